"""The page in a headless browser, with the tiny model."""

import json
import re
import shutil
import time

import pytest
from axe_playwright_python.sync_playwright import Axe
from gradio_client import Client
from playwright.sync_api import expect, sync_playwright

from alter_demo.app.tabs.unlearn import option_label
from alter_demo.files import EXAMPLE
from alter_demo.models.built_in import built_in

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
UNEXPECTED = re.compile("Traceback|Error:")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOSTILE = "<img src=x onerror=window.hacked=1> ${7*7} {{7}} \\ ` </script> **b** \u202eabc 🙂"


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert path, "Chromium is missing: apt-get install chromium (make test does it)"
    with sync_playwright() as p:
        running = p.chromium.launch(executable_path=path, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def page(browser, server):
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    outside, own = [], (server[0], "data:", "blob:")
    page.on("request", lambda r: None if r.url.startswith(own) else outside.append(r.url))
    page.goto(server[0])
    expect(page.get_by_role("button", name="Unlearn on this machine")).to_be_visible(timeout=30_000)
    yield page
    assert outside == []
    page.close()


def choose_model(page, tiny):
    go(page, "Unlearn")
    box = page.get_by_label("Model", exact=True)
    box.fill(str(tiny))
    box.press("Enter")


def start(page, tiny, file, steps):
    choose_model(page, tiny)
    page.locator("input[type=file]").first.set_input_files(file)
    expect(page.locator(".file-preview").first).to_be_visible(
        timeout=30_000
    )  # the file is uploaded
    page.get_by_role("button", name="More settings").click()
    set_slider(page, option_label("max_steps"), steps)
    set_slider(page, option_label("limit"), 4)
    page.get_by_role("button", name="Unlearn", exact=True).click()


def set_slider(page, label, value):
    """Type a value until the slider follows: a busy page may still be drawing its parts."""
    number = page.get_by_label(f"number input for {label}")
    slider = page.get_by_label(f"range slider for {label}")
    for _ in range(20):
        number.fill(str(value))
        number.press("Tab")
        page.wait_for_timeout(250)
        if number.input_value() == slider.input_value() == str(value):
            return
    raise AssertionError(f"{label} stays at {slider.input_value()}")


def status(page):
    return page.locator("#status")


def go(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def barriers(page) -> list[tuple]:
    """Serious accessibility faults of what the page shows now: (tab, rule, nodes)."""
    expect(page.locator(".pending")).to_have_count(
        0, timeout=60_000
    )  # pale while it is being updated
    tab = page.get_by_role("tab", selected=True).first.inner_text()
    violations = Axe().run(page).response["violations"]
    serious = (v for v in violations if v["impact"] in ("serious", "critical"))
    return [(tab, v["id"], [n["html"][:200] for n in v["nodes"]][:3]) for v in serious]


def finish_run(page, tiny, file, steps=6):
    """Finish a run on the Unlearn tab."""
    start(page, tiny, file, steps)
    expect(status(page)).to_contain_text("Done:", timeout=240_000)


def test_the_first_screen_is_a_finished_example(page):
    stored = json.loads(EXAMPLE.read_text())
    expect(page.locator("#numbers")).to_contain_text(
        f"answer probability down by {stored['numbers']['forgot']:.1%}"
    )
    last = stored["items"][-1]
    page.get_by_text(last["question"], exact=True).click()
    expect(page.locator("#example-after textarea")).to_have_value(last["after"])
    expect(page.locator("#example-xray .xray-token")).to_have_count(len(last["xray"]["tokens"]))
    page.get_by_role("button", name="Unlearn on this machine").click()
    expect(page.get_by_role("button", name="Unlearn", exact=True)).to_be_visible()


def test_a_whole_run_then_every_tab(page, server, tiny, own_data):
    before = set((server[1] / "runs").glob("*"))  # of other tests on this server
    finish_run(page, tiny, own_data[0])
    faults = barriers(page)
    assert re.search(r"forget held out", page.locator("#numbers-table").inner_text())
    assert "What colour has the door" in page.locator("#live").inner_text()
    assert (
        page.locator("svg .plot_marks path").count() >= 5
    )  # one line per loss term, and the probe
    expect(page.locator("svg").get_by_text("probe, relative to start")).to_be_visible()
    (run,) = {p for p in (server[1] / "runs").iterdir() if p.is_dir()} - before
    assert (run / "metrics.json").is_file()
    with page.expect_download() as download:
        page.locator("#saved").get_by_role("link").first.click()
    assert download.value.suggested_filename == f"{run.name}.zip"

    go(page, "Compare")
    page.get_by_role("button", name="Metrics and files of this run").click()
    expect(page.locator("#run-status")).to_contain_text("alter_selective on forget", timeout=30_000)
    expect(page.locator("#numbers-table-of-run")).to_contain_text("forget held out")
    page.get_by_role("button", name="Create .zip file").click()
    expect(page.locator("#saved-of-run").get_by_role("link").first).to_be_visible(timeout=30_000)
    for route in ("as trained", "all off"):
        page.get_by_label("Active experts (right)").click()
        page.get_by_role("option", name=route, exact=True).click()
        page.get_by_label("Question", exact=True).fill("What colour has the door of house 3?")
        page.get_by_role("button", name="Ask both").click()
        expect(page.locator("#compare-status")).to_contain_text(" s)", timeout=120_000)
    expect(page.locator("#compare-status")).to_contain_text(
        "identical"
    )  # all off is the base model
    page.get_by_label("Question", exact=True).fill(HOSTILE)
    page.get_by_label("Active experts (right)").click()
    page.get_by_role("option", name="as trained", exact=True).click()
    page.get_by_role("button", name="Ask both").click()
    expect(page.locator("#compare-status")).not_to_contain_text(
        "identical", timeout=30_000
    )  # a new answer
    expect(page.locator("#compare-status")).to_contain_text(" s)", timeout=120_000)
    assert page.evaluate("window.hacked") is None and page.locator("img[src=x]").count() == 0
    faults += barriers(page)

    go(page, "Token X-ray")
    page.get_by_label("Text", exact=True).first.fill("Hello " + HOSTILE)
    page.get_by_role("button", name="Show tokens").click()
    tokens = page.locator("#tokens .xray-token")
    expect(tokens.first).to_be_visible(timeout=60_000)
    shown = "".join(tokens.all_inner_texts()).replace("·", " ")
    assert "<img src=x onerror=" in shown and "${7*7} {{7}}" in shown
    tokens.nth(2).hover()
    expect(page.locator("#tokens .xray-detail")).to_contain_text("S_q")
    tokens.nth(0).focus()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#tokens .xray-chart")).to_have_count(3)
    before = [t.get_attribute("style") for t in tokens.all()]
    page.locator("#tokens .xray-by").select_option("entropy")
    assert [t.get_attribute("style") for t in tokens.all()] != before
    page.locator("#tokens .xray-threshold").fill("0")
    expect(page.locator("#tokens .xray-share")).to_contain_text("0 confident")
    assert float(page.locator("#tokens .xray-root").get_attribute("data-recolour-ms")) < 100
    page.get_by_role("button", name="Save as HTML").click()
    expect(page.locator("#xray-status")).to_contain_text("Saved", timeout=30_000)
    faults += barriers(page)

    go(page, "Word clouds")
    page.get_by_role("button", name="Draw word clouds").click()
    expect(page.locator("#clouds-status")).to_contain_text("words from", timeout=120_000)
    expect(page.locator("#clouds img").first).to_be_visible(timeout=60_000)
    expect(page.locator("#cloud-words")).to_contain_text(re.compile(r"(A|B_r|B_f1)\s"))
    faults += barriers(page)

    go(page, "Router")
    expect(page.locator("#router-status")).to_contain_text(
        "metrics.json of this run", timeout=60_000
    )
    page.get_by_role("button", name="Show expert weights").click()
    expect(page.locator("#router-status")).to_contain_text("Heat map drawn", timeout=60_000)
    expect(page.locator(".js-plotly-plot:visible")).to_have_count(4, timeout=60_000)
    assert page.evaluate("window.hacked") is None
    faults += barriers(page)
    assert not faults, "\n".join(map(str, faults))

    page.goto(f"{server[0]}/?run={run.name}&tab=compare&prompt=Who%3F")
    expect(page.get_by_label("Question", exact=True)).to_have_value("Who?", timeout=30_000)
    expect(page.get_by_label("Run (right)")).to_have_value(run.name)
    page.get_by_role("button", name="Metrics and files of this run").click()  # also after a reload
    expect(page.locator("#numbers-table-of-run")).to_contain_text("forget held out", timeout=30_000)


def test_hostile_data_is_text_on_every_tab(page, server, tiny, tmp_path):
    """Questions and answers of an uploaded file appear in tables, charts and clouds."""
    file = tmp_path / "<img src=x onerror=window.hacked=2>.jsonl"
    rows = [
        {"question": f"{i} {HOSTILE}?", "answer": f"<b onclick=window.hacked=3>{i}</b> {HOSTILE}"}
        for i in range(8)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    finish_run(page, tiny, file, steps=2)
    for place in ("#live", "#answers"):
        expect(page.locator(place)).to_contain_text("${7*7} {{7}}")
        assert page.locator(f"{place} img[src=x]").count() == 0
    go(page, "Router")
    expect(page.locator("#router-status")).to_contain_text(
        "metrics.json of this run", timeout=60_000
    )
    expect(page.locator("#nearest")).to_contain_text(
        "<img src=x onerror=window.hacked=1>", timeout=30_000
    )
    go(page, "Word clouds")
    page.get_by_role("button", name="Draw word clouds").click()
    expect(page.locator("#clouds-status")).to_contain_text("words from", timeout=120_000)
    expect(page.locator("#clouds img").first).to_be_visible(timeout=60_000)
    assert page.evaluate("window.hacked") is None and page.locator("img[src=x]").count() == 0


def test_stop_keeps_the_run(page, server, tiny, own_data):
    before = set((server[1] / "runs").glob("*/metrics.json"))
    start(page, tiny, own_data[0], steps=200)
    expect(status(page)).to_contain_text("Step", timeout=120_000)
    page.get_by_role("button", name="Stop and keep").click()
    expect(status(page)).to_contain_text("stopped by hand", timeout=120_000)
    assert len(set((server[1] / "runs").glob("*/metrics.json")) - before) == 1


@pytest.mark.slow
def test_the_built_in_model_forgets_on_the_page_and_stops_when_asked(page, server):
    own = server[1] / "cache" / "smollm2-135m"
    if not own.exists():
        own.parent.mkdir(parents=True, exist_ok=True)
        own.symlink_to(built_in("smollm2-135m"))
    go(page, "Unlearn")
    page.get_by_role("button", name="More settings").click()
    set_slider(page, option_label("limit"), 4)
    page.get_by_role("button", name="Unlearn", exact=True).click()
    expect(status(page)).to_contain_text("loading the model", ignore_case=True, timeout=30_000)
    expect(status(page)).to_contain_text("Step 2 of at most 120", timeout=400_000)
    expect(page.locator("#live")).to_contain_text("Harry Potter")
    page.get_by_role("button", name="Stop and keep").click()
    expect(status(page)).to_contain_text("stopped by hand", timeout=400_000)
    expect(page.locator("#answers")).to_contain_text("Hogwarts")  # the answers before
    go(page, "Compare")
    page.get_by_label("Question", exact=True).fill("Who wrote The Hobbit?")
    page.get_by_role("button", name="Ask both").click()
    expect(page.locator("#compare-status")).to_contain_text(" s)", timeout=120_000)
    expect(page.locator("#after")).to_contain_text("Tolkien")  # a neighbour, kept
    assert not UNEXPECTED.search((server[1] / "log").read_text())


def test_a_closed_tab_frees_its_job_in_two_seconds(browser, server, tiny, own_data):
    before = set((server[1] / "runs").glob("*"))
    page = browser.new_page()
    page.goto(server[0])
    start(page, tiny, own_data[0], steps=200)
    expect(status(page)).to_contain_text("Step", timeout=120_000)
    other = Client(server[0], verbose=False, analytics_enabled=False)
    waiting = other.submit(
        "the base model", "none", "as trained", "Who?", False, 1.0, 0, 8, api_name="/compare_job"
    )
    page.wait_for_timeout(1000)
    assert not waiting.done()  # it waits for its turn
    started = time.monotonic()
    page.close()
    assert "not a run" in waiting.result(timeout=60)[2]
    print(f"the next visitor has an answer {time.monotonic() - started:.1f} s later")
    assert time.monotonic() - started < 2
    (left,) = set((server[1] / "runs").glob("*")) - before  # the completed steps, without metrics
    metrics = json.loads((left / "metrics.json").read_text())
    assert (
        metrics["stopped"] == "stopped by hand"
        and metrics["steps"] >= 1
        and not metrics["measured"]
    )
    assert (left / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_accessibility_fault_on_any_tab(browser, server, scheme):
    """Of the empty tabs; `test_a_whole_run_then_every_tab` checks them with content."""
    page = browser.new_page(viewport={"width": 1280, "height": 1000}, color_scheme=scheme)
    page.goto(f"{server[0]}/?__theme={scheme}")
    expect(page.get_by_role("button", name="Unlearn on this machine")).to_be_visible(timeout=30_000)
    faults = []
    for tab in page.get_by_role("tab").all():
        tab.click()
        page.wait_for_timeout(700)
        faults += barriers(page)
    page.close()
    assert not faults, "\n".join(map(str, faults))


@pytest.mark.parametrize(
    "content, sentence",
    [
        ("prompt,reply\na,b\n", "missing"),
        ("", "no examples"),
        ("question,answer\na,b,c\n", "line 2"),
    ],
)
def test_a_bad_file_gets_one_sentence(page, tiny, tmp_path, content, sentence):
    choose_model(page, tiny)
    (tmp_path / "<b>bad.csv").write_text(content)
    page.locator("input[type=file]").first.set_input_files(tmp_path / "<b>bad.csv")
    page.get_by_role("button", name="Unlearn", exact=True).click()
    expect(status(page)).to_contain_text(sentence, timeout=60_000)
    expect(status(page)).not_to_contain_text("Traceback")


def test_unknown_model_and_no_question(page):
    choose_model(page, "../../etc")
    page.get_by_role("button", name="Unlearn", exact=True).click()
    expect(status(page)).to_contain_text("not found", timeout=60_000)
    go(page, "Compare")
    page.get_by_label("Question", exact=True).fill("   ")
    page.get_by_role("button", name="Ask both").click()
    expect(page.locator("#compare-status")).to_contain_text("Enter a question", timeout=30_000)
