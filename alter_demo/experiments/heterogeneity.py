"""Why A is shared and B is not (ALTER, Fig. 1): LoRAs of several domains, trained from one start.

The domains are imaginary authors. Each LoRA learns one of them, and one more learns them all.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from sklearn.decomposition import PCA

from ..data.forget_sets import load_forget_set
from ..data.rendering import render
from ..data.schema import Example
from ..errors import UserError
from ..models.fine_tuning import FineTuneConfig, fine_tune
from ..models.loading import LM
from .results import add_result, read_results

# (domain, module) -> what was learned: A - A_0 (r, in) and B - B_0 (out, r). All LoRAs start from
# the same A_0, so whole A's would be alike whatever they learn.
Weights = dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]
FORGET_SET = "imaginary-authors"


def domains(n: int = 4) -> dict[str, list[Example]]:
    """The examples of the first n imaginary authors, and of all of them as "mixed".

    Raises:
        UserError: n is out of range.
    """
    topics: dict[str, list[Example]] = {}
    for example in load_forget_set(FORGET_SET).retain:
        topics.setdefault(example.topic, []).append(example)
    if not 2 <= n <= len(topics):
        raise UserError(f"`domains` must be in [2, {len(topics)}], got {n}.")
    chosen = dict(list(topics.items())[:n])
    return chosen | {"mixed": [example for own in chosen.values() for example in own]}


def fine_tuned(lm: LM, examples: dict, steps=24, layers=4, r=8, seed=0) -> Weights:
    """Train a LoRA on the last `layers` layers for each domain, all from the same random A.

    Args:
        examples: domain -> its examples, as `domains` returns them.
    Raises:
        UserError: these layers have no linear layer.
    """
    count = lm.model.config.get_text_config().num_hidden_layers
    last = [f".{k}." for k in range(count - layers, count)]
    modules = [
        name
        for name, module in lm.model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(part in name for part in last)
    ]
    if not modules:
        raise UserError("The last layers of this model have no linear layer. Use another model.")
    learned: Weights = {}
    for domain, own in examples.items():
        torch.manual_seed(seed)  # the same start
        lora = LoraConfig(r=r, target_modules=modules, task_type="CAUSAL_LM")
        model = get_peft_model(lm.model, lora)
        start = adapter_weights(model)
        samples = [sample for example in own for sample in render(lm.tokenizer, example)]
        fine_tune(model, lm, samples, FineTuneConfig(steps, batch_size=8, lr=2e-3, seed=seed))
        for module, (a, b) in adapter_weights(model).items():
            learned[domain, module] = a - start[module][0], b - start[module][1]
        lm.model = model.unload()
    return learned


def adapter_weights(model) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A and B of each module of a LoRA."""
    weights = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            pair = (module.lora_A["default"].weight, module.lora_B["default"].weight)
            weights[name] = tuple(w.detach().float().cpu().numpy().copy() for w in pair)
    return weights


def similarity(weights: Weights) -> pd.DataFrame:
    """Cosine between what the A's and the B's of two domains learned: one row per matrix, module
    and pair of domains."""
    names, modules = (list(dict.fromkeys(key[i] for key in weights)) for i in (0, 1))
    rows = []
    for module, (one, other) in itertools.product(modules, itertools.combinations(names, 2)):
        pairs = zip("AB", weights[one, module], weights[other, module], strict=True)
        for matrix, a, b in pairs:
            cosine = (a * b).sum() / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12)
            pair = {"pair": f"{one} / {other}", "similarity": float(cosine)}
            rows.append({"matrix": matrix, "module": module} | pair)
    return pd.DataFrame(rows)


def projected(weights: Weights) -> pd.DataFrame:
    """What A and B of the last module learned, as points in the plane (PCA over all domains).

    Returns:
        matrix, domain, x, y: one row for each of the r directions.
    """
    module, rows = list(weights)[-1][1], []
    own = {domain: pair for (domain, name), pair in weights.items() if name == module}
    for k, matrix in enumerate("AB"):
        vectors = [pair[k] if matrix == "A" else pair[k].T for pair in own.values()]  # (r, width)
        points = PCA(2, random_state=0).fit_transform(np.concatenate(vectors))
        table = pd.DataFrame(points, columns=["x", "y"])
        table.insert(0, "domain", np.repeat(list(own), [len(v) for v in vectors]))
        table.insert(0, "matrix", matrix)
        rows.append(table)
    return pd.concat(rows, ignore_index=True)


def store(lm: LM, path: Path, n=4, steps=24, layers=4, seed=0, command="") -> dict:
    """Train and compare the LoRAs of n domains, and add the result to a results file.

    Raises:
        UserError: as `domains`; steps or layers out of range; a damaged file.
    """
    most = lm.model.config.get_text_config().num_hidden_layers
    if steps < 1:
        raise UserError(f"`steps` must be at least 1, got {steps}.")
    if not 1 <= layers <= most:
        raise UserError(f"`layers` must be in [1, {most}] for this model, got {layers}.")
    read_results(path, "heterogeneity")  # a damaged file fails now, not after the work
    examples = domains(n)
    started = time.perf_counter()
    weights = fine_tuned(lm, examples, steps, layers, seed=seed)
    seconds, cosines = time.perf_counter() - started, similarity(weights)
    mixed = cosines["pair"].str.contains("mixed").map({True: "mixed", False: "apart"})
    means = cosines.groupby(["matrix", mixed])["similarity"].mean()
    config = {"forget": FORGET_SET, "model": lm.name}
    config |= {"domains": n, "steps": steps, "layers": layers}
    entry = {
        "id": json.dumps(["heterogeneity", seed, config]),
        "method": "lora",
        "seed": seed,
        "command": command,
        "metrics": {f"{m}_{kind}_cosine": round(v, 9) for (m, kind), v in means.items()},
        "config": config,
        "hardware": lm.hardware,
        "seconds": {"learn": round(seconds, 1)},
        "points": projected(weights).round(5).to_dict("records"),
    }
    return add_result(path, entry, "heterogeneity")
