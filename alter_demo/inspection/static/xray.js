// The token X-ray: draws the tokens of a text, recolours them, shows one in detail. The page, the
// notebooks and the stand-alone file all use this function. Every text is set through textContent,
// because model and user text may be hostile.
// data: {names, qs, q, threshold, tokens: [{t, id, sp, S, e, w, b, a, tb, ta, c}]}, written by
// `xray_data` in alter_demo/inspection/xray.py.
function drawXray(root, data) {
  "use strict";
  const CIVIDIS = [
    "#00204d", "#00336f", "#39486b", "#575c6d", "#707173",
    "#8a8779", "#a69d75", "#c4b56c", "#e4cf5b", "#ffea46",
  ];
  const EXPERTS = [
    "#d9d9d9", "#56b4e9", "#e69f00", "#009e73", "#f0e442",
    "#cc79a7", "#0072b2", "#d55e00", "#999933",
  ];
  const NEUTRAL = "#f5f5f5", BEFORE = "#0072b2", AFTER = "#d55e00";
  const ROUTES = {A: "#e69f00", B: "#56b4e9"}, PALE = {A: "#fbecca", B: "#ddeffa"};
  root.replaceChildren();
  root.classList.add("xray");
  if (!data.tokens || !data.tokens.length) return;
  const routed = data.names.length > 0;
  const state = {
    by: routed ? "route" : "entropy",
    q: Math.max(0, data.qs.indexOf(data.q)),
    threshold: data.threshold,
    chosen: -1,
  };
  const make = (tag, parent, text, attributes) => {
    const node = document.createElement(tag);
    if (text !== undefined && text !== null) node.textContent = text;
    for (const [key, value] of Object.entries(attributes || {})) node.setAttribute(key, value);
    if (parent) parent.appendChild(node);
    return node;
  };
  const number = (x, digits) =>
    x === null || x === undefined ? "–" : x.toFixed(digits === undefined ? 3 : digits);
  const ink = (colour) => {
    const [r, g, b] = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
    return 0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#000000" : "#ffffff";
  };
  const shade = (share) => {
    const last = CIVIDIS.length - 1;
    return CIVIDIS[Math.max(0, Math.min(last, Math.round(share * last)))];
  };
  const entropy = (token) => token.S[state.q];
  const route = (token) => (entropy(token) > state.threshold ? "A" : "B");
  const acts = (token) => token.w.some((w) => w > 0);
  const expert = (token) => {
    if (!token.w.length) return "none (this method has no experts)";
    return acts(token) ? data.names[token.e] : "none (frozen model only)";
  };
  const largest = (f) => data.tokens.reduce((most, token) => Math.max(most, f(token)), 1e-6);
  const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "·");

  const controls = make("div", root, null, {class: "xray-controls"});
  const byLabel = make("label", controls, "Colour by ");
  const by = make("select", byLabel, null, {class: "xray-by"});
  const choices = ["route", "expert", "entropy", "log-probability", "change"];
  for (const name of routed ? choices : choices.slice(2))
    make("option", by, name, {value: name});
  const slider = (label, attributes) => {
    const box = make("label", controls, `${label} `);
    const input = make("input", box, null, {type: "range", min: 0, ...attributes});
    return [input, make("output", box)];
  };
  const [q, qOutput] = slider("q", {
    max: data.qs.length - 1, step: 1, class: "xray-q", "aria-label": "order q of the entropy",
  });
  const [threshold, thresholdOutput] = slider("threshold", {
    step: 0.01, class: "xray-threshold", "aria-label": "threshold of S_q",
  });
  const share = make("span", controls, null, {class: "xray-share"});
  const legend = make("div", root, null, {class: "xray-legend"});
  const text = make("div", root, null, {
    class: "xray-tokens", role: "group",
    "aria-label": "Tokens: move with the arrow keys, press Enter for bar charts",
  });
  const detail = make("div", root, null, {
    class: "xray-detail", role: "status", "aria-live": "polite",
  });
  const bars = make("div", root, null, {class: "xray-bars"});
  make("p", detail, "Point at a token or move to it with the arrow keys. "
    + "Click it or press Enter for bar charts.");

  const nodes = data.tokens.map((token, index) => {
    const node = make("button", text, visible(token.t) || "∅", {
      type: "button",
      class: "xray-token" + (token.sp ? " xray-special" : ""),
      tabindex: index ? -1 : 0,
    });
    if (token.t.includes("\n")) make("br", text);
    return node;
  });

  const colourOf = {
    route: (token) => (acts(token) ? ROUTES : PALE)[route(token)],
    expert: (token) => (acts(token) ? EXPERTS[token.e % EXPERTS.length] : NEUTRAL),
    entropy: (token, top) => shade(entropy(token) / top),
    "log-probability": (token) => (token.b === null ? NEUTRAL : shade(Math.exp(token.b))),
    change: (token) => shade(token.c),
  };

  function recolour() {
    const started = performance.now();
    const colour = colourOf[state.by], top = largest(entropy);
    let uncertain = 0;
    data.tokens.forEach((token, index) => {
      const fill = colour(token, top), way = route(token);
      uncertain += way === "A";
      const style = nodes[index].style;
      style.backgroundColor = fill;
      style.color = ink(fill);
      style.textDecoration = way === "B" ? "underline dashed" : "none";
    });
    qOutput.textContent = String(data.qs[state.q]);
    thresholdOutput.textContent = state.threshold.toFixed(2);
    const count = data.tokens.length, active = data.tokens.filter(acts).length;
    const where = routed ? `an expert acts on ${active}` : "this method has no router";
    share.textContent =
      `${count} tokens: ${uncertain} uncertain, ${count - uncertain} confident; ${where}`;
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
      swatch(ROUTES.A, "A: uncertain, a mixture of experts");
      swatch(ROUTES.B, "B: confident, B_r and one forgetting expert");
      swatch(PALE.A, "");
      swatch(PALE.B, "pale: no expert acts");
    } else if (state.by === "expert") {
      swatch(NEUTRAL, "frozen model only");
      data.names.forEach((name, e) => swatch(EXPERTS[e % EXPERTS.length], name));
    } else {
      const [low, high] = {
        entropy: ["S_q: 0", number(largest(entropy), 2)],
        "log-probability": ["probability before: 0", "1"],
        change: ["change: 0", "1"],
      }[state.by];
      swatch(CIVIDIS[0], low);
      for (const colour of CIVIDIS.slice(2, -1)) swatch(colour, "");
      swatch(CIVIDIS[CIVIDIS.length - 1], high);
    }
    make("span", legend, "dashed underline: confident", {class: "xray-note"});
  }

  function describe(index) {
    const token = data.tokens[index];
    nodes.forEach((node, i) => node.classList.toggle("xray-chosen", i === index));
    detail.replaceChildren();
    const line = make("p", detail);
    make("strong", line, visible(token.t));
    const weights = token.w.map((w, e) => (w > 0 ? `${data.names[e]} ${number(w, 2)}` : ""));
    const mixture = weights.filter(Boolean).join(", ");
    const facts = [
      `id ${token.id}${token.sp ? " (special)" : ""}`,
      `S_q ${number(entropy(token))} (q ${data.qs[state.q]})`,
      ...(routed ? [`route ${route(token)}`] : []),
      `expert: ${expert(token)}${mixture ? ` (${mixture})` : ""}`,
      `log p ${number(token.b, 2)} before, ${number(token.a, 2)} after`,
      `change of the next-token distribution ${number(token.c, 2)}`,
    ];
    make("span", line, `  ${facts.join(", ")}`);
    if (token.g) {
      const near = (side) => `${side} prompt ${token.g[`${side}_index`]} (${number(token.g[`${side}_similarity`], 2)})`;
      make("p", detail, `Gate: score ${number(token.g.score, 2)}, topic ${number(token.g.topic, 2)}, `
        + `nearest stored ${near("forget")}, ${near("retain")}`);
    }
    for (const [side, top] of [["before", token.tb], ["after", token.ta]]) {
      const row = make("p", detail, `Next token ${side}: `);
      top.forEach(([candidate, p], i) =>
        make("span", row, `${i ? ", " : ""}“${visible(candidate)}” ${number(p, 2)}`));
    }
  }

  function drawBars(index) {
    const token = data.tokens[index];
    bars.replaceChildren();
    const chart = (title, rows, colour) => {
      const box = make("section", bars, null, {class: "xray-chart", "aria-label": title});
      make("h4", box, title);
      for (const [label, value, own] of rows) {
        const row = make("div", box, null, {class: "xray-row"});
        make("span", row, label, {class: "xray-label"});
        const track = make("span", row, null, {class: "xray-track"});
        const bar = make("span", track, null, {class: "xray-bar"});
        bar.style.width = `${Math.max(0, Math.min(1, value)) * 100}%`;
        bar.style.backgroundColor = own || colour;
        make("span", row, number(value, 2), {class: "xray-value"});
      }
      if (!rows.length) make("p", box, "This method has no experts.");
    };
    const experts = token.w.map((w, e) => [data.names[e], w, EXPERTS[e % EXPERTS.length]]);
    const candidates = (top) => top.map(([candidate, p]) => [visible(candidate), p]);
    chart("Expert weights", experts, BEFORE);
    chart("Next token before", candidates(token.tb), BEFORE);
    chart("Next token after", candidates(token.ta), AFTER);
  }

  const select = (event) => {
    const index = nodes.indexOf(event.target);
    if (index < 0) return;
    state.chosen = index;
    describe(index);
    if (event.type === "click") drawBars(index);
  };
  for (const type of ["mouseover", "focusin", "click"]) text.addEventListener(type, select);
  text.addEventListener("keydown", (event) => {
    const i = nodes.indexOf(document.activeElement), last = nodes.length - 1;
    const to = {
      ArrowRight: Math.min(i + 1, last), ArrowLeft: Math.max(i - 1, 0), Home: 0, End: last,
    }[event.key];
    if (i < 0 || to === undefined) return;
    event.preventDefault();
    nodes[i].tabIndex = -1;
    nodes[to].tabIndex = 0;
    nodes[to].focus();
  });
  const fitSlider = () => {
    threshold.max = Math.max(largest(entropy), state.threshold).toFixed(2);
    threshold.value = state.threshold;
  };
  const onInput = (input, update) =>
    input.addEventListener("input", () => { update(); recolour(); });
  onInput(by, () => { state.by = by.value; });
  onInput(q, () => { state.q = Number(q.value); fitSlider(); });
  onInput(threshold, () => { state.threshold = Number(threshold.value); });
  q.value = state.q;
  fitSlider();
  recolour();
}
