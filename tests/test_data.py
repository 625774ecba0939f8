import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from alter_demo.answers import is_right
from alter_demo.data import Item, Sample, asked_differently, collate, load_forget_set, read_file, render, render_prompt
from alter_demo.errors import UserError

SHARED = Path(__file__).parents[2] / "shared" / "data"


def test_harry_potter_pool():
    made = load_forget_set("harry-potter")
    assert len(made.forget) >= 150 and len(made.forget_held_out) >= 150
    assert {i.topic for i in made.forget} >= {"people", "places", "magic", "plot"}
    questions = [i.question for i in [*made.forget, *made.forget_held_out, *made.retain, *made.neighbours]]
    assert len(set(questions)) == len(questions)
    assert len(made.neighbours) >= 60
    for item in made.forget:
        assert is_right(item.answer, item), item
        assert not is_right(item.question, item) and not is_right(item.paraphrased_question, item), item


def test_general_prompts():
    made = load_forget_set("harry-potter")
    assert len(made.general) >= 200 and len(made.general_held_out) >= 60
    assert len({i.topic for i in made.general}) >= 6
    assert not {i.question for i in made.general} & {i.question for i in made.general_held_out}


def test_imaginary_authors_follow_tofus_schema():
    made = load_forget_set("imaginary-authors")
    assert len(made.forget) == 40 and len(made.retain) == 160
    for item in [*made.forget, *made.retain]:
        assert item.paraphrased_question and item.paraphrased_answer
        assert len(set(item.perturbed_answer)) == 5 and item.paraphrased_answer not in item.perturbed_answer
    authors = {i.topic for i in [*made.forget, *made.retain]}
    assert len(authors) == 10 and not {i.topic for i in made.forget} & {i.topic for i in made.retain}


@pytest.mark.parametrize("name", ["tofu-forget01", "tofu-forget05", "tofu-forget10", "muse-news"])
def test_benchmarks_from_a_folder(name, monkeypatch):
    if not SHARED.is_dir():
        pytest.skip("../shared/data is absent")
    monkeypatch.setenv("ALTER_DATA_DIR", str(SHARED))
    made = load_forget_set(name)
    sizes = {"tofu-forget01": 40, "tofu-forget05": 200, "tofu-forget10": 400, "muse-news": 80}
    assert len(made.trained_on) == sizes[name] and len(made.retain) > 40 and made.neighbours
    if name.startswith("tofu"):
        assert all(i.perturbed_answer for i in made.forget)
        few = made.smaller(20)  # a small model is measured on what it was taught
        assert len(few.retain) == 20 and few.more["retain"] == few.retain
        assert few.neighbours == asked_differently(few.retain)
        assert len(few.holdout) == len(few.forget) and not [i for i in few.holdout if i in few.retain]
    else:  # without MUSE's texts: the questions are learned, and some of them never
        assert (
            len(made.holdout) == 20
            and len(made.forget) == 60
            and len(made.probe) == 20
            and made.learned
            and len(made.retain) == 100
        )
    with pytest.raises(UserError, match="retain item"):
        made.smaller(0)


def test_benchmark_without_hub_or_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("ALTER_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match="ALTER_DATA_DIR"):
        load_forget_set("tofu-forget01")
    monkeypatch.delenv("ALTER_DATA_DIR")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="check the network"):
        load_forget_set("tofu-forget01")


GOOD = {
    "a.jsonl": '{"question": "Q?", "answer": "A."}\n\n{"question": "R?", "answer": "B."}\n',
    "a.json": '[{"question": "Q?", "answer": "A."}, {"question": "R?", "answer": "B."}]',
    "a.csv": '\ufeffquestion,answer\nQ?,A.\n"R?","B."\n',
}


@pytest.mark.parametrize("name", GOOD)
def test_own_files(name, tmp_path):
    (tmp_path / name).write_text(GOOD[name], encoding="utf-8")
    items = read_file(tmp_path / name)
    assert [(i.question, i.answer) for i in items] == [("Q?", "A."), ("R?", "B.")]


def test_tofus_own_files_hold_an_object_a_line_whatever_their_name_says(tmp_path):
    (tmp_path / "forget01.json").write_text('{"question": "q1", "answer": "a1"}\n{"question": "q2", "answer": "a2"}\n')
    assert read_file(tmp_path / "forget01.json") == [Item("q1", "a1"), Item("q2", "a2")]


def test_only_line_feeds_end_a_line(tmp_path):
    rows = [{"question": "Q?", "answer": f"first{c}second"} for c in "\u2028\u0085\x0c\x0b"]
    (tmp_path / "a.jsonl").write_text("\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    (tmp_path / "a.csv").write_text(
        "question,answer\n" + "".join(f"Q?,{r['answer']}\n" for r in rows), encoding="utf-8"
    )
    for name in ("a.jsonl", "a.csv"):
        assert [i.answer for i in read_file(tmp_path / name)] == [r["answer"] for r in rows]


