"""From `unlearn` to a saved run and back, on a tiny random model."""

import gc
import json
import os
import shutil
import time
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import FEW, OWN_FORGET, OWN_RETAIN, quick_config
from torch.optim import AdamW

from alter_demo import load_model, load_run, unlearn
from alter_demo.alter.dataset import draw_groups
from alter_demo.alter.frozen import frozen_pass
from alter_demo.alter.gate import fit_gate
from alter_demo.alter.tuner import AlterConfig
from alter_demo.baselines.methods import METHODS
from alter_demo.callbacks import Callback
from alter_demo.cli.runs import print_run
from alter_demo.data.built_in import read_set
from alter_demo.data.rendering import Sample, render
from alter_demo.errors import Interrupted, UserError
from alter_demo.evaluation.shortfalls import shortfalls
from alter_demo.experiments.results import read_results
from alter_demo.files import ASSETS, RUN_NAME, write_json
from alter_demo.models.generation import greedy
from alter_demo.models.scoring import log_probs
from alter_demo.models.teaching import TeachConfig, teach
from alter_demo.record import local_path, portable_path
from alter_demo.run_folder import RUNS, new_run_path, newest_run

TEXT = "What is the capital of France? It is Paris, and the river is the Seine."
FILES = {"config.json", "metrics.json", "answers.json", "log_before.json", "log_after.json"}
GROUPS = ("forget", "forget_held_out", "neighbours", "general")
MEASURED = {"probability", "rouge_l", "rouge_l_to_base", "repetition"}


class Steps(Callback):
    """Keeps what it is told; stops when `stop(self)` says so."""

    def __init__(self, stop=lambda steps: False):
        self.entries, self.stages, self.stop = [], [], stop

    def on_step(self, entry, max_steps):
        self.entries.append((entry, max_steps))

    def on_stage(self, stage, share):
        self.stages.append(stage)

    def should_stop(self):
        return self.stop(self)


def trained(run):
    return {n: p for n, p in run.model.named_parameters() if "alter_" in n}


def question_answer_pairs(examples):
    return [e.question for e in examples], [e.answer for e in examples]


def saved(tiny, forget_set, path, config=None, callbacks=(), **loading):
    """A run as the command line makes it: trained, saved, measured."""
    run = unlearn(load_model(str(tiny), **loading), forget_set, config or quick_config(), callbacks)
    run.save(path)
    run.evaluate(callbacks)
    return run


@pytest.fixture(scope="module")
def folder(tiny, forget_set, tmp_path_factory):
    """Folder of a finished run that nobody changes."""
    path = tmp_path_factory.mktemp("runs") / "own"
    saved(tiny, forget_set, path)
    return path


@pytest.fixture(scope="module")
def default(tiny, forget_set):
    """The default method, unlearned with an A that learns fast; tests only read it."""
    return unlearn(str(tiny), forget_set, quick_config(lr_a=1e-2))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_a_whole_folder_that_loads(tiny, forget_set, tmp_path, method):
    steps = Steps()
    config = quick_config(method, lr=0.02, lr_b=1e-2, steering_coefficient=5.0)
    run = saved(tiny, forget_set, tmp_path / "runs" / "r1", config, [steps])
    assert [e["step"] for e, _ in steps.entries] == list(range(1, FEW + 1))
    assert steps.entries[0][1] == FEW
    assert sorted(os.listdir(tmp_path / "runs")) == ["r1"]
    folder = tmp_path / "runs" / "r1"
    weights = "model" if METHODS[method].trainable.changes_weights else "adapter"
    assert {p.name for p in folder.iterdir()} == FILES | {weights}
    metrics = json.loads((folder / "metrics.json").read_text())
    for side in ("before", "after"):
        assert all(set(metrics[side][group]) >= MEASURED for group in GROUPS)
    assert metrics["before"]["forget"]["rouge_l_to_base"] == 1.0
    assert set(metrics["seconds"]) == {"unlearn", "evaluate"}
    assert {"config", "seed", "versions", "hardware", "history"} <= set(metrics)
    again, base = load_run(folder), load_model(str(tiny))
    prompts = [e.question for e in forget_set.forget[:4]] + ["Hello!"]
    assert again.generate(prompts, max_new_tokens=8) == run.generate(prompts, max_new_tokens=8)
    assert again.generate(prompts, False, 8) == greedy(base, prompts, 8)
    pairs = question_answer_pairs(forget_set.forget)
    after, before = again.log_probs(*pairs), again.log_probs(*pairs, adapted=False)
    assert after == pytest.approx(run.log_probs(*pairs), abs=1e-6)
    assert after != pytest.approx(before, abs=1e-4)
    assert before == pytest.approx(log_probs(base, *pairs), abs=1e-6)


