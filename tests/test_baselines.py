"""Each loss against its formula, on logits made up for it."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax, logsigmoid

from alter_demo.alter import losses as alter_losses
from alter_demo.alter.losses import FORGET, RETAIN, LossInputs
from alter_demo.baselines import losses
from alter_demo.baselines.methods import METHODS, WEIGHTS
from alter_demo.config import TrainingConfig, training_config

V = 11
KIND = torch.tensor([1, 1, 0, 0, 2, 2])
ROW = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 4, 4, 5, 5, 5])


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    n = len(ROW)
    frozen = log_softmax(torch.randn(n, V), -1)
    labels = torch.randint(0, V, (n,))
    top = frozen.topk(V, -1)
    return LossInputs(
        torch.randn(n, V, requires_grad=True),
        labels,
        ROW,
        KIND,
        (KIND[ROW] > 0).long(),
        torch.zeros(n).bool(),
        frozen.gather(1, labels[:, None])[:, 0],
        top.indices,
        top.values,
        torch.rand(n),
        torch.rand(n) > 0.6,
        hidden=torch.randn(n, 8),
        frozen_hidden=torch.randn(n, 8),
    )


def log_p(s, rows):
    on = torch.isin(s.row, torch.tensor(rows))
    return -cross_entropy(s.logits[on], s.labels[on], reduction="none"), s.frozen_log_p[on]


def ratios(s, rows):
    return torch.stack([(a.sum() - b.sum()) for a, b in (log_p(s, [r]) for r in rows)])


def test_gradient_ascent_and_keeping(inputs):
    forget, retain = -log_p(inputs, [0, 1])[0].mean(), -log_p(inputs, [2, 3])[0].mean()
    c = TrainingConfig(retain_loss="nll")
    assert torch.allclose(losses.gradient_ascent_loss(inputs, c), -forget) and torch.allclose(
        alter_losses.retain_loss(inputs, c), retain
    )
    on = inputs.on(RETAIN)
    frozen = torch.zeros_like(inputs.logits[on]).scatter(
        1, inputs.top_ids[on], inputs.top_log_p[on]
    )
    kl = (
        kl_div(inputs.logits[on].log_softmax(-1), frozen, log_target=True, reduction="none")
        .sum(-1)
        .mean()
    )
    assert torch.allclose(alter_losses.retain_loss(inputs, TrainingConfig()), kl, atol=1e-5)


def test_preference_losses(inputs):
    b = 0.1
    c = TrainingConfig(npo_beta=b)
    r_f, r_idk = ratios(inputs, [0, 1]), ratios(inputs, [4, 5])
    assert torch.allclose(losses.npo_loss(inputs, c), (-(2 / b) * logsigmoid(-b * r_f)).mean())
    assert torch.allclose(
        losses.dpo_loss(inputs, c), (-(2 / b) * logsigmoid(b * (r_idk - r_f))).mean()
    )
    mean_nll = torch.stack([-log_p(inputs, [r])[0].mean() for r in (0, 1)])
    c = training_config("simnpo")
    assert c.npo_beta == 4.5
    assert torch.allclose(
        losses.simnpo_loss(inputs, c), (-(2 / 4.5) * logsigmoid(4.5 * mean_nll)).mean()
    )


def test_rmu_steers_and_keeps(inputs):
    c = TrainingConfig(steering_coefficient=6.0, seed=3)
    u = torch.rand(8, generator=torch.Generator().manual_seed(3))
    goal = 6 * u / u.norm()
    assert torch.allclose(
        losses.rmu_loss(inputs, c), (inputs.hidden[inputs.on(FORGET)] - goal).square().mean()
    )
    kept = (
        (inputs.hidden[inputs.on(RETAIN)] - inputs.frozen_hidden[inputs.on(RETAIN)]).square().mean()
    )
    assert torch.allclose(losses.rmu_retain_loss(inputs, c), kept)


def test_random_labels_go_through_the_seed(inputs):
    values = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        values.append(losses.random_labels_loss(inputs, TrainingConfig()).item())
    assert values[0] == values[1] != values[2]


def test_alter_sees_confident_tokens_of_each_sub_domain(inputs):
    inputs.sub_domain = torch.where(
        inputs.row == 0, 1, torch.where(inputs.row == 1, 2, inputs.sub_domain)
    )
    loss = alter_losses.entropy_guided_loss(inputs, TrainingConfig(forget_end_of_turn=True))
    (grad,) = torch.autograd.grad(loss, inputs.logits)
    moved = grad.abs().sum(-1) > 0
    assert torch.equal(moved, inputs.on(FORGET) & ~inputs.high_entropy)
    uncertain = alter_losses.structure_loss(inputs, TrainingConfig())
    (grad,) = torch.autograd.grad(uncertain, inputs.logits)
    assert torch.equal(grad.abs().sum(-1) > 0, inputs.high_entropy)


def test_unlikelihood_moves_what_is_memorised():
    logits = torch.tensor([[14.0, 0.0, 1.0]], requires_grad=True)
    inverted_hinge_loss, unlikelihood = alter_losses.inverted_hinge_loss, alter_losses.unlikelihood
    label = torch.tensor([0])
    p = logits.detach().softmax(-1)[0]
    loss = unlikelihood(logits, label)
    assert loss.item() == pytest.approx(-math.log1p(-p[0].item()), rel=1e-3)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.allclose(grad[0], torch.tensor([p[0], *(-p[0] * p[1:] / p[1:].sum())]), atol=1e-5)
    (hinge,) = torch.autograd.grad(inverted_hinge_loss(logits, label).sum(), logits)
    assert hinge.abs().max() < 1e-4 < grad.abs().max()


def test_every_weight_is_a_setting():
    assert {p for m in METHODS.values() for p in m.losses} == set(WEIGHTS)
    for name in METHODS:
        assert all(hasattr(training_config(name), weight) for weight in WEIGHTS.values())
