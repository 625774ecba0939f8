"""Many visitors, hostile uploads and forbidden paths, through gradio_client and HTTP."""

import html
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import pytest
from conftest import COLOURS, ROOT
from gradio_client import Client, handle_file

VISITORS = 20
GIB = 2**30


def visitor(server) -> Client:
    return Client(server[0], verbose=False, analytics_enabled=False)


def unlearn(client, tiny, file, model=None):
    upload = handle_file(file) if isinstance(file, Path) else file
    # as the page lists them: method, max_steps, limit, r, n_experts, seed
    options = ("alter_selective", 4, 4, 4, 1, 0)
    inputs = (model or str(tiny), "harry-potter", upload, None)
    return client.submit(*inputs, *options, api_name="/unlearn_job")


def status_of(job, seconds=240) -> str:
    return job.result(timeout=seconds)[0]


@pytest.fixture(scope="module")
def run(server, tiny, tmp_path_factory):
    """The name of a finished run on the twelve doors."""
    file = tmp_path_factory.mktemp("doors") / "doors.csv"
    rows = "".join(
        f"What colour has the door of house {i}?,The door is {c}.\n" for i, c in enumerate(COLOURS)
    )
    file.write_text("question,answer\n" + rows)
    status = status_of(unlearn(visitor(server), tiny, file))
    assert "Done:" in status
    return max(
        (server[1] / "runs").glob("*/metrics.json"), key=lambda p: p.stat().st_mtime
    ).parent.name


def ask(client, run, question, length=24):
    return client.submit(
        "the base model",
        run,
        "as trained",
        question,
        False,
        1.0,
        0,
        length,
        api_name="/compare_job",
    )


def answers_of(result) -> tuple[str, str]:
    return tuple("".join(piece["token"] for piece in side) for side in result[:2])


def test_twenty_visitors_one_job_at_a_time_and_no_answer_for_another(server, run):
    questions = [
        f"What colour has the door of house {i}? And who lives there, number {i * 7}?"
        for i in range(VISITORS)
    ]
    with ThreadPoolExecutor(VISITORS) as pool:
        clients = list(pool.map(lambda _: visitor(server), questions))
    jobs = [ask(client, run, q) for client, q in zip(clients, questions, strict=True)]
    places, working = set(), 0
    while not all(job.done() for job in jobs):
        now = [job.status() for job in jobs]
        places |= {s.rank for s in now if s.code.name == "IN_QUEUE" and s.rank is not None}
        working = max(working, sum(s.code.name in ("PROCESSING", "ITERATING") for s in now))
        time.sleep(0.05)
    together = [answers_of(job.result(timeout=10)) for job in jobs]
    assert len(places) >= 5  # the others see their place
    assert (
        1 <= working <= 2
    )  # one ends and the next begins between two looks; without a queue, all work
    alone = [answers_of(ask(clients[0], run, q).result(timeout=60)) for q in questions]
    assert together == alone and len(set(together)) > VISITORS / 2


class Endless:
    """A file of `size` bytes that needs no memory; it counts the bytes read."""

    def __init__(self, head: bytes, tail: bytes, size: int):
        self.head, self.tail, self.left, self.sent = head, tail, size, 0

    def read(self, n=-1):
        if self.head:
            part, self.head = self.head, b""
        elif self.left > 0:
            part = b"x" * min(2**20, self.left)
            self.left -= len(part)
        else:
            part, self.tail = self.tail, b""
        self.sent += len(part)
        return part


def test_a_gigabyte_is_refused_and_leaves_nothing(server):
    head = (
        b'--b\r\nContent-Disposition: form-data; name="files"; filename="big.csv"\r\n'
        b"Content-Type: text/csv\r\n\r\n"
    )
    body, room = Endless(head, b"\r\n--b--\r\n", GIB), shutil.disk_usage(server[1]).free
    request = urllib.request.Request(
        f"{server[0]}/gradio_api/upload",
        body,
        {"Content-Type": "multipart/form-data; boundary=b"},
        method="POST",
    )
    with pytest.raises((urllib.error.HTTPError, urllib.error.URLError, OSError)) as error:
        urllib.request.urlopen(request, timeout=120).read()
    assert getattr(error.value, "code", 413) in (413, 400)
    assert room - shutil.disk_usage(server[1]).free < 2**28 and body.sent < GIB


