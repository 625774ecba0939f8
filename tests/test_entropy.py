"""Tsallis entropy and its threshold."""

import pytest
import torch
from scipy import stats

from alter_demo.alter.entropy import entropy_range, resolve_threshold, tsallis_entropy
from alter_demo.errors import UserError


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(3, 700, 50) * torch.tensor([0.1, 3.0, 30.0])[:, None, None]


@pytest.mark.parametrize("q", [0.5, 1.2, 1.5, 2.0, 3.0])
def test_equals_the_definition(logits, q):
    p = logits.double().softmax(-1)
    by_definition = (1 - sum(p[..., i] ** q for i in range(50))) / (q - 1)
    assert torch.allclose(tsallis_entropy(logits, q).double(), by_definition, atol=2e-6)


def test_q_one_is_shannon_and_the_limit_of_its_neighbours(logits):
    shannon = torch.from_numpy(stats.entropy(logits.double().softmax(-1).numpy(), axis=-1))
    assert torch.allclose(tsallis_entropy(logits, 1.0).double(), shannon, atol=1e-5)
    assert torch.allclose(tsallis_entropy(logits, 1.0 + 1e-4).double(), shannon, atol=2e-3)


def test_range_shape_and_dtype(logits):
    assert tsallis_entropy(logits, 1.5).shape == (3, 700)
    assert tsallis_entropy(logits.bfloat16(), 1.5).dtype == torch.float32
    uniform = torch.zeros(1, 50)
    certain = torch.full((1, 50), -1e9).index_fill(1, torch.tensor([7]), 0.0)
    for q in (0.5, 1.0, 1.5, 2.0):
        assert tsallis_entropy(uniform, q).item() == pytest.approx(entropy_range(50, q), rel=1e-5)
        assert tsallis_entropy(certain, q).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(UserError, match="positive"):
        tsallis_entropy(uniform, 0)


def test_is_differentiable():
    logits = torch.randn(4, 9, requires_grad=True)
    tsallis_entropy(logits, 1.5).sum().backward()
    assert logits.grad.abs().sum() > 0


def test_threshold_must_be_in_the_range_of_the_entropy():
    entropy = torch.rand(100)
    assert resolve_threshold(1.2, entropy, 1.5, 49152) == 1.2
    # at q = 2, S_q is below 1, so the published 1.2 is impossible
    with pytest.raises(UserError, match=r"must be in \(0, 1\)"):
        resolve_threshold(1.2, entropy, 2.0, 49152)
    with pytest.raises(UserError, match="must be a number"):
        resolve_threshold("high", entropy, 1.5, 49152)


def test_auto_leaves_a_quarter_above():
    torch.manual_seed(0)
    memorised = torch.rand(1000) * 0.01
    threshold = resolve_threshold("auto", memorised, 1.5, 49152)
    assert (memorised > threshold).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert resolve_threshold("auto", torch.zeros(10), 1.5, 49152) > 0
