"""Each rival's loss against its formula, on logits made up for it."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax, logsigmoid

from alter_demo import methods
from alter_demo.methods import METHODS, Step
from alter_demo.training import TrainConfig, train_config

V = 11
KIND = torch.tensor([1, 1, 0, 0, 2, 2])
ROW = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 4, 4, 5, 5, 5])


@pytest.fixture
def step():
    torch.manual_seed(0)
    n = len(ROW)
    frozen = log_softmax(torch.randn(n, V), -1)
    labels = torch.randint(0, V, (n,))
    top = frozen.topk(V, -1)
    return Step(
        torch.randn(n, V, requires_grad=True), labels, ROW, KIND, (KIND[ROW] > 0).long(), torch.zeros(n).bool(),
        frozen.gather(1, labels[:, None])[:, 0], top.indices, top.values, torch.rand(n), torch.rand(n) > 0.6,
        hidden=torch.randn(n, 8), frozen_hidden=torch.randn(n, 8),
    )  # fmt: skip


def log_p(s, rows):
    on = torch.isin(s.row, torch.tensor(rows))
    return -cross_entropy(s.logits[on], s.labels[on], reduction="none"), s.frozen_log_p[on]


def ratios(s, rows):
    return torch.stack([(a.sum() - b.sum()) for a, b in (log_p(s, [r]) for r in rows)])


def test_gradient_ascent_and_keeping(step):
    forget, retain = -log_p(step, [0, 1])[0].mean(), -log_p(step, [2, 3])[0].mean()
    c = TrainConfig(retention="nll")
    assert torch.allclose(methods.ascent(step, c), -forget) and torch.allclose(methods.keep(step, c), retain)
    on = step.on(0)
    frozen = torch.zeros_like(step.logits[on]).scatter(1, step.top_ids[on], step.top_log_p[on])
    kl = kl_div(step.logits[on].log_softmax(-1), frozen, log_target=True, reduction="none").sum(-1).mean()
    assert torch.allclose(methods.keep(step, TrainConfig()), kl, atol=1e-5)


def test_preference_losses(step):
    b = 0.1
    c = TrainConfig(sharpness=b)
    r_f, r_idk = ratios(step, [0, 1]), ratios(step, [4, 5])
    assert torch.allclose(methods.npo(step, c), (-(2 / b) * logsigmoid(-b * r_f)).mean())
    assert torch.allclose(methods.dpo(step, c), (-(2 / b) * logsigmoid(b * (r_idk - r_f))).mean())
    mean_nll = torch.stack([-log_p(step, [r])[0].mean() for r in (0, 1)])
    c = train_config("simnpo")
    assert c.sharpness == 4.5
    assert torch.allclose(methods.simnpo(step, c), (-(2 / 4.5) * logsigmoid(4.5 * mean_nll)).mean())


def test_rmu_steers_and_keeps(step):
    c = TrainConfig(steering=6.0, seed=3)
    u = torch.rand(8, generator=torch.Generator().manual_seed(3))
    goal = 6 * u / u.norm()
    assert torch.allclose(methods.steer(step, c), (step.hidden[step.on(1)] - goal).square().mean())
    kept = (step.hidden[step.on(0)] - step.frozen_hidden[step.on(0)]).square().mean()
    assert torch.allclose(methods.keep_states(step, c), kept)


def test_random_labels_go_through_the_seed(step):
    values = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        values.append(methods.random_labels(step, TrainConfig()).item())
    assert values[0] == values[1] != values[2]


def test_alter_sees_confident_tokens_of_each_sub_domain(step):
    step.domain = torch.where(step.row == 0, 1, torch.where(step.row == 1, 2, step.domain))
    loss = methods.entropy_guided(step, TrainConfig(forget_end=True))
    (grad,) = torch.autograd.grad(loss, step.logits)
    moved = grad.abs().sum(-1) > 0
    assert torch.equal(moved, step.on(1) & ~step.high)
    uncertain = methods.structure(step, TrainConfig())
    (grad,) = torch.autograd.grad(uncertain, step.logits)
    assert torch.equal(grad.abs().sum(-1) > 0, step.high)


def test_unlikelihood_moves_what_is_memorised():
    logits = torch.tensor([[14.0, 0.0, 1.0]], requires_grad=True)
    from alter_demo.losses import inverted_hinge_loss, unlikelihood

    label = torch.tensor([0])
    p = logits.detach().softmax(-1)[0]
    loss = unlikelihood(logits, label)
    assert loss.item() == pytest.approx(-math.log1p(-p[0].item()), rel=1e-3)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.allclose(grad[0], torch.tensor([p[0], *(-p[0] * p[1:] / p[1:].sum())]), atol=1e-5)
    (hinge,) = torch.autograd.grad(inverted_hinge_loss(logits, label).sum(), logits)
    assert hinge.abs().max() < 1e-4 < grad.abs().max()


def test_every_weight_is_a_setting():
    assert {p for m in METHODS.values() for p in m.parts} == set(methods.WEIGHTS)
    for name in METHODS:
        assert all(hasattr(train_config(name), weight) for weight in methods.WEIGHTS.values())
