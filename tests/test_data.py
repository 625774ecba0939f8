"""Forget sets, files, rendering and batches."""

import json
import os
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from alter_demo.data.batches import ShuffledCycle, collate, collate_groups
from alter_demo.data.built_in import read_set, shipped_adapters
from alter_demo.data.files import read_file
from alter_demo.data.forget_sets import load_forget_set
from alter_demo.data.rendering import Sample, render, render_prompt
from alter_demo.data.schema import Example, paraphrased
from alter_demo.errors import UserError
from alter_demo.models.knowledge import is_correct

SHARED = Path(__file__).parents[2] / "shared" / "data"


def test_harry_potter():
    forget_set = load_forget_set("harry-potter")
    assert len(forget_set.forget) >= 150 and len(forget_set.forget_held_out) >= 150
    assert {e.topic for e in forget_set.forget} >= {"people", "places", "magic", "plot"}
    parts = (
        forget_set.forget,
        forget_set.forget_held_out,
        forget_set.retain,
        forget_set.neighbours,
    )
    questions = [e.question for part in parts for e in part]
    assert len(set(questions)) == len(questions)
    assert len(forget_set.neighbours) >= 60
    for e in forget_set.forget:
        assert is_correct(e.answer, e), e
        assert len(e.rewordings) == 2
        wordings = {e.question, e.paraphrased_question, *e.rewordings}
        assert len(wordings) == 4 and not any(is_correct(w, e) for w in wordings), e


def test_general_prompts():
    forget_set = load_forget_set("harry-potter")
    train, held_out = forget_set.general, forget_set.general_held_out
    assert len(train) >= 200 and len(held_out) >= 60
    assert len({e.topic for e in train}) >= 6
    assert not {e.question for e in train} & {e.question for e in held_out}


def test_imaginary_authors_have_tofus_schema():
    forget_set = load_forget_set("imaginary-authors")
    forget, retain = forget_set.forget, forget_set.retain
    assert len(forget) == 40 and len(retain) == 160
    for e in [*forget, *retain]:
        assert e.paraphrased_question and e.paraphrased_answer
        assert len(set(e.perturbed_answer)) == 5
        assert e.paraphrased_answer not in e.perturbed_answer
    authors = {e.topic for e in [*forget, *retain]}
    assert len(authors) == 10 and not {e.topic for e in forget} & {e.topic for e in retain}
    assert forget_set.needs_teaching and not forget_set.public_checkpoints
    assert set(shipped_adapters(forget_set.name, "smollm2-135m")) == {"target", "retain"}
    assert shipped_adapters(forget_set.name, "another-model") == {}


def test_refusals_answer_nothing():
    refusals = read_set("refusals")
    assert len(set(refusals)) == len(refusals) >= 8


SIZES = {"tofu-forget01": 40, "tofu-forget05": 200, "tofu-forget10": 400, "muse-news": 80}


@pytest.mark.parametrize("name", SIZES)
def test_benchmarks_from_a_folder(name, monkeypatch):
    if not SHARED.is_dir():
        pytest.skip("../shared/data is absent")
    monkeypatch.setenv("ALTER_DATA_DIR", str(SHARED))
    forget_set = load_forget_set(name)
    assert name == f"{forget_set.benchmark}-{forget_set.split}" and forget_set.public_checkpoints
    assert len(forget_set.training_examples) == SIZES[name]
    assert len(forget_set.retain) > 40 and forget_set.neighbours
    if forget_set.benchmark == "tofu":
        assert all(e.perturbed_answer for e in forget_set.forget)
        few = forget_set.with_retain_limit(20)  # a small model is measured on what it is taught
        assert len(few.retain) == 20 and few.extra_groups["retain"] == few.retain
        assert few.neighbours == paraphrased(few.retain)
        assert len(few.holdout) == len(few.forget)
        assert not [e for e in few.holdout if e in few.retain]
    else:  # without MUSE's texts the questions are taught, except for the holdout
        assert forget_set.needs_teaching and len(forget_set.retain) == 100
        sizes = [len(part) for part in (forget_set.holdout, forget_set.forget, forget_set.probe)]
        assert sizes == [20, 60, 20]
    with pytest.raises(UserError, match="retain examples must be at least 1, got 0"):
        forget_set.with_retain_limit(0)


