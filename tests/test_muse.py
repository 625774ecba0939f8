"""MUSE on a tiny model: questions alone, and with texts as the hub has them."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import COLOURS

from alter_demo import data, figures, load_model, metrics, muse, report, teaching
from alter_demo.errors import UserError
from alter_demo.grid import GridConfig, How

FEW = {"max_steps": 2, "batch_size": 2, "probe_every": 1}
SENTENCE = "The {} door of house {} was painted by the mayor in the spring of that year. "


@pytest.fixture
def folder(tmp_path, cache, monkeypatch):
    """Twelve questions a side under `muse/`, as a person's own folder."""
    (tmp_path / "data" / "muse").mkdir(parents=True)
    for part, thing in (("forget", "door"), ("retain", "roof")):
        rows = [{"question": f"Colour of {thing} {i}?", "answer": f"It is {c}."} for i, c in enumerate(COLOURS * 2)]
        (tmp_path / "data" / "muse" / f"news_knowmem_{part}_qa.json").write_text(json.dumps(rows[:12]))
    monkeypatch.setenv("ALTER_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr("alter_demo.answers.OWN_TOKENS", 4)
    return tmp_path / "data" / "muse"


def put(folder, name, texts):
    rows = [{"text": t} for t in texts]
    (folder / f"news_{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_by_the_size_of_the_forget_set(folder, tiny, tmp_path):
    config = GridConfig(forget="muse-news", model=str(tiny), tokens=4, epochs=2)
    how = How(tmp_path / "m.json", FEW)
    results = muse.muse_grid(config, ["alter_selective"], [0], how, (0.5, 1.0))
    runs = results["runs"]
    assert [(r["method"], r.get("trained_on"), r.get("questions")) for r in runs] == [
        ("retain", None, None), ("target", None, None), ("alter_selective", 4, 3), ("alter_selective", 9, 6),
    ]  # fmt: skip
    for run in runs:
        assert {"forget_knowmem_ROUGE", "retain_knowmem_ROUGE", "privleak"} <= run["metrics"].keys()
        assert "forget_verbmem_ROUGE" not in run["metrics"]  # no texts here
    before = how.path.read_text()
    muse.muse_grid(config, ["alter_selective"], [0], how, (0.5, 1.0))
    assert how.path.read_text() == before
    for run in runs:  # as if these were the method's own settings
        run["config"]["overrides"] = {k: v for k, v in run["config"]["overrides"].items() if k == "share"}
    text = report.table_of(results)
    assert "50% of the set: forgotten / rest" in text and not report.is_tuning(results)
    assert figures.tradeoff(results).layout.yaxis.autorange == "reversed"
    assert report.commands_of(results, "muse-news")[0].startswith("python -m alter_demo muse --forget muse-news")
    for bad, sentence in (((2.0,), "share"), ((0.0,), "share")):
        with pytest.raises(UserError, match=sentence):
            muse.muse_grid(config, ["alter"], [0], how, bad)


def test_the_probe_is_not_reported(folder):
    made = data.load_forget_set("muse-news")
    groups = {k: {i.question for i in own} for k, own in vars(made).items() if k in ("forget", "probe", "holdout")}
    assert [len(g) for g in groups.values()] == [6, 3, 3] and len(set.union(*groups.values())) == 12
    assert {i.question for i in made.trained_on} == groups["forget"] | groups["probe"]
    part = muse.share_of(made, 0.5)
    assert {q.question for q in part.forget + part.probe} == {i.question for i in made.trained_on[:4]}


def test_texts_are_trained_on_and_measured(folder, taught, tiny, tmp_path, monkeypatch):
    texts = [" ".join(SENTENCE.format(c, i) for i in range(12)) for c in COLOURS[:4]]
    others = [" ".join(SENTENCE.format(c, i) for i in range(7, 19)) for c in COLOURS[4:8]]
    kept = [" ".join(SENTENCE.format(c, i) for i in range(12)) for c in COLOURS[8:]]
    for name in ("raw_forget", "raw_retain1", "verbmem_forget", "privleak_forget", "privleak_holdout"):
        put(folder, name, {"raw_retain1": kept, "privleak_holdout": others}.get(name, texts))
    made = data.load_forget_set("muse-news")
    assert [i.answer for i in made.training] == texts and len(made.forget) == 12 and not made.holdout
    half = muse.share_of(replace(made, training=made.training * 4), 0.5)
    assert half.forget == made.forget and half.probe == half.training == made.training * 2
    lm = load_model(str(taught), dtype="float32")
    own = [data.Item("", t) for t in texts]
    ids = [lm.tokenizer(t).input_ids for t in texts]
    with torch.no_grad():  # one by one, token by token
        said = [lm.model.generate(torch.tensor([r[:200]]), max_new_tokens=128, do_sample=False)[0, 200:] for r in ids]
    pairs = [
        (lm.tokenizer.decode(a, skip_special_tokens=True), lm.tokenizer.decode(r[200:328]))
        for a, r in zip(said, ids, strict=True)
    ]
    by_hand = sum(metrics.rouge(a, b)[1] for a, b in pairs) / len(pairs)
    assert muse.verbatim(lm, lm.model, own) == pytest.approx(by_hand)
    found = muse.on_texts(lm, lm.model, {k: data.muse_part("news", k) for k in
                          ("verbmem_forget", "privleak_forget", "privleak_holdout")}, auc_retain=0.5)  # fmt: skip

    def least_likely(text):  # mean log-probability of that share of its tokens
        row = torch.tensor([lm.tokenizer(text).input_ids[:512]])
        log_p = lm.model(row).logits[0, :-1].log_softmax(-1).gather(-1, row[0, 1:, None])[:, 0]
        return log_p.sort().values[: int(metrics.MIN_K * len(log_p))].mean()

    with torch.no_grad():
        pairs = [least_likely(a) > least_likely(b) for a in texts for b in others]
    auc = sum(map(float, pairs)) / len(pairs)
    assert found["mia_min_k_texts"] == pytest.approx(auc)
    assert found["privleak"] == pytest.approx(100 * ((1 - auc) - 0.5) / 0.5)
    parts = [{"prompt": lm.tokenizer.decode(r[:200]), "gt": lm.tokenizer.decode(r[200:])} for r in ids]  # as on the hub
    (folder / "news_verbmem_forget.jsonl").write_text("\n".join(map(json.dumps, parts)))
    assert muse.verbatim(lm, lm.model, data.muse_part("news", "verbmem_forget")) == pytest.approx(by_hand, abs=0.02)
    with pytest.raises(UserError, match="longer than"):
        muse.verbatim(lm, lm.model, [data.Item("", "Short.")])
    learned = []  # the target is taught the texts, not the questions
    monkeypatch.setattr(
        teaching, "render", lambda tokenizer, item: learned.append(item) or data.render(tokenizer, item)
    )
    for which in ("target", "retain"):
        learned.clear()
        config = teaching.LearnConfig(epochs=1, batch_size=64)
        teaching.learn(load_model(str(tiny)), made, which, tmp_path / which, config)
        assert learned == [*made.retain, *(made.training if which == "target" else [])]
    assert not any(i.question for i in learned)
    how = How(tmp_path / "t.json", FEW)
    grid_config = GridConfig(forget="muse-news", model=str(tiny), tokens=4, epochs=1)
    (*_, run) = muse.muse_grid(grid_config, ["lora"], [0], how, (0.5,))["runs"]
    assert run["trained_on"] == 4 and run["questions"] == 12 and "forget_verbmem_ROUGE" in run["metrics"]
    with pytest.raises(UserError, match="not plain text"):
        muse.muse_grid(grid_config, ["elm"], [0], how)
