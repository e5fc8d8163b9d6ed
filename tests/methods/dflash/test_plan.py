"""What a run will cost: operations against torch's own count, memory against what a step has in use."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from dllm.config import recipe_book
from dllm.config.load import parse_params
from dllm.config.params import Optimizer, Params
from dllm.methods.dflash.anchors import Anchors
from dllm.methods.dflash.objective import Batch, dflash_terms
from dllm.methods.dflash.plan import forward_flops, plan
from dllm.methods.method import PlanContext
from dllm.models.drafts import attention
from dllm.models.drafts.checkpoint import save_draft
from dllm.models.known_targets import planned_target
from dllm.registry import DRAFTS
from dllm.training.optimizer import Optimizers
from dllm.training.plan import Workload

ROWS, LENGTH, BLOCKS, VOCAB, CHUNK = 2, 200, 24, 4000, 64
SHAPE = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 12, "vocab_size": VOCAB,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
WORK = Workload(60, LENGTH, LENGTH, LENGTH, "a test")


def params(name: str = "dflash", **dflash: Any) -> Params:
    draft = {"architecture": name, "num_hidden_layers": 2}
    section = {"block_size": 8, "num_blocks_per_sample": BLOCKS, "ce_chunk_size": CHUNK, "draft": draft} | dflash
    raw = {
        "recipe": "x", "target": {"model": "builtin:tiny"}, "prepare": {"sources": [{"name": "gsm8k"}]},
        "train": {"batch_size": ROWS, "epochs": 2, "dflash": section}, "register": {"model_name": "x"},
    }  # fmt: skip
    return parse_params(raw)


def meta_target() -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPE))


def planned(chosen: Params, target: Any = None, ranks: int = 1) -> Any:
    return plan(PlanContext(chosen, chosen.train.method_settings, target or meta_target(), WORK, ranks))


class Step:
    """A real step of the planned shape, on the CPU."""

    def __init__(self, chosen: Params) -> None:
        settings: Any = chosen.train.method_settings
        family = DRAFTS[settings.draft.architecture]
        config = family.config_for(AutoConfig.for_model(**SHAPE), settings.draft, block_size=8, mask_token_id=3)
        self.settings, self.draft = settings, family(config)
        self.draft.reset_parameters(0)
        self.optimizer = torch.optim.AdamW(self.draft.parameters(), fused=True)
        width = SHAPE["hidden_size"]
        assert isinstance(width, int)
        self.embedding = torch.randn(VOCAB, width, dtype=torch.bfloat16)
        features = torch.randn(ROWS, LENGTH, width * len(config.target_layer_ids), dtype=torch.bfloat16)
        ids = torch.randint(0, VOCAB, (ROWS, LENGTH))
        self.batch = Batch(ids, torch.ones(ROWS, LENGTH, dtype=torch.bool), features, None)
        place = torch.arange(LENGTH - 8 - BLOCKS, LENGTH - 8).expand(ROWS, BLOCKS).clone()  # they see nearly everything
        self.anchors = Anchors(place, torch.ones(ROWS, BLOCKS, dtype=torch.bool))

    def gradient(self) -> int:
        """Compute a gradient; return the number of scored slots."""
        sums = dflash_terms(
            self.draft,
            self.embedding,
            self.embedding,
            self.batch,
            self.anchors,
            gamma=4.0,
            chunk=CHUNK,
            draft_settings=self.settings.draft,
        )
        sums.numerator.backward()  # type: ignore[no-untyped-call]
        return int(sums.count_P.sum())


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are of a GPU's attention; torch counts no operations of the fused kernel on a CPU."""
    monkeypatch.setattr(attention, "MERGED_ON", frozenset())


@pytest.mark.parametrize("name", list(DRAFTS))
def test_operations_are_those_that_torch_counts(name: str) -> None:
    step = Step(params(name))
    with FlopCounterMode(display=False) as counter:
        predictions = step.gradient()
    ours = step.draft.train_flops(
        context_tokens=ROWS * LENGTH,
        blocks=ROWS * BLOCKS,
        visible_tokens=int(step.anchors.pos_BN.sum()),
        predictions=predictions,
        vocab=VOCAB,
    )
    assert 0.94 < ours / counter.get_total_flops() < 1.06


