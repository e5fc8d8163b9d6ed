"""Where a target is, what it hashes to, and one line for each way it can be missing."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dllm.config.params import Target
from dllm.errors import ModelError
from dllm.models import target_identity, targets

TINY = Target(model="builtin:tiny")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The tiny target as a directory of a user's own."""
    folder = tmp_path / "mine"
    shutil.copytree(targets.locate(TINY), folder)
    (folder / "weights.sha256").unlink()
    return folder


def test_a_directory_is_a_target(copy: Path) -> None:
    target = Target(model=str(copy), dtype="float32")
    model = targets.load_target(target)
    assert model.dtype == torch.float32
    assert targets.load_target(target, torch.bfloat16).dtype == torch.bfloat16
    assert targets.load_target(target, "bfloat16", "cpu").dtype == torch.bfloat16
    assert len(targets.load_tokenizer(target)) == len(targets.load_tokenizer(TINY))


def test_identity_follows_the_weights_and_the_config(copy: Path) -> None:
    target = Target(model=str(copy))
    first = target_identity.identity(target)
    assert first == {"model": str(copy), "revision": None, "weights": target_identity.identity(TINY)["weights"]}
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    second = target_identity.identity(target)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    third = target_identity.identity(target)
    assert len({first["weights"], second["weights"], third["weights"]}) == 3


def test_a_hub_snapshot_is_known_by_its_commit_and_blobs(copy: Path, tmp_path: Path, monkeypatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    hub = tmp_path / "hub" / "models--me--mine"
    blob = hub / "blobs" / ("ab" * 32)
    blob.parent.mkdir(parents=True)
    shutil.move(copy / "model.safetensors", blob)
    (hub / "snapshots").mkdir()
    shutil.move(copy, hub / "snapshots" / commit)
    (hub / "snapshots" / commit / "model.safetensors").symlink_to(blob)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = target_identity.identity(Target(model="me/mine", revision=commit))
    assert found["revision"] == commit and found["model"] == "me/mine"
    assert found["weights"] != target_identity.identity(TINY)["weights"], "named by the blob, not read"


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/model", "~/none", "a/b/c", "two words"])
def test_a_missing_directory_is_one_line(name: str) -> None:
    with pytest.raises(ModelError, match="no such model directory") as caught:
        targets.locate(Target(model=name))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_hub_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"hub is out of reach.*target\.model: nobody/nothing.*built-in") as caught:
        targets.locate(Target(model="nobody/nothing"))
    assert "\n" not in str(caught.value)


def test_a_broken_directory_is_one_line(copy: Path) -> None:
    target = Target(model=str(copy))
    (copy / "model.safetensors").unlink()
    for read in (targets.load_target, target_identity.identity):
        with pytest.raises(ModelError) as caught:
            read(target)
        assert str(copy) in str(caught.value) and "\n" not in str(caught.value)
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot read the tokenizer"):
        targets.load_tokenizer(target)
    (copy / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        targets.locate(target)


def test_damaged_weights_are_one_line(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="cannot read the target") as caught:
        targets.load_target(Target(model=str(copy)))
    assert "\n" not in str(caught.value)


def test_a_target_with_a_tensor_missing_is_refused(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors, model\.norm\.weight among them"):
        targets.load_target(Target(model=str(copy)))
