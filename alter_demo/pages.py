"""The page: a finished example, unlearn, compare, token X-ray, word clouds, router, evidence, how it works.

Layout and wiring only; what the buttons do stands in `jobs.py`. Model and user text only ever reaches components that
show it as text.
"""

from __future__ import annotations

import os
import signal
import threading
import warnings

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from importlib.resources import files

import gradio as gr

from . import METHOD_NAMES, jobs
from .data import FORGET_SETS
from .errors import UserError
from .jobs import LIVE_COLUMNS, ROUTES, UNTOUCHED
from .models import MODELS

STATIC = files(__package__) / "static"
TABS = ("example", "unlearn", "compare", "xray", "clouds", "router", "evidence", "how")
# gradio_client may ask for jobs too, and waits its turn
ONE_JOB = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "undocumented"}
AT_ONCE = {"queue": False, "api_visibility": "private"}
FIRST_RESULTS = "imaginary-authors-gpu"  # all methods, three seeds: what most people come for
WAITING = 64  # visitors in the queue; each sees his place in it
# the address names run, tab and question, so that it can be sent to somebody
REMEMBER = """(run, tab, prompt) => {
  const url = new URL(window.location);
  for (const [key, value] of Object.entries({run, tab, prompt})) {
    if (value) url.searchParams.set(key, value); else url.searchParams.delete(key);
  }
  window.history.replaceState(null, "", url);
}"""

# gradio labels an empty box without saying what it is, which screen readers may not read
MEND = """() => {
  const empty = () => document.querySelectorAll(".empty[aria-label]:not([role])");
  const mend = () => empty().forEach((node) => node.setAttribute("role", "img"));
  new MutationObserver(mend).observe(document.body, {childList: true, subtree: true});
  mend();
}"""


def xray(value: dict, **kwargs) -> gr.HTML:
    """Token records drawn in the browser by `static/xray.js`; the value is the dict of `xray.xray_data`.

    A function, since a subclass of a component makes gradio write a .pyi file into the package.
    """
    script = (STATIC / "xray.js").read_text(encoding="utf-8")
    draw = "const show = () => drawXray(element.querySelector('.xray-root'), props.value || {});"
    return gr.HTML(
        value, html_template="<div class='xray-root'></div>",
        js_on_load=f"{script}\n{draw}\nshow();\nwatch('value', show);", **kwargs,
    )  # fmt: skip


def build() -> gr.Blocks:
    clear = (3600, 6 * 3600)  # seconds: how often gradio looks for files to clear, and how old they are then
    with gr.Blocks(title="ALTER: make a language model forget", analytics_enabled=False, delete_cache=clear) as demo:
        gr.Markdown("# Make a language model forget, and only that")
        tab = gr.Textbox("example", visible=False)  # a State never reaches the browser, where the address is
        with gr.Tabs(selected="example") as tabs:
            with gr.Tab("Example", id="example"):
                begin, expected = example_tab()
            with gr.Tab("Unlearn", id="unlearn"):
                name, finished, status = unlearn_tab()
            with gr.Tab("Compare", id="compare"):
                run, prompt, after, compared = compare_tab()
            with gr.Tab("Token X-ray", id="xray"):
                seen = xray_tab(run, after)
            with gr.Tab("Word clouds", id="clouds"):
                clouds = clouds_tab(run)
            with gr.Tab("Router", id="router") as router:
                heat = router_tab(router, run)
            with gr.Tab("Evidence", id="evidence") as evidence:
                evidence_tab(evidence)
            with gr.Tab("How it works, and its limits", id="how"):
                drawing = (STATIC / "architecture.svg").read_text(encoding="utf-8")
                gr.HTML(f'<div class="wide" tabindex="0">{drawing}</div>', elem_id="architecture")
                gr.Markdown((STATIC / "how.md").read_text(encoding="utf-8"), latex_delimiters=LATEX)
        begin.click(lambda: gr.Tabs(selected="unlearn"), None, tabs, **AT_ONCE)
        finished.then(choose_run, name, run, **AT_ONCE)
        stale = [*compared, *seen, *clouds, *heat]  # another run's answers and drawings are not this one's
        run.change(lambda: [None] * len(stale), None, stale, **AT_ONCE)
        gr.on([run.change, prompt.change], None, [run, tab, prompt], None, js=REMEMBER, **AT_ONCE)
        tabs.select(selected_tab, None, tab, **AT_ONCE).then(None, [run, tab, prompt], None, js=REMEMBER, **AT_ONCE)
        demo.load(restore, None, [tabs, tab, run, prompt, expected, status], **AT_ONCE)
        demo.unload(jobs.forget_session)
    return demo