@pytest.mark.parametrize("name", list(DRAFTS))
def test_moments_are_those_that_training_allocates(name: str) -> None:
    chosen = params(name)
    chosen = chosen.model_copy(update={"train": chosen.train.model_copy(update={"optimizer": Optimizer(name="muon")})})
    step = Step(chosen)
    optimizers = Optimizers(step.draft, chosen.train.optimizer, step.draft.adamw_rates(step.settings.draft))
    step.gradient()
    optimizers.step()
    held = sum(
        tensor.nbytes
        for part in optimizers.parts
        for state in part.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor) and tensor.ndim
    )
    assert planned(chosen).memory["optimizer"] == held


@pytest.mark.parametrize("name", list(DRAFTS))
@pytest.mark.parametrize("group", [None, 1 << 16])
def test_memory_is_what_a_step_has_in_use(name: str, group: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if group is not None:
        monkeypatch.setattr(attention, "SCORES_AT_ONCE", group)
    step = Step(params(name))
    step.gradient()
    step.optimizer.step()
    step.optimizer.zero_grad()
    tracker = MemTracker()
    tracker.track_external(step.draft, step.optimizer)
    with tracker:
        step.gradient()
    measured = sum(found["Total"] for found in tracker.get_tracker_snapshot("peak").values())
    estimate = sum(planned(params(name)).memory.values())
    print(f"{name}: estimated {estimate / 2**20:.1f} MiB, measured {measured / 2**20:.1f}: {estimate / measured:.2f}")
    assert 0.8 < estimate / measured < 1.25


def test_a_targets_operations_are_those_that_torch_counts() -> None:
    # Torch counts no fused attention on CPUs, and of this one also the half that the causal mask hides.
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPE), attn_implementation="eager")
    ids = torch.randint(0, VOCAB, (1, LENGTH))
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.get_decoder()(input_ids=ids, use_cache=False)
    ours = forward_flops(model, LENGTH) + 2 * LENGTH**2 * 12 * 128
    assert abs(ours / counter.get_total_flops() - 1) < 0.02


@pytest.mark.parametrize(
    ("recipe", "draft", "target"),
    [
        ("qwen3-4b-dflash", 537_427_200, 4_022_468_096),
        ("qwen3-8b-dflash", 1_048_626_432, 8_190_735_360),
        ("qwen3-4b-dflash2", 632_360_192, 4_022_468_096),
        ("qwen3-8b-dflash2", 1_169_573_120, 8_190_735_360),
    ],
)
def test_recipes_of_well_known_targets_are_planned_without_their_repositories(
    recipe: str, draft: int, target: int
) -> None:
    chosen = recipe_book.load(recipe)
    work = Workload(800_000, 3072, 3072, 2048, "a test")
    model = planned_target(chosen.target)
    found = plan(PlanContext(chosen, chosen.train.method_settings, model, work, 8))
    assert found.parameters == {"draft": draft, "target, frozen": target}
    assert found.memory["target"] == 2 * target and found.memory["optimizer"] == 8 * draft
    assert found.memory["gradients"] == found.memory["draft weights"] == 4 * draft
    assert found.bytes < 80e9 and found.loading == 0


def test_what_the_settings_change_shows() -> None:
    cached, online = planned(params()), planned(params(features="online"))
    assert cached.once_flops and not online.once_flops and "target's features" in online.step_flops
    assert online.memory["target"] > cached.memory["target"] and cached.loading
    assert planned(params(), ranks=2).memory["gradients"] == 4 * cached.parameters["draft"]
    assert planned(params(ce_chunk_size=8192)).bytes > cached.bytes
    fewer = planned(params(num_blocks_per_sample=6))
    assert fewer.bytes < cached.bytes and fewer.step_flops["draft"] < cached.step_flops["draft"]


def test_a_warm_start_is_planned_by_the_published_draft(tmp_path: Path) -> None:
    section = {"num_hidden_layers": 3, "num_target_layers_tapped": 4}
    settings: Any = params(draft=section).train.method_settings
    draft = DRAFTS["dflash"](
        DRAFTS["dflash"].config_for(meta_target().config, settings.draft, block_size=6, mask_token_id=3)
    )
    draft.reset_parameters(0)
    save_draft(draft, tmp_path)
    size = sum(parameter.numel() for parameter in draft.parameters())
    same = planned(params(block_size=0, draft={"init": str(tmp_path)}))
    assert same.parameters["draft"] == size
    extended = planned(params(block_size=0, draft={"init": str(tmp_path), "architecture": "dflash2"}))
    assert extended.parameters["draft"] > size
    assert extended.memory["features"] == same.memory["features"], "the published draft's taps"
