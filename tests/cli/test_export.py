"""`export`: what serving engines load, with a card that says what it is and how it is served."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from safetensors.torch import load_file

from dllm.cli.app import app
from dllm.config.load import load_params, params_digest
from dllm.digests import file_digest, tree_digest
from dllm.errors import ConfigError, ModelError, StageError
from dllm.methods.dflash.settings import Draft
from dllm.models import hub
from dllm.models.builtin import directory
from dllm.models.drafts.checkpoint import load_draft, save_draft
from dllm.models.drafts.dflash import DFlashDraft
from dllm.models.targets import empty_target
from dllm.publishing import publish_tree
from dllm.registry import DRAFTS
from dllm.stages import other_work
from dllm.tracking.provenance import digest
from tests.decoding import stand_in_drafts
from tests.models.small_models import TINY

HOSTILE = "<script>alert(1)</script> `x` | [y](http://z)\n---\nlicense: mit"
PARAMS = """
recipe: small
target: {model: "Qwen/Qwen3-4B"}
prepare: {sources: [{name: "openai/gsm8k", split: main}, {name: "/home/ann/chats.jsonl"}]}
train: {epochs: 3, dflash: {block_size: 4}}
register: {model_name: x}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = stand_in_drafts.config(empty_target(TINY), 4)
    draft = DFlashDraft(config)
    draft.reset_parameters(seed=3)
    folder = tmp_path_factory.mktemp("draft")
    save_draft(draft, folder)
    return folder


def project(root: Path, checkpoint: Path, target: str = "Qwen/Qwen3-4B") -> Path:
    """Lay out the records of a whole run, as the stages leave them, with the checkpoint as its result."""
    (root / "params.yaml").write_text(PARAMS)
    params = load_params(root / "params.yaml")
    identity = {"target": {"model": target, "revision": "a" * 40}, "method": "dflash"}
    figures = {
        "prepare": {"sources": {"openai/gsm8k": {"train": 700}, "/home/ann/chats.jsonl": {"train": 20}}},
        "regenerate": {"rows": 640, "tokens": 81000},
        "train": {"draft_params": 61728, "steps": 12, "seconds": 120.0, "val_draft_acc_k1": 0.5},
        "evaluate": {"tau_micro": 2.345, "acceptance_by_offset": [0.6, 0.3, 0.1], "dtype": "bfloat16", "device": "cpu"},
    }  # fmt: skip
    files: dict[str, dict[str, Path]] = {stage: {} for stage in figures}
    for stage, name in (("prepare", "prompts.parquet"), ("regenerate", "shard-00000.parquet")):
        (root / name).write_text(stage)
        files[stage][name] = root / name
    files["train"] = {f"checkpoint/{path.name}": path for path in checkpoint.iterdir()}
    digests = {stage: {name: file_digest(path) for name, path in found.items()} for stage, found in files.items()}
    settings = other_work.determining(params.train, 1)
    runs: dict[str, dict[str, Any]] = {
        "prepare": {"inputs": {"/home/ann/chats.jsonl/chats.jsonl": "c" * 64}},
        "regenerate": {"inputs": {"prompts": digests["prepare"]["prompts.parquet"]}, "identity": {"engine": "local"}},
        "train": {"inputs": {"regenerate": tree_digest(digests["regenerate"])}, "identity": identity, "ranks": 1,
                  "params": params_digest(params.target, settings), "libraries": {"torch": "2.13.0"}},
        "evaluate": {"inputs": {"checkpoint": digest(checkpoint)}, "identity": identity},
    }  # fmt: skip
    for stage, found in figures.items():
        metrics = root / f"{stage}.json"
        metrics.write_text(json.dumps(found))
        outputs = digests[stage] | {"metrics.json": file_digest(metrics)}
        publish_tree(
            root / "out" / stage,
            files[stage] | {"metrics.json": metrics},
            {"run.json": runs[stage] | {"outputs": outputs}},
        )
    return root


def dllm(*words: object) -> None:
    typer.main.get_command(app).main(args=[str(word) for word in words], standalone_mode=False)


def parts(card: str) -> tuple[dict[str, Any], str]:
    """Split a card into its front matter and its text."""
    _, front, text = card.split("---\n", 2)
    return yaml.safe_load(front), text


def rows(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\| (\S.*?) \| (.*) \|$", text.replace("\\_", "_"), re.MULTILINE))


def test_an_export_is_the_same_draft_and_engines_find_what_they_read(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")  # which is empty, and so may be filled
    dllm("export", "--checkpoint", checkpoint, "--to", ".", "--root", tmp_path)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "new"))
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    assert load_draft(tmp_path / "new").config == load_draft(checkpoint).config
    front, text = parts((tmp_path / "new" / "README.md").read_text())
    assert front == {
        "pipeline_tag": "text-generation",
        "tags": ["speculative-decoding", "draft-model", "dflash", "dllm"],
    }
    assert "No record of it lies beside the checkpoint." in text and "## Acceptance" not in text
    assert "--speculative-num-draft-tokens 4" in text and '"num_speculative_tokens": 3' in text


@pytest.mark.parametrize("name", list(DRAFTS))
def test_every_family_is_exported_by_its_own_name(name: str, tmp_path: Path) -> None:
    target: Any = empty_target(TINY).config
    settings = Draft(architecture=name, num_hidden_layers=1, num_target_layers_tapped=3)
    draft = DRAFTS[name](DRAFTS[name].config_for(target, settings, block_size=4, mask_token_id=3))
    draft.reset_parameters(seed=1)
    save_draft(draft, tmp_path / "draft", torch.bfloat16)
    dllm("export", "--checkpoint", tmp_path / "draft", "--to", tmp_path / "new", "--root", tmp_path)
    front, text = parts((tmp_path / "new" / "README.md").read_text())
    assert name in front["tags"] and f"# {draft.architectures[0]} for" in text and "| weights | bfloat16 |" in text
    assert type(load_draft(tmp_path / "new")) is DRAFTS[name]