def test_a_run_from_disk_can_be_measured_again(folder, forget_set):
    run = load_run(folder)
    stored = dict(run.metrics)
    with pytest.raises(UserError, match="holds no data"):
        run.evaluate()
    run.path = None  # leave the folder alone
    again = run.evaluate(forget_set=forget_set)
    assert again["after"] == stored["after"] and again["before"] == stored["before"]


def test_a_run_of_0_1_loads_under_the_new_names(folder, tmp_path):
    old = shutil.copytree(folder, tmp_path / "old")
    metrics = json.loads((old / "metrics.json").read_text())
    config = metrics["config"]
    training = config["training"]
    metrics["config"] = {
        "unlearn": {"method": config["method"], **config["adapter"], **config["data"]},
        "train": {"stop_ratio": training["stop_ratio"], "batch_size": 2, "beta": 0.5, "eta": 3.0},
        "alter": config["alter"],
    }
    (old / "metrics.json").write_text(json.dumps(metrics))
    run = load_run(old)
    assert run.metrics["config"]["training"]["forget_weight"] == 0.5
    assert run.metrics["config"]["training"]["elm_eta"] == 3.0
    assert run.metrics["config"]["adapter"]["r"] == config["adapter"]["r"]
    assert run.generate(["Hello!"]) == load_run(folder).generate(["Hello!"])
    assert shortfalls(run.metrics)


def test_unlearning_lowers_the_forget_answers_and_spares_the_rest(taught, forget_set):
    config = quick_config(n_experts=1, max_steps=30, lr_b=1e-2, batch_size=4)
    run = unlearn(str(taught), forget_set, config)

    def change(examples):
        pairs = question_answer_pairs(examples)
        before = torch.tensor(run.log_probs(*pairs, adapted=False))
        return torch.tensor(run.log_probs(*pairs)) - before

    # the words of "The door is" are no knowledge and stay
    drop = change(forget_set.forget)
    assert drop.mean() < -0.4 and (drop < 0).all()
    assert change(forget_set.retain).abs().mean() < drop.abs().mean() / 4


def test_it_learns_to_refuse(taught, forget_set):
    refusals = read_set("refusals")[:3]
    questions = [e.question for e in forget_set.forget]
    pairs = [q for q in questions for _ in refusals], refusals * len(questions)
    change = {}
    for weight in (0.0, 1.0):
        config = quick_config(
            max_steps=40, lr_b=5e-3, batch_size=4, refusal_weight=weight, n_experts=2
        )
        run = unlearn(str(taught), forget_set, config)
        after, before = run.log_probs(*pairs), run.log_probs(*pairs, adapted=False)
        change[weight] = torch.tensor(after).mean() - torch.tensor(before).mean()
    assert change[1.0] > 0.5 and change[1.0] > change[0.0] + 0.2


def test_every_sub_domain_gets_refusals():
    forget = [Sample([1, 2], 1, label=d) for d in (1, 2, 2, 3)]
    refusals = [replace(s, refusal=True) for s in forget]
    groups = draw_groups(forget, [Sample([1, 2], 1)], 24, 0, refusals)
    labels = [s.label for group in groups for s in group if s.refusal]
    assert sorted(labels) == [1] * 8 + [2] * 8 + [3] * 8
    assert [group[0].label for group in groups][:4] == [1, 2, 3, 1]
    assert all(group[1].label == 0 for group in groups)
    paired = draw_groups(forget, [], 8, 0, refusals, paired=True)
    partner = dict(zip(map(id, forget), refusals, strict=True))
    assert all(refusal is partner[id(sample)] for sample, refusal in paired)


def test_forced_routes(tiny, forget_set):
    run, logits = unlearn(str(tiny), forget_set, quick_config(n_experts=2)), {}
    ids = torch.tensor([[5, 6, 7, 8]], device=run.lm.device)
    for force in (None, "off", "r", 1, 2):
        with run.force_route(force), torch.no_grad():
            logits[force] = run.model(input_ids=ids).logits
    assert torch.equal(logits["off"], load_model(str(tiny)).model(ids).logits)
    assert not torch.equal(logits["r"], logits["off"])
    assert not torch.equal(logits[1], logits[2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])  # `auto` takes one of them here
