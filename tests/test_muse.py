"""MUSE on a tiny model: questions alone, and with texts as the Hub has them."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import COLOURS

from alter_demo import load_model
from alter_demo.data.benchmarks import muse_part
from alter_demo.data.forget_sets import load_forget_set
from alter_demo.data.rendering import render
from alter_demo.data.schema import Example
from alter_demo.errors import UserError
from alter_demo.evaluation import metrics
from alter_demo.experiments import muse
from alter_demo.experiments.cells import GridConfig, GridOptions
from alter_demo.models import teaching

FEW = {"max_steps": 2, "batch_size": 2, "probe_every": 1}
SENTENCE = "The {} door of house {} was painted by the mayor in the spring of that year. "


@pytest.fixture
def folder(tmp_path, few, monkeypatch):
    """Twelve questions a side under `muse/`, as in a user's own folder."""
    folder = tmp_path / "data" / "muse"
    folder.mkdir(parents=True)
    for part, thing in (("forget", "door"), ("retain", "roof")):
        rows = [
            {"question": f"Colour of {thing} {i}?", "answer": f"It is {c}."}
            for i, c in enumerate(COLOURS)
        ]
        (folder / f"news_knowmem_{part}_qa.json").write_text(json.dumps(rows))
    monkeypatch.setenv("ALTER_DATA_DIR", str(tmp_path / "data"))
    return folder


def options(path, *methods) -> GridOptions:
    return GridOptions(path, methods, overrides=FEW)


def test_by_the_size_of_the_forget_set(folder, tiny, tmp_path):
    config = GridConfig(forget="muse-news", model=str(tiny), tokens=4, epochs=2)
    few = options(tmp_path / "m.json", "alter_selective")
    results = muse.run_muse(config, few, (0.5, 1.0))
    rows = [(r["method"], r.get("trained_on"), r.get("questions")) for r in results["runs"]]
    shares = [("alter_selective", 4, 3), ("alter_selective", 9, 6)]
    assert rows == [("retain", None, None), ("target", None, None), *shares]
    overrides = [r["config"]["overrides"] for r in results["runs"][2:]]
    assert results["type"] == "grid" and overrides == [FEW | {"share": 0.5}, FEW]
    for run in results["runs"]:
        assert {"forget_knowmem_ROUGE", "retain_knowmem_ROUGE", "privleak"} <= run["metrics"].keys()
        assert "forget_verbmem_ROUGE" not in run["metrics"]  # no texts here
    before = few.path.read_text()
    muse.run_muse(config, few, (0.5, 1.0))
    assert few.path.read_text() == before
    for share in (2.0, 0.0):
        with pytest.raises(UserError, match="share"):
            muse.run_muse(config, few, (share,))
    with pytest.raises(UserError, match="muse-news or muse-books"):
        muse.run_muse(replace(config, forget="imaginary-authors"), options(tmp_path / "o.json"))


def test_the_probe_is_not_reported(folder):
    forget_set = load_forget_set("muse-news")
    names = ("forget", "probe", "holdout")
    groups = {name: {e.question for e in getattr(forget_set, name)} for name in names}
    assert [len(g) for g in groups.values()] == [6, 3, 3] and len(set.union(*groups.values())) == 12
    trained_on = [e.question for e in forget_set.training_examples]
    assert set(trained_on) == groups["forget"] | groups["probe"]
    part = muse.share_of(forget_set, 0.5)
    assert {e.question for e in part.forget + part.probe} == set(trained_on[:4])


@pytest.fixture
def texts(folder):
    """The parts of MUSE that are texts: of the forget set, like it, and to be kept."""

    def write(start, *colours):
        houses = range(start, start + 12)
        return [" ".join(SENTENCE.format(c, i) for i in houses) for c in colours]

    forget, kept = write(0, *COLOURS[:4]), write(0, *COLOURS[8:])
    parts = dict.fromkeys(("raw_forget", "verbmem_forget", "privleak_forget"), forget)
    parts |= {"raw_retain1": kept, "privleak_holdout": write(7, *COLOURS[4:8])}
    for name, rows in parts.items():
        lines = [json.dumps({"text": text}) for text in rows]
        (folder / f"news_{name}.jsonl").write_text("\n".join(lines))
    return parts