@pytest.mark.parametrize("name", ["bomb.csv", "bomb.zip"])
def test_a_zip_bomb_is_no_data(server, tiny, tmp_path, name):
    import zipfile

    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.csv", b"0" * 2**28)
    (tmp_path / "bomb").rename(tmp_path / name)
    started = time.monotonic()
    try:
        status = status_of(unlearn(visitor(server), tiny, tmp_path / name))
    except Exception as error:  # gradio itself refuses other file types
        status = str(error)
    assert re.search(r"not text|UTF-8|file type|Invalid|\.csv|missing", html.unescape(status)), (
        status
    )
    assert time.monotonic() - started < 30


def test_a_path_on_the_server_is_no_upload(server, tiny):
    """A hostile client can send a path in place of an uploaded file."""
    secret = server[1] / "secret.csv"
    secret.write_text("question,answer\nWho?,The secret.\nWhat?,Another.\n")
    config = json.load(urllib.request.urlopen(f"{server[0]}/config"))
    index = next(d["id"] for d in config["dependencies"] if d["api_name"] == "unlearn_job")
    upload = {"path": str(secret), "meta": {"_type": "gradio.FileData"}, "orig_name": "secret.csv"}
    data = [str(tiny), "harry-potter", upload, None, "alter_selective", 4, 4, 4, 1, 0]
    body = json.dumps({"data": data, "fn_index": index, "session_hash": "hostile"}).encode()
    headers = {"Content-Type": "application/json"}
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(
            urllib.request.Request(f"{server[0]}/gradio_api/queue/join", body, headers)
        )
        stream = urllib.request.urlopen(
            f"{server[0]}/gradio_api/queue/data?session_hash=hostile", timeout=60
        )
        for line in stream:
            assert b"The secret." not in line
            if b"process_completed" in line:
                assert b'"success":false' in line.replace(b" ", b"")
                raise urllib.error.HTTPError(server[0], 403, "refused", None, None)
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"{server[0]}/gradio_api/file={secret}")


@pytest.mark.parametrize(
    "model, sentence",
    [("meta-llama/../../etc", "not found"), ("../../../etc", "no config.json|not found"),
     ("/etc/passwd", "not found"), ("a/b/c", "not found")],
)  # fmt: skip
def test_unknown_models_are_refused(server, tiny, model, sentence):
    status = status_of(unlearn(visitor(server), tiny, None, model=model))
    assert re.search(sentence, re.sub(r"&#(\d+);", lambda m: chr(int(m[1])), status)), status


@pytest.mark.parametrize(
    "name", ["../secret", "/etc", "..", ".hidden", "a/b", "<b>x</b>", "none-such"]
)
def test_runs_outside_the_folder_are_refused(server, run, name):
    status = ask(visitor(server), name, "Who?").result(timeout=60)[2]
    assert re.search("not a valid run name|is not a run", re.sub(r"&#(\d+);", " ", status)), status


def test_a_run_with_pickled_weights_is_refused(server, run):
    folder = server[1] / "runs" / "pickled"
    shutil.copytree(server[1] / "runs" / run, folder)
    (folder / "adapter" / "adapter_model.safetensors").rename(
        folder / "adapter" / "adapter_model.bin"
    )
    try:
        status = ask(visitor(server), "pickled", "Who?").result(timeout=60)[2]
        assert "pickled weights are not loaded" in re.sub(r"&#\d+;", "", status.lower()), status
    finally:
        shutil.rmtree(folder)


