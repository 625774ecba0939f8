"""Why A is shared and B is not (ALTER, Fig. 1): LoRAs of several domains, trained from one start.

The domains are imaginary authors. Each LoRA learns one of them, and one more learns them all.
"""

import itertools
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from sklearn.decomposition import PCA

from ..data.forget_sets import load_forget_set
from ..data.rendering import render_examples
from ..data.schema import Example
from ..errors import UserError
from ..models.fine_tuning import FineTuneConfig, fine_tune
from ..models.loading import LM
from ..options import check_value
from .results import add_result, read_results

FORGET_SET = "imaginary-authors"
# (domain, module) -> what was learned: A - A_0 (r, in) and B - B_0 (out, r). All LoRAs start from
# the same A_0, so whole A's would be alike whatever they learn.
Weights = dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]


def domains(n: int = 4) -> dict[str, list[Example]]:
    """The examples of the first n imaginary authors, and of all of them as "mixed"."""
    examples = load_forget_set(FORGET_SET).retain
    topics = list(dict.fromkeys(example.topic for example in examples))
    check_value("domains", n, {"min": 2, "max": len(topics)})
    chosen = {topic: [e for e in examples if e.topic == topic] for topic in topics[:n]}
    return chosen | {"mixed": list(itertools.chain(*chosen.values()))}


def fine_tuned(lm: LM, examples: dict, steps=24, layers=4, r=8, seed=0) -> Weights:
    """Train a LoRA on the last `layers` layers for each domain, all from the same random A."""
    count = lm.model.config.get_text_config().num_hidden_layers
    last = [f".{k}." for k in range(count - layers, count)]
    linear = [n for n, m in lm.model.named_modules() if isinstance(m, torch.nn.Linear)]
    modules = [name for name in linear if any(part in name for part in last)]
    if not modules:
        raise UserError("The last layers of this model have no linear layer. Use another model.")
    learned: Weights = {}
    for domain, own in examples.items():
        torch.manual_seed(seed)  # the same start
        lora = LoraConfig(r=r, target_modules=modules, task_type="CAUSAL_LM")
        model = get_peft_model(lm.model, lora)
        start = adapter_weights(model)
        config = FineTuneConfig(steps, batch_size=8, lr=2e-3, seed=seed)
        fine_tune(model, lm, render_examples(lm.tokenizer, own), config)
        for module, (a, b) in adapter_weights(model).items():
            learned[domain, module] = a - start[module][0], b - start[module][1]
        lm.model = model.unload()
    return learned


def adapter_weights(model) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A and B of each module of a LoRA."""
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            pair = (matrix["default"].weight for matrix in (module.lora_A, module.lora_B))
            weights[name] = tuple(w.detach().float().cpu().numpy().copy() for w in pair)
    return weights


def similarity(weights: Weights) -> pd.DataFrame:
    """Cosine between what the A's and the B's of two domains learned: one row per matrix, module
    and pair of domains."""
    names, modules = map(dict.fromkeys, zip(*weights, strict=True))
    rows = []
    for module, (one, other) in itertools.product(modules, itertools.combinations(names, 2)):
        for matrix, a, b in zip("AB", weights[one, module], weights[other, module], strict=True):
            cosine = (a * b).sum() / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12)
            rows.append((matrix, module, f"{one} / {other}", float(cosine)))
    return pd.DataFrame(rows, columns=["matrix", "module", "pair", "similarity"])


def projected(weights: Weights) -> pd.DataFrame:
    """What A and B of the last module learned, as points in the plane (PCA over all domains):
    matrix, domain, x, y for each of the r directions."""
    module, tables = list(weights)[-1][1], []
    own = {domain: pair for (domain, name), pair in weights.items() if name == module}
    directions = {"A": [a for a, _ in own.values()], "B": [b.T for _, b in own.values()]}
    for matrix, rows in directions.items():  # (r, width) for each domain
        x, y = PCA(2, random_state=0).fit_transform(np.concatenate(rows)).T
        names = np.repeat([*own], len(rows[0]))
        tables.append(pd.DataFrame({"matrix": matrix, "domain": names, "x": x, "y": y}))
    return pd.concat(tables, ignore_index=True)


def store(lm: LM, path: Path, n=4, steps=24, layers=4, seed=0, command="") -> dict:
    """Train and compare the LoRAs of n domains, and add the result to a results file."""
    most = lm.model.config.get_text_config().num_hidden_layers
    check_value("steps", steps, {"min": 1})
    check_value("layers", layers, {"min": 1, "max": most})
    read_results(path, "heterogeneity")  # a damaged file fails now, not after the work
    examples, started = domains(n), time.perf_counter()
    weights = fine_tuned(lm, examples, steps, layers, seed=seed)
    seconds, cosines = time.perf_counter() - started, similarity(weights)
    mixed = cosines["pair"].str.contains("mixed").map({True: "mixed", False: "apart"})
    means = cosines.groupby(["matrix", mixed])["similarity"].mean()
    config = {"forget": FORGET_SET, "model": lm.name}
    config |= {"domains": n, "steps": steps, "layers": layers}
    key = json.dumps(["heterogeneity", seed, config])
    entry = {"id": key, "method": "lora", "seed": seed, "command": command}
    entry["metrics"] = {f"{m}_{kind}_cosine": round(v, 9) for (m, kind), v in means.items()}
    entry |= {"config": config, "hardware": lm.hardware, "seconds": {"learn": round(seconds, 1)}}
    entry["points"] = projected(weights).round(5).to_dict("records")
    return add_result(path, entry, "heterogeneity")