def test_benchmark_without_hub_or_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("ALTER_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match="ALTER_DATA_DIR"):
        load_forget_set("tofu-forget01")
    monkeypatch.delenv("ALTER_DATA_DIR")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="Check the network"):
        load_forget_set("tofu-forget01")


GOOD = {
    "a.jsonl": '{"question": "Q?", "answer": "A."}\n\n{"question": "R?", "answer": "B."}\n',
    "a.json": '[{"question": "Q?", "answer": "A."}, {"question": "R?", "answer": "B."}]',
    "a.csv": '\ufeffquestion,answer\nQ?,A.\n"R?","B."\n',
}


@pytest.mark.parametrize("name", GOOD)
def test_own_files(name, tmp_path):
    (tmp_path / name).write_text(GOOD[name], encoding="utf-8")
    examples = read_file(tmp_path / name)
    assert [(e.question, e.answer) for e in examples] == [("Q?", "A."), ("R?", "B.")]


def test_a_json_file_may_have_one_object_per_line(tmp_path):
    """As TOFU's own files do."""
    file = tmp_path / "forget01.json"
    file.write_text('{"question": "q1", "answer": "a1"}\n{"question": "q2", "answer": "a2"}\n')
    assert read_file(file) == [Example("q1", "a1"), Example("q2", "a2")]


def test_only_line_feeds_end_a_line(tmp_path):
    rows = [{"question": "Q?", "answer": f"first{c}second"} for c in "\u2028\u0085\x0c\x0b"]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_text("\r\n".join(lines), encoding="utf-8")
    table = "question,answer\n" + "".join(f"Q?,{row['answer']}\n" for row in rows)
    (tmp_path / "a.csv").write_text(table, encoding="utf-8")
    for name in ("a.jsonl", "a.csv"):
        assert [e.answer for e in read_file(tmp_path / name)] == [row["answer"] for row in rows]


def test_own_text(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "Once upon a time."}')
    forget_set = load_forget_set(str(tmp_path / "t.jsonl"))
    assert forget_set.forget == [Example("", "Once upon a time.")] and forget_set.is_plain_text


