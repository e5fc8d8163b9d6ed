"""The chunked losses against torch's own, and their edges."""

import math

import pytest
import torch
import torch.nn.functional as F

from dllm.training.cross_entropy import FrozenHead, frozen_head_cross_entropy, nll_and_hits, weighted_cross_entropy


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


@pytest.mark.parametrize("chunk", [1, 3, 128])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_a_frozen_heads_loss_and_gradient_are_torchs(chunk, share, dtype, atol):
    torch.manual_seed(0)
    hidden, head, teacher = torch.randn(17, 24).to(dtype), torch.randn(50, 24).to(dtype), torch.randn(17, 24).to(dtype)
    labels, weights = torch.randint(50, (17,)), torch.rand(17)
    ours = hidden.clone().requires_grad_()
    loss, nll, hit, *_ = frozen_head_cross_entropy(ours, head, labels, chunk, teacher, share)
    (loss * weights).sum().backward()
    theirs = hidden.float().requires_grad_()
    logits = theirs @ head.float().T
    soft = (1 - share) * F.one_hot(labels, 50) + share * torch.softmax(teacher.float() @ head.float().T, -1)
    want = F.cross_entropy(logits, soft, reduction="none")
    (want * weights).sum().backward()
    torch.testing.assert_close(loss, want, atol=atol, rtol=1e-2)
    torch.testing.assert_close(nll, F.cross_entropy(logits, labels, reduction="none"), atol=atol, rtol=1e-2)
    torch.testing.assert_close(ours.grad.float(), theirs.grad, atol=atol * 2, rtol=2e-2)
    if dtype == torch.float32:
        assert hit.tolist() == (logits.argmax(-1) == labels).tolist()


def test_a_frozen_heads_tie_goes_to_the_first_of_equals_as_in_argmax():
    head = torch.tensor([[1.0], [1.0], [0.0]])
    labels = torch.tensor([0, 1, 2])
    for candidates in (0, 2):
        rows = frozen_head_cross_entropy(torch.ones(3, 1), head, labels, 8, candidates=candidates)
        assert rows.hit_M.tolist() == [True, False, False]


def test_torchs_linear_cross_entropy_agrees() -> None:
    hidden, head, labels, weights = drawn(9)
    loss, _, _ = weighted_cross_entropy(hidden, head, labels, torch.ones_like(weights), 4)
    theirs = F.linear_cross_entropy(hidden, head, labels, reduction="sum")
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    row_loss, *_ = frozen_head_cross_entropy(hidden, head.detach(), labels, 4)
    assert row_loss.sum().item() == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_scores_are_torchs_and_an_excluded_id_is_no_rival(chunk) -> None:
    hidden, head, labels, _ = drawn(9)
    hidden, head = hidden.detach(), head.detach()
    logits = hidden @ head.T
    nll, hit = nll_and_hits(lambda x: x @ head.T, hidden, labels, chunk)
    torch.testing.assert_close(nll, F.cross_entropy(logits, labels, reduction="none"), rtol=1e-5, atol=1e-6)
    assert torch.equal(hit, logits.argmax(-1) == labels)
    best = int(logits[0].argmax())
    second = logits[0].topk(2).indices[1:]
    nll_without, hit_without = nll_and_hits(lambda x: x @ head.T, hidden[:1], second, chunk, excluded=best)
    assert hit_without.all() and not nll_and_hits(lambda x: x @ head.T, hidden[:1], second, chunk)[1].any()
    assert nll_without.item() == pytest.approx(F.cross_entropy(logits[:1], second).item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_in_the_layout_for_gradients_gives_the_same(dtype) -> None:
    torch.manual_seed(0)
    hidden, head, labels = torch.randn(19, 64).to(dtype), torch.randn(512, 64).to(dtype), torch.randint(512, (19,))
    found = []
    for given in (head, FrozenHead(head)):
        leaf = hidden.clone().requires_grad_()
        rows = frozen_head_cross_entropy(leaf, given, labels, 8)
        rows.loss_M.sum().backward()
        found.append((rows, leaf.grad))
    assert torch.equal(found[0][0].loss_M, found[1][0].loss_M)
    torch.testing.assert_close(found[0][1], found[1][1])


@pytest.mark.parametrize("chunk", [3, 100])
def test_the_largest_logits_and_their_gradient_are_autograds(chunk) -> None:
    hidden, head, labels, _ = drawn(9, torch.float32)
    rows = frozen_head_cross_entropy(hidden, head.detach(), labels, chunk, candidates=4)
    weights = torch.randn(9, 4)
    (rows.loss_M.sum() + (rows.top_logits_MK * weights).sum()).backward()
    ours, hidden.grad = hidden.grad, None
    logits = hidden @ head.detach().T
    top = logits.gather(1, rows.top_ids_MK)
    (F.cross_entropy(logits, labels, reduction="sum") + (top * weights).sum()).backward()
    torch.testing.assert_close(rows.top_logits_MK, top)
    torch.testing.assert_close(ours, hidden.grad, rtol=1e-4, atol=1e-5)
    assert torch.equal(top.sort(-1, descending=True).values, logits.topk(4).values)
    assert torch.equal(rows.hit_M, logits.argmax(-1) == labels)
    every = frozen_head_cross_entropy(hidden, head.detach(), labels, chunk, candidates=99)
    assert every.top_ids_MK.tolist() == [list(range(11))] * 9