def test_a_run_loads_in_its_own_precision(tiny, forget_set, tmp_path, dtype):
    unlearn(load_model(str(tiny), dtype=dtype), forget_set, quick_config()).save(tmp_path / "r")
    assert load_run(tmp_path / "r").lm.dtype == dtype


def test_what_a_run_falls_short_of_is_told(folder, tiny, forget_set, capsys):
    run = load_run(folder)
    metrics = run.metrics
    metrics["phase_one"]["router"] |= {"forget_open_at_answer": 1.0, "retain_open_anywhere": 0.02}
    metrics["stopped"] = "the probe reached its target"
    assert not metrics["held_out"]  # no question of the file is asked in other words
    assert "no paraphrased_question" in shortfalls(metrics)[0]
    metrics["held_out"] = True
    assert shortfalls(metrics) == []
    metrics["phase_one"]["router"]["forget_open_at_answer"] = 0.25
    metrics["stopped"] = "all steps done"
    metrics["config"]["training"]["stop_ratio"] = 0.001
    gate, steps = shortfalls(metrics)
    assert "opens on only 25% of the forget samples" in gate
    assert "Use more steps" in steps and "12 of" not in steps
    metrics["phase_one"]["samples"]["forget"] = 20
    assert "used 12 of 20 forget samples" in shortfalls(metrics)[1]
    metrics["config"]["training"]["stop_ratio"] = 1e-12  # as on plain texts
    assert shortfalls(metrics)[1] == "Training used 12 of 20 forget samples."
    metrics["phase_one"]["samples"]["retain_given"] = 40
    assert "used 6 of 40 retain samples" in shortfalls(metrics)[2]
    metrics["phase_one"]["router"]["retain_open_anywhere"] = 0.2
    assert "opens on 20% of the retain samples" in shortfalls(metrics)[1]
    print_run(run)
    assert "opens on only 25% of" in capsys.readouterr().out.replace("\n", " ")
    published = unlearn(str(tiny), forget_set, quick_config("alter"))
    published.metrics["phase_one"]["router"]["forget_open_at_answer"] = 0.25  # acts everywhere
    assert not any("gate" in sentence for sentence in shortfalls(published.metrics))


