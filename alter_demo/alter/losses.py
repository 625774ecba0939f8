"""ALTER's losses, and `LossInputs`, the forward pass that the losses of all methods read.

Functions of logits return one value per position. Functions of (LossInputs, TrainingConfig)
return the scalar that the trainer weighs and adds up.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import DEFAULT_Q
from .entropy import tsallis_entropy

RETAIN, FORGET, REFUSAL = 0, 1, 2  # LossInputs.role


@dataclass
class LossInputs:
    """The n answer positions of a batch of B samples: forget, then retain, then refusal samples.

    The frozen model's outputs there come from phase one, so no second model is in memory.
    """

    logits: torch.Tensor  # (n, V)
    labels: torch.Tensor  # (n,)
    row: torch.Tensor  # (n,) the sample that each position belongs to
    role: torch.Tensor  # (B,) RETAIN, FORGET or REFUSAL
    sub_domain: torch.Tensor  # (n,) from 1, 0 for retain samples
    is_end: torch.Tensor  # (n,) bool, the label is the end of turn
    frozen_log_p: torch.Tensor  # (n,) the label's log-probability in the frozen model
    top_ids: torch.Tensor  # (n, TOP) the frozen model's likeliest tokens
    top_log_p: torch.Tensor  # (n, TOP)
    entropy: torch.Tensor  # (n,) S_q of the frozen model
    high_entropy: torch.Tensor  # (n,) bool, S_q above the threshold: uncertain
    q: float = DEFAULT_Q
    hidden: torch.Tensor | None = None  # (n, D) states of the steered layer (RMU)
    frozen_hidden: torch.Tensor | None = None  # (n, D)

    def on(self, role: int) -> torch.Tensor:
        """(n,) bool, the positions of samples with this role."""
        return (self.role == role)[self.row]

    def nll(self, on: torch.Tensor) -> torch.Tensor:
        return nll(self.logits[on], self.labels[on])

    def sums(self, values: torch.Tensor, role: int) -> torch.Tensor:
        """Sums of (n,) values over each sample with this role, (samples,)."""
        total = values.new_zeros(len(self.role)).index_add(0, self.row, values)
        return total[self.role == role]

    def log_ratio(self, role: int) -> torch.Tensor:
        """r = S_theta - S_frozen of each sample with this role, S the answer's log-probability."""
        log_p = -self.nll(torch.ones_like(self.is_end))
        return self.sums(log_p - self.frozen_log_p, role)

    def zero(self) -> torch.Tensor:
        return self.logits.new_zeros((), dtype=torch.float32)


def inverted_hinge_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """IHL = 1 + p_true - max_{v != true} p_v (LoKU, Cha et al. 2025; ALTER's L_IHL).

    It lowers the true token and raises its nearest competitor: as a function of the probabilities
    its gradient is bounded and concerns two tokens.

    Args:
        logits: (n, V), computed in float32.
        labels: (n,) token ids.
    Returns:
        (n,) float32, in (0, 2).
    """
    p = logits.float().softmax(-1)
    p_true = p.gather(-1, labels[:, None]).squeeze(-1)
    p_other = p.scatter(-1, labels[:, None], -1.0).amax(-1)
    return 1 + p_true - p_other


def unlikelihood(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-ln(1 - p_true), (n, V) and (n,) to (n,) (Welleck et al. 2020).

    Its gradient on the true token's logit is p_true: bounded like that of IHL, but largest where
    IHL's vanishes, on a memorised token. The mass goes to the other tokens in proportion.
    """
    z = logits.float()
    others = z.scatter(-1, labels[:, None], float("-inf")).logsumexp(-1)
    return z.logsumexp(-1) - others


def nll(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood, (n, V) and (n,) to (n,)."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def distillation(
    logits: torch.Tensor, top_ids: torch.Tensor, top_log_p: torch.Tensor
) -> torch.Tensor:
    """KL(frozen || adapted) over the frozen model's k likeliest tokens and one "other" outcome.

    A lower bound of the full KL that needs k numbers per position instead of the vocabulary.

    Args:
        logits: (n, V) of the adapted model.
        top_ids, top_log_p: (n, k) of the frozen model.
    Returns:
        (n,) float32.
    """
    log_q = logits.float().log_softmax(-1).gather(-1, top_ids)
    p, top_log_p = top_log_p.float().exp(), top_log_p.float()
    rest_p = (1 - p.sum(-1)).clamp_min(1e-6)
    rest_q = (1 - log_q.exp().sum(-1)).clamp_min(1e-6)
    return (p * (top_log_p - log_q)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())


FORGET_LOSSES = {"ihl": inverted_hinge_loss, "unlikelihood": unlikelihood}


def confident_forget_positions(inputs: LossInputs, config) -> torch.Tensor:
    """(n,) bool: the positions that ALTER forgets on."""
    on = inputs.on(FORGET) & ~inputs.high_entropy
    return on if config.forget_end_of_turn else on & ~inputs.is_end


def entropy_guided_loss(inputs: LossInputs, config) -> torch.Tensor:
    """ALTER's forget loss: for each sub-domain the mean over its confident tokens, summed."""
    on = confident_forget_positions(inputs, config)
    if not on.any():
        return inputs.zero()
    per_token = FORGET_LOSSES[config.forget_loss](inputs.logits[on], inputs.labels[on])
    sub_domain = inputs.sub_domain[on]
    return sum(per_token[sub_domain == d].mean() for d in sub_domain.unique())


def retain_loss(inputs: LossInputs, config) -> torch.Tensor:
    """On retain samples: NLL (as published), or the KL to the frozen model."""
    on = inputs.on(RETAIN)
    if not on.any():
        return inputs.zero()
    if config.retain_loss == "nll":
        return inputs.nll(on).mean()
    return distillation(inputs.logits[on], inputs.top_ids[on], inputs.top_log_p[on]).mean()


def structure_loss(inputs: LossInputs, config) -> torch.Tensor:
    """First-order form of lambda ||grad_A S_q||^2: uncertain tokens keep their entropy."""
    on = inputs.high_entropy
    if not (config.structure_weight and on.any()):
        return inputs.zero()
    entropy = tsallis_entropy(inputs.logits[on], inputs.q)
    return (entropy - inputs.entropy[on]).square().mean()


def refusal_loss(inputs: LossInputs, config) -> torch.Tensor:
    """NLL of the refusals."""
    on = inputs.on(REFUSAL)
    return inputs.nll(on).mean() if on.any() else inputs.zero()


def progressive_refusal_loss(inputs: LossInputs, config) -> torch.Tensor:
    """`refusal_loss` times 1 - mean p of the answers' confident tokens.

    IHL hardly moves a token of p near 1, so what is still memorised must go before a refusal can
    take its place.
    """
    on = confident_forget_positions(inputs, config)
    forgotten = 1 - (-inputs.nll(on)).exp().mean().nan_to_num(0).detach()
    return forgotten * refusal_loss(inputs, config)
