"""Why A is shared and B is not (ALTER, Fig. 1): LoRAs of different domains, from the same start, beside each other.

Domains are the invented authors; each LoRA learns one of them, and one learns them all mixed.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from sklearn.decomposition import PCA

from .data import Item, load_forget_set, render
from .errors import UserError
from .models import LM
from .results import put, read_results
from .teaching import LearnConfig
from .training import AnswerTrainer, Pairs, arguments, collate_pairs

# (domain, module) -> what was learned: A - A_0 (r, in), B - B_0 (out, r). All start from the same A_0, so that whole
# A's would be alike whatever they learned
Weights = dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]


def domains(n: int = 4) -> dict[str, list[Item]]:
    """The questions of the first n invented authors, and of all of them together ("mixed").

    Raises:
        UserError: fewer than two domains, or more than there are.
    """
    items, found = load_forget_set("imaginary-authors").retain, {}
    for item in items:
        found.setdefault(item.topic, []).append(item)
    if not 2 <= n <= len(found):
        raise UserError(f"There can be 2 to {len(found)} domains, and {n} is not among them.")
    chosen = dict(list(found.items())[:n])
    return chosen | {"mixed": [i for own in chosen.values() for i in own]}


def fine_tuned(
    lm: LM, sets: dict[str, list[Item]], steps: int = 24, layers: int = 4, r: int = 8, seed: int = 0
) -> Weights:
    """What a LoRA on the last `layers` layers learns from each set, all from the same random A."""
    config = LearnConfig(max_steps=steps, batch_size=8)
    count = lm.model.config.get_text_config().num_hidden_layers
    last = [f".{k}." for k in range(count - layers, count)]
    modules = [n for n, m in lm.model.named_modules() if isinstance(m, torch.nn.Linear) and any(x in n for x in last)]
    if not modules:
        raise UserError("The last layers of this model hold no linear layer for a LoRA: take another one.")
    found: Weights = {}
    for name, items in sets.items():
        torch.manual_seed(seed)  # the same start
        lora = LoraConfig(r=r, target_modules=modules, task_type="CAUSAL_LM")
        model = get_peft_model(lm.model, lora)
        start = adapter_weights(model)
        samples = [s for i in items for s in render(lm.tokenizer, i)]
        with tempfile.TemporaryDirectory() as scratch:
            args = arguments(scratch, config, lm.device)
            args.learning_rate = config.lr
            AnswerTrainer(
                model=model, args=args, data_collator=collate_pairs(lm.tokenizer.pad_token_id, lm.device),
                train_dataset=Pairs(samples, [], steps * config.batch_size, seed),
            ).train()  # fmt: skip
        for path, (a, b) in adapter_weights(model).items():
            found[name, path] = a - start[path][0], b - start[path][1]
        lm.model = model.unload()
    return found


def adapter_weights(model) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A and B of each module of a LoRA."""
    return {
        path: tuple(x["default"].weight.detach().float().cpu().numpy().copy() for x in (module.lora_A, module.lora_B))
        for path, module in model.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }


def similarity(weights: Weights) -> pd.DataFrame:
    """Cosine of what the A's and the B's of two domains learned, for each pair: matrix, module, pair, similarity."""
    names, modules = (list(dict.fromkeys(k[i] for k in weights)) for i in (0, 1))
    rows = []
    for module, (one, other) in itertools.product(modules, itertools.combinations(names, 2)):
        for matrix, a, b in zip("AB", weights[one, module], weights[other, module], strict=True):
            cosine = (a * b).sum() / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12)
            rows.append({"matrix": matrix, "module": module, "pair": f"{one} / {other}", "similarity": float(cosine)})
    return pd.DataFrame(rows)


def projected(weights: Weights) -> pd.DataFrame:
    """What every domain's A and B of one module learned as points in the plane, one for each of the r directions (PCA
    over all domains, the last module): matrix, domain, x, y."""
    module, rows = list(weights)[-1][1], []
    names = list(dict.fromkeys(k[0] for k in weights))
    for k, matrix in enumerate("AB"):
        vectors = [weights[name, module][k] for name in names]
        vectors = [v if matrix == "A" else v.T for v in vectors]  # (r, in) or (r, out)
        points = PCA(2, random_state=0).fit_transform(np.concatenate(vectors))
        owners = [name for name, v in zip(names, vectors, strict=True) for _ in v]
        rows += [{"matrix": matrix, "domain": d, "x": x, "y": y} for d, (x, y) in zip(owners, points, strict=True)]
    return pd.DataFrame(rows)


def store(lm: LM, path: Path, n: int = 4, steps: int = 24, layers: int = 4, seed: int = 0) -> dict:
    """Fine-tune and compare as above and put it into a results file, in place of what stood there for this seed.

    Raises:
        UserError: as `domains`; fewer than 1 step or layer; a damaged file.
    """
    if steps < 1 or not 1 <= layers <= lm.model.config.get_text_config().num_hidden_layers:
        raise UserError("There must be at least 1 step and 1 layer, and no more layers than the model has.")
    read_results(path)  # damaged: now, not after the work
    sets = domains(n)
    started = time.perf_counter()
    weights = fine_tuned(lm, sets, steps, layers, seed=seed)
    seconds, found = time.perf_counter() - started, similarity(weights)
    found["mixed"] = found["pair"].str.contains("mixed")
    means = found.groupby(["matrix", "mixed"])["similarity"].mean()
    config = {"forget": "imaginary-authors", "model": lm.name, "domains": n, "steps": steps, "layers": layers}
    entry = {
        "id": json.dumps(["heterogeneity", seed, config]), "method": "lora", "seed": seed,
        "metrics": {f"{m}_{'mixed' if x else 'apart'}_cosine": round(v, 9) for (m, x), v in means.items()},
        "config": config, "hardware": lm.hardware, "seconds": {"learn": round(seconds, 1)},
        "points": projected(weights).round(5).to_dict("records"),
    }  # fmt: skip
    return put(path, entry)