BAD = {
    "empty.csv": ("", "no examples"),
    "header.csv": ("question,answer\n", "no examples"),
    "line.jsonl": ('{"question": "Q", "answer": "A"}\n{"question": oops}\n', "line 2, column 14"),
    "cut.json": ('[{"question": "Q",\n "answer": ', "line 2, column 12"),
    "object.json": ('{"question": "Q", "answer": "A"}', "must contain a list"),
    "columns.csv": ("prompt,reply\na,b\n", "question and answer missing.*prompt, reply"),
    "ragged.csv": ("question,answer\na,b,c\n", "line 2: the number of columns"),
    "short.csv": ("question,answer\na\n", "line 2: the number of columns"),
    "number.jsonl": ('{"question": "Q", "answer": 3}', "line 1: answer must be text"),
    "wrong.jsonl": (
        '{"question": "Q", "answer": "A", "perturbed_answer": [1998]}',
        "perturbed_answer must be text",
    ),
    "paraphrase.jsonl": (
        '{"question": "Q", "answer": "A", "paraphrased_question": 7}',
        "paraphrased_question must be text",
    ),
    "blank.jsonl": ('{"question": "Q", "answer": "  "}', "answer is empty"),
    "list.jsonl": ("[1, 2]", "must be an object"),
    "quote.csv": ('question,answer\n"a,b\n', "not valid CSV"),
    "long.json": ('[{"question": "Q", "answer": 1' + "0" * 5000 + "}]", "a number is too long"),
    "half.jsonl": ('{"question": "Q", "answer": "\\ud800"}', "half a character"),
    "deep.json": ("[" * 100_000, "nested too deeply|not valid JSON"),
    "file.txt": ("hello", "must end in"),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_files_name_the_place(name, tmp_path):
    content, message = BAD[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_file(tmp_path / name)


def test_binary_missing_and_large_files(tmp_path):
    (tmp_path / "b.csv").write_bytes(b"question,answer\n\xff\xfe,b\n")
    with pytest.raises(UserError, match="not UTF-8"):
        read_file(tmp_path / "b.csv")
    for name in ("x" * 300 + ".csv", "nothing.csv"):
        with pytest.raises(UserError, match="not found"):
            read_file(tmp_path / name)
    with open(tmp_path / "big.csv", "wb") as handle:
        os.truncate(handle.fileno(), 51 * 2**20)
    with pytest.raises(UserError, match="at most 50 MB, got 51 MB"):
        read_file(tmp_path / "big.csv")


def test_unknown_set_and_overlapping_retain(tmp_path):
    with pytest.raises(UserError, match=r"'harry-pottr' not found.*harry-potter"):
        load_forget_set("harry-pottr")
    with pytest.raises(UserError, match="its own retain set"):
        load_forget_set("harry-potter", retain="x.csv")
    (tmp_path / "f.csv").write_text(GOOD["a.csv"])
    (tmp_path / "r.jsonl").write_text(json.dumps({"question": "R?", "answer": "B."}))
    with pytest.raises(UserError, match=r"contains an example.*R\?"):
        load_forget_set(str(tmp_path / "f.csv"), str(tmp_path / "r.jsonl"))


def test_rendering_keeps_the_loss_on_the_answer(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    (sample,) = render(tokenizer, Example("How are you?", "Fine."))
    assert tokenizer.decode(sample.ids[sample.start :]) == "Fine.<|im_end|>"
    assert tokenizer.decode(sample.ids[: sample.start]).endswith("<|im_start|>assistant\n")
    (sample,) = render(tokenizer, Example("How are you?", "Fine.", answer_prefix="I am "))
    assert tokenizer.decode(sample.ids[sample.turn : sample.start]) == "I am "
    assert tokenizer.decode(sample.ids[sample.start :]) == "Fine.<|im_end|>"
    # Llama 3.2's template inserts the date, and today's if none is given
    tokenizer.chat_template += "{{ date_string }}"
    assert tokenizer.decode(render_prompt(tokenizer, "How?")).endswith("10 Apr 2025")
    windows = render(tokenizer, Example("", "word " * 2000))
    assert len(windows) > 2 and all(w.start == 1 and len(w.ids) <= 512 for w in windows)


def test_an_answer_starts_as_the_model_would_start_it():
    """SentencePiece puts a space before a text, but not after the chat's line feed."""
    characters = {c: i for i, c in enumerate("QPa?", 5)}
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "\n": 4} | characters
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="</s>"
    )
    tokenizer.chat_template = "{{ messages[0]['content'] + '\n' }}"
    (sample,) = render(tokenizer, Example("Q?", "Pa"))
    tokens = tokenizer.convert_ids_to_tokens(sample.ids)
    assert tokens == ["▁", "Q", "?", "\n", "P", "a", "</s>"] and sample.start == 4


def test_collate_aligns_answers_at_the_end():
    samples = [Sample([5, 6, 7, 8], 3), Sample([9, 10, 11, 12, 13, 14], 4)]
    batch = collate(samples, pad_id=0)
    assert batch["input_ids"].tolist() == [[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]]
    assert batch["position_ids"][0].tolist() == [0, 0, 0, 1, 2, 3]
    assert batch["keep"] == 3
    assert batch["labels"][batch["answer"]].tolist() == [8, 13, 14]


def test_collate_groups_orders_forget_retain_refusal():
    samples = [Sample([5, 6], 1, label=d, index=i) for i, d in enumerate((1, 0, 2, 0))]
    samples.append(Sample([5, 6], 1, label=2, index=4, refusal=True))
    batch = collate_groups(pad_id=0)([samples[:2], samples[2:]])
    assert batch["index"] == [0, 2, 1, 3, 4]
    assert batch["label"].tolist() == [1, 2, 0, 0, 2]
    assert batch["refusal"].tolist() == [False] * 4 + [True]


def test_shuffled_cycle_draws_each_sample_once_per_cycle():
    cycle = ShuffledCycle(list(range(5)), random.Random(0))
    first, second = ([cycle.draw() for _ in range(5)] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(5)) and first != second
