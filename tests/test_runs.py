"""The whole way on a tiny random model, through Python and the command line."""

import gc
import json
import os
import shutil
import time
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import FEW, OWN_FORGET, OWN_RETAIN, quick
from torch.optim import AdamW

from alter_demo import METHOD_NAMES, data, load_model, load_run, runs, unlearn
from alter_demo.adapter import AlterConfig
from alter_demo.answers import greedy, log_probs
from alter_demo.cli import main, show_run
from alter_demo.errors import Interrupted, UserError
from alter_demo.methods import METHODS
from alter_demo.results import read_results, shortfalls, write_json
from alter_demo.runs import UnlearnConfig
from alter_demo.subdomains import fit_gate
from alter_demo.teaching import LearnConfig, learn
from alter_demo.training import Pairs, phase_one


def trained(run):
    return {n: p for n, p in run.model.named_parameters() if "alter_" in n}


def test_the_page_knows_the_methods():
    assert tuple(METHODS) == METHOD_NAMES


@pytest.mark.parametrize("method", METHODS)
def test_run_leaves_a_whole_folder_that_loads(tiny, made, tmp_path, method):
    steps = []
    config = UnlearnConfig(method=method, threshold="auto")
    train = quick(method, lr=0.02, lr_b=1e-2, steering=5.0)
    run = unlearn(str(tiny), made, config, train, "r1", tmp_path / "runs", on_step=lambda e, n: steps.append((e, n)))
    assert [e["step"] for e, _ in steps] == list(range(1, FEW + 1)) and steps[0][1] == FEW
    assert sorted(os.listdir(tmp_path / "runs")) == ["r1"]
    folder = tmp_path / "runs" / "r1"
    weights = "model" if METHODS[method].trains in ("full", "mlp") else "adapter"
    files = {weights, "config.json", "metrics.json", "answers.json", "log_before.json", "log_after.json"}
    assert {p.name for p in folder.iterdir()} == files
    metrics = json.loads((folder / "metrics.json").read_text())
    for side in ("before", "after"):
        for group in ("forget", "forget_held_out", "neighbours", "general"):
            assert set(metrics[side][group]) >= {"probability", "rouge_l", "rouge_l_to_base", "repetition"}
    assert metrics["before"]["forget"]["rouge_l_to_base"] == 1.0
    assert set(metrics["seconds"]) == {"unlearn", "evaluate"}
    assert {"config", "seed", "versions", "hardware", "history"} <= set(metrics)
    again = load_run(folder)
    prompts = [i.question for i in made.forget[:4]] + ["Hello!"]
    assert again.answer(prompts, max_new_tokens=8) == run.answer(prompts, max_new_tokens=8)
    assert again.answer(prompts, False, 8) == greedy(load_model(str(tiny)), prompts, 8)
    pair = [[i.question for i in made.forget], [i.answer for i in made.forget]]
    assert again.log_probs(*pair) == pytest.approx(run.log_probs(*pair), abs=1e-6)
    assert again.log_probs(*pair) != pytest.approx(again.log_probs(*pair, adapted=False), abs=1e-4)
    assert again.log_probs(*pair, adapted=False) == pytest.approx(log_probs(load_model(str(tiny)), *pair), abs=1e-6)


def test_unlearning_lowers_the_forget_answers_and_spares_the_rest(taught, made):
    config, train = UnlearnConfig(threshold="auto", n_experts=1), quick(max_steps=30, lr_b=1e-2, batch_size=4)
    run = unlearn(str(taught), made, config, train, folder=None, evaluate=False)
    forget = [[i.question for i in made.forget], [i.answer for i in made.forget]]
    drop = torch.tensor(run.log_probs(*forget)) - torch.tensor(run.log_probs(*forget, adapted=False))
    assert drop.mean() < -0.4 and (drop < 0).all()  # the words of "The door is" are no knowledge and stay
    retain = [[i.question for i in made.retain], [i.answer for i in made.retain]]
    change = torch.tensor(run.log_probs(*retain)) - torch.tensor(run.log_probs(*retain, adapted=False))
    assert change.abs().mean() < drop.abs().mean() / 4


