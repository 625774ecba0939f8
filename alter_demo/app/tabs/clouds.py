"""Word clouds: which words take which route."""

import json
import time

import gradio as gr

from ...alter import DEFAULT_Q, PUBLISHED_THRESHOLD
from ...errors import UserError
from ..components import INSTANT, MODEL_JOB, TABLE, Page
from ..run_store import get_run
from ..sessions import MAX_TEXT, TICK, model_job

SOURCES = ["forget set", "retain set", "my text"]
COLUMNS = ["route", "word", "count"]
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
    table = gr.Dataframe(headers=COLUMNS, **options)
    words, views = gr.State(None), [gallery, table, histogram]
    inputs = {"run": page.run, "source": source, "text": text}
    outputs = [words, threshold, status]
    drawn = draw.click(clouds_job, inputs_kwargs=inputs, outputs=outputs, **MODEL_JOB)
    drawn.then(show_clouds, [words, threshold], views, **INSTANT)
    threshold.release(show_clouds, [words, threshold], views, **INSTANT)
    page.of_run += [words, *views, status]


@model_job(outputs=3)
def clouds_job(run, source, text):
    """Yields ({"words": [(word, S_q, expert), ...], "q", "routed"}, threshold, status)."""
    from ...inspection.words import expert_name, words

    yield gr.skip(), gr.skip(), "Loading the model."
    run = get_run(run)
    own = source == SOURCES[2]
    texts = [(text[:MAX_TEXT], None)] if own else measured_answers(run, source == SOURCES[0])
    rows, updated = [], time.monotonic()
    for number, (answer, question) in enumerate(texts, 1):
        for word, trace, _ in words(run.trace_tokens(answer, question)):
            rows.append((word, round(trace.entropy, 4), expert_name(trace)))
        if time.monotonic() - updated > TICK:
            updated = time.monotonic()
            yield gr.skip(), gr.skip(), f"Read {number} of {len(texts)} texts."
    threshold, q = PUBLISHED_THRESHOLD, DEFAULT_Q
    if routed := run.has_router:
        threshold, q = run.router.config.threshold, run.router.config.q
    data = {"words": rows, "q": q, "routed": routed}
    yield data, threshold_slider(round(threshold, 3)), f"{len(rows)} words from {len(texts)} texts."


def measured_answers(run, forget: bool) -> list[tuple[str, str]]:
    """(answer, question) of the run's forget groups, or of the groups to keep, evenly spaced."""
    rows = json.loads((run.path / "answers.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if row["group"].startswith("forget") == forget]
    if not rows:
        raise UserError("This run has no measured answers of that set. Use your own text.")
    rows = rows[:: max(1, len(rows) // MAX_ANSWERS)][:MAX_ANSWERS]
    return [(row["before"], row["question"]) for row in rows]


def threshold_slider(value: float) -> gr.Slider:
    label, maximum = "Threshold of S_q (words above it are uncertain)", max(3.0, 1.2 * value)
    return gr.Slider(0.0, maximum, value, step=0.01, label=label)  # a small q has a large S_q


def show_clouds(data: dict | None, threshold: float):
    """(gallery, table, histogram) of the words of `clouds_job`, split at `threshold`."""
    from ...inspection.charts import WAYS, cloud, histogram, word_table
    from ...inspection.words import word_counts

    if not data or not data["words"]:
        return [], None, None
    counts = word_counts(data["words"], threshold)
    gallery = []
    for route in WAYS:
        if image := cloud(counts.get(route, {}), route):
            caption = CAPTIONS.get(route, "confident, in the forget set")
            gallery.append((image, f"{route}: {caption}" if data["routed"] else caption))
    entropies = [entropy for _, entropy, _ in data["words"]]
    table = word_table(counts).head(300).set_axis(COLUMNS, axis=1)
    return gallery, table, histogram(entropies, threshold, data["q"])
