"""The fused loss against plain autograd, and its edges."""

import math

import pytest
import torch
import torch.nn.functional as F

from dllm.methods.diffusion.losses import weighted_cross_entropy


def drawn(rows: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 6, generator=generator, dtype=dtype).requires_grad_()
    head = torch.randn(11, 6, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(0, 11, (rows,), generator=generator)
    return hidden, head, labels, torch.rand(rows, generator=generator) + 0.5


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_loss_and_both_gradients_are_autograds(chunk) -> None:
    hidden, head, labels, weights = drawn(9)
    loss, nll, hit = weighted_cross_entropy(hidden, head, labels, weights, chunk)
    (3 * loss).backward()
    ours = hidden.grad.clone(), head.grad.clone()
    hidden.grad = head.grad = None
    logits = hidden @ head.T
    plain = F.cross_entropy(logits, labels, reduction="none")
    (3 * (plain * weights).sum()).backward()
    torch.testing.assert_close(nll.double(), plain, rtol=1e-5, atol=1e-6)
    assert loss.item() == pytest.approx((plain * weights).sum().item(), rel=1e-5)
    assert torch.equal(hit, logits.argmax(-1) == labels)
    torch.testing.assert_close(ours[0], hidden.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[1], head.grad, rtol=1e-5, atol=1e-6)


def test_without_a_scored_place_the_loss_is_zero_with_finite_gradients() -> None:
    hidden, head, labels, weights = drawn(0)
    loss, nll, _ = weighted_cross_entropy(hidden, head, labels, weights, 4)
    loss.backward()
    assert loss.item() == 0 and len(nll) == 0
    assert torch.equal(head.grad, torch.zeros_like(head))


def test_even_logits_cost_ln_v_and_sure_ones_nothing() -> None:
    labels = torch.tensor([3, 0])
    even, _, _ = weighted_cross_entropy(torch.zeros(2, 4), torch.randn(9, 4), labels, torch.ones(2), 8)
    assert even.item() == pytest.approx(2 * math.log(9), rel=1e-6)
    sure, _, hit = weighted_cross_entropy(100 * torch.eye(9)[labels], torch.eye(9), labels, torch.ones(2), 8)
    assert sure.item() == 0 and hit.all()


def test_ties_go_to_the_first_of_equals_as_argmax_has_it() -> None:
    labels = torch.tensor([0, 4])
    _, _, hit = weighted_cross_entropy(torch.zeros(2, 4), torch.randn(9, 4), labels, torch.ones(2), 8)
    assert hit.tolist() == [True, False]


def test_bfloat16_keeps_its_dtypes() -> None:
    hidden, head, labels, weights = drawn(40, torch.float32)
    loss, _, _ = weighted_cross_entropy(hidden.bfloat16(), head, labels, weights, 16)
    loss.backward()
    plain = (F.cross_entropy(hidden @ head.T, labels, reduction="none") * weights).sum()
    assert head.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(plain.item(), rel=0.02)