def test_a_card_tells_data_settings_and_acceptance(checkpoint: Path, tmp_path: Path) -> None:
    root = project(tmp_path, checkpoint)
    dllm("export", "--checkpoint", root / "out/train", "--to", tmp_path / "new", "--for", "vllm", "--root", root)
    front, text = parts((tmp_path / "new" / "README.md").read_text())
    assert front["base_model"] == "Qwen/Qwen3-4B" and front["datasets"] == ["openai/gsm8k"]
    found = rows(text)
    assert found["prompts of openai/gsm8k"] == "700 (split main)" and found["prompts of chats.jsonl"].startswith("20")
    assert found["sha256 of chats.jsonl"] == "c" * 64 and "ann" not in text, "folders of the machine"
    assert found["responses"] == "640, 81,000 tokens" and found["responses come from"] == "regenerate.engine local"
    assert found["train.dflash.block_size"] == "4" and found["minutes"] == "2.0" and found["torch"] == "2.13.0"
    assert found["τ micro, held-out prompts"] == "2.35"
    assert "| 1 | 0.500 | – | 0.600 |" in text
    command = shlex.split(text.split("```sh\n")[1].split("```")[0].replace("\\\n", " "))
    assert command[:3] == ["vllm", "serve", "Qwen/Qwen3-4B"] and "SGLang" not in text


def test_records_of_another_checkpoint_and_changed_settings_are_left_out(checkpoint: Path, tmp_path: Path) -> None:
    root = project(tmp_path, checkpoint)
    (root / "params.yaml").write_text(PARAMS.replace("epochs: 3", "epochs: 4"))
    dllm("export", "--checkpoint", root / "out/train", "--to", tmp_path / "first", "--root", root)
    assert "train.epochs" not in rows((tmp_path / "first" / "README.md").read_text())
    other = load_draft(checkpoint)
    other.reset_parameters(seed=4)
    save_draft(other, tmp_path / "other")
    dllm("export", "--checkpoint", tmp_path / "other", "--to", tmp_path / "second", "--root", root)
    card = (tmp_path / "second" / "README.md").read_text()
    assert "Acceptance" not in card and "prompts of" not in card and "base_model:" not in card.replace("# base", "")


def test_names_on_a_card_are_text(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x1" * 12)
    root = project(tmp_path, checkpoint, target=HOSTILE + " hf_" + "x1" * 12)
    dllm("export", "--checkpoint", root / "out/train", "--to", tmp_path / "new", "--root", root)
    front, text = parts((tmp_path / "new" / "README.md").read_text())
    assert "license" not in front and "base_model" not in front
    assert "<script>" not in text and "\n---\nlicense" not in text and "x1x1" not in text and "`x`" not in text


@pytest.mark.parametrize(
    "target",
    ["models/ann", "./models/ann", "../x/models/ann", "/x/models/ann", "~/models/ann", "file:///x/models/ann",
     "s3://models/ann", "https://me:models@ann", "C:\\models\\ann"],
)  # fmt: skip
def test_no_folder_and_no_password_stands_on_a_card(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    (tmp_path / "models" / "ann").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    dllm("export", "--checkpoint", checkpoint, "--to", "new", "--root", tmp_path, "--target", target)
    card = (tmp_path / "new" / "README.md").read_text()
    assert "DFlashDraftModel for ann\n" in card and "models" not in card and "base_model: name" in card


def test_what_an_engine_cannot_decode_is_refused_in_one_line(checkpoint: Path, tmp_path: Path) -> None:
    window = tmp_path / "window"
    config: Any = load_draft(checkpoint).config
    raw = config.to_json() | {"layer_types": ["sliding_attention"], "sliding_window": 8, "use_sliding_window": True}
    raw |= {"is_causal": True, "dflash_config": raw["dflash_config"] | {"causal": True}}
    draft = DFlashDraft(DFlashDraft.read_config(raw, "raw"))
    draft.reset_parameters(seed=3)
    save_draft(draft, window)
    with pytest.raises(ModelError, match=r"^llama.cpp would decode layer 0 with bidirectional .* window of 8, and"):
        dllm("export", "--checkpoint", window, "--to", tmp_path / "new", "--for", "llamacpp", "--root", tmp_path)
    assert not (tmp_path / "new").exists()
    dllm("export", "--checkpoint", window, "--to", tmp_path / "new", "--for", "sglang", "--root", tmp_path)
    dllm("export", "--checkpoint", window, "--to", tmp_path / "all", "--root", tmp_path)
    card = (tmp_path / "all" / "README.md").read_text()
    assert "* llama.cpp would decode" in card and "**llama.cpp**" not in card and "**LMDeploy 0.18**" in card


def test_wrong_calls_are_one_line(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(StageError, match="not empty"):
        dllm("export", "--checkpoint", checkpoint, "--to", tmp_path / "full", "--root", tmp_path)
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "run.json").touch()
    with pytest.raises(StageError, match=r"in the result of stage train.*--to"):
        dllm("export", "--checkpoint", checkpoint, "--to", tmp_path / "out" / "train" / "new", "--root", tmp_path)
    with pytest.raises(ConfigError, match="did you mean vllm"):
        dllm("export", "--checkpoint", checkpoint, "--to", tmp_path / "a", "--for", "vlm", "--root", tmp_path)
    with pytest.raises(ModelError, match="plain causal model"):
        dllm("export", "--checkpoint", directory("builtin:tiny"), "--to", tmp_path / "a", "--root", tmp_path)
    assert hub.looks_like_id("no/such") and not (tmp_path / "a").exists()