LATEX = [{"left": "$$", "right": "$$", "display": True}, {"left": "$", "right": "$", "display": False}]


def selected_tab(event: gr.SelectData) -> str:
    return TABS[event.index] if isinstance(event.index, int) and 0 <= event.index < len(TABS) else TABS[0]


def restore(request: gr.Request):
    """What the address asks for, as far as it exists."""
    asked = dict(request.query_params)
    names = jobs.run_names()
    chosen = asked.get("run") if asked.get("run") in names else next(iter(names), None)
    prompt = asked["prompt"][: jobs.MAX_PROMPT] if "prompt" in asked else gr.skip()
    # only what the address asks for: a person may have gone to another tab while this was under way
    tabs = (gr.Tabs(selected=asked["tab"]), asked["tab"]) if asked.get("tab") in TABS else (gr.skip(), gr.skip())
    return *tabs, gr.Dropdown(names, value=chosen), prompt, jobs.expected_time(), jobs.expected_time()


def choose_run(name: str) -> gr.Dropdown:
    """The run that has just been made; after an error the choice stays."""
    names = jobs.run_names()
    return gr.Dropdown(names, value=name) if name in names else gr.Dropdown(names)


# ---------------------------------------------------------------------------------------------------------- the tabs


def example_tab() -> tuple[gr.Button, gr.Markdown]:
    stored = jobs.read_example()
    gr.Markdown(
        "One small adapter on a frozen model. A gate says where the topic is met; elsewhere nothing acts. There every "
        "token is routed by how sure the model is: a confident one takes a single expert B, an uncertain one a mixture "
        "of them, all through one shared matrix A."
    )
    with gr.Row(equal_height=True):
        begin = gr.Button("Make a model forget, here and now", variant="primary", scale=1)
        expected = gr.Markdown(jobs.expected_time(), elem_id="expected")
    if stored:
        n = stored["numbers"]
        gr.Markdown(
            f"### Harry Potter: {n['forgot']:.1%} of the answers' probability gone · everyday questions: "
            f"{n['kept']:.1%} kept · neighbouring topics: {n['neighbours']:.1%} kept",
            elem_id="numbers",
        )
        questions = [item["question"] for item in stored["items"]]
        first = stored["items"][0]
        chips = gr.Radio(questions, value=questions[0], label="The same question, before and after")
        with gr.Row():
            before = gr.Textbox(first["before"], label="Before", lines=3, interactive=False, elem_id="example-before")
            after = gr.Textbox(first["after"], label="After", lines=3, interactive=False, elem_id="example-after")
        gr.Markdown("The answer **before**, token by token: what the router makes of it.")
        tokens = xray(first["xray"], elem_id="example-xray")
        gr.Markdown(
            f"Stored, not live: computed by this code on {stored['date']} on {stored['hardware']} ({stored['model']}, "
            f"{stored['forget_set']}, {stored['steps']} steps in {stored['seconds']['unlearn']:.0f} s, and "
            f"{stored['seconds']['evaluate']:.0f} s of measuring). Percentages: probability of the answers to "
            "questions that were not trained on, after against before; these five are such questions. Everyday answers "
            f"are like those before to ROUGE-L {stored['after']['general']['rouge_l_to_base']:.2f} (1: word for word)."
        )
        chips.change(
            lambda q: next([i["before"], i["after"], i["xray"]] for i in stored["items"] if i["question"] == q),
            chips, [before, after, tokens], **AT_ONCE,
        )  # fmt: skip
    else:
        gr.Markdown("There is no stored example: `python -m alter_demo example runs/NAME` makes one from a run.")
    return begin, expected