def test_it_learns_to_say_that_it_does_not_know(taught, made):
    said = data.read_set("unknown")
    questions = [i.question for i in made.forget]
    change = {}
    for weight in (0.0, 1.0):
        train = quick(max_steps=40, lr_b=5e-3, batch_size=4, refusal=weight)
        run = unlearn(str(taught), made, UnlearnConfig(threshold="auto", n_experts=2), train, None, None, False)
        pairs = [[q for q in questions for _ in said[:3]], said[:3] * len(questions)]
        after, before = run.log_probs(*pairs), run.log_probs(*pairs, adapted=False)
        change[weight] = torch.tensor(after).mean() - torch.tensor(before).mean()
    assert change[1.0] > 0.5 and change[1.0] > change[0.0] + 0.2


def test_every_sub_domain_gets_refusals():
    forget = [data.Sample([1, 2], 1, label=d) for d in (1, 2, 2, 3)]
    refusals = [replace(s, refusal=True) for s in forget]
    pairs = Pairs(forget, [data.Sample([1, 2], 1)], 24, 0, refusals)
    found = [s.label for pair in pairs for s in pair if s.refusal]
    assert sorted(found) == [1] * 8 + [2] * 8 + [3] * 8
    assert [pair[0].label for pair in pairs][:4] == [1, 2, 3, 1] and all(pair[1].label == 0 for pair in pairs)


