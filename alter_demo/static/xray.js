// The token X-ray: draws tokens, recolours them, shows one in detail. The page, the notebook and the stand-alone file
// use this one function. Every text is put in by textContent: model and user text is hostile.
// data: {names, qs, q, threshold, tokens: [{t, id, sp, S, e, w, b, a, tb, ta, c}]}, see alter_demo/xray.py.
function drawXray(root, data) {
  "use strict";
  const CIVIDIS = ["#00204d", "#00336f", "#39486b", "#575c6d", "#707173", "#8a8779", "#a69d75", "#c4b56c", "#e4cf5b", "#ffea46"];
  const EXPERTS = ["#d9d9d9", "#56b4e9", "#e69f00", "#009e73", "#f0e442", "#cc79a7", "#0072b2", "#d55e00", "#999933"];
  const ROUTES = {A: "#e69f00", B: "#56b4e9"}, PALE = {A: "#fbecca", B: "#ddeffa"};
  root.replaceChildren();
  root.classList.add("xray");
  if (!data.tokens || !data.tokens.length) return;
  const routed = data.names.length > 0;
  const state = {by: routed ? "route" : "entropy", q: Math.max(0, data.qs.indexOf(data.q)), threshold: data.threshold, chosen: -1};
  const make = (tag, parent, text, attributes) => {
    const node = document.createElement(tag);
    if (text !== undefined && text !== null) node.textContent = text;
    for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
    if (parent) parent.appendChild(node);
    return node;
  };
  const number = (x, digits) => (x === null || x === undefined ? "–" : x.toFixed(digits === undefined ? 3 : digits));
  const ink = (colour) => {
    const [r, g, b] = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
    return 0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#000000" : "#ffffff";
  };
  const shade = (share) => CIVIDIS[Math.max(0, Math.min(CIVIDIS.length - 1, Math.round(share * (CIVIDIS.length - 1))))];
  const entropy = (token) => token.S[state.q];
  const route = (token) => (entropy(token) > state.threshold ? "A" : "B");
  const acted = (token) => token.w.some((w) => w > 0);
  const expert = (token) => (token.w.length ? (acted(token) ? data.names[token.e] : "none, the frozen model itself") : "the method has none");
  const largest = (f) => data.tokens.reduce((most, token) => Math.max(most, f(token)), 1e-6);
  const shown = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "·");

  const controls = make("div", root, null, {class: "xray-controls"});
  const byLabel = make("label", controls, "Colour by ");
  const by = make("select", byLabel, null, {class: "xray-by"});
  for (const name of [...(routed ? ["route", "expert"] : []), "entropy", "log-probability", "change"]) make("option", by, name, {value: name});
  const qLabel = make("label", controls, "q ");
  const q = make("input", qLabel, null, {type: "range", min: 0, max: data.qs.length - 1, step: 1, class: "xray-q", "aria-label": "q, order of the entropy"});
  const qShown = make("output", qLabel);
  const tLabel = make("label", controls, "threshold ");
  const t = make("input", tLabel, null, {type: "range", min: 0, step: 0.01, class: "xray-threshold", "aria-label": "threshold of S_q"});
  const tShown = make("output", tLabel);
  const share = make("span", controls, null, {class: "xray-share"});
  const legend = make("div", root, null, {class: "xray-legend"});
  const text = make("div", root, null, {class: "xray-tokens", role: "group", "aria-label": "Tokens; arrow keys move, Enter shows bars"});
  const detail = make("div", root, null, {class: "xray-detail", role: "status", "aria-live": "polite"});
  const bars = make("div", root, null, {class: "xray-bars"});
  make("p", detail, "Point at a token, or move to it with the arrow keys; click it, or press Enter, for bars.");

  const nodes = data.tokens.map((token, index) => {
    const node = make("button", text, shown(token.t) || "∅", {type: "button", class: "xray-token" + (token.sp ? " xray-special" : ""), tabindex: index ? -1 : 0});
    if (token.t.includes("\n")) make("br", text);
    return node;
  });

  const colourOf = {
    route: (token) => (acted(token) ? ROUTES : PALE)[route(token)],
    entropy: (() => { let top; return (token, first) => { if (first) top = largest(entropy); return shade(entropy(token) / top); }; })(),
    expert: (token) => (acted(token) ? EXPERTS[token.e % EXPERTS.length] : "#f5f5f5"),
    "log-probability": (token) => (token.b === null ? "#f5f5f5" : shade(Math.exp(token.b))),
    change: (token) => shade(token.c),
  };

  function recolour() {
    const started = performance.now();
    const colour = colourOf[state.by];
    let uncertain = 0;
    data.tokens.forEach((token, index) => {
      const fill = colour(token, index === 0), way = route(token);
      uncertain += way === "A";
      const style = nodes[index].style;
      style.backgroundColor = fill;
      style.color = ink(fill);
      style.textDecoration = way === "B" ? "underline dashed" : "none";
    });
    qShown.textContent = String(data.qs[state.q]);
    tShown.textContent = state.threshold.toFixed(2);
    const count = data.tokens.length, acting = data.tokens.filter(acted).length;
    const where = routed ? `an expert acts on ${acting}` : "this method has no router";
    share.textContent = `${count} tokens: ${uncertain} uncertain, ${count - uncertain} confident; ${where}`;
    drawLegend();
    if (state.chosen >= 0) describe(state.chosen);
    root.dataset.recolourMs = (performance.now() - started).toFixed(1);
  }

  function drawLegend() {
    legend.replaceChildren();
    const swatch = (colour, label) => {
      const part = make("span", legend, null, {class: "xray-key"});
      make("i", part).style.backgroundColor = colour;
      make("span", part, label);
    };
    if (state.by === "route") {
      swatch(ROUTES.A, "A: uncertain, experts are mixed"); swatch(ROUTES.B, "B: confident, one forgetting expert beside B_r");
      swatch(PALE.A, ""); swatch(PALE.B, "pale: no expert acts");
    }
    else if (state.by === "expert") {
      swatch("#f5f5f5", "the frozen model itself");
      data.names.forEach((name, e) => swatch(EXPERTS[e % EXPERTS.length], name));
    } else {
      const ends = {entropy: ["S_q 0", number(largest(entropy), 2)], "log-probability": ["p(token) before: 0", "1"], change: ["no change", "all of it"]}[state.by];
      swatch(CIVIDIS[0], ends[0]);
      for (const colour of CIVIDIS.slice(2, -1)) swatch(colour, "");
      swatch(CIVIDIS[CIVIDIS.length - 1], ends[1]);
    }
    make("span", legend, "dashed underline: confident", {class: "xray-note"});
  }

  function describe(index) {
    const token = data.tokens[index];
    nodes.forEach((node, i) => node.classList.toggle("xray-chosen", i === index));
    detail.replaceChildren();
    const line = make("p", detail);
    make("strong", line, shown(token.t));
    const weights = token.w.map((w, e) => (w > 0 ? `${data.names[e]} ${number(w, 2)}` : "")).filter(Boolean).join(", ");
    make("span", line, `  id ${token.id}${token.sp ? " (special)" : ""}, S_q ${number(entropy(token))} (q ${data.qs[state.q]}), ${routed ? `route ${route(token)}, ` : ""}expert: ${expert(token)}${weights ? ` (${weights})` : ""}, log p ${number(token.b, 2)} before, ${number(token.a, 2)} after; change of what follows ${number(token.c, 2)}`);
    for (const [label, top] of [["next, before: ", token.tb], ["next, after: ", token.ta]]) {
      const row = make("p", detail, label);
      top.forEach(([what, p], i) => make("span", row, `${i ? ", " : ""}“${shown(what)}” ${number(p, 2)}`));
    }
  }

  function drawBars(index) {
    const token = data.tokens[index];
    bars.replaceChildren();
    const chart = (title, rows, colour) => {
      const box = make("section", bars, null, {class: "xray-chart", "aria-label": title});
      make("h4", box, title);
      for (const [label, value, special] of rows) {
        const row = make("div", box, null, {class: "xray-row"});
        make("span", row, label, {class: "xray-label"});
        const bar = make("span", make("span", row, null, {class: "xray-track"}), null, {class: "xray-bar"});
        bar.style.width = `${Math.max(0, Math.min(1, value)) * 100}%`;
        bar.style.backgroundColor = special || colour;
        make("span", row, number(value, 2), {class: "xray-value"});
      }
      if (!rows.length) make("p", box, "This method has no experts.");
    };
    chart("Expert weights", token.w.map((w, e) => [data.names[e], w, EXPERTS[e % EXPERTS.length]]), "#0072b2");
    chart("Next token, before", token.tb.map(([what, p]) => [shown(what), p]), "#0072b2");
    chart("Next token, after", token.ta.map(([what, p]) => [shown(what), p]), "#d55e00");
  }

  const look = (index) => { state.chosen = index; describe(index); };
  text.addEventListener("mouseover", (event) => { const i = nodes.indexOf(event.target); if (i >= 0) look(i); });
  text.addEventListener("focusin", (event) => { const i = nodes.indexOf(event.target); if (i >= 0) look(i); });
  text.addEventListener("click", (event) => { const i = nodes.indexOf(event.target); if (i >= 0) { look(i); drawBars(i); } });
  text.addEventListener("keydown", (event) => {
    const i = nodes.indexOf(document.activeElement), last = nodes.length - 1;
    const to = {ArrowRight: Math.min(i + 1, last), ArrowLeft: Math.max(i - 1, 0), Home: 0, End: last}[event.key];
    if (i < 0 || to === undefined) return;
    event.preventDefault();
    nodes[i].tabIndex = -1;
    nodes[to].tabIndex = 0;
    nodes[to].focus();
  });
  const reach = () => {
    t.max = Math.max(largest(entropy), state.threshold).toFixed(2);
    t.value = state.threshold;
  };
  by.addEventListener("change", () => { state.by = by.value; recolour(); });
  q.addEventListener("input", () => { state.q = Number(q.value); reach(); recolour(); });
  t.addEventListener("input", () => { state.threshold = Number(t.value); recolour(); });
  q.value = state.q;
  reach();
  recolour();
}