def unlearn_tab():
    with gr.Row():
        with gr.Column(scale=2):
            model = gr.Dropdown(
                jobs.models_offered(), value=next(iter(MODELS)), label="Model", allow_custom_value=True,
                info="built in, a folder on this machine, or a hub id" if jobs.address() in jobs.LOOPBACK else None,
            )  # fmt: skip
            forget = gr.Dropdown(list(FORGET_SETS), value="harry-potter", label="What it shall forget")
            kinds = [".jsonl", ".json", ".csv"]
            with gr.Row():
                upload = gr.File(label="or a file of yours", file_types=kinds, height=140)
                keep = gr.File(label="and what must stay", file_types=kinds, height=140)
            gr.Markdown(
                "Files (.jsonl, .json, .csv): `question,answer`, better `paraphrased_question` too, or `text`. A file "
                "is taken in place of the set above. Whoever can open this page sees every run here, and its answers."
            )
            method = gr.Dropdown(
                list(METHOD_NAMES), value="alter_selective", label="Method",
                info="alter: as published; alter_selective: leaves the rest alone; the others are rivals",
            )  # fmt: skip
            with gr.Accordion("More settings", open=False):
                steps = gr.Slider(
                    0,
                    400,
                    0,
                    step=1,
                    label="Steps at most",
                    info="0: the method's own (ALTER 120, alter_selective on plain texts 240, most rivals 60)",
                )
                limit = gr.Slider(4, 100, 24, step=1, label="Questions per group to measure with")
                rank = gr.Slider(1, 32, 8, step=1, label="Rank", info="of A and of every B")
                experts = gr.Slider(0, 8, 0, step=1, label="Forgetting experts", info="0: found by clustering")
                seed = gr.Number(0, precision=0, label="Seed", info="the same seed gives the same run")
        with gr.Column(scale=3):  # on a projector all of it stands above the fold
            with gr.Row():
                start = gr.Button("Unlearn", variant="primary")
                stop = gr.Button("Stop and keep")
            status = gr.Markdown(jobs.expected_time(), elem_id="status")
            gr.Markdown(
                "Leave this tab open meanwhile: a reload ends the training and keeps what was learned, without figures."
            )
            loss = gr.LinePlot(
                None, x="step", y="value", color="part", height=280,
                title="Loss by part, and the probe (what forgetting stops by)",
            )  # fmt: skip
            live = gr.Dataframe(
                headers=LIVE_COLUMNS, interactive=False, wrap=True, label="Live answers, asked again every few steps",
                column_widths=["12%", "28%", "30%", "30%"],
                elem_id="live",
            )  # fmt: skip
    numbers, answers, saved = record_of("")
    words_of_the_tables()
    forget.input(lambda: (None, None), None, [upload, keep], **AT_ONCE)  # else the file would go before it
    name = gr.State("")
    started = start.click(
        jobs.unlearn_job, [model, forget, upload, keep, method, steps, rank, experts, limit, seed],
        [status, loss, live, numbers, answers, saved, name], **ONE_JOB,
    )  # fmt: skip
    stop.click(jobs.ask_to_stop, None, status, **AT_ONCE)
    return name, started, status


def record_of(which: str):
    """(numbers, answers, files) of a run, ids ending in `which`."""
    numbers = gr.Dataframe(
        headers=["group", "probability", "ROUGE-L", "like the untouched model's"], interactive=False,
        label="Before → after", elem_id=f"numbers-table{which}",
    )  # fmt: skip
    answers = gr.Dataframe(
        headers=["group", "question", "before", "after"], interactive=False, wrap=True, max_height=420,
        label="Answers before and after", column_widths=["12%", "28%", "30%", "30%"], elem_id=f"answers{which}",
    )  # fmt: skip
    return (
        numbers,
        answers,
        gr.File(label="Adapter and record as a zip, metrics as JSON", visible=False, elem_id=f"saved{which}"),
    )


def words_of_the_tables() -> None:
    with gr.Accordion("The words of these tables, and which way is better", open=False):
        gr.Markdown((STATIC / "words.md").read_text(encoding="utf-8"))


def compare_tab():
    with gr.Row():
        # any name may be sent, and gets a sentence of ours: the list grows while the page stands open
        names = jobs.run_names()
        left = gr.Dropdown([UNTOUCHED, *names], value=UNTOUCHED, label="Left", allow_custom_value=True)
        run = gr.Dropdown(names, value=next(iter(names), None), label="Run (right)", allow_custom_value=True)
        route = gr.Dropdown(ROUTES, value=ROUTES[0], label="Which experts act on the right")
    with gr.Row():
        prompt = gr.Textbox(
            "What is the name of Harry Potter's school?", label="Question", scale=4, max_length=jobs.MAX_PROMPT
        )
        ask = gr.Button("Ask both", variant="primary", scale=1)
    with gr.Accordion("Sampling", open=False):
        sampled = gr.Checkbox(False, label="Sample, both sides with the same noise (otherwise greedy)")
        temperature = gr.Slider(0.1, 2.0, 1.0, step=0.1, label="Temperature")
        seed = gr.Number(0, precision=0, label="Seed of the sampling")
        length = gr.Slider(8, 256, 64, step=8, label="Tokens at most")
    colours = {"differs": "#b45309"}
    with gr.Row():
        before = gr.HighlightedText(label="Left", color_map=colours, show_legend=False, elem_id="before")
        after = gr.HighlightedText(label="Right", color_map=colours, show_legend=False, elem_id="after")
    status = gr.Markdown("", elem_id="compare-status")
    gr.Examples(
        ["What is the name of Harry Potter's red-haired best friend?", "Who wrote The Hobbit?",
         "What is the capital of France?", "Which train takes students to Hogwarts?"],
        prompt, cache_examples=False, run_on_click=False,
    )  # fmt: skip
    given, asked = [left, run, route, prompt, sampled, temperature, seed, length], gr.State("")
    gr.on([ask.click, prompt.submit], jobs.compare_job, given, [before, after, status], **ONE_JOB)
    gr.on([ask.click, prompt.submit], lambda x: x, prompt, asked, **AT_ONCE)
    run.change(lambda: gr.Dropdown([UNTOUCHED, *jobs.run_names()]), None, left, **AT_ONCE)
    with gr.Accordion("What this run measured, and its files", open=False) as record:
        about = gr.Markdown("", elem_id="run-status")
        numbers, answers, saved = record_of("-of-run")
        pack = gr.Button("Pack as a zip")
        words_of_the_tables()
    gr.on([run.change, record.expand], jobs.run_view, run, [about, numbers, answers, saved], **AT_ONCE)
    pack.click(jobs.pack, run, [saved, about], queue=False, api_visibility="private")
    return run, prompt, (after, asked), [before, after, status]