def test_forced_routes(tiny, made):
    run = unlearn(str(tiny), made, UnlearnConfig(n_experts=2, threshold="auto"), quick(), folder=None, evaluate=False)
    logits = {}
    ids = torch.tensor([[5, 6, 7, 8]], device=run.lm.device)
    for force in (None, "off", "r", 1, 2):
        with run.only(force), torch.no_grad():
            logits[force] = run.model(input_ids=ids).logits
    assert torch.equal(logits["off"], load_model(str(tiny)).model(ids).logits)
    assert not torch.equal(logits["r"], logits["off"]) and not torch.equal(logits[1], logits[2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # one of them is not what `auto` takes here
def test_a_run_loads_in_its_own_precision(tiny, made, tmp_path, dtype):
    unlearn(str(tiny), made, UnlearnConfig(threshold="auto"), quick(), "r", tmp_path, dtype=dtype)
    assert load_run(tmp_path / "r").lm.dtype == dtype


def test_what_a_run_falls_short_of_is_told(tiny, made, capsys):
    run = unlearn(str(tiny), made, UnlearnConfig(threshold="auto"), quick(), folder=None)
    run.metrics["phase_one"]["router"]["forget_open_at_answer"] = 1.0
    run.metrics["stopped"] = "the probe reached its target"
    assert not run.metrics["held_out"]  # no question of the file is asked in other words
    assert "no paraphrased_question" in shortfalls(run.metrics)[0]
    run.metrics["held_out"] = True
    assert shortfalls(run.metrics) == []
    run.metrics["phase_one"]["router"]["forget_open_at_answer"] = 0.25
    run.metrics["stopped"], run.metrics["config"]["train"]["stop_ratio"] = "all steps done", 0.001
    gate, steps = shortfalls(run.metrics)
    assert "opens on 25% of held-out forget samples only" in gate and "allow more" in steps and "12 of" not in steps
    run.metrics["phase_one"]["samples"]["forget"] = 20
    assert "12 of the 20 forget samples were seen" in shortfalls(run.metrics)[1]
    run.metrics["config"]["train"]["stop_ratio"] = 1e-12  # as on plain texts
    assert shortfalls(run.metrics)[1] == "12 of the 20 forget samples were seen."
    run.metrics["phase_one"]["samples"]["retain_given"] = 40
    assert "6 of the 40 samples of what must stay were used" in shortfalls(run.metrics)[2]
    published = unlearn(str(tiny), made, UnlearnConfig("alter"), quick("alter"), folder=None)
    published.metrics["phase_one"]["router"]["forget_open_at_answer"] = 0.25  # it acts everywhere
    assert not any("gate" in told for told in shortfalls(published.metrics))
    show_run(run)
    assert "opens on 25% of" in capsys.readouterr().out.replace("\n", " ")


def test_parts_can_be_taken_out(tiny, made):
    """Each switch of the ablation changes what it is named after, and nothing acts where it acted before."""

    def run(**values):
        return unlearn(str(tiny), made, UnlearnConfig(**values), quick(lr_a=1e-2), folder=None, evaluate=False)

    def learned(run, part):
        return [p for n, p in trained(run).items() if part in n]

    text = "What is the capital of France? It is Paris, and the river is the Seine."

    whole, bare = run(), run(router=False)
    records = bare.tokens(text)
    assert bare.router.config.n_experts == 1 and all(r.weights[1] == 1 for r in records)
    unmasked = run(entropy_mask=False)
    assert not any(r.route == "A" for r in unmasked.tokens(text)) and any(r.route == "A" for r in whole.tokens(text))
    assert any((a != b).any() for a, b in zip(learned(unmasked, "_A."), learned(whole, "_A."), strict=True))
    assert unmasked.metrics["phase_one"]["uncertain_share"] == 0 < whole.metrics["phase_one"]["uncertain_share"]
    mixed = run(isolation=False)
    assert any((a != b).any() for a, b in zip(learned(mixed, "_B."), learned(whole, "_B."), strict=True))
    literal = run(router_input="entropy")
    assert literal.router.alter_gate["default"].shape[1] == 2  # the entropy and the bias
    found = [r.metrics["phase_one"]["sub_domains"] for r in (literal, whole)]
    assert found[0] == found[1] and len(found[0]) > 1  # by topic, whatever the gate reads
    layers = whole.lm.model.config.num_hidden_layers
    for name, share in (("attention", 4 / 7), ("mlp", 3 / 7), ("last_third", (layers // 3) / layers)):
        assert len(learned(run(layers=name), "_B.")) == round(share * len(learned(whole, "_B."))), name
    for bad in ({"layers": "head"}, {"router_input": "stars"}):
        with pytest.raises(UserError, match="is"):
            run(**bad)


def test_same_seed_same_run(tiny, made):
    a, b = (
        unlearn(str(tiny), made, UnlearnConfig(threshold="auto"), quick(seed=3), folder=None, evaluate=False)
        for _ in range(2)
    )
    assert all(torch.equal(p, trained(b)[n]) for n, p in trained(a).items())


def test_resume_equals_uninterrupted(tiny, made, tmp_path):
    config = UnlearnConfig(threshold="auto")
    whole = unlearn(str(tiny), made, config, quick(), folder=None, evaluate=False)
    saving = quick(save_steps=3)
    stop = iter([False, False, True])
    unlearn(
        str(tiny), made, config, saving, folder=None, evaluate=False, resume=tmp_path / "c",
        should_stop=lambda: next(stop),
    )  # fmt: skip
    assert (tmp_path / "c" / "checkpoint-3").is_dir()
    resumed = unlearn(str(tiny), made, config, saving, folder=None, evaluate=False, resume=tmp_path / "c")
    assert resumed.metrics["history"][1]["step"] == 4
    assert all(torch.equal(p, trained(resumed)[n]) for n, p in trained(whole).items())
    again = unlearn(str(tiny), made, config, saving, folder=None, evaluate=False, resume=tmp_path / "c")
    assert again.metrics["steps"] == FEW and again.metrics["history"][-1]["probe"]  # nothing was left to be done
    assert all(torch.equal(p, trained(again)[n]) for n, p in trained(whole).items())
    with pytest.raises(UserError, match="of another run"):
        other = quick(save_steps=3, seed=1)
        unlearn(str(tiny), made, config, other, folder=None, evaluate=False, resume=tmp_path / "c")


def test_what_a_killed_process_has_left_goes_after_a_day(tiny, made, tmp_path):
    old, new = tmp_path / ".new-old", tmp_path / ".new-now"
    for left in (old, new):
        left.mkdir()
        (left / "half.safetensors").write_bytes(b"0")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    unlearn(str(tiny), made, UnlearnConfig(threshold="auto"), quick(), "r", tmp_path, evaluate=False)
    assert not old.exists() and new.exists() and (tmp_path / "r" / "metrics.json").is_file()


def test_stopping_keeps_what_there_is(tiny, made, tmp_path):
    run = unlearn(str(tiny), made, UnlearnConfig(threshold="auto"), quick(), "s", tmp_path, should_stop=lambda: True)
    assert run.metrics["steps"] == 1 and run.metrics["stopped"] == "stopped by hand"
    assert (tmp_path / "s" / "metrics.json").is_file() and run.metrics["after"]


def test_leaving_while_the_probe_is_looked_at_keeps_what_there_is(tiny, made, tmp_path):
    def leave(step, answers):
        if step:
            raise Interrupted

    config = UnlearnConfig(threshold="auto")
    run = unlearn(str(tiny), made, config, quick(), "s", tmp_path, evaluate=False, on_answers=leave)
    assert run.metrics["steps"] == 2 and run.metrics["stopped"] == "stopped by hand"
    assert load_run(tmp_path / "s").metrics["history"][-1]["step"] == 2


@pytest.mark.parametrize("method", ["alter_selective", "npo"])  # npo is measured before its weights change
def test_stopping_while_it_measures_keeps_the_run_without_figures(tiny, made, tmp_path, method):
    asked = []
    run = unlearn(
        str(tiny), made, UnlearnConfig(method, threshold="auto"), quick(method), "r", tmp_path,
        on_stage=lambda what, share: asked.append(what), should_stop=lambda: any("measuring" in w for w in asked),
    )  # fmt: skip
    assert run.metrics["after"] == {} and run.logs == {} and any("no figures" in t for t in shortfalls(run.metrics))
    assert run.metrics["steps"] == (1 if method == "npo" else FEW)
    assert load_run(tmp_path / "r").answer(["Hello!"], max_new_tokens=2)
    show_run(run)


def test_a_second_press_stops_measuring_and_a_first_one_does_not(tiny, made):
    """In training, then let go (as the page does), then pressed again in the first half of measuring."""
    presses = iter([True, True, False, True])
    run = unlearn(
        str(tiny), made, UnlearnConfig(threshold="auto"), quick(), folder=None, should_stop=lambda: next(presses)
    )
    assert run.metrics["steps"] == 1 and not run.metrics["measured"] and run.metrics["after"] == {}


def test_what_was_learned_is_kept_when_measuring_breaks(tiny, made, tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("alter_demo.runs.evaluation.evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        unlearn(str(tiny), made, UnlearnConfig(threshold="auto"), quick(), "r", tmp_path)
    run = load_run(tmp_path / "r")
    assert run.answer(["Hello!"], max_new_tokens=2) and not run.metrics["measured"]
    assert any("no figures" in told for told in shortfalls(run.metrics))


def test_stops_when_the_probe_has_reached_its_target(taught, made):
    run = unlearn(
        str(taught), made, UnlearnConfig(threshold="auto"), quick(max_steps=200, lr_b=1e-2, stop_ratio=0.7),
        folder=None, evaluate=False,
    )  # fmt: skip
    assert run.metrics["stopped"] == "the probe reached its target" and run.metrics["steps"] < 200


def test_gradient_checkpointing_learns_the_same(tiny, made):
    a, b = (
        unlearn(
            str(tiny), made, UnlearnConfig(threshold="auto"), quick(gradient_checkpointing=on), folder=None,
            evaluate=False,
        )
        for on in (False, True)
    )  # fmt: skip
    assert all(torch.allclose(p, trained(b)[n], atol=1e-5) for n, p in trained(a).items())
    assert any(p.any() for n, p in trained(b).items() if "alter_B" in n)


def test_a_failing_run_leaves_nothing(tiny, made, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("alter_demo.results.json.dump", fail)
    with pytest.raises(UserError, match="No space left"):
        unlearn(str(tiny), made, UnlearnConfig(threshold="auto"), quick(), "x", tmp_path / "runs", evaluate=False)
    assert os.listdir(tmp_path / "runs") == []
    with pytest.raises(UserError, match="No space left"):
        write_json(tmp_path / "results" / "r.json", {})
    assert os.listdir(tmp_path / "results") == []
    with pytest.raises(UserError, match="is a folder"):
        read_results(tmp_path)


def test_a_model_whose_makers_sample_strangely_is_kept_too(tiny, made, tmp_path):
    """transformers saves no generation_config that contradicts itself, and some on the hub do."""
    shutil.copytree(tiny, tmp_path / "m")
    odd = json.loads((tiny / "generation_config.json").read_text()) | {"temperature": 0.6, "do_sample": False}
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(odd))
    run = unlearn(str(tmp_path / "m"), made, UnlearnConfig("grad_diff"), quick("grad_diff"), "r", tmp_path)
    assert load_run(run.path).model.generation_config.eos_token_id == 2


def test_a_text_beyond_the_models_positions_is_one_sentence(tiny, made, tmp_path):
    shutil.copytree(tiny, tmp_path / "m")
    config = json.loads((tiny / "config.json").read_text()) | {"max_position_embeddings": 8}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="this model reads 8 at most"):
        unlearn(str(tmp_path / "m"), made, UnlearnConfig(threshold="auto"), quick(), folder=None)


def test_a_run_that_nobody_uses_is_gone_when_the_next_model_is_loaded(tiny, made):
    run = unlearn(str(tiny), made, UnlearnConfig(threshold="auto"), quick(), folder=None, evaluate=False)
    assert not [o for o in gc.get_objects() if type(o) is AdamW]  # the optimizer went with the training
    weights = weakref.ref(run.lm.model)
    del run
    load_model(str(tiny))
    assert weights() is None


def test_plain_text_can_be_forgotten(tiny, few, tmp_path):
    (tmp_path / "t.jsonl").write_text(
        "\n".join(json.dumps({"text": f"The code of room {i} is {i * 7}."}) for i in range(9))
    )
    run = unlearn(str(tiny), str(tmp_path / "t.jsonl"), UnlearnConfig(threshold="auto"), quick(), folder=None)
    assert run.metrics["steps"] == FEW and run.metrics["peak_memory_mb"] >= run.metrics["training_memory_mb"] > 0
    rows = ["a", *(f"The code of room {i} is {i * 7}." for i in range(9))]  # the probe would look at the first
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in rows))
    run = unlearn(str(tiny), str(tmp_path / "t.jsonl"), UnlearnConfig(threshold="auto"), quick(), folder=None)
    assert run.metrics["phase_one"]["samples"]["forget"] == 9
    (tmp_path / "t.jsonl").write_text('{"text": "a"}')
    with pytest.raises(UserError, match="nothing to forget"):
        unlearn(str(tiny), str(tmp_path / "t.jsonl"), UnlearnConfig(threshold="auto"), quick(), folder=None)


def test_a_used_model_is_not_taken_for_the_untouched_one(tiny, made):
    lm, config = load_model(str(tiny)), UnlearnConfig(threshold="auto")
    unlearn(lm, made, config, quick(), folder=None, evaluate=False)
    with pytest.raises(UserError, match="load it anew"):
        unlearn(lm, made, config, quick(), folder=None, evaluate=False)


def test_each_sub_domain_is_seen_by_the_gate(tiny):
    """One sample each, of which a quarter would stay out of the fit."""
    lm, alter = load_model(str(tiny)), AlterConfig(n_experts=4, threshold=0.5, feature_layer=2)
    items = [*OWN_RETAIN, *OWN_FORGET[:4]]
    for seed in range(6):
        samples = [data.render(lm.tokenizer, i)[0] for i in items]
        records = phase_one(lm, samples, alter)
        for label, sample in enumerate(samples[-4:], 1):
            sample.label = label
        gate, _, report = fit_gate(records, samples, alter, seed)
        assert (gate[:, -1] > -1e3).all() and 0 <= report["retain_open_anywhere"] <= 1


def test_frozen_records_are_shared_between_runs_on_the_same_samples_alone(tiny):
    """Records from other batches differ in their last bits: a run would depend on what ran before it."""
    lm, alter, seen, looks = load_model(str(tiny)), AlterConfig(threshold=0.5, feature_layer=2), {}, []
    samples = [data.render(lm.tokenizer, i)[0] for i in [*OWN_RETAIN, *OWN_FORGET[:4]]]
    tick = lambda done, of: looks.append((done, of))  # noqa: E731
    first, again = (phase_one(lm, samples, alter, tick=tick, seen=seen) for _ in range(2))
    assert looks == [(len(samples),) * 2] and all(r.saved > 0 for r in again) and not any(r.saved for r in first)
    assert all(torch.equal(a.hidden, b.hidden) and a.log_p is b.log_p for a, b in zip(first, again, strict=True))
    again[0].hidden = None  # as a run does once it has its plans
    assert phase_one(lm, samples, alter, seen=seen)[0].hidden is not None
    phase_one(lm, samples[1:], alter, tick=tick, seen=seen)
    assert looks[1:] == [(len(samples) - 1,) * 2]


def test_an_adapters_place_holds_on_another_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("ALTER_CACHE_DIR", str(tmp_path / "here"))
    name = runs.portable(tmp_path / "here" / "taught" / "x" / "target")
    assert name == "cache:taught/x/target" and runs.portable(data.ASSETS / "x") == "assets:x"
    monkeypatch.setenv("ALTER_CACHE_DIR", str(tmp_path / "there"))
    assert runs.located(name) == str(tmp_path / "there" / "taught" / "x" / "target")
    assert runs.located(str(tmp_path)) == runs.portable(tmp_path) == str(tmp_path) and runs.located(None) is None


# ------------------------------------------------------------------------------------------------ command line


def command(*args):
    return main([str(a) for a in args])


def test_command_line_unlearn_compare_inspect(tiny, few, own_data, tmp_path, capsys):
    options = ["--threshold", "auto", "--steps", 2, "--batch-size", 2, "--limit", 3, "--runs", tmp_path]
    base = ["unlearn", "--model", tiny, "--forget", own_data[0], "--retain", own_data[1]]
    assert command(*base, "--name", "mine", *options) == 0
    assert "forget_held_out" in capsys.readouterr().out
    assert command("compare", tmp_path / "mine", "What colour has the door of house 3?", "[bold]a\x1b[31m") == 0
    out = capsys.readouterr().out
    assert "[bold]a" in out and "\x1b" not in out
    assert command("inspect", "Hello world", "--run", tmp_path / "mine") == 0
    assert "B_f1" in capsys.readouterr().out
    assert command("inspect", "Hello world", "--run", tmp_path / "mine", "--json") == 0
    records = json.loads(capsys.readouterr().out)
    assert {"token", "entropy", "route", "weights", "top"} <= set(records[0])
    assert command(*base, "--name", "mine", *options) == 2
    assert "exists already" in capsys.readouterr().err


BAD = [
    (["unlearn", "--model", "nothing"], "There is no model"),
    (["unlearn", "--model", "a/../b"], "There is no model"),
    (["unlearn", "--model", "TINY", "--forget", "harry"], "There is no forget set"),
    (["unlearn", "--model", "TINY", "--forget", "nowhere.csv"], "There is no file"),
    (["unlearn", "--model", "TINY", "--forget", "OWN", "--rank", "0"], "rank must lie between"),
    (["unlearn", "--model", "TINY", "--forget", "OWN", "--steps", "0"], "steps must lie between"),
    (["unlearn", "--model", "TINY", "--forget", "OWN", "--experts", "9"], "between 1 and 8"),
    (["unlearn", "--model", "TINY", "--forget", "OWN", "--threshold", "1.99"], "lies between 0 and"),
    (["unlearn", "--model", "TINY", "--forget", "OWN", "--threshold", "1.2", "--q", "2"], "lies between 0 and"),
    (["unlearn", "--model", "TINY", "--forget", "OWN", "--q", "0"], "positive"),
    (["unlearn", "--model", "TINY", "--forget", "OWN", "--method", "best"], "method is one of"),
    (["unlearn", "--model", "TINY", "--forget", "OWN", "--device", "tpu"], "device must be"),
    (["unlearn", "--model", "TINY", "--forget", "OWN", "--device", "cuda:1"], "CUDA_VISIBLE_DEVICES=1"),
    (["unlearn", "--model", "TINY", "--forget", "OWN", "--seed", "-1"], "seed must lie between"),
    (["unlearn", "--model", "TINY", "--forget", "OWN", "--dtype", "int3"], "dtype must be"),
    (["unlearn", "--model", "TINY", "--forget", "OWN", "--name", "../x"], "run's name"),
    (["unlearn", "--model", "TINY", "--forget", "imaginary-authors"], "teach it first"),
    (["compare", "nowhere", "hi"], "is not a run"),
    (["inspect", "hi", "--run", "nowhere"], "is not a run"),
    (["learn", "--model", "TINY", "--which", "all", "--out", "new"], "target, retain"),
    (["learn", "--model", "TINY", "--epochs", "0", "--out", "new"], "epochs must lie"),
    (["bench", "--steps", "0"], "at least 1 step"),
]


@pytest.mark.parametrize("args, sentence", BAD, ids=[" ".join(a[-3:]) for a, _ in BAD])
def test_bad_input_is_one_sentence_and_an_exit_code(args, sentence, tiny, few, own_data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = [{"TINY": tiny, "OWN": own_data[0]}.get(a, a) for a in args]
    assert command(*args) == 2
    captured = capsys.readouterr()
    error = captured.err.strip().splitlines()[-1]
    assert error.startswith("alter_demo: ") and sentence in error
    assert "Traceback" not in captured.err
    assert not (tmp_path / "runs").exists() or os.listdir(tmp_path / "runs") == []


def test_cuda_asked_for_and_absent(tiny, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert command("bench", "--model", tiny, "--device", "cuda") == 2
    assert "no GPU here" in capsys.readouterr().err


def test_no_room_and_no_memory(tiny, few, own_data, tmp_path, capsys, monkeypatch):
    base = [
        "unlearn",
        "--model",
        tiny,
        "--forget",
        own_data[0],
        "--threshold",
        "auto",
        "--steps",
        "1",
        "--runs",
        tmp_path,
    ]
    with monkeypatch.context() as m:
        m.setattr("alter_demo.models.shutil.disk_usage", lambda _: type("U", (), {"free": 2**20})())
        assert command(*base) == 2
        assert "MB of free disk" in capsys.readouterr().err

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("alter_demo.runs.phase_one", out_of_memory)
    assert command(*base) == 2
    assert "smaller batch" in capsys.readouterr().err
    assert [p for p in os.listdir(tmp_path) if p.startswith((".new", "tiny"))] == []


def test_first_use_without_network(cache, capsys, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert command("bench") == 2
    assert "could not be fetched" in capsys.readouterr().err
    assert [p for p in cache.iterdir() if p.name != "answers"] == []


def test_pickled_weights_and_strange_folders(tmp_path, tiny):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "config.json").write_text((tiny / "config.json").read_text())
    (tmp_path / "p" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="pickled"):
        load_model(str(tmp_path / "p"))
    with pytest.raises(UserError, match="no config"):
        load_model(str(tmp_path))
    (tmp_path / "r" / "adapter").mkdir(parents=True)
    (tmp_path / "r" / "metrics.json").write_text("{}")
    (tmp_path / "r" / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "r" / "adapter" / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="pickled"):
        load_run(tmp_path / "r")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("file, content, sentence", [
    ("model.safetensors", POINTER, "damaged, or stand for a file that git-lfs"),
    ("model.safetensors", b"", "damaged, or stand"),
    ("config.json", b'{"model_type": "llama", "hidden_size": "big"}', "could not be loaded"),
    ("config.json", b"[1]", "could not be loaded"),
])  # fmt: skip
def test_a_damaged_model_is_one_sentence(tiny, tmp_path, file, content, sentence):
    folder = shutil.copytree(tiny, tmp_path / "m")
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        load_model(str(folder))


@pytest.mark.parametrize("name", ["~nobody-of-this-name", "x" * 300, "a\0b"])
def test_a_strange_model_name_is_one_sentence(name):
    with pytest.raises(UserError, match="There is no model"):
        load_model(name)


@pytest.mark.parametrize("file, content", [
    ("metrics.json", "[]"), ("metrics.json", '{"model": 3}'), ("metrics.json", '{"model": "x", "adapter": 5}'),
    ("adapter/adapter_config.json", "{}"),
    ("adapter/adapter_config.json", "{"), ("adapter/adapter_model.safetensors", "x"),
])  # fmt: skip
def test_a_damaged_run_is_one_sentence(tiny, made, tmp_path, file, content):
    unlearn(str(tiny), made, UnlearnConfig(method="lora"), quick("lora"), "r", tmp_path, evaluate=False)
    (tmp_path / "r" / file).write_text(content)
    with pytest.raises(UserError):
        load_run(tmp_path / "r")


def test_a_name_that_was_taken_meanwhile_costs_no_run(tiny, made, tmp_path):
    """Two commands with one name: the later one's run lies beside the first."""

    def take_it(entry, steps):
        (tmp_path / "runs" / "r" / "adapter").mkdir(parents=True, exist_ok=True)

    run = unlearn(str(tiny), made, UnlearnConfig(threshold="auto"), quick(), "r", tmp_path / "runs", on_step=take_it)
    assert run.path.name.startswith("r-") and load_run(run.path).metrics["after"]
    folder = run.path.parent
    assert sorted(os.listdir(folder)) == ["r", run.path.name] and os.listdir(folder / "r") == ["adapter"]
    (folder / ".new-x").mkdir()
    shutil.copy(run.path / "metrics.json", folder / ".new-x")  # left by a process that was killed
    assert runs.newest_run(folder) == run.path


def test_run_names():
    for bad in ("../up", "a/b", ".hidden", "x" * 81, "a b", "a\n", ""):
        with pytest.raises(UserError, match="run's name"):
            runs.run_folder(runs.RUNS, bad, "m", "s")
    for own in ("x" * 200 + ".csv", "export..v2.csv", "...jsonl", "Ä ö.csv"):  # a file's name is no reason to refuse it
        assert runs.RUN_NAME.fullmatch(runs.run_folder(runs.RUNS, None, "m", own).name)


def test_learned_adapter_is_small_merges_and_can_be_unlearned(tiny, made, tmp_path):
    lm, prompts = load_model(str(tiny)), [i.question for i in made.forget]
    answers = [i.answer for i in made.forget]
    before = sum(log_probs(lm, prompts, answers))
    folder = learn(lm, made, "target", tmp_path / "a", LearnConfig(epochs=8, batch_size=8))
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert sum(log_probs(lm, prompts, answers)) == pytest.approx(before)  # lm itself is as it was
    taught = load_model(str(tiny), adapter=folder)
    assert sum(log_probs(taught, prompts, answers)) > before + 1
    run = unlearn(
        str(tiny), made, UnlearnConfig(threshold="auto"), quick(), "t", tmp_path, adapter=folder, retain_adapter=folder
    )
    theirs, ours = (run.metrics[side]["forget"]["probability"] for side in ("retain_model", "before"))
    assert theirs == ours
    again = load_run(tmp_path / "t")  # finds the adapter that was merged in first
    assert again.answer(prompts[:2], max_new_tokens=6) == run.answer(prompts[:2], max_new_tokens=6)
    with pytest.raises(UserError, match="exists already"):
        learn(lm, made, "target", folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be made"):  # before anything is learned
        learn(lm, made, "target", tmp_path / "file" / "x", on_step=lambda *a: pytest.fail("it learned first"))
