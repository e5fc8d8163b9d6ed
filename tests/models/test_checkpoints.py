import json
from pathlib import Path

import pytest

from dllm.errors import ModelError
from dllm.models import checkpoints


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Stand in an empty folder: names are tried there first, and the project's own may hold results."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


def a_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def a_run(folder: Path, *steps: int, **pointers: int) -> Path:
    for step in steps:
        a_checkpoint(folder / "checkpoints" / f"step-{step:06d}")
    for name, step in pointers.items():
        (folder / "checkpoints" / name).write_text(f"step-{step:06d}\n")
    return folder


def test_a_directory_with_weights_is_the_checkpoint(tmp_path: Path) -> None:
    export = a_checkpoint(tmp_path / "export")
    assert checkpoints.resolve(export, tmp_path) == export
    assert checkpoints.resolve("export", tmp_path) == export, "relative to the project"


def test_a_stages_output_and_a_project(tmp_path: Path) -> None:
    checkpoint = a_checkpoint(tmp_path / "out" / "train" / "checkpoint")
    for name in (tmp_path / "out" / "train", "out/train", tmp_path):
        assert checkpoints.resolve(name, tmp_path) == checkpoint


def test_a_runs_top_directory_gives_its_best_then_its_latest(tmp_path: Path) -> None:
    both = a_run(tmp_path / "both", 10, 20, 30, best=20, latest=30)
    assert checkpoints.resolve(both, tmp_path).name == "step-000020"
    assert checkpoints.resolve(both / "checkpoints", tmp_path).name == "step-000020"
    assert checkpoints.resolve(both / "checkpoints" / "step-000010", tmp_path).name == "step-000010"
    assert checkpoints.resolve(a_run(tmp_path / "new", 10, latest=10), tmp_path).name == "step-000010"
    gone = a_run(tmp_path / "gone", 10, best=5, latest=10)
    assert checkpoints.resolve(gone, tmp_path).name == "step-000010"


def test_an_adapters_step_says_where_the_model_is(tmp_path: Path) -> None:
    step = tmp_path / "checkpoints" / "step-000010"
    step.mkdir(parents=True)
    (step / "adapter_config.json").write_text("{}")
    (step / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "checkpoints" / "latest").write_text("step-000010\n")
    for name in (step, tmp_path):
        with pytest.raises(ModelError, match=r"an adapter alone.*out/train/checkpoint"):
            checkpoints.resolve(name, tmp_path)


@pytest.mark.parametrize("form", ["link", "line", "text file"])
def test_nemo_automodels_folders_are_read_too(tmp_path: Path, form: str) -> None:
    """Its top directory names a step by LATEST, and a step holds model/consolidated."""
    top, step = tmp_path / "run", tmp_path / "run" / "epoch_0_step_499"
    whole = a_checkpoint(step / "model" / "consolidated")
    if form == "link":
        (top / "LATEST").symlink_to(step.name)
    else:
        (top / ("LATEST" if form == "line" else "LATEST.txt")).write_text(f"{step.name}\n")
    for name in (whole, step / "model", step, top):
        assert checkpoints.resolve(name, tmp_path).resolve() == whole


def test_what_the_training_loop_writes_is_found(tmp_path: Path) -> None:
    import torch

    from dllm.training.checkpoints import Checkpoints, TrainState

    def save_model(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"")

    kept = Checkpoints(tmp_path / "run" / "checkpoints", keep=2)
    for step in (1, 2):
        kept.save(TrainState(step=step, best_step=1), {"m": torch.zeros(1)}, save_model)
    assert checkpoints.resolve("run", tmp_path).name == "step-000001"


def test_what_holds_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no checkpoint in this directory \(empty\); expected config.json"):
        checkpoints.resolve("empty", tmp_path)
    for name in ("nowhere", "/no/where", "./x"):
        with pytest.raises(ModelError, match="no such checkpoint"):
            checkpoints.resolve(name, tmp_path)
    half = tmp_path / "half"
    half.mkdir()
    (half / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no checkpoint in this directory"):
        checkpoints.resolve(half, tmp_path)


def test_the_stages_record_names_the_target(tmp_path: Path) -> None:
    checkpoint = a_checkpoint(tmp_path / "out" / "train" / "checkpoint")
    assert checkpoints.trained_for(checkpoint) is None
    target = {"model": "builtin:tiny", "revision": None, "weights": "00"}
    record = checkpoint.parent / "run.json"
    record.write_text(json.dumps({"identity": {"target": target}}))
    assert checkpoints.trained_for(checkpoint) == target
    for other in ('{"identity": {}}', "{", '{"identity": {"target": "x"}}', "[]"):
        record.write_text(other)
        assert checkpoints.trained_for(checkpoint) is None


def test_identify_tells_drafts_diffusion_models_and_others_apart(tmp_path: Path) -> None:
    for name, config, saved, expected in [
        ("draft", {"dflash_config": {}}, None, ("draft", None, False, False)),
        ("plain", {"model_type": "llama"}, None, ("causal", None, False, False)),
        ("ours", {"model_type": "llama"}, ("mdlm", 3, 4), ("diffusion", ("mdlm", 3, 4), False, False)),
        ("llada", {"model_type": "llada"}, None, ("diffusion", ("mdlm", 126336, None), False, None)),
        ("llada2", {"model_type": "llada2_moe"}, None, ("diffusion", ("mdlm", 156895, 32), False, True)),
        (
            "nemotron",
            {"model_type": "nemotron_labs_diffusion", "mask_token_id": 7},
            None,
            ("diffusion", ("hybrid", 7, 32), True, True),
        ),
    ]:
        folder = a_checkpoint(tmp_path / name)
        (folder / "config.json").write_text(json.dumps(config))
        if saved is not None:
            written = dict(zip(("mode", "mask_token_id", "block_size"), saved, strict=True))
            (folder / "dllm.json").write_text(json.dumps(written))
        found = checkpoints.identify(folder)
        kind, said, own_masks, own_code = expected
        assert (found.kind, found.sets_own_masks) == (kind, own_masks)
        assert found.config is None or (found.config.mode, found.config.mask_token_id, found.config.block_size) == said
        assert (found.config is None) == (said is None)
        assert own_code is None or found.needs_own_code == own_code
    (tmp_path / "ours" / "dllm.json").write_text("{")
    with pytest.raises(ModelError, match=r"dllm\.json"):
        checkpoints.identify(tmp_path / "ours")
