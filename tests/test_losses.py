import torch

from alter_demo.alter.losses import distillation, inverted_hinge_loss, nll


def test_ihl_value_by_hand():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    loss = inverted_hinge_loss(p.log(), torch.tensor([0, 0]))
    assert torch.allclose(loss, torch.tensor([1 + 0.5 - 0.3, 1 + 0.1 - 0.7]))


def test_ihl_gradient_is_the_closed_form():
    torch.manual_seed(0)
    logits = torch.randn(40, 11, dtype=torch.float32, requires_grad=True)
    labels = torch.randint(0, 11, (40,))
    inverted_hinge_loss(logits, labels).sum().backward()
    p = logits.detach().softmax(-1)
    rows = torch.arange(40)
    rival = p.scatter(1, labels[:, None], -1).argmax(-1)
    p_t, p_m = p[rows, labels], p[rows, rival]
    expected = p * (p_m - p_t)[:, None]
    expected[rows, labels] = p_t * (1 - p_t + p_m)
    expected[rows, rival] = -p_m * (1 + p_t - p_m)
    assert torch.allclose(logits.grad, expected, atol=1e-6)


def test_ihl_is_bounded_and_in_float32():
    logits = torch.tensor([[80.0, -80.0, 0.0]], dtype=torch.bfloat16)
    assert inverted_hinge_loss(logits, torch.tensor([0])).item() == 2.0
    assert inverted_hinge_loss(logits, torch.tensor([1])).item() == 0.0
    assert inverted_hinge_loss(logits, torch.tensor([0])).dtype == torch.float32


def test_distillation_is_kl_when_all_tokens_are_kept():
    torch.manual_seed(0)
    frozen, adapted = torch.randn(6, 9), torch.randn(6, 9)
    top = frozen.log_softmax(-1).topk(9)
    full = torch.nn.functional.kl_div(
        adapted.log_softmax(-1), frozen.softmax(-1), reduction="none"
    ).sum(-1)
    assert torch.allclose(distillation(adapted, top.indices, top.values), full, atol=1e-5)
    few = frozen.log_softmax(-1).topk(3)
    assert (distillation(adapted, few.indices, few.values) <= full + 1e-6).all()
    assert distillation(frozen, few.indices, few.values).abs().max() < 1e-6


def test_nll():
    logits = torch.randn(5, 7)
    labels = torch.tensor([0, 1, 2, 3, 4])
    assert torch.allclose(nll(logits, labels), -logits.log_softmax(-1)[torch.arange(5), labels])
