"""Adapters: they alone are trained, in float32; merging keeps the logits; a killed run resumes bitwise."""

import json
import os
import signal
from array import array
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dllm.config.params import Target, Train
from dllm.errors import ConfigError, ModelError
from dllm.methods.diffusion.build import initial_model
from dllm.methods.diffusion.masked import MaskedStrategy
from dllm.methods.diffusion.settings import Mdlm
from dllm.models import precision
from dllm.models.diffusion.families import load_checkpoint
from dllm.models.diffusion.lora import FILES
from dllm.tracking.runs import NullTracker
from dllm.training.batches import Example
from dllm.training.distributed import Ranks
from dllm.training.loop import Loop
from tests.methods.diffusion.strategies import strategy_of
from tests.models.diffusion.remote_code import checkpoint

ALONE = Ranks(0, 1, torch.device("cpu"))
TINY = Target(model="builtin:tiny", dtype="float32")
LORA = {"rank": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj", "up_proj"]}
LAST = "checkpoints/step-000006"


def row(i: int) -> Example:
    ids = torch.randint(10, 400, (9 + 2 * i,), generator=torch.Generator().manual_seed(i)).tolist()
    return Example(f"r{i}-0", array("i", ids), 3)


SPLITS = {"train": [row(i) for i in range(8)], "heldout": [row(9)]}


def settings(**changes) -> Train:
    values = {
        "mode": "mdlm", "compute_dtype": "float32", "epochs": 3, "batch_size": 4, "validate_every": 3, "log_every": 1,
        "optimizer": {"lr": 0.02}, "mdlm": {"lora": LORA}, **changes,
    }  # fmt: skip
    return Train.model_validate(values)


def strategy(target: Target = TINY, **changes) -> MaskedStrategy:
    asked = settings(**changes)
    return strategy_of(initial_model(target, asked, "cpu"), SPLITS, asked)


def run(made: MaskedStrategy, work: Path):
    return Loop(made, made.settings, ALONE, work=work, tracker=NullTracker()).run()


def test_only_adapters_are_trained_and_the_rest_stays_in_the_compute_dtype(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(precision, "_multiplies_in", lambda dtype: True)
    made = strategy(compute_dtype="bfloat16")
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    run(made, tmp_path)
    for name, value in made.model.state_dict().items():
        moved = not torch.equal(before[name], value)
        assert moved == (".lora_" in name), name
        assert value.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16), name
    names = set(load_file(tmp_path / LAST / "optimizer.safetensors"))
    assert names and all(".lora_" in name for name in names)
    assert not (tmp_path / LAST / "model.safetensors").exists()


def test_the_merged_model_has_the_logits_of_the_adapted_one(tmp_path: Path) -> None:
    made = strategy()
    outcome = run(made, tmp_path)
    made.load(outcome.checkpoint)
    model, ids = made.model.eval(), torch.arange(20, 40)[None]
    with torch.no_grad():
        adapted = model.logits(model.hidden(ids))
        made.export(outcome.checkpoint, tmp_path / "export", torch.float32)
        merged = load_checkpoint(tmp_path / "export")
        torch.testing.assert_close(merged.logits(merged.hidden(ids)), adapted, atol=1e-4, rtol=1e-4)
        base = initial_model(TINY, settings(mdlm={}), "cpu")
        assert (base.logits(base.hidden(ids)) - adapted).abs().max() > 1e-2
    assert not any("lora" in name for name in load_file(tmp_path / "export" / "model.safetensors"))


class Stopped:
    """Receives SIGTERM in its fourth step, between two checkpoints."""

    steps = 0

    def terms(self, split, rows, epoch):
        self.steps += split == "train"
        if self.steps == 4 and split == "train":
            os.kill(os.getpid(), signal.SIGTERM)
        return super().terms(split, rows, epoch)


def test_a_stopped_run_resumes_bitwise(tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    run(strategy(), straight)
    with pytest.raises(SystemExit):
        run(strategy_of(initial_model(TINY, settings(), "cpu"), SPLITS, settings(), Stopped), stopped)
    assert (stopped / "checkpoints" / "latest").read_text() == "step-000004\n"
    run(strategy(), stopped)
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (stopped / LAST / name).read_bytes() == (straight / LAST / name).read_bytes()


def test_peft_reads_the_adapter(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from dllm.models import targets

    made = strategy()
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    made.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= set(FILES)
    told = json.loads((tmp_path / FILES[0]).read_text())
    assert (told["base_model_name_or_path"], told["r"], told["lora_alpha"]) == ("builtin:tiny", 4, 8)
    plain = AutoModelForCausalLM.from_pretrained(targets.locate(TINY), dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        model = made.model.eval()
        ours = model.logits(model.causal_hidden(ids))
        torch.testing.assert_close(theirs(ids).logits, ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llada", "llada2_moe", "nemotron_labs_diffusion"])
def test_published_models_are_adapted_through_their_own_code(tmp_path: Path, kind: str) -> None:
    target = checkpoint(tmp_path / "published", kind)
    mode = "hybrid" if kind == "nemotron_labs_diffusion" else "mdlm"
    section = {"lora": LORA} if kind == "llada" else {"lora": LORA, "attention": "block", "block_size": 4}
    made = strategy(target, mode=mode, **{mode: section})
    made.model.train()
    made.terms("train", [0, 1], 0).numerator.backward()
    moving = {name: p.grad for name, p in made.model.named_parameters() if p.requires_grad}
    assert all(grad.abs().sum() > 0 for name, grad in moving.items() if "lora_B" in name) and len(moving) == 8
    made.save(tmp_path)
    made.export(tmp_path, tmp_path / "export", torch.float32)
    again = load_checkpoint(tmp_path / "export", trust_remote_code=True)
    assert again.config == made.model.config


REFUSED = [
    ({"target_modules": ["lm_head"]}, "take no adapter"),
    ({"target_modules": ["embed_tokens"]}, "take no adapter"),
    ({"target_modules": ["nowhere"]}, "no module of the model is called nowhere"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED, ids=str)
def test_an_adapter_without_a_module_is_refused(changes: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        strategy(mdlm={"lora": {**LORA, **changes}})


def test_another_ranks_adapter_is_refused(tmp_path: Path) -> None:
    strategy().save(tmp_path)
    with pytest.raises(ModelError, match="another rank"):
        strategy(mdlm={"lora": {**LORA, "rank": 2}}).load(tmp_path)


def test_settings_without_an_adapter_do_not_mention_it() -> None:
    plain, adapted = (made.mdlm.model_dump(exclude_none=True) for made in (settings(mdlm={}), settings()))
    assert "lora" not in plain and "lora" in adapted
    with pytest.raises(ValueError, match="set init to target"):
        Mdlm.model_validate({"init": "random", "lora": LORA})