def test_parts_can_be_taken_out(tiny, forget_set, default):
    """Each switch of the ablation changes what it is named after."""

    def run(**values):
        return unlearn(str(tiny), forget_set, quick_config(lr_a=1e-2, **values))

    def weights(run, part):
        return [p for n, p in trained(run).items() if part in n]

    def differ(one, other, part):
        pairs = zip(weights(one, part), weights(other, part), strict=True)
        return any((a != b).any() for a, b in pairs)

    def phase_one(run):
        return run.metrics["phase_one"]

    bare = run(router=False)
    assert bare.router.config.n_experts == 1
    assert all(trace.weights[1] == 1 for trace in bare.trace_tokens(TEXT))
    unmasked = run(entropy_mask=False)
    assert not any(trace.route == "A" for trace in unmasked.trace_tokens(TEXT))
    assert any(trace.route == "A" for trace in default.trace_tokens(TEXT))
    assert differ(unmasked, default, "_A.")
    assert phase_one(unmasked)["uncertain_share"] == 0 < phase_one(default)["uncertain_share"]
    assert differ(run(isolation=False), default, "_B.")
    literal = run(router_input="entropy")
    assert literal.router.alter_gate["default"].shape[1] == 2  # the entropy and the bias
    sizes = phase_one(literal)["sub_domains"]
    assert sizes == phase_one(default)["sub_domains"] and len(sizes) > 1  # by topic
    layers = default.lm.model.config.num_hidden_layers
    shares = {"attention": 4 / 7, "mlp": 3 / 7, "last_third": (layers // 3) / layers}
    for name, share in shares.items():
        count = len(weights(run(layers=name), "_B."))
        assert count == round(share * len(weights(default, "_B."))), name
    for bad in ({"layers": "head"}, {"router_input": "stars"}):
        with pytest.raises(UserError, match="must be one of"):
            run(**bad)


def test_same_seed_same_run(tiny, forget_set, default):
    again = unlearn(str(tiny), forget_set, quick_config(lr_a=1e-2))
    assert all(torch.equal(p, trained(again)[n]) for n, p in trained(default).items())


def test_gradient_checkpointing_learns_the_same(tiny, forget_set, default):
    config = quick_config(lr_a=1e-2, gradient_checkpointing=True)
    other = trained(unlearn(str(tiny), forget_set, config))
    assert all(torch.allclose(p, other[n], atol=1e-5) for n, p in trained(default).items())
    assert any(p.any() for n, p in other.items() if "alter_B" in n)


def test_what_a_killed_process_has_left_goes_after_a_day(tmp_path):
    old, new = tmp_path / ".new-old", tmp_path / ".new-now"
    for left in (old, new):
        left.mkdir()
        (left / "half.safetensors").write_bytes(b"0")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    new_run_path(tmp_path, "r", "m", "s")
    assert not old.exists() and new.exists()


def test_stopping_keeps_what_there_is(tiny, forget_set, tmp_path):
    run = saved(tiny, forget_set, tmp_path / "s", callbacks=[Steps(lambda steps: True)])
    assert run.metrics["steps"] == 1 and run.metrics["stopped"] == "stopped by hand"
    assert (tmp_path / "s" / "metrics.json").is_file() and run.metrics["after"]


def test_leaving_while_the_probe_is_measured_keeps_what_there_is(tiny, forget_set, tmp_path):
    class Leave(Callback):
        live_answers = True

        def on_answers(self, step, answers):
            if step:
                raise Interrupted

    run = unlearn(str(tiny), forget_set, quick_config(), [Leave()])
    assert run.metrics["steps"] == 2 and run.metrics["stopped"] == "stopped by hand"
    run.save(tmp_path / "s")
    assert load_run(tmp_path / "s").metrics["history"][-1]["step"] == 2


@pytest.mark.parametrize("method", ["alter_selective", "npo"])  # npo changes the weights
def test_stopping_while_it_measures_keeps_the_run_without_figures(
    tiny, forget_set, tmp_path, method
):
    steps = Steps(lambda steps: any("measuring" in stage for stage in steps.stages))
    run = saved(tiny, forget_set, tmp_path / "r", quick_config(method), [steps])
    assert run.metrics["after"] == {} and run.logs == {}
    assert any("no figures" in sentence for sentence in shortfalls(run.metrics))
    assert run.metrics["steps"] == FEW
    assert load_run(tmp_path / "r").generate(["Hello!"], max_new_tokens=2)
    print_run(run)


def test_a_second_press_stops_measuring_and_a_first_one_does_not(tiny, forget_set):
    """In training, then let go (as the page does), then pressed again while measuring."""
    presses = iter([True, True, False, True])
    steps = Steps(lambda steps: next(presses))
    run = unlearn(str(tiny), forget_set, quick_config(), [steps])
    run.evaluate([steps])
    assert run.metrics["steps"] == 1
    assert not run.metrics["measured"] and run.metrics["after"] == {}


def test_what_was_learned_is_kept_when_measuring_breaks(tiny, forget_set, tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("alter_demo.run.evaluate_groups", killed)
    with pytest.raises(KeyboardInterrupt):
        saved(tiny, forget_set, tmp_path / "r")
    run = load_run(tmp_path / "r")
    assert run.generate(["Hello!"], max_new_tokens=2) and not run.metrics["measured"]
    assert any("no figures" in sentence for sentence in shortfalls(run.metrics))


def test_stops_when_the_probe_has_reached_its_target(taught, forget_set):
    config = quick_config(max_steps=200, lr_b=1e-2, stop_ratio=0.7)
    run = unlearn(str(taught), forget_set, config)
    assert run.metrics["stopped"] == "the probe reached its target" and run.metrics["steps"] < 200


def test_a_failing_run_leaves_nothing(default, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("alter_demo.files.json.dump", fail)
    with pytest.raises(UserError, match="No space left"):
        default.save(tmp_path / "runs" / "x")
    assert os.listdir(tmp_path / "runs") == []
    with pytest.raises(UserError, match="No space left"):
        write_json(tmp_path / "results" / "r.json", {})
    assert os.listdir(tmp_path / "results") == []
    with pytest.raises(UserError, match="is a folder"):
        read_results(tmp_path)


def test_a_model_with_a_strange_generation_config_is_saved_too(tiny, forget_set, tmp_path):
    """transformers saves no generation_config that contradicts itself, and some on the hub do."""
    shutil.copytree(tiny, tmp_path / "m")
    odd = json.loads((tiny / "generation_config.json").read_text())
    odd |= {"temperature": 0.6, "do_sample": False}
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(odd))
    run = unlearn(str(tmp_path / "m"), forget_set, quick_config("grad_diff"))
    assert load_run(run.save(tmp_path / "r")).model.generation_config.eos_token_id == 2


def test_a_text_beyond_the_models_positions_is_one_sentence(tiny, forget_set, tmp_path):
    shutil.copytree(tiny, tmp_path / "m")
    config = json.loads((tiny / "config.json").read_text()) | {"max_position_embeddings": 8}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"at most 8|8 at most"):
        unlearn(str(tmp_path / "m"), forget_set, quick_config())


def test_a_run_that_nobody_uses_is_gone_when_the_next_model_is_loaded(tiny, forget_set):
    run = unlearn(str(tiny), forget_set, quick_config())
    assert not [o for o in gc.get_objects() if type(o) is AdamW]  # gone with the training
    weights = weakref.ref(run.lm.model)
    del run
    load_model(str(tiny))
    assert weights() is None


def test_plain_text_can_be_forgotten(tiny, few, tmp_path):
    file, lines = tmp_path / "t.jsonl", [f"The code of room {i} is {i * 7}." for i in range(9)]

    def write(texts):
        file.write_text("\n".join(json.dumps({"text": text}) for text in texts))

    write(lines)
    run = unlearn(str(tiny), str(file), quick_config())
    metrics = run.evaluate()
    assert metrics["steps"] == FEW
    assert metrics["peak_memory_mb"] >= metrics["training_memory_mb"] > 0
    write(["a", *lines])  # the probe would measure the first
    run = unlearn(str(tiny), str(file), quick_config())
    assert run.metrics["phase_one"]["samples"]["forget"] == 9
    write(["a"])
    with pytest.raises(UserError, match="nothing to forget"):
        unlearn(str(tiny), str(file), quick_config())


def test_an_unlearned_model_is_not_taken_for_the_base_model(tiny, forget_set):
    lm = load_model(str(tiny))
    unlearn(lm, forget_set, quick_config())
    with pytest.raises(UserError, match="Load the model anew"):
        unlearn(lm, forget_set, quick_config())


def test_each_sub_domain_is_seen_by_the_gate(tiny):
    """One sample each, of which a quarter would stay out of the fit."""
    lm, alter = load_model(str(tiny)), AlterConfig(n_experts=4, threshold=0.5, feature_layer=2)
    examples = [*OWN_RETAIN, *OWN_FORGET[:4]]
    for seed in range(6):
        samples = [render(lm.tokenizer, e)[0] for e in examples]
        frozen = frozen_pass(lm, samples, alter)
        for label, sample in enumerate(samples[-4:], 1):
            sample.label = label
        gate, report = fit_gate(frozen, samples, alter, seed)
        assert (gate[:, -1] > -1e3).all() and 0 <= report["retain_open_anywhere"] <= 1


def test_frozen_outputs_are_shared_by_runs_on_the_same_samples_alone(tiny):
    """Outputs from other batches differ in their last bits: a run must not depend on others."""
    lm, alter = load_model(str(tiny)), AlterConfig(threshold=0.5, feature_layer=2)
    cache, passes = {}, []
    samples = [render(lm.tokenizer, e)[0] for e in [*OWN_RETAIN, *OWN_FORGET[:4]]]
    progress = lambda done, total: passes.append((done, total))  # noqa: E731
    first, again = (frozen_pass(lm, samples, alter, progress, cache=cache) for _ in range(2))
    assert passes == [(len(samples),) * 2]
    assert all(o.seconds > 0 for o in again) and not any(o.seconds for o in first)
    pairs = zip(first, again, strict=True)
    assert all(torch.equal(a.hidden, b.hidden) and a.log_p is b.log_p for a, b in pairs)
    again[0].hidden = None  # as a run does once it has its plans
    assert frozen_pass(lm, samples, alter, cache=cache)[0].hidden is not None
    frozen_pass(lm, samples[1:], alter, progress, cache=cache)
    assert passes[1:] == [(len(samples) - 1,) * 2]


def test_an_adapters_place_holds_on_another_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("ALTER_CACHE_DIR", str(tmp_path / "here"))
    name = portable_path(tmp_path / "here" / "taught" / "x" / "target")
    assert name == "cache:taught/x/target" and portable_path(ASSETS / "x") == "assets:x"
    monkeypatch.setenv("ALTER_CACHE_DIR", str(tmp_path / "there"))
    assert local_path(name) == str(tmp_path / "there" / "taught" / "x" / "target")
    assert local_path(str(tmp_path)) == portable_path(tmp_path) == str(tmp_path)
    assert local_path(None) is None


@pytest.mark.parametrize("file, content", [
    ("metrics.json", "[]"),
    ("metrics.json", '{"model": 3}'),
    ("metrics.json", '{"model": "x", "adapter": 5}'),
    ("adapter/adapter_config.json", "{}"),
    ("adapter/adapter_config.json", "{"),
    ("adapter/adapter_model.safetensors", "x"),
])  # fmt: skip
def test_a_damaged_run_is_one_sentence(folder, tmp_path, file, content):
    damaged = shutil.copytree(folder, tmp_path / "r")
    (damaged / file).write_text(content)
    with pytest.raises(UserError):
        load_run(damaged)


def test_a_name_that_was_taken_meanwhile_costs_no_run(default, tmp_path):
    """Two commands with one name: the later one's run lies beside the first."""
    (tmp_path / "r" / "adapter").mkdir(parents=True)
    path = default.save(tmp_path / "r")
    default.path = None
    assert path.name.startswith("r-") and load_run(path).metrics["steps"] == FEW
    assert sorted(os.listdir(tmp_path)) == ["r", path.name]
    assert os.listdir(tmp_path / "r") == ["adapter"]
    (tmp_path / ".new-x").mkdir()
    shutil.copy(path / "metrics.json", tmp_path / ".new-x")  # left by a killed process
    assert newest_run(tmp_path) == path


def test_run_names():
    for bad in ("../up", "a/b", ".hidden", "x" * 81, "a b", "a\n", ""):
        with pytest.raises(UserError, match=r"run.s name"):
            new_run_path(RUNS, bad, "m", "s")
    # the name of a file is no reason to refuse it
    for file in ("x" * 200 + ".csv", "export..v2.csv", "...jsonl", "Ä ö.csv"):
        assert RUN_NAME.fullmatch(new_run_path(RUNS, None, "m", file).name)


def test_a_taught_adapter_is_small_merges_and_can_be_unlearned(tiny, forget_set, tmp_path):
    lm, pairs = load_model(str(tiny)), question_answer_pairs(forget_set.forget)
    before = sum(log_probs(lm, *pairs))
    folder = teach(lm, forget_set, "target", tmp_path / "a", TeachConfig(epochs=8, batch_size=8))
    files = sorted(p.name for p in folder.iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    assert sum(log_probs(lm, *pairs)) == pytest.approx(before)  # lm itself is as it was
    target = load_model(str(tiny), adapter=folder)
    assert sum(log_probs(target, *pairs)) > before + 1
    run = unlearn(target, forget_set, quick_config())
    run.save(tmp_path / "t")
    run.evaluate(retain_adapter=folder)
    retain, ours = (
        run.metrics[side]["forget"]["probability"] for side in ("retain_model", "before")
    )
    assert retain == ours
    again = load_run(tmp_path / "t")  # finds the adapter that was merged in first
    assert again.generate(pairs[0][:2], max_new_tokens=6) == run.generate(
        pairs[0][:2], max_new_tokens=6
    )
    with pytest.raises(UserError, match="already exists"):
        teach(lm, forget_set, "target", folder)
    (tmp_path / "file").write_text("")
    never = lambda *a: pytest.fail("it learned first")  # noqa: E731
    with pytest.raises(UserError, match="file"):
        teach(lm, forget_set, "target", tmp_path / "file" / "x", on_step=never)


def test_a_sub_domain_needs_an_expert(tiny, forget_set):
    examples = [replace(e, sub_domain=1 + n % 3) for n, e in enumerate(forget_set.forget)]
    named = replace(forget_set, forget=examples, training=examples)
    with pytest.raises(UserError, match="Sub-domain 3 has no expert: there are at most 2"):
        unlearn(load_model(str(tiny)), named, quick_config(n_experts=2))
