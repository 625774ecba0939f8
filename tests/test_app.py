"""The page in a real headless browser, on the tiny model: unlearn, stop, compare, tokens, hostile text, bad file."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
HOSTILE = "<img src=x onerror=window.hacked=1> ${7*7} {{7}} \\ ` </script> **b** \u202eabc 🙂"


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"GRADIO_SERVER_PORT": str(port), "ALTER_CACHE_DIR": str(folder / "cache"),
                        "PYTHONPATH": str(ROOT)}  # fmt: skip
    with open(folder / "log", "w") as log:
        process = subprocess.Popen([sys.executable, str(ROOT / "app.py")], cwd=folder, env=env, stdout=log, stderr=log)
    url, started = f"http://127.0.0.1:{port}", time.monotonic()
    while True:
        try:
            assert urllib.request.urlopen(url, timeout=2).status == 200
            break
        except OSError:
            assert process.poll() is None and time.monotonic() - started < 60, (folder / "log").read_text()
            time.sleep(0.1)
    print(f"first HTTP 200 after {time.monotonic() - started:.1f} s")
    yield url, folder
    process.terminate()
    process.wait(10)


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
    expect(page.get_by_role("button", name="Unlearn")).to_be_visible(timeout=30_000)
    yield page
    assert outside == []
    page.close()


def choose_model(page, tiny):
    box = page.get_by_label("Model", exact=True)
    box.fill(str(tiny))
    box.press("Enter")


def start(page, tiny, file, steps):
    choose_model(page, tiny)
    page.locator("input[type=file]").first.set_input_files(file)
    expect(page.locator(".file-preview").first).to_be_visible(timeout=30_000)  # the upload has arrived
    page.get_by_role("button", name="More settings").click()
    set_slider(page, "Steps at most", steps)
    set_slider(page, "Questions per group to measure with", 4)
    page.get_by_role("button", name="Unlearn").click()


def set_slider(page, label, value):
    """Type a value and see the slider itself follow: on a busy machine the page may still be drawing its parts."""
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


def test_a_whole_run_then_compare_and_tokens(page, server, tiny, own_data):
    start(page, tiny, own_data[0], steps=6)
    expect(status(page)).to_contain_text("Done: 6 steps", timeout=240_000)
    assert re.search(r"forget held out", page.locator(".table-wrap").first.inner_text())
    assert page.locator("svg .plot_marks path").count() >= 4  # a line for each part of the loss, and the probe
    (run,) = [p for p in (server[1] / "runs").iterdir() if p.is_dir()]
    assert (run / "metrics.json").is_file()

    page.get_by_label("Question", exact=True).fill("What colour has the door of house 3?")
    page.get_by_role("button", name="Ask both").click()
    expect(status(page)).to_contain_text("answer", timeout=120_000)
    assert page.locator("#before textarea").input_value()

    page.get_by_label("Text", exact=True).fill("Hello " + HOSTILE)
    page.get_by_role("button", name="Show tokens").click()
    expect(status(page)).to_contain_text("of them uncertain", timeout=60_000)
    expect(
        page.locator("#tokens")
        .get_by_role("gridcell", name="A", exact=True)
        .or_(page.locator("#tokens").get_by_role("gridcell", name="B", exact=True))
        .first
    ).to_be_visible()
    page.get_by_label("Question", exact=True).fill(HOSTILE)
    page.get_by_role("button", name="Ask both").click()
    expect(status(page)).to_contain_text("answer", timeout=120_000)
    assert page.evaluate("window.hacked") is None


def test_stop_keeps_the_run(page, server, tiny, own_data):
    before = set((server[1] / "runs").glob("*/metrics.json"))
    start(page, tiny, own_data[0], steps=200)
    expect(status(page)).to_contain_text("Step", timeout=120_000)
    page.get_by_role("button", name="Stop and keep").click()
    expect(status(page)).to_contain_text("stopped by hand", timeout=120_000)
    assert len(set((server[1] / "runs").glob("*/metrics.json")) - before) == 1


@pytest.mark.parametrize(
    "content, sentence",
    [("prompt,reply\na,b\n", "missing"), ("", "no examples"), ("question,answer\na,b,c\n", "line 2")],
)
def test_a_bad_file_gets_one_sentence(page, tiny, tmp_path, content, sentence):
    choose_model(page, tiny)
    (tmp_path / "<b>bad.csv").write_text(content)
    page.locator("input[type=file]").first.set_input_files(tmp_path / "<b>bad.csv")
    page.get_by_role("button", name="Unlearn").click()
    expect(status(page)).to_contain_text(sentence, timeout=60_000)
    expect(status(page)).not_to_contain_text("Traceback")


def test_unknown_model_and_no_question(page):
    choose_model(page, "../../etc")
    page.get_by_role("button", name="Unlearn").click()
    expect(status(page)).to_contain_text("There is no model", timeout=60_000)
    page.get_by_label("Question", exact=True).fill("   ")
    page.get_by_role("button", name="Ask both").click()
    expect(status(page)).to_contain_text("no question", timeout=30_000)
