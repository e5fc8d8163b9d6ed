"""The schedule, and what moves which weights."""

import pytest
import torch
from torch import nn

from dllm.config.params import Optimizer
from dllm.errors import ModelError
from dllm.models import precision
from dllm.models.sharding import own_shards
from dllm.training.muon import Muon, orthogonalized
from dllm.training.optimizer import ADAMW_SHARE, Optimizers, lr_factor


def test_cosine_warms_up_over_an_int_of_the_ratio_and_ends_near_zero() -> None:
    factors = [lr_factor(step, 110, schedule="cosine", warmup_ratio=0.1) for step in range(110)]
    assert factors[:11] == pytest.approx([i / 11 for i in range(1, 12)])
    assert factors[11] == pytest.approx(1.0)
    assert factors[11 + 99 // 3] == pytest.approx(0.75)
    assert 0 < factors[-1] < 0.001
    assert factors[11:] == sorted(factors[11:], reverse=True)


def test_constant_stays_and_a_short_run_needs_no_warm_up() -> None:
    assert [lr_factor(s, 10, schedule="constant", warmup_ratio=0.2) for s in (0, 1, 2, 9)] == [0.5, 1, 1, 1]
    assert lr_factor(0, 5, schedule="cosine", warmup_ratio=0.04) == 1.0


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))


def stepped(optimizers: Optimizers, net: nn.Module, number: int, lr: float = 1.0) -> None:
    for i in range(number):
        (net(torch.linspace(0, i + 1.0, 6)) * torch.arange(4)).sum().backward()
        optimizers.set_lr(lr)
        optimizers.step()


def test_muon_moves_matrices_by_a_matched_size_and_adamw_the_rest() -> None:
    net = model()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizers = Optimizers(net, Optimizer(name="muon", lr=0.01))
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers.set_lr(1.0)
    optimizers.step()
    moved = {name: (p.detach() - before[name]) for name, p in net.named_parameters()}
    assert {key.rpartition(":")[2] for key in optimizers.state() if key.startswith("0.weight")} == {"momentum_buffer"}
    assert moved["0.weight"].square().mean().sqrt() == pytest.approx(0.2 * 0.01, rel=0.4)
    assert moved["1.bias"].abs().max() == pytest.approx(ADAMW_SHARE * 0.01, rel=1e-3)


def test_muon_takes_torchs_steps_where_it_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, gradients = [(48, 16), (16, 48), (32, 32)], torch.Generator().manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    monkeypatch.setattr(precision, "_multiplies_in", lambda dtype: False)
    one = Muon(ours, lr=0.01, weight_decay=0.1)
    other = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad = its.grad = torch.randn(mine.shape, generator=gradients)
        one.step()
        other.step()
    for mine, its in zip(ours, theirs, strict=True):
        moved = its.detach() - 1
        assert (mine - its).norm() < 0.02 * moved.norm()  # bfloat16 has three digits
        assert torch.allclose(one.state[mine]["momentum_buffer"], other.state[its]["momentum_buffer"])
    values = torch.linalg.svdvals(orthogonalized(torch.randn(40, 12, generator=gradients), (3.4445, -4.775, 2.0315), 5))
    assert values.min() > 0.5 and values.max() < 1.3


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay(name) -> None:
    net = model()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizers = Optimizers(net, Optimizer(name=name, lr=0.5, weight_decay=0.1))
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.set_lr(1.0)
    optimizers.step()
    torch.testing.assert_close(dict(net.named_parameters())["0.weight"], before["0.weight"] * 0.95)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters() if p.ndim < 2)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_goes_out_and_back_exactly(name) -> None:
    settings = Optimizer(name=name, lr=0.02)
    straight, first, second = model(), model(), model()
    stepped(Optimizers(straight, settings), straight, 2)
    one = Optimizers(first, settings)
    stepped(one, first, 1)
    second.load_state_dict(first.state_dict())
    two = Optimizers(second, settings)
    shards = own_shards(one.state(), is_main=True)
    assert shards.keys() == one.state().keys()
    two.load_state(shards)
    for net, part in ((first, one), (second, two)):
        (net(torch.linspace(0, 2.0, 6)) * torch.arange(4)).sum().backward()
        part.set_lr(1.0)
        part.step()
    for a, b, c in zip(straight.parameters(), first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)


def test_state_of_another_model_is_refused() -> None:
    optimizers = Optimizers(model(), Optimizer())
    with pytest.raises(ModelError, match=r"2\.weight:exp_avg"):
        optimizers.load_state({"2.weight:exp_avg": torch.zeros(4)})
    with pytest.raises(ModelError, match=r"0\.weight:exp_avg"):
        optimizers.load_state({"0.weight:exp_avg": torch.zeros(4)})


def test_clipping_scales_the_global_norm_and_reports_the_norm_before() -> None:
    net = model()
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    total = sum(p.numel() for p in net.parameters())
    assert float(Optimizers(net, Optimizer(clip_norm=1.0)).clip()) == pytest.approx(3 * total**0.5)
    assert sum(float(p.grad.square().sum()) for p in net.parameters() if p.grad is not None) == pytest.approx(
        1, rel=1e-4
    )


@pytest.mark.parametrize(("name", "rate"), [("adamw", 0.01), ("muon", ADAMW_SHARE * 0.01)])
def test_a_parameter_with_a_rate_of_its_own_is_adamws_and_never_decays(name: str, rate: float) -> None:
    net = model()
    before = net[0].weight.detach().clone()
    optimizers = Optimizers(net, Optimizer(name=name, lr=0.01, weight_decay=0.1), {"0.weight": 7.0})
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers.set_lr(0.5)
    optimizers.step()
    assert (net[0].weight.detach() - before).abs().max().item() == pytest.approx(0.5 * 7 * rate, rel=1e-3)
    assert "exp_avg" in {key.rpartition(":")[2] for key in optimizers.state() if key.startswith("0.weight")}
    before = net[0].weight.detach().clone()
    for part in optimizers.parts:
        part.state.clear()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step()
    assert torch.equal(net[0].weight, before)
