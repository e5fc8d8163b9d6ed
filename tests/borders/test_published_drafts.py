"""A published draft is pinned by its revision, recorded by its commit, and held against its target by `prepare`."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from safetensors.torch import load_file, save_file

from dllm.config.load import parse_params
from dllm.config.params import Target
from dllm.errors import DllmError
from dllm.methods.dflash.build import initial_draft
from dllm.models import targets
from dllm.models.drafts.checkpoint import save_draft
from dllm.models.drafts.config import FULL, SLIDING
from dllm.models.drafts.dflash import DFlashDraft
from dllm.registry import METHODS
from dllm.stages import preflight
from tests.decoding import stand_in_drafts

OLD, NEW = "a" * 40, "b" * 40
TINY = Target(model="builtin:tiny", dtype="float32")


def _params(**draft: Any) -> Any:
    block_size, mask_id = draft.pop("block_size", 4), draft.pop("mask_token_id", None)
    raw = {
        "recipe": "mine",
        "target": {"model": "builtin:tiny", "dtype": "float32"},
        "prepare": {"sources": [{"name": "gsm8k"}]},
        "register": {"model_name": "mine"},
        "train": {
            "mode": "dflash",
            "dflash": {"block_size": block_size, "mask_token_id": mask_id, "draft": {"init": "me/draft", **draft}},
        },
    }
    return parse_params(raw)


def _publish(hub: Path, commit: str, folder: Path, *names: str) -> None:
    """Put a folder into a Hugging Face cache as a commit of me/draft, with links to blobs, and name it."""
    repo = hub / "models--me--draft"
    for part in ("blobs", "refs", f"snapshots/{commit}"):
        (repo / part).mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        blob = repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        (repo / "snapshots" / commit / file.name).symlink_to(blob)
    for name in names:
        (repo / "refs" / name).write_text(commit)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two commits of a draft: the tag v1, and main."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    draft = DFlashDraft(stand_in_drafts.config(targets.load_target(TINY), 4))
    for seed, commit, name in ((1, OLD, "v1"), (2, NEW, "main")):
        draft.reset_parameters(seed)
        save_draft(draft, tmp_path / name)
        written = json.loads((tmp_path / name / "config.json").read_text())
        del written["num_target_layers"]  # as in some published files
        (tmp_path / name / "config.json").write_text(json.dumps(written))
        _publish(tmp_path / "hub", commit, tmp_path / name, name)
    return tmp_path / "hub"


@pytest.mark.parametrize(("revision", "commit"), [(None, NEW), ("main", NEW), ("v1", OLD), (OLD, OLD)])
def test_a_revision_is_taken_and_its_commit_recorded(hub: Path, revision: str | None, commit: str) -> None:
    params = _params(revision=revision)
    preflight.check(params)
    found = METHODS["dflash"].identity(params)["draft"]
    assert (found["model"], found["revision"]) == ("me/draft", commit)
    target = targets.load_target(TINY)
    draft = initial_draft(params.train.dflash, target, targets.load_tokenizer(TINY), seed=0)
    expected = DFlashDraft(draft.config)
    expected.reset_parameters(1 if commit == OLD else 2)
    assert all((one == other).all() for one, other in zip(draft.parameters(), expected.parameters(), strict=True))
    assert draft.config.to_json()["num_target_layers"] == target.config.num_hidden_layers


def test_weights_in_a_directory_are_recorded_too(hub: Path) -> None:
    folder = hub.parent / "v1"
    found = METHODS["dflash"].identity(_params(init=str(folder)))["draft"]
    assert (found["model"], found["revision"]) == (str(folder), None)
    assert found["weights"] == METHODS["dflash"].identity(_params(revision="v1"))["draft"]["weights"]
    (folder / "model.safetensors").write_bytes((hub.parent / "main" / "model.safetensors").read_bytes())
    assert found["weights"] != METHODS["dflash"].identity(_params(init=str(folder)))["draft"]["weights"]
    assert METHODS["dflash"].identity(_params(init="random")) == {}


REFUSED = {
    "another commit": ({}, {"revision": "v2"}, "out of reach"),
    "another width": ({"hidden_size": 128}, {}, "hidden_size 128, the target's is 64"),
    "another vocabulary": ({"vocab_size": 32000}, {}, "vocab_size 32000, the target's is 1408"),
    "another depth": ({"num_target_layers": 36}, {}, "num_target_layers 36, the target has 8"),
    "a layer beyond the target": ({"dflash_config/target_layer_ids": [1, 3, 99]}, {}, "taps layer 99"),
    "no layers": ({"dflash_config/target_layer_ids": None}, {}, "target_layer_ids"),
    "a mask beyond the vocabulary": ({"dflash_config/mask_token_id": 5000}, {}, "mask id 5000"),
    "a mask that text uses": ({"dflash_config/mask_token_id": 2}, {}, "mask id 2"),
    "another mask": ({}, {"mask_token_id": 4}, "trained with mask_token_id 3, params say 4"),
    "other layers tapped": ({}, {"target_layer_ids": [1, 2, 3]}, "target_layer_ids (1, 3, 5), params say (1, 2, 3)"),
    "a window that it has not": ({}, {"sliding_window": 64}, "sliding_window None, params say 64"),
    "another attention": ({}, {"layer_types": [SLIDING]}, "params say ('sliding_attention',)"),
    "another causality": ({}, {"causal": True}, "is_causal False, params say True"),
    "two block sizes": ({"block_size": 8}, {}, "block_size"),
    "a block beyond the window": (
        {"layer_types": [SLIDING], "sliding_window": 8, "use_sliding_window": True}, {"block_size": 16},
        "a sliding_window of 8 is smaller than a block of 16",
    ),
    "another family": ({"architectures": ["Qwen3DSparkModel"]}, {}, "DSpark"),
    "DFlash 2 for DFlash": (
        {"architectures": ["DFlash2DraftModel"], "conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 8,
         "selector_top_k": 4}, {},
        "a DFlash2DraftModel, and a DFlashDraftModel is trained",
    ),
    "a key of tomorrow": ({"residual_gate": 0.5}, {}, "residual_gate"),
    "a model that is no draft": ({"architectures": ["LlamaForCausalLM"]}, {}, "LlamaForCausalLM"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "settings", "said"), REFUSED.values(), ids=REFUSED)
def test_a_draft_that_does_not_fit_is_refused_by_prepare_without_its_weights(
    hub: Path, changes: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    raw = json.loads((hub.parent / "main" / "config.json").read_text())
    for path, value in changes.items():
        node, _, key = path.rpartition("/")
        (raw[node] if node else raw)[key] = value
    folder = hub.parent / "changed"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    _publish(hub, "c" * 40, folder, "main")
    with pytest.raises(DllmError) as caught:
        preflight.check(_params(**settings))
    assert said in str(caught.value)
    assert len(str(caught.value)) <= 500
    assert str(caught.value).isprintable()


def test_weights_that_are_there_are_listed_by_prepare(hub: Path) -> None:
    folder = hub.parent / "main"
    state = load_file(folder / "model.safetensors")
    preflight.check(_params(init=str(folder)))
    save_file({**state, "d2t": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(DllmError, match=r"d2t.*ids of a reduced vocabulary"):
        preflight.check(_params(init=str(folder)))
    (folder / "model.safetensors").unlink()
    with pytest.raises(DllmError, match=r"model\.safetensors is missing"):
        preflight.check(_params(init=str(folder)))


def _without_weights(hub: Path) -> dict[str, TensorInfo]:
    """Leave me/draft as prepare finds it before any download, and return the headers of its weights."""
    folder = hub.parent / "main"
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    _publish(hub, "c" * 40, folder, "main")
    return {name: TensorInfo("F32", list(tensor.shape), (0, 0)) for name, tensor in state.items()}


def test_tensors_on_the_hub_are_checked_by_prepare_without_a_download(
    hub: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    headers, asked = _without_weights(hub), []

    def headers_of(repo: str, *, revision: str) -> SafetensorsRepoMetadata:
        asked.append((repo, revision))
        return SafetensorsRepoMetadata(None, False, {}, {"model.safetensors": SafetensorsFileMetadata({}, headers)})

    monkeypatch.setattr("dllm.models.hub.get_safetensors_metadata", headers_of)
    preflight.check(_params())
    assert asked == [("me/draft", "c" * 40)]
    headers["model.rotary_emb.inv_freq"] = headers.pop("fc.weight")
    with pytest.raises(DllmError, match=r"lacks fc\.weight \(me/draft\)"):
        preflight.check(_params())
    headers |= {"encoder.fc.weight": headers["model.rotary_emb.inv_freq"], "d2t": TensorInfo("I64", [3], (0, 0))}
    with pytest.raises(DllmError, match=r"d2t.*ids of a reduced vocabulary"):
        preflight.check(_params())
    assert "cannot be listed" not in capfd.readouterr().err


@pytest.mark.parametrize("away", [None, httpx.ConnectError("away"), httpx.ReadTimeout("slow")], ids=repr)
def test_where_the_hub_lists_no_tensors_prepare_says_when_they_are_checked(
    hub: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, away: Exception | None
) -> None:
    _without_weights(hub)

    def fail(repo: str, **_: Any) -> None:
        raise away or AssertionError

    if away:  # else the cache is used offline
        monkeypatch.setattr("dllm.models.hub.get_safetensors_metadata", fail)
    preflight.check(_params())
    assert "draft me/draft: its tensors cannot be listed now; train checks them" in capfd.readouterr().err


def test_an_embedding_of_its_own_for_masks_is_refused_by_prepare_without_weights(hub: Path) -> None:
    _without_weights(hub)
    (hub.parent / "main" / "mask_embedding.pt").write_bytes(b"")
    _publish(hub, "d" * 40, hub.parent / "main", "main")
    with pytest.raises(DllmError, match="an embedding of its own for masks"):
        preflight.check(_params())


def test_what_the_settings_say_of_a_draft_may_be_what_it_is(hub: Path) -> None:
    preflight.check(_params(mask_token_id=3, target_layer_ids=[1, 3, 5], layer_types=[FULL], causal=False))


def test_dflash_2_may_start_from_dflash(hub: Path) -> None:
    preflight.check(_params(architecture="dflash2"))


def test_a_revision_of_a_directory_or_of_nothing_is_refused(hub: Path) -> None:
    with pytest.raises(DllmError, match="a directory has no revision"):
        preflight.check(_params(init=str(hub.parent / "v1"), revision="v1"))
    with pytest.raises(DllmError, match="revision is that of a published draft"):
        _params(init="random", revision="v1")
