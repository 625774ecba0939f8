"""Many visitors, big and hostile uploads, paths that lead elsewhere: the app asked through gradio_client and HTTP."""

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
from pathlib import Path

import pytest
from conftest import COLOURS, ROOT
from gradio_client import Client, handle_file

VISITORS = 20
GIB = 2**30


def visitor(server) -> Client:
    return Client(server[0], verbose=False, analytics_enabled=False)


def unlearn(client, tiny, file, steps=4, **more):
    given = {"method": "alter_selective", "steps": steps, "rank": 4, "experts": 1, "limit": 4, "seed": 0} | more
    model, upload = more.pop("model", str(tiny)), handle_file(file) if isinstance(file, Path) else file
    order = ("method", "steps", "rank", "experts", "limit", "seed")
    return client.submit(model, "harry-potter", upload, None, *(given[k] for k in order), api_name="/unlearn_job")


def status_of(job, seconds=240) -> str:
    return job.result(timeout=seconds)[0]


@pytest.fixture(scope="module")
def run(server, tiny, tmp_path_factory):
    """Name of a finished run on the twelve doors."""
    file = tmp_path_factory.mktemp("doors") / "doors.csv"
    rows = "".join(f"What colour has the door of house {i}?,The door is {c}.\n" for i, c in enumerate(COLOURS))
    file.write_text("question,answer\n" + rows)
    said = status_of(unlearn(visitor(server), tiny, file))
    assert "Done:" in said
    return max((server[1] / "runs").glob("*/metrics.json"), key=lambda p: p.stat().st_mtime).parent.name


def ask(client, run, question, length=24):
    return client.submit(
        "the untouched model", run, "as trained", question, False, 1.0, 0, length, api_name="/compare_job"
    )


def answers_of(result) -> tuple[str, str]:
    return tuple("".join(piece["token"] for piece in side) for side in result[:2])


def test_twenty_visitors_one_job_at_a_time_and_no_answer_for_another(server, run):
    questions = [
        f"What colour has the door of house {i}? And who lives there, number {i * 7}?" for i in range(VISITORS)
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
    assert len(places) >= 5  # the others were told their place
    assert 1 <= working <= 2  # one ends and the next begins between two looks; without a queue it would be all
    alone = [answers_of(ask(clients[0], run, q).result(timeout=60)) for q in questions]
    assert together == alone and len(set(together)) > VISITORS / 2


class Endless:
    """A file of `size` bytes that takes no room here; counts what was taken."""

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
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="big.csv"\r\nContent-Type: text/csv\r\n\r\n'
    body, room = Endless(head, b"\r\n--b--\r\n", GIB), shutil.disk_usage(server[1]).free
    request = urllib.request.Request(
        f"{server[0]}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=b"}, method="POST"
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
        said = status_of(unlearn(visitor(server), tiny, tmp_path / name))
    except Exception as error:  # gradio itself refuses what is not .jsonl, .json or .csv
        said = str(error)
    assert re.search(r"not text|UTF-8|file type|Invalid|\.csv|missing", html.unescape(said)), said
    assert time.monotonic() - started < 30


def test_a_path_on_the_server_is_no_upload(server, tiny):
    """What a hostile client can send in place of an uploaded file."""
    secret = server[1] / "secret.csv"
    secret.write_text("question,answer\nWho?,The secret.\nWhat?,Another.\n")
    config = json.load(urllib.request.urlopen(f"{server[0]}/config"))
    index = next(d["id"] for d in config["dependencies"] if d["api_name"] == "unlearn_job")
    upload = {"path": str(secret), "meta": {"_type": "gradio.FileData"}, "orig_name": "secret.csv"}
    data = [str(tiny), "harry-potter", upload, None, "alter_selective", 4, 4, 1, 4, 0]
    body = json.dumps({"data": data, "fn_index": index, "session_hash": "hostile"}).encode()
    headers = {"Content-Type": "application/json"}
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(urllib.request.Request(f"{server[0]}/gradio_api/queue/join", body, headers))
        stream = urllib.request.urlopen(f"{server[0]}/gradio_api/queue/data?session_hash=hostile", timeout=60)
        for line in stream:
            assert b"The secret." not in line
            if b"process_completed" in line:
                assert b'"success":false' in line.replace(b" ", b"")
                raise urllib.error.HTTPError(server[0], 403, "refused", None, None)
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(f"{server[0]}/gradio_api/file={secret}")


@pytest.mark.parametrize(
    "model, sentence",
    [("meta-llama/../../etc", "There is no model"), ("../../../etc", "no config.json|There is no model"),
     ("/etc/passwd", "There is no model"), ("a/b/c", "There is no model")],
)  # fmt: skip
def test_models_that_are_none(server, tiny, model, sentence):
    said = status_of(unlearn(visitor(server), tiny, None, model=model))
    assert re.search(sentence, re.sub(r"&#(\d+);", lambda m: chr(int(m[1])), said)), said


@pytest.mark.parametrize("name", ["../secret", "/etc", "..", ".hidden", "a/b", "<b>x</b>", "none-such"])
def test_runs_outside_the_folder_are_refused(server, run, name):
    said = ask(visitor(server), name, "Who?").result(timeout=60)[2]
    assert re.search("not the name of a run|is not a run", re.sub(r"&#(\d+);", " ", said)), said


def test_a_run_with_pickled_weights_is_refused(server, run):
    folder = server[1] / "runs" / "pickled"
    shutil.copytree(server[1] / "runs" / run, folder)
    (folder / "adapter" / "adapter_model.safetensors").rename(folder / "adapter" / "adapter_model.bin")
    try:
        said = ask(visitor(server), "pickled", "Who?").result(timeout=60)[2]
        assert "pickled weights are not loaded" in re.sub(r"&#\d+;", "", said), said
    finally:
        shutil.rmtree(folder)


def test_on_a_space_every_job_asks_for_the_gpu():
    """`spaces` exists on Spaces only, so a stand-in notes what was decorated."""
    script = (
        "import sys, types; seen = []; spaces = types.ModuleType('spaces')\n"
        "spaces.GPU = lambda duration: lambda f: seen.append(f.__name__) or f\n"
        "sys.modules['spaces'] = spaces\n"
        "import alter_demo.jobs, alter_demo.pages\n"
        "alter_demo.pages.build(); print(' '.join(seen)); assert 'torch' not in sys.modules"
    )
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"unlearn_job", "compare_job", "xray_job", "clouds_job", "heat_job"} == set(out.split())


