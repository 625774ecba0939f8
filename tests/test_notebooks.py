"""The lessons: their form, their exercises, and that they run and show what is committed."""

import re
import time
import tomllib
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from alter_demo import lessons

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
SECONDS = 180  # each at most, on 2 cores
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
SOLUTION = re.compile(r"<details><summary>Solution</summary>\n\n```python\n(.*?)```\n</details>", re.DOTALL)


def read(path):
    return nbformat.read(path, as_version=4)


def tagged(notebook, tag):
    return [c for c in notebook.cells if tag in c.metadata.get("tags", [])]


def text_of(cell) -> str:
    """What a cell printed and showed, without images."""
    shown = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
    return "\n".join(shown)


def test_there_are_seven():
    assert [p.name[:2] for p in NOTEBOOKS] == [f"0{i}" for i in range(1, 8)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_form(path):
    notebook, pair = read(path), jupytext.read(path.with_suffix(".py"))
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in pair.cells], (
        "the .py beside it differs: run make outputs"
    )
    top, install, last = notebook.cells[0].source, notebook.cells[1], notebook.cells[-1].source
    assert top.startswith(f"# {path.name[1]}. ") and all(f"**{x}.**" in top for x in ("Goal", "Before", "Time"))
    address = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    assert (
        f"/github/{address.removeprefix('https://github.com/')}/blob/main/notebooks/{path.name}" in top
        and address in install.source
    )
    assert install.metadata["tags"] == ["install"] and 'if "google.colab" in sys.modules' in install.source
    assert "## Summary" in last and (path == NOTEBOOKS[-1] or "**Next:**" in last)
    assert len(tagged(notebook, "exercise")) >= 3 and len(tagged(notebook, "check")) >= 3
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert max(len(c.source.splitlines()) for c in code) <= 15
    assert all(c.execution_count for c in code), "committed without outputs"
    outputs = [o for c in code for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    markup = [str(o.data) for o in outputs if "data" in o]
    assert not any("<script" in m or "https://" in m for m in markup)  # nothing that a reader's browser would fetch


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stubs_fail_and_solutions_pass(path):
    cells = read(path).cells
    names = {"np": __import__("numpy"), "torch": __import__("torch"), "json": __import__("json"), "check": print}
    for number, cell in enumerate(cells):
        if "exercise" not in cell.metadata.get("tags", []):
            continue
        name = re.search(r'check\("(\w+)"', cell.source)[1]
        solution = SOLUTION.match(cells[number + 1].source)[1]
        for source, right in ((cell.source, False), (solution, True)):
            scope = dict(names)
            exec(source, scope)
            hint = lessons.verdict(name, scope[name])
            assert (hint is None) == right, f"{name}: {hint}"


def test_every_exercise_stands_in_a_notebook():
    asked = [re.search(r'check\("(\w+)"', c.source)[1] for p in NOTEBOOKS for c in tagged(read(p), "exercise")]
    assert sorted(asked) == sorted(lessons.EXERCISES)


def test_a_broken_package_breaks_a_notebook(monkeypatch):
    """The second notebook's checks of the layer, with a package whose update lacks one expert."""
    cells = [c.source for c in read(NOTEBOOKS[1]).cells if c.cell_type == "code"]
    end = next(i for i, source in enumerate(cells) if "largest difference" in source)
    monkeypatch.chdir(ROOT / "notebooks")

    def up_to_the_check():
        scope = {}
        for source in cells[: end + 1]:
            exec(source, scope)

    up_to_the_check()
    whole = lessons.ExpertDelta.apply
    monkeypatch.setattr(lessons.ExpertDelta, "apply", lambda x, a, b, w, *m: whole(x, a, b[:-1], w[:, :-1], *m))
    with pytest.raises(AssertionError):
        up_to_the_check()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_it_runs_and_shows_what_is_committed(path):
    notebook, committed = read(path), read(path)
    started = time.monotonic()
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    spent = time.monotonic() - started
    print(f"{path.stem}: {spent:.0f} s")
    for old, new in zip(tagged(committed, "same"), tagged(notebook, "same"), strict=True):
        before, now = (list(map(float, NUMBER.findall(text_of(c)))) for c in (old, new))
        assert before and now == pytest.approx(before, rel=0.05, abs=0.02), text_of(new)
    assert spent < SECONDS
