"""Word clouds: which words take which route."""

import time

import gradio as gr

from ...errors import UserError
from ..components import INSTANT, TABLE, Page
from ..run_store import answer_rows, get_run
from ..sessions import MAX_TEXT, TICK, model_job

SOURCES = ["forget set", "retain set", "my text"]
CAPTIONS = {"A": "uncertain", "B_r": "confident", "none": "no expert acts"}
MAX_ANSWERS = 30  # of a set that clouds are drawn from


def build(page: Page, tab: gr.Tab) -> None:
    with gr.Row():
        source = gr.Radio(SOURCES, value=SOURCES[0], label="Words from")
        text = gr.Textbox("", label="My text", lines=2, scale=2, max_length=MAX_TEXT)
        draw = gr.Button("Draw word clouds", variant="primary")
    status = gr.Markdown("", elem_id="clouds-status")
    threshold = threshold_slider(1.2)
    histogram = gr.Plot(label="Words by S_q")
    gallery = gr.Gallery(label="Word clouds", columns=3, object_fit="contain", elem_id="clouds")
    options = {"label": "Word counts by route", "elem_id": "cloud-words", **TABLE}
    table = gr.Dataframe(headers=["route", "word", "count"], **options)
    words, views = gr.State(None), [gallery, table, histogram]
    inputs = {"run": page.run, "source": source, "text": text}
    drawn = model_job(draw.click, clouds_job, inputs, [words, threshold, status])
    drawn.then(show_clouds, [words, threshold], views, **INSTANT)
    threshold.release(show_clouds, [words, threshold], views, **INSTANT)
    page.of_run += [words, *views, status]


def clouds_job(run, source, text):
    """Yields ({"words": [(word, S_q, expert), ...], "q", "routed"}, threshold, status)."""
    from ...inspection.words import expert_name, words

    yield gr.skip(), gr.skip(), "Loading the model."
    run, rows, updated = get_run(run), [], time.monotonic()
    own = source == SOURCES[2]
    texts = [(text[:MAX_TEXT], None)] if own else measured_answers(run, source == SOURCES[0])
    for number, (answer, question) in enumerate(texts, 1):
        for word, trace, _ in words(run.trace_tokens(answer, question)):
            rows.append((word, round(trace.entropy, 4), expert_name(trace)))
        if time.monotonic() - updated > TICK:
            updated = time.monotonic()
            yield gr.skip(), gr.skip(), f"Read {number} of {len(texts)} texts."
    routed = run.has_router
    threshold, q = (run.router.config.threshold, run.router.config.q) if routed else (1.2, 1.5)
    data = {"words": rows, "q": q, "routed": routed}
    yield data, threshold_slider(round(threshold, 3)), f"{len(rows)} words from {len(texts)} texts."


def measured_answers(run, forget: bool) -> list[tuple[str, str]]:
    """(answer, question) of the run's forget groups, or of the groups to keep, evenly spaced."""
    rows = [row for row in answer_rows(run.path) if row[0].startswith("forget") == forget]
    if not rows:
        raise UserError("This run has no measured answers of that set. Use your own text.")
    rows = rows[:: max(1, len(rows) // MAX_ANSWERS)][:MAX_ANSWERS]
    return [(before, question) for _, question, before, _ in rows]


def threshold_slider(value: float) -> gr.Slider:
    label, maximum = "Threshold of S_q (words above it are uncertain)", max(3.0, 1.2 * value)
    return gr.Slider(0.0, maximum, value, step=0.01, label=label)  # a small q has a large S_q


def show_clouds(data: dict | None, threshold: float):
    """(gallery, table, histogram) of the words of `clouds_job`, split at `threshold`."""
    from ...inspection import charts
    from ...inspection.words import word_counts

    if not data or not data["words"]:
        return [], None, None
    counts, gallery = word_counts(data["words"], threshold), []
    for route in charts.WAYS:
        if image := charts.cloud(counts.get(route, {}), route):
            caption = CAPTIONS.get(route, "confident, in the forget set")
            gallery.append((image, f"{route}: {caption}" if data["routed"] else caption))
    histogram = charts.histogram([s_q for _, s_q, _ in data["words"]], threshold, data["q"])
    return gallery, charts.word_table(counts).head(300), histogram