def test_memory_stays_where_it_is(server, tiny, tmp_path):
    """A few runs warm up, more must add little (`python tests/test_visitors.py` measures 50 after 5)."""
    file = tmp_path / "doors.csv"
    file.write_text("question,answer\n" + "".join(f"Door {i}?,{c} paint.\n" for i, c in enumerate(COLOURS)))
    first, last = memory(server, tiny, file, (3, 9))
    assert last < 1.1 * first


def memory(server, tiny, file, counts) -> list[int]:
    """Resident MB of the app after so many runs."""
    client, found = visitor(server), []
    for number in range(1, max(counts) + 1):
        assert "Done:" in status_of(unlearn(client, tiny, file))
        if number in counts:
            line = next(x for x in Path(f"/proc/{server[2]}/status").read_text().splitlines() if "VmRSS" in x)
            found.append(int(line.split()[1]) // 2**10)
    return found


def test_names_make_no_links_and_no_lists():
    from alter_demo.jobs import plain

    for text in ("www.evil.example.com", "https://evil.example.com", "1. x", "1) x", "a_b*c*", "<b>", "me@x.org"):
        shown = plain(text)
        assert html.unescape(shown) == text and not re.search(r"www\.|://|^\d+[.)]|[_*<@]", shown)


def test_a_visitor_who_left_while_waiting_gets_no_job(tmp_path, monkeypatch):
    """B waits for A's job, closes the tab, and A's ends: nothing of B's may begin."""
    from types import SimpleNamespace

    from alter_demo import jobs, runs

    began = []
    monkeypatch.setattr(runs, "unlearn", lambda *a, **k: began.append(a))
    asked = SimpleNamespace(session_hash="b")
    with jobs.JOB:
        shown = jobs.unlearn_job("m", "school", None, None, "npo", 0, 8, 0, 4, 0, asked)
        next(shown)
        jobs.forget_session(asked)
    said = [step[0] for step in shown]
    assert not began and "the tab was closed" in said[-1] and not jobs.OWNER


def test_a_page_open_to_others_offers_no_folder_of_the_machine(monkeypatch):
    from alter_demo import jobs
    from alter_demo.errors import UserError

    assert jobs.offered("/home/me/model") == "/home/me/model"  # on 127.0.0.1
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    monkeypatch.setenv("ALTER_MODELS", "/srv/shown, org/model")
    assert [jobs.offered(x) for x in ("smollm2-135m", "/srv/shown", "org/model")]
    with pytest.raises(UserError, match="offers smollm2-135m, /srv/shown, org/model only"):
        jobs.offered("/home/me/model")


def test_the_slider_reaches_a_threshold_of_a_small_q():
    from alter_demo import jobs

    assert jobs.threshold_slider({"threshold": 46.9}).preprocess(46.9) == 46.9


def test_a_damaged_run_does_not_keep_the_page_from_opening(tmp_path, monkeypatch):
    from alter_demo import jobs

    monkeypatch.setattr(jobs, "RUNS", tmp_path)
    (tmp_path / "r").mkdir()
    for content in (
        "[" * 100_000,
        '{"seconds": {"unlearn": 1' + "0" * 400 + ', "evaluate": 2}}',
        '{"phase_one": null}',
    ):
        (tmp_path / "r" / "metrics.json").write_text(content)
        assert "Runs on" in jobs.expected_time()
        assert "damaged" in jobs.run_view("r")[0]
    (tmp_path / "r" / "metrics.json").write_text('{"seconds": {"unlearn": 7, "evaluate": 0}, "measured": false}')
    assert "the last run here" not in jobs.expected_time()  # it is being measured, or was stopped
    (tmp_path / "r").rename(tmp_path / ".new-r")
    assert jobs.run_names() == []
