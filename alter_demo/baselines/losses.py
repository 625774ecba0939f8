"""The losses of the baselines, each a scalar of (LossInputs, TrainingConfig).

NLL is a mean over positions, S(y) the sum of an answer's log-probabilities, and
r = S_theta - S_frozen.
"""

import torch
import torch.nn.functional as F

from ..alter.losses import (
    FORGET,
    REFUSAL,
    RETAIN,
    LossInputs,
    distillation,
    inverted_hinge_loss,
    nll,
)


def gradient_ascent_loss(inputs: LossInputs, config) -> torch.Tensor:
    """-NLL_f (Maini et al. 2024)."""
    return -inputs.nll(inputs.on(FORGET)).mean()


def npo_loss(inputs: LossInputs, config) -> torch.Tensor:
    """-(2/b) log sigmoid(-b r_f): ascent that slows down as the answer goes (Zhang et al. 2024)."""
    b = config.npo_beta
    return (2 / b) * F.softplus(b * inputs.log_ratio(FORGET)).mean()


def simnpo_loss(inputs: LossInputs, config) -> torch.Tensor:
    """-(2/b) log sigmoid(b NLL_f): NPO by length and without a reference (Fan et al. 2024)."""
    b = config.npo_beta
    values = inputs.nll(torch.ones_like(inputs.is_end))
    mean = inputs.sums(values, FORGET) / inputs.sums(torch.ones_like(values), FORGET)
    return (2 / b) * F.softplus(-b * mean).mean()


def dpo_loss(inputs: LossInputs, config) -> torch.Tensor:
    """-(2/b) log sigmoid(b (r_idk - r_f)): prefer "I don't know" (Maini et al. 2024)."""
    b = config.npo_beta
    return (2 / b) * F.softplus(-b * (inputs.log_ratio(REFUSAL) - inputs.log_ratio(FORGET))).mean()


def random_labels_loss(inputs: LossInputs, config) -> torch.Tensor:
    """NLL of random tokens on forget positions (Golatkar et al. 2020)."""
    on = inputs.on(FORGET)
    labels = torch.randint_like(inputs.labels[on], inputs.logits.shape[-1])
    return nll(inputs.logits[on], labels).mean()


def inverted_hinge_mean(inputs: LossInputs, config) -> torch.Tensor:
    """The mean of IHL over all forget positions (Cha et al. 2025)."""
    on = inputs.on(FORGET)
    return inverted_hinge_loss(inputs.logits[on], inputs.labels[on]).mean()


def rmu_loss(inputs: LossInputs, config) -> torch.Tensor:
    """Pull forget states towards c u, u a fixed random direction (RMU, Li et al. 2024)."""
    hidden = inputs.hidden[inputs.on(FORGET)]
    generator = torch.Generator().manual_seed(config.seed)
    u = torch.rand(hidden.shape[-1], generator=generator).to(hidden.device)
    return F.mse_loss(hidden, (config.steering_coefficient * u / u.norm()).expand_as(hidden))


def rmu_retain_loss(inputs: LossInputs, config) -> torch.Tensor:
    """Keep retain states where the frozen model has them (RMU)."""
    on = inputs.on(RETAIN)
    return F.mse_loss(inputs.hidden[on], inputs.frozen_hidden[on])


def elm_loss(inputs: LossInputs, config) -> torch.Tensor:
    """KL to P (P_novice / P_expert)^eta of the frozen model (ELM, Gandikota et al. 2024).

    Phase one stores that target in place of the frozen distribution: `refusals.set_novice_targets`.
    """
    on = inputs.on(FORGET)
    return distillation(inputs.logits[on], inputs.top_ids[on], inputs.top_log_p[on]).mean()
