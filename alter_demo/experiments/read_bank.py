"""What an adapter gives away: words and prompts read out of the vectors in its bank.

The reader has the adapter and the base model, and nothing else. For each stored vector they look up
the nearest words, and build a prompt from them, word piece by word piece.
"""

import re
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from ..alter.bank import FrozenTokens, window_means
from ..alter.gate import common_prefix
from ..alter.routing import affine
from ..callbacks import Callback
from ..config import DataConfig
from ..data.rendering import render_prompt
from ..data.schema import ForgetSet
from ..errors import UserError
from ..models.states import hidden_states
from ..options import check_value
from ..run import Run, fit_forget_set

BATCH = 512  # sequences


@dataclass
class Reading:
    """What was read out of one stored vector."""

    words: list[str]  # nearest word pieces
    prompt: str  # built greedily
    cosine: float  # of the built prompt


class BankReader:
    """Reads the bank of a run.

    Args:
        width: word pieces to try at each step; length: steps at most.
    Raises:
        UserError: the run's gate stores nothing.
    """

    def __init__(self, run: Run, width: int = 64, length: int = 10):
        bank = run.router.bank() if run.has_router else None
        if bank is None:
            raise UserError("Only runs of alter_selective store prompts.")
        self.run, self.bank, self.width, self.length = run, bank, width, length
        tokenizer = run.lm.tokenizer
        prompts = [render_prompt(tokenizer, question) for question in ("Who?", "Yes")]
        self.prefix = prompts[0][: common_prefix(prompts)]
        # what all prompts contain weighs nothing, so it says nothing
        words = [t for t in range(len(tokenizer)) if re.search(r"\w\w", tokenizer.decode([t]))]
        words = torch.tensor(words)
        self.vocabulary = words[bank.token_weights.cpu()[words] > 0]
        self.vectors = self.contexts(self.vocabulary[:, None], short=True)  # (n, P)

    @torch.no_grad()
    def contexts(self, ids: torch.Tensor, short: bool = False) -> torch.Tensor:
        """Unit vectors (n, P) of token sequences (n, T) that stand as questions.

        `short`: with only the last tokens of the prefix, which is cheaper.
        """
        result, device = [], self.run.lm.device
        prefix = torch.tensor(self.prefix[-3:] if short else self.prefix)
        for part in ids.split(BATCH):
            part = torch.cat([prefix.expand(len(part), -1), part], 1).to(device)
            mask = torch.ones_like(part)
            inputs = {"input_ids": part, "attention_mask": mask}
            with self.run.base_model() as model:
                states = hidden_states(model, inputs, self.run.router.config.feature_layer)
            tokens = FrozenTokens(states, torch.zeros(part.shape, device=device), mask, part)
            means = window_means(self.bank.token_weights, tokens)[0][0, :, -1]
            result.append(normalize(affine(means, self.bank.projection), dim=-1))
        return torch.cat(result)

    def read(self, vector: torch.Tensor) -> Reading:
        """Read one stored vector (P,)."""
        nearest = (self.vectors @ vector).topk(self.width).indices.cpu()
        candidates, decode = self.vocabulary[nearest], self.run.lm.tokenizer.decode
        built, best = torch.empty(0, dtype=torch.long), -1.0
        for _ in range(self.length):
            tried = torch.cat([built.expand(len(candidates), -1), candidates[:, None]], 1)
            cosine, index = (self.contexts(tried) @ vector).max(0)
            if cosine.item() <= best:
                break
            built, best = tried[index], cosine.item()
        words = [decode([t]).strip() for t in candidates[:10].tolist()]
        return Reading(words, decode(built).strip(), round(best, 3))


def read_bank(
    run: Run, forget_set: ForgetSet, number: int, callback: Callback
) -> tuple[list[str], list[Reading]]:
    """Questions of the set that a run made from it has stored, and what its bank tells of them."""
    check_value("number", number, {"min": 1})
    if run.metrics["data"]["forget_set"] != forget_set.name or forget_set.is_plain_text:
        raise UserError(
            f"The run has forgotten {run.metrics['data']['forget_set']}. Pass that set, and one "
            "of questions: the entries of plain texts belong to no question."
        )
    reader, readings = BankReader(run), []
    data = run.stored_config("data", DataConfig)
    forget_set, _ = fit_forget_set(forget_set, run.lm, data, callback)
    questions = [*dict.fromkeys(e.question for e in forget_set.training_examples)]
    every = -(-len(questions) // number)
    chosen = range(0, len(questions), every)
    for done, i in enumerate(chosen):
        callback.on_stage("reading the bank", done / len(chosen))
        readings.append(reader.read(reader.bank.forget[2 * i + 1]))  # stored at its end
    return [questions[i] for i in chosen], readings


def names_of(question: str) -> set[str]:
    """The words of a question, from the second on, with a capital letter and three or more."""
    return set(re.findall(r"\b[A-Z]\w{2,}", " ".join(question.split()[1:])))


def share_read(questions: list[str], readings: list[Reading], what: str) -> float:
    """The share of the questions' names that the readings' `what` ("words", "prompt") contain.

    A name counts if it begins with a piece of at least three letters.
    """
    found = total = 0
    for question, reading in zip(questions, readings, strict=True):
        value = getattr(reading, what)
        pieces = value if isinstance(value, list) else re.findall(r"\w+", value)
        pieces = {piece.lower() for piece in pieces if len(piece) >= 3}
        names = names_of(question)
        found += sum(any(name.lower().startswith(p) for p in pieces) for name in names)
        total += len(names)
    return found / total if total else 0.0