def test_on_a_space_every_job_asks_for_the_gpu():
    """`spaces` exists on Spaces only, so a stub records the decorated functions."""
    script = (
        "import sys, types; names = []; spaces = types.ModuleType('spaces')\n"
        "spaces.GPU = lambda duration: lambda f: names.append(f.__name__) or f\n"
        "sys.modules['spaces'] = spaces\n"
        "import alter_demo.app.main\n"
        "alter_demo.app.main.build(); print(' '.join(names)); assert 'torch' not in sys.modules"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {"unlearn_job", "compare_job", "xray_job", "clouds_job", "weights_job"} == set(
        out.split()
    )


def test_memory_stays_where_it_is(server, tiny, tmp_path):
    """The first runs warm up; more runs must add little."""
    file = tmp_path / "doors.csv"
    file.write_text(
        "question,answer\n" + "".join(f"Door {i}?,{c} paint.\n" for i, c in enumerate(COLOURS))
    )
    first, last = memory(server, tiny, file, (3, 9))
    assert last < 1.1 * first


def memory(server, tiny, file, counts) -> list[int]:
    """Resident memory of the app in MB after each number of runs in `counts`."""
    client, sizes = visitor(server), []
    for number in range(1, max(counts) + 1):
        assert "Done:" in status_of(unlearn(client, tiny, file))
        if number in counts:
            line = next(
                x
                for x in Path(f"/proc/{server[2]}/status").read_text().splitlines()
                if "VmRSS" in x
            )
            sizes.append(int(line.split()[1]) // 2**10)
    return sizes


def test_names_make_no_links_and_no_lists():
    from alter_demo.app.sessions import escape_markdown

    for text in (
        "www.evil.example.com",
        "https://evil.example.com",
        "1. x",
        "1) x",
        "a_b*c*",
        "<b>",
        "me@x.org",
    ):
        shown = escape_markdown(text)
        assert html.unescape(shown) == text and not re.search(r"www\.|://|^\d+[.)]|[_*<@]", shown)


def test_a_visitor_who_left_while_waiting_gets_no_job(tmp_path, monkeypatch):
    """B waits for A's job and closes the tab before it ends: B's job must not start."""
    from types import SimpleNamespace

    from alter_demo.app import sessions
    from alter_demo.app.tabs.unlearn import unlearn_job

    calls = []
    monkeypatch.setattr(
        import_module("alter_demo.unlearn"), "unlearn", lambda *a, **k: calls.append(a)
    )
    visitor = SimpleNamespace(session_hash="b")
    options = {"method": "npo", "max_steps": 0, "limit": 4, "r": 8, "n_experts": 0, "seed": 0}
    with sessions.JOB:
        job = unlearn_job(
            visitor, model="m", forget_set="school", upload=None, retain=None, **options
        )
        next(job)
        sessions.leave(visitor)
    statuses = [step[0] for step in job]
    assert not calls and "the tab was closed" in statuses[-1] and not sessions.OWNER


def test_a_page_open_to_others_offers_no_folder_of_the_machine(monkeypatch):
    from alter_demo.app.sessions import check_access
    from alter_demo.errors import UserError

    assert check_access("/home/me/model") == "/home/me/model"  # on 127.0.0.1
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    monkeypatch.setenv("ALTER_MODELS", "/srv/shown, org/model")
    assert [check_access(x) for x in ("smollm2-135m", "/srv/shown", "org/model")]
    with pytest.raises(UserError, match=r"one of smollm2-135m, /srv/shown, org/model\."):
        check_access("/home/me/model")


def test_the_slider_reaches_a_threshold_of_a_small_q():
    from alter_demo.app.tabs.clouds import threshold_slider

    assert threshold_slider(46.9).preprocess(46.9) == 46.9


def test_a_damaged_run_does_not_keep_the_page_from_opening(tmp_path, monkeypatch):
    from alter_demo.app import run_store

    monkeypatch.setattr(run_store, "RUNS", tmp_path)
    (tmp_path / "r").mkdir()
    for content in (
        "[" * 100_000,
        '{"seconds": {"unlearn": 1' + "0" * 400 + ', "evaluate": 2}}',
        '{"phase_one": null}',
    ):
        (tmp_path / "r" / "metrics.json").write_text(content)
        assert "Runs on" in run_store.expected_time()
        assert "damaged" in run_store.describe_run("r")[0]
    (tmp_path / "r" / "metrics.json").write_text(
        '{"seconds": {"unlearn": 7, "evaluate": 0}, "measured": false}'
    )
    assert "The last run" not in run_store.expected_time()  # not measured (yet)
    (tmp_path / "r").rename(tmp_path / ".new-r")
    assert run_store.run_names() == []