def test_figures_of_texts(folder, texts, taught):
    lm = load_model(str(taught), dtype="float32")
    forget, others = texts["verbmem_forget"], texts["privleak_holdout"]
    ids = [lm.tokenizer(text).input_ids for text in forget]
    scores = []
    for row in ids:  # one by one
        prompt, generation = torch.tensor([row[:200]]), {"max_new_tokens": 128, "do_sample": False}
        answer = lm.model.generate(prompt, **generation)[0, 200:]
        answer = lm.tokenizer.decode(answer, skip_special_tokens=True)
        scores.append(metrics.rouge(answer, lm.tokenizer.decode(row[200:328]))[1])
    parts = {part: muse_part("news", part) for part in muse.TEXT_PARTS}
    figures = muse.measure_texts(lm, lm.model, parts, retain_auc=0.5)
    by_hand = pytest.approx(sum(scores) / len(scores))
    assert figures["forget_verbmem_ROUGE"] == by_hand

    def least_likely(text):
        """Mean log-probability of the share of a text's tokens that are least likely."""
        row = torch.tensor([lm.tokenizer(text).input_ids[:512]])
        with torch.no_grad():
            all_log_p = lm.model(row).logits[0, :-1].log_softmax(-1)
        log_p = all_log_p.gather(-1, row[0, 1:, None])[:, 0]
        return log_p.sort().values[: int(metrics.MIN_K * len(log_p))].mean()

    pairs = [least_likely(a) > least_likely(b) for a in forget for b in others]
    auc = sum(map(float, pairs)) / len(pairs)
    assert figures["mia_min_k_texts"] == pytest.approx(auc)
    assert figures["privleak"] == pytest.approx(100 * ((1 - auc) - 0.5) / 0.5)
    decode = lm.tokenizer.decode
    rows = [{"prompt": decode(r[:200]), "gt": decode(r[200:])} for r in ids]  # as on the Hub
    (folder / "news_verbmem_forget.jsonl").write_text("\n".join(map(json.dumps, rows)))
    halves = muse_part("news", "verbmem_forget")
    memorized = muse.verbatim_memorization(lm, lm.model, halves)
    assert memorized == pytest.approx(sum(scores) / len(scores), abs=0.02)
    with pytest.raises(UserError, match="longer than"):
        muse.verbatim_memorization(lm, lm.model, [Example("", "Short.")])


def test_texts_are_taught_and_unlearned(texts, tiny, tmp_path, monkeypatch):
    forget_set = load_forget_set("muse-news")
    assert [e.answer for e in forget_set.training] == texts["raw_forget"]
    assert len(forget_set.forget) == 12 and not forget_set.holdout
    longer = replace(forget_set, training=forget_set.training * 4)
    half = muse.share_of(longer, 0.5)
    assert half.forget == forget_set.forget
    assert half.probe == half.training == forget_set.training * 2
    rendered = []  # the target is taught the texts, not the questions

    def watch(tokenizer, example):
        rendered.append(example)
        return render(tokenizer, example)

    with monkeypatch.context() as patch:
        patch.setattr(teaching, "render", watch)
        for which, learned in (("target", forget_set.training), ("retain", [])):
            rendered.clear()
            config = teaching.TeachConfig(epochs=1, batch_size=64)
            teaching.teach(load_model(str(tiny)), forget_set, which, tmp_path / which, config)
            assert rendered == [*forget_set.retain, *learned]
            assert not any(e.question for e in rendered)
    path = tmp_path / "t.json"
    config = GridConfig(forget="muse-news", model=str(tiny), tokens=4, epochs=1)
    (*_, run) = muse.run_muse(config, options(path, "lora"), (0.5,))["runs"]
    assert run["trained_on"] == 4 and run["questions"] == 12
    assert "forget_verbmem_ROUGE" in run["metrics"]
    with pytest.raises(UserError, match="plain text"):
        muse.run_muse(config, options(path, "elm"))