def test_own_text(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "Once upon a time."}')
    assert load_forget_set(str(tmp_path / "t.jsonl")).forget == [Item("", "Once upon a time.")]


BAD = {
    "empty.csv": ("", "no examples"),
    "header.csv": ("question,answer\n", "no examples"),
    "line.jsonl": ('{"question": "Q", "answer": "A"}\n{"question": oops}\n', "line 2, column 14"),
    "cut.json": ('[{"question": "Q",\n "answer": ', "line 2, column 12"),
    "object.json": ('{"question": "Q", "answer": "A"}', "must hold a list"),
    "columns.csv": ("prompt,reply\na,b\n", "question and answer missing.*prompt, reply"),
    "ragged.csv": ("question,answer\na,b,c\n", "line 2: the number of columns"),
    "short.csv": ("question,answer\na\n", "line 2: the number of columns"),
    "number.jsonl": ('{"question": "Q", "answer": 3}', "line 1: answer must be text"),
    "wrong.jsonl": ('{"question": "Q", "answer": "A", "perturbed_answer": [1998]}', "perturbed_answer must be text"),
    "asked.jsonl": ('{"question": "Q", "answer": "A", "paraphrased_question": 7}', "paraphrased_question must be text"),
    "blank.jsonl": ('{"question": "Q", "answer": "  "}', "answer is empty"),
    "list.jsonl": ("[1, 2]", "must be an object"),
    "quote.csv": ('question,answer\n"a,b\n', "not valid CSV"),
    "long.json": ('[{"question": "Q", "answer": 1' + "0" * 5000 + "}]", "a number is too long"),
    "half.jsonl": ('{"question": "Q", "answer": "\\ud800"}', "half a character"),
    "deep.json": ("[" * 100_000, "nested too deeply|not valid JSON"),
    "file.txt": ("hello", "must end in"),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_files_say_where(name, tmp_path):
    (tmp_path / name).write_text(BAD[name][0])
    with pytest.raises(UserError, match=BAD[name][1]):
        read_file(tmp_path / name)


def test_binary_absent_and_large_files(tmp_path):
    (tmp_path / "b.csv").write_bytes(b"question,answer\n\xff\xfe,b\n")
    with pytest.raises(UserError, match="not UTF-8"):
        read_file(tmp_path / "b.csv")
    with pytest.raises(UserError, match="no file"):
        read_file(tmp_path / ("x" * 300 + ".csv"))
    with pytest.raises(UserError, match="no file"):
        read_file(tmp_path / "nothing.csv")
    with open(tmp_path / "big.csv", "wb") as handle:
        os.truncate(handle.fileno(), 51 * 2**20)
    with pytest.raises(UserError, match="50 MB is the most"):
        read_file(tmp_path / "big.csv")


def test_unknown_set_and_overlapping_retain(tmp_path):
    with pytest.raises(UserError, match="harry-potter"):
        load_forget_set("harry-pottr")
    with pytest.raises(UserError, match="brings its own"):
        load_forget_set("harry-potter", retain="x.csv")
    (tmp_path / "f.csv").write_text(GOOD["a.csv"])
    (tmp_path / "r.jsonl").write_text(json.dumps({"question": "R?", "answer": "B."}))
    with pytest.raises(UserError, match=r"contains an example.*R\?"):
        load_forget_set(str(tmp_path / "f.csv"), str(tmp_path / "r.jsonl"))


def test_rendering_keeps_the_loss_on_the_answer(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    (sample,) = render(tokenizer, Item("How are you?", "Fine."))
    assert tokenizer.decode(sample.ids[sample.start :]) == "Fine.<|im_end|>"
    assert tokenizer.decode(sample.ids[: sample.start]).endswith("<|im_start|>assistant\n")
    tokenizer.chat_template += "{{ date_string }}"  # as Llama 3.2's, which takes today's where none is given
    assert tokenizer.decode(render_prompt(tokenizer, "How?")).endswith("10 Apr 2025")
    windows = render(tokenizer, Item("", "word " * 2000))
    assert len(windows) > 2 and all(w.start == 1 and len(w.ids) <= 512 for w in windows)


def test_an_answer_begins_as_the_model_would_begin_it():
    """SentencePiece puts a space before a text, and none after the chat's line feed."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "\n": 4} | {c: i for i, c in enumerate("QPa?", 5)}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = "{{ messages[0]['content'] + '\n' }}"
    (sample,) = render(tokenizer, Item("Q?", "Pa"))
    assert tokenizer.convert_ids_to_tokens(sample.ids) == ["▁", "Q", "?", "\n", "P", "a", "</s>"] and sample.start == 4


def test_collate_lines_up_answers_at_the_end():
    batch = collate([Sample([5, 6, 7, 8], 3), Sample([9, 10, 11, 12, 13, 14], 4)], pad_id=0)
    assert batch["input_ids"].tolist() == [[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]]
    assert batch["position_ids"][0].tolist() == [0, 0, 0, 1, 2, 3]
    assert batch["keep"] == 3
    assert batch["labels"][batch["answer"]].tolist() == [8, 13, 14]
