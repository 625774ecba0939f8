"""Token traces: entropy, route, experts, and the models' predictions for each token of a text.

`entropy`, `route` and `expert` of a token come from the frozen model's prediction of the token
that follows it.
"""

from dataclasses import dataclass, fields

import torch

from ..alter import DEFAULT_Q, PUBLISHED_THRESHOLD
from ..alter.bank import FrozenTokens, GateScores
from ..alter.entropy import tsallis_entropy
from ..alter.routing import RoutingPlan, acting_expert
from ..data.rendering import render_prompt
from ..errors import UserError

QS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)  # orders on the X-ray's slider
TOP_K = 5
MAX_TOKENS = 4096
ROWS = 128  # positions whose distributions are in memory at once, in float32


@dataclass
class TokenTrace:
    """One token as the router, the base model and the unlearned model see it."""

    token: str  # the whole character if the token is a part of one
    id: int
    special: bool  # of the tokenizer or the chat template, not of the question or the answer
    start: int  # characters [start, end) of the text; with a question, of the rendered chat
    end: int
    entropy: float  # S_q of the frozen model, q of the adapter
    entropies: list[float]  # the same for each q of QS
    route: str  # "A": uncertain, "B": confident
    expert: int  # 0: B_r or none, d: B_fd is the likeliest
    weights: list[float]  # B_r, B_f1 .. B_fN; all zero: no expert acts; []: no experts at all
    log_prob: float | None  # of this token under the base model; None for the first
    log_prob_after: float | None  # under the unlearned model
    top: list[tuple[str, float]]  # the base model's likeliest next tokens, with probabilities
    top_after: list[tuple[str, float]]
    change: float  # total variation between both next-token distributions, in [0, 1]
    in_question: bool = False
    gate: dict[str, float] | None = None  # of a gate with a bank, see `gate_reasons`


@torch.no_grad()
def trace_tokens(run, text: str, question: str | None = None) -> list[TokenTrace]:
    """Traces of a plain text, or of `text` as the answer to `question` in the chat's form.

    Raises UserError if the text is empty or longer than 4096 tokens.
    """
    tokenizer = run.lm.tokenizer
    ids, spans, rendered = tokenize(tokenizer, text, question)
    if not ids or not (text + (question or "")).strip():
        raise UserError("The text is empty. Enter some text.")
    if len(ids) > MAX_TOKENS:
        raise UserError(f"A text must have at most {MAX_TOKENS} tokens, got {len(ids)}.")
    batch = torch.tensor([ids], device=run.lm.device)
    before, after, plan = predict(run, batch)
    if plan:
        entropy, threshold = plan.entropy[0], run.router.config.threshold
        experts = acting_expert(plan.weights[0], run.router.config).tolist()
        weights = plan.weights[0].tolist()
    else:
        entropy, threshold = tsallis_entropy(before, DEFAULT_Q), PUBLISHED_THRESHOLD
        experts, weights = [0] * len(ids), [[]] * len(ids)
    reasons = gate_reasons(plan.scores) if plan and plan.scores else [None] * len(ids)
    entropies = torch.stack([tsallis_entropy(before, order) for order in QS], -1)  # (T, |QS|)
    log_probs, top, change = compare_logits(before, after, batch[0], tokenizer)
    special_ids, user_spans = set(tokenizer.all_special_ids), text_spans(rendered, text, question)
    traces = []
    for t, token_id in enumerate(ids):
        (start, end), token = spans[t], tokenizer.decode([token_id])
        in_text = any(a <= start and end <= b for a, b in user_spans)
        traces.append(
            TokenTrace(
                token=rendered[start:end] if "\ufffd" in token else token,
                id=token_id,
                special=token_id in special_ids or not in_text,
                start=start,
                end=end,
                entropy=entropy[t].item(),
                entropies=[round(x, 4) for x in entropies[t].tolist()],
                route="A" if entropy[t] > threshold else "B",
                expert=experts[t],
                weights=[round(w, 4) for w in weights[t]],
                log_prob=log_probs[0][t],
                log_prob_after=log_probs[1][t],
                top=top[0][t],
                top_after=top[1][t],
                change=change[t],
                in_question=question is not None and end <= user_spans[0][1],
                gate=reasons[t],
            )
        )
    return traces


def gate_reasons(scores: GateScores) -> list[dict[str, float]]:
    """Why the gate is open or shut at each token of one text.

    The fields of `GateScores`, without the decision.
    """
    columns = {f.name: getattr(scores, f.name) for f in fields(scores) if f.name != "opened"}
    rows = zip(*(values[0].tolist() for values in columns.values()), strict=True)
    return [{k: round(v, 4) for k, v in zip(columns, row, strict=True)} for row in rows]


def predict(run, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, RoutingPlan | None]:
    """Logits (T, V) before and after unlearning of a text (1, T), and its plan if it is routed.

    The plan follows from the base model's pass, so the router need not run that pass again.
    """
    plan = None
    with run.base_model() as model:
        out = model(input_ids=batch, use_cache=False, output_hidden_states=run.has_router)
    if run.has_router:
        config = run.router.config
        entropy = tsallis_entropy(out.logits, config.q)
        hidden = out.hidden_states[config.feature_layer]
        tokens = FrozenTokens(hidden, entropy, torch.ones_like(batch), batch)
        plan, _ = run.router.plan(tokens)
    with run.follow_plan(plan) as model:
        after = model(input_ids=batch, use_cache=False).logits[0]
    return out.logits[0], after, plan


def tokenize(tokenizer, text: str, question: str | None) -> tuple[list[int], list, str]:
    """Token ids, their character spans (start, end), and the text that the spans refer to."""
    if question is None:
        encoded = tokenizer(text, return_offsets_mapping=True)
        return encoded.input_ids, encoded.offset_mapping, text
    prompt = tokenizer.decode(render_prompt(tokenizer, question))
    text = text if tokenizer.chat_template else f" {text}"
    options = {"add_special_tokens": False, "return_offsets_mapping": True}
    head, tail = tokenizer(prompt, **options), tokenizer(text, **options)
    shifted = [(a + len(prompt), b + len(prompt)) for a, b in tail.offset_mapping]
    return head.input_ids + tail.input_ids, head.offset_mapping + shifted, prompt + text


def text_spans(rendered: str, text: str, question: str | None) -> list[tuple[int, int]]:
    """The spans of the question and the answer in the rendered chat; the rest is template."""
    if question is None:
        return [(0, len(rendered))]
    answer = len(rendered) - len(text)
    start = rendered.rfind(question, 0, answer)
    return [(start, start + len(question)), (answer, len(rendered))]


def compare_logits(before: torch.Tensor, after: torch.Tensor, ids: torch.Tensor, tokenizer):
    """`log_prob` and `top` of T traces, for each model, and `change`, from logits (T, V)."""
    log_probs, top, change = ([None], [None]), ([], []), []
    for first in range(0, len(ids), ROWS):
        rows = slice(first, first + ROWS)
        log_p = [logits[rows].float().log_softmax(-1) for logits in (before, after)]
        following = ids[first + 1 : first + ROWS + 1]
        for side, values in enumerate(log_p):
            own = values[: len(following)].gather(-1, following[:, None])[:, 0]
            log_probs[side].extend(own.tolist())
            best = values.exp().topk(TOP_K, -1)
            for p, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                tokens = [tokenizer.decode([i]) for i in index]
                top[side].append(list(zip(tokens, p, strict=True)))
        change += ((log_p[0].exp() - log_p[1].exp()).abs().sum(-1) / 2).tolist()
    return log_probs, top, change
