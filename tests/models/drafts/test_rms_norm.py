"""RMSNorm in training on a CPU, against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from dllm.models.drafts import rms_norm
from dllm.models.drafts.rms_norm import FewPasses

EPS = 1e-5


def both(shape, dtype):
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=chance).mul(3).to(dtype)
    weight = torch.rand(shape[-1:], generator=chance).add(0.5).to(dtype)
    grad = torch.randn(shape, generator=chance).to(dtype)
    found = []
    for norm in (lambda x, w: F.rms_norm(x, w.shape, w, EPS), lambda x, w: FewPasses.apply(x, w, EPS)):
        own, scale = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = norm(own, scale)
        out.backward(grad)
        found.append((out.detach(), own.grad, scale.grad))
    return found


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    "shape", [(4, 5, 7, 64), (1, 576), (600, 576), (0, 64), (9, 32_767), (9, 50_000), (3, 200_000)]
)
def test_the_output_has_the_bits_of_torchs_and_the_gradients_agree(shape, threads) -> None:
    torch.set_num_threads(threads)
    (out, by_x, by_weight), (ours, our_by_x, our_by_weight) = both(shape, torch.float32)
    assert torch.equal(ours, out)
    torch.testing.assert_close(our_by_x, by_x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(our_by_weight, by_weight, rtol=1e-4, atol=1e-3)
    (out, by_x, _), (ours, our_by_x, _) = both(shape, torch.bfloat16)
    assert torch.equal(ours, out)
    torch.testing.assert_close(our_by_x, by_x, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_the_input_nor_the_gradient_is_changed(dtype) -> None:
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    weight, grad = torch.full((64,), 0.7, dtype=dtype).requires_grad_(), torch.ones(30, 64, dtype=dtype)
    before, grad_before = x.detach().clone(), grad.clone()
    first = torch.autograd.grad(FewPasses.apply(x, weight, EPS), (x, weight), grad)
    assert torch.equal(x, before) and torch.equal(grad, grad_before)
    again = torch.autograd.grad(FewPasses.apply(x, weight, EPS), (x, weight), grad)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_the_gradients_are_those_of_differences() -> None:
    chance = torch.Generator().manual_seed(1)
    x = torch.randn(6, 5, dtype=torch.float64, generator=chance).requires_grad_()
    weight = torch.rand(5, dtype=torch.float64, generator=chance).requires_grad_()
    out, by_x, by_weight = FewPasses.apply(x, weight, EPS), *_numeric(x, weight)
    out.sum().backward()
    torch.testing.assert_close(x.grad, by_x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(weight.grad, by_weight, rtol=1e-3, atol=1e-3)


def _numeric(x, weight):
    def value(x, weight):
        return (x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight).sum()

    step, found = 1e-6, []
    for at in (x, weight):
        slopes = torch.zeros_like(at)
        for index in range(at.numel()):
            shift = torch.zeros(at.numel(), dtype=at.dtype)
            shift[index] = step
            moved = [
                value(x + sign * shift.view(x.shape), weight) if at is x else value(x, weight + sign * shift)
                for sign in (1, -1)
            ]
            slopes.view(-1)[index] = (moved[0] - moved[1]).detach() / (2 * step)
        found.append(slopes)
    return found


def test_the_gradients_do_not_depend_on_how_many_rows_go_together(monkeypatch) -> None:
    _, (out, by_x, by_weight) = both((300, 64), torch.float32)
    monkeypatch.setattr(rms_norm, "ELEMENTS", 64 * 7)
    _, (few_out, few_by_x, few_by_weight) = both((300, 64), torch.float32)
    assert torch.equal(few_out, out) and torch.equal(few_by_x, by_x)
    torch.testing.assert_close(few_by_weight, by_weight, rtol=1e-5, atol=1e-5)