def xray_tab(run, right) -> list:
    gr.Markdown(
        "Which tokens are uncertain (route A: experts are mixed, and A learns from them) and which are confident "
        "(route B: one expert), and where an expert acts at all, in the run chosen in Compare."
    )
    with gr.Row():
        text = gr.Textbox(
            "Harry Potter took the Hogwarts Express with Ron Weasley. However, Paris is the capital of France.",
            label="Text", lines=2, scale=4, max_length=jobs.MAX_TEXT,
        )  # fmt: skip
        question = gr.Textbox("", label="as the answer to (optional)", scale=2, max_length=jobs.MAX_PROMPT)
    with gr.Row():
        look = gr.Button("Show tokens", variant="primary")
        take = gr.Button("Take the right answer of Compare")
        save = gr.Button("Save as one HTML file")
    status = gr.Markdown("", elem_id="xray-status")
    tokens = xray({}, elem_id="tokens")
    saved = gr.File(label="The saved X-ray", interactive=False, visible=False)
    look.click(jobs.xray_job, [run, text, question], [tokens, status], **ONE_JOB)
    take.click(
        lambda pieces, asked: ("".join(p["token"] for p in pieces or []).strip(), asked), [*right],
        [text, question], **AT_ONCE,
    )  # fmt: skip
    save.click(jobs.xray_file, tokens, [saved, status], **AT_ONCE)
    return [tokens, status]


def clouds_tab(run) -> list:
    gr.Markdown(
        "Whole words of answers by the way that they took, in the run chosen in Compare: where an expert acts, "
        "uncertain ones (A) and confident ones of each B; and those that the frozen model says alone. What counts is "
        "the prediction that a word came from."
    )
    with gr.Row():
        source = gr.Radio(["forget set", "retain set", "my text"], value="forget set", label="Words of")
        text = gr.Textbox("", label="My text", lines=2, scale=2, max_length=jobs.MAX_TEXT)
        draw = gr.Button("Draw the clouds", variant="primary")
    status = gr.Markdown("", elem_id="clouds-status")
    threshold = gr.Slider(0.0, 3.0, 1.2, step=0.01, label="Threshold of S_q: above it a word is uncertain")
    histogram = gr.Plot(label="How many words have which S_q")
    gallery = gr.Gallery(label="Word clouds", columns=3, object_fit="contain", elem_id="clouds")
    table = gr.Dataframe(
        headers=["way", "word", "times"], interactive=False, label="The same, sorted", max_height=360,
        elem_id="cloud-words",
    )  # fmt: skip
    found = gr.State(None)
    views = [gallery, table, histogram]
    drawn = draw.click(jobs.clouds_job, [run, source, text], [found, status], **ONE_JOB)
    drawn = drawn.then(jobs.threshold_slider, found, threshold, **AT_ONCE)
    drawn.then(jobs.clouds_view, [found, threshold], views, **AT_ONCE)
    threshold.release(jobs.clouds_view, [found, threshold], views, **AT_ONCE)
    return [found, *views, status]


def router_tab(router, run) -> list:
    status = gr.Markdown("", elem_id="router-status")
    with gr.Row():
        flow = gr.Plot(label="Sub-domains to experts, answer tokens")
        share = gr.Plot(label="Where the tokens of each set go")
    with gr.Row():
        domains = gr.Plot(label="Sub-domains, as the router sees the questions")
        nearest = gr.Dataframe(
            headers=["domain", "questions nearest to its centre"], interactive=False, wrap=True, max_height=420,
            label="Nearest questions", column_widths=["25%", "75%"], elem_id="nearest",
        )  # fmt: skip
    with gr.Row():
        text = gr.Textbox(
            "Harry Potter goes to school at Hogwarts. However, Paris is the capital of France.", label="Text", scale=4,
            max_length=2000,
        )  # fmt: skip
        look = gr.Button("Tokens by experts", variant="primary")
    heat = gr.Plot(label="Tokens by experts")
    view = jobs.router_view, run, [flow, domains, share, nearest, status]
    router.select(*view, **AT_ONCE)
    run.change(*view, **AT_ONCE)
    look.click(jobs.heat_job, [run, text], [heat, status], **ONE_JOB)
    return [heat]


def evidence_tab(evidence) -> None:
    gr.Markdown(
        "From the results files in `assets/results/`, which only the commands write. "
        "A star is the model that never saw the forget set."
    )
    status = gr.Markdown("")
    file = gr.Dropdown([], label="Results file")
    table = gr.Dataframe(interactive=False, wrap=True, label="Figures")
    words_of_the_tables()
    with gr.Row():  # a label would lie across the titles of the drawings
        first, second = (
            gr.Plot(label="Utility against forgetting, over the rounds, or relearning", show_label=False),
            gr.Plot(label="Cost", show_label=False),
        )
    # no spinner: it would make the empty status line a region that scrolls
    view = {"fn": evidence_view, "inputs": file, "outputs": [table, first, second, status], "show_progress": "hidden"}
    evidence.select(results_files, file, file, show_progress="hidden", **AT_ONCE).then(**view, **AT_ONCE)
    file.input(**view, **AT_ONCE)


def results_files(chosen: str | None) -> gr.Dropdown:
    from .tables import RESULTS

    names = sorted(p.stem for p in RESULTS.glob("*.json"))
    return gr.Dropdown(names, value=next((n for n in (chosen, FIRST_RESULTS, *names) if n in names), None))


def evidence_view(name):
    """(table, figure, figure, status) of one results file."""
    from . import charts, report, tables
    from .results import read_results

    if not name or name not in {p.stem for p in tables.RESULTS.glob("*.json")}:
        return shown(), drawn(), drawn(), "There are no results here yet: `python -m alter_demo tofu` makes some."
    try:
        results = read_results(tables.RESULTS / f"{name}.json")
        kind = report.kind_of(results)
        made = [draw(results) for draw in report.drawings_of(results).values()]
        plots = [drawn(charts.look(f, 560)) for f in made if not hasattr(f, "save")]  # an image has its own tab
        said = "\n\n".join(filter(None, [kind.said, *(f"`{c}`" for c in report.commands_of(results, name))]))
        return shown(kind.frame(results)), *[*plots, drawn(), drawn()][:2], said
    except (UserError, IndexError, KeyError) as error:
        return shown(), drawn(), drawn(), jobs.sentence(error)


def shown(table=None) -> gr.Dataframe:
    """A table with three digits of each number: a p-value of 1e-11 is not 0."""
    if table is None:
        return gr.Dataframe(None)

    def cell(v) -> str:
        return str(v) if not isinstance(v, float) else "" if v != v else f"{v:.0f}" if abs(v) >= 1000 else f"{v:.3g}"

    label = "Medians over the seeds" if "seeds" in table.columns else "Figures"
    text = table.map(cell)
    widths = ["170px"] + ["120px"] * (len(text.columns) - 1)
    return gr.Dataframe(text, column_widths=widths, label=label)


def drawn(figure=None) -> gr.Plot:
    return gr.Plot(figure, visible=figure is not None)


# ------------------------------------------------------------------------------------------------------------ launch


def end(*_):
    raise KeyboardInterrupt  # SIGINT itself is ignored in a script's background


def launch(demo: gr.Blocks, **kwargs):
    """Listens on 127.0.0.1 unless GRADIO_SERVER_NAME says otherwise; no share link, no telemetry."""
    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"]).set(
        button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800"
    )
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, about itself
    demo.queue(max_size=WAITING)
    options = {"ssr_mode": False, "show_error": False, "max_file_size": "50mb", "share": False, "theme": theme}
    css = "\n".join((STATIC / name).read_text(encoding="utf-8") for name in ("page.css", "xray.css"))
    options |= {"css": css, "js": MEND, "run_history": False, "footer_links": ["settings"]}
    options["server_name"] = jobs.address()
    if threading.current_thread() is threading.main_thread():
        # uploads and zips go when the process ends in order, which the default does not let it
        signal.signal(signal.SIGTERM, end)
    return demo.launch(**options | kwargs)
