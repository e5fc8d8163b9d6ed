"""Each page of docs/extending, run: the member it shows is installed from outside and goes through the verbs."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from dllm.config.load import parse_params
from dllm.decoding.settings import Settings
from dllm.decoding.unmasking import sample
from dllm.errors import ModelError
from dllm.methods.dflash.settings import Draft
from dllm.models import builtin
from dllm.models.diffusion.families import load_checkpoint, load_diffusion_lm
from dllm.models.drafts.checkpoint import save_draft
from dllm.models.drafts.dflash import DFlashDraft
from dllm.models.drafts.protocol import TargetIO
from dllm.models.targets import empty_target
from dllm.responses import shards
from tests.arch.source_tree import ROOT
from tests.extending.pages import Shell, blocks, install
from tests.models.small_models import TINY

PAGES = ("method", "draft", "objective", "model-family", "sampler", "source", "engine", "serving-engine")
SMALL = (
    "prepare.sources=[{name: gsm8k, limit: 24}]",
    "regenerate.max_new_tokens=8",
    "train.epochs=1",
    "evaluate.num_prompts=1",
    "evaluate.max_new_tokens=8",
    "evaluate.identity_prompts=1",
)


def sets(*values: str) -> list[str]:
    return [word for value in (*SMALL, *values) for word in ("--set", value)]


def test_every_page_is_listed_and_adds_one_file_and_one_line() -> None:
    index = (ROOT / "docs" / "extending.md").read_text()
    for path in sorted((ROOT / "docs" / "extending").glob("*.md")):
        assert f"(extending/{path.name})" in index
    for page in PAGES:
        found = blocks(page)
        assert len(found["python"]) == 1 and len(found["toml"][0].splitlines()) == 2, page


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny recipe, prepared and regenerated once, for members that train."""
    folder = tmp_path_factory.mktemp("project")
    shell = Shell(folder)
    shell.dllm("recipe", "use", "tiny-dflash")
    for stage in ("prepare", "regenerate"):
        shell.dllm(stage, *sets())
    return folder


@pytest.mark.slow
def test_a_draft_and_an_objective_train_decode_and_load(tmp_path: Path, project: Path) -> None:
    shell = Shell(project, install("draft", tmp_path), install("objective", tmp_path))
    chosen = sets("train.dflash.draft.architecture=bigram", "train.dflash.loss=uniform")
    for stage in ("train", "evaluate"):
        shell.dllm(stage, *chosen)
    config = json.loads((project / "out/train/checkpoint/config.json").read_text())
    assert config["architectures"] == ["BigramDraft"]
    found = json.loads((project / "out/evaluate/metrics.json").read_text())
    assert found["greedy_identical"] is True and found["tau_micro"] >= 1
    words = ["--checkpoint", "out/train", "--prompt", "What is 2 plus 3?", "--max-new-tokens", "8", "--json"]
    decoded, plain = (json.loads(shell.dllm("generate", *words, *more)) for more in ([], ["--sampler", "ar"]))
    assert decoded["token_ids"] == plain["token_ids"]


def test_the_draft_proposes_what_it_was_trained_to_predict(tmp_path: Path) -> None:
    page = runpy.run_path(str(install("draft", tmp_path) / "toy_draft.py"))
    draft = page["BigramDraft"](page["BigramConfig"](4, 0, (1,), 8, 32))
    draft.reset_parameters(1)
    target = TargetIO(torch.nn.Embedding(32, 8), torch.nn.Linear(8, 32, bias=False))
    features_BSF, ids_BNL, keep_BN = torch.zeros(1, 5, 8), torch.tensor([[[7, 0, 0, 0]]]), torch.tensor([[True]])
    with torch.no_grad():
        hidden_BNPD = draft(target.embed(ids_BNL), features_BSF, torch.tensor([[4]]), keep_BN)
        proposal = draft.propose(7, 3, features_BSF, 4, draft.new_cache(), target)
    assert proposal.ids_P.tolist() == target.head(hidden_BNPD[0, 0]).argmax(-1).tolist()


@pytest.mark.slow
def test_a_serving_engine_refuses_what_it_cannot_decode(tmp_path: Path) -> None:
    config = DFlashDraft.config_for(
        empty_target(TINY).config, Draft(num_hidden_layers=1, sliding_window=8), block_size=4, mask_token_id=3
    )
    draft = DFlashDraft(config)
    draft.reset_parameters(seed=1)
    save_draft(draft, tmp_path / "draft")
    shell = Shell(tmp_path, install("serving-engine", tmp_path))
    said = shell.dllm("export", "--checkpoint", "draft", "--to", "exported")
    assert "z-lab, toy" not in said and "Toy 1.0 has no causal attention in a window of 8, as in layer 0" in said


@pytest.mark.slow
def test_a_model_family_trains_is_evaluated_and_generates(tmp_path: Path) -> None:
    package, target = tmp_path / "package", tmp_path / "target"
    package.mkdir()
    install("model-family", package)
    shutil.copytree(builtin.directory("builtin:tiny"), target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"shifted_logits": True}))
    shell = Shell(tmp_path, package)
    shell.dllm("recipe", "use", "tiny-mdlm")
    chosen = [
        f"target.model={target}",
        "prepare.sources=[{name: arithmetic, limit: 24}]",
        "prepare.heldout_fraction=0.2",
        *("train.nproc=1", "train.epochs=1", "train.mdlm.init=target", "train.mdlm.eos_padding=0"),
        *("evaluate.num_prompts=1", "evaluate.max_new_tokens=8", "evaluate.diffusion.likelihood_answers=2"),
        *("evaluate.diffusion.likelihood_samples=2", "evaluate.diffusion.thresholds=[0.9]"),
        *("evaluate.diffusion.steps=[null]", "evaluate.diffusion.cache=none"),
    ]
    for stage in ("prepare", "regenerate", "train", "evaluate"):
        shell.dllm(stage, *(word for value in chosen for word in ("--set", value)))
    assert json.loads((tmp_path / "out/evaluate/metrics.json").read_text())["nelbo"] > 0
    words = ["--checkpoint", "out/train", "--prompt", "7 7", "--raw", "--max-new-tokens", "8", "--json"]
    found = json.loads(shell.dllm("generate", *words))

    checkpoint, copied = tmp_path / "out/train/checkpoint", tmp_path / "without-family"
    with pytest.raises(ModelError, match="shifted_logits: True, which is not supported"):
        load_checkpoint(checkpoint)  # the package is installed in the shell only
    shutil.copytree(checkpoint, copied)
    config = json.loads((copied / "config.json").read_text())
    del config["shifted_logits"]
    (copied / "config.json").write_text(json.dumps(config))
    plain = load_checkpoint(copied)
    family = runpy.run_path(str(package / "toy_family.py"))["ShiftedLM"]
    shifted = family(plain.model, plain.tokenizer, plain.mask_token_id)
    ids = torch.tensor([plain.tokenizer("7 7")["input_ids"]])
    assert torch.equal(shifted.hidden(ids)[:, 1:], plain.hidden(ids)[:, :-1])
    settings = Settings(max_new_tokens=8, block_size=32)
    assert found["token_ids"] == sample(shifted, ids.tolist(), settings)[0].token_ids
    with pytest.raises(ModelError, match="no cache of ours with this model"):
        sample(shifted, ids.tolist(), Settings(max_new_tokens=8, cache="dual"))


@pytest.mark.slow
def test_a_sampler_generates_with_a_diffusion_model(tmp_path: Path) -> None:
    model = load_diffusion_lm(TINY)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    model.save(checkpoint)
    shell = Shell(tmp_path, install("sampler", tmp_path))
    words = ["generate", "--checkpoint", str(checkpoint), "--prompt", "Why?", "--max-new-tokens", "6", "--json"]
    found = json.loads(shell.dllm(*words, "--sampler", "left-to-right"))
    assert found["sampler"] == "left-to-right" and found["passes"] == found["tokens"] <= 6
    assert model.mask_token_id not in found["token_ids"]


@pytest.mark.slow
def test_a_source_is_prepared_with_its_limit_and_references(tmp_path: Path) -> None:
    shell = Shell(tmp_path, install("source", tmp_path))
    shell.dllm("recipe", "use", "tiny-dflash")
    said = shell.dllm("prepare", "--set", "prepare.sources=[{name: squares, limit: 30}]")
    assert "prepare: squares: 40 rows" in said
    metrics = json.loads((tmp_path / "out/prepare/metrics.json").read_text())
    assert metrics["references"] == 30
    identity = json.loads((tmp_path / "out/prepare/run.json").read_text())["identity"]
    assert identity == {"squares@train": {"generated": "squares of 1 to 40"}}


@pytest.mark.slow
def test_an_engine_generates(tmp_path: Path) -> None:
    shell = Shell(tmp_path, install("engine", tmp_path))
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "How many?"}]}) + "\n")
    words = ["--input-data", "chats.jsonl", "--output-dir", "out", "--model", "builtin:tiny", "--engine", "echo"]
    shell.dllm("regenerate", *words)
    (row,) = shards.read_rows(tmp_path / "out")
    assert row.answer_ids == row.prompt_ids and shards.read_manifest(tmp_path / "out")["engine"] == "echo"


def test_a_recipe_states_differences_and_becomes_a_whole_params_file(tmp_path: Path) -> None:
    (text,) = blocks("recipe")["yaml"]
    name = text.splitlines()[0].removeprefix("# ").removesuffix(".yaml")
    shutil.copytree(ROOT / "dllm", tmp_path / "dllm", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "dllm" / "config" / "recipes" / f"{name}.yaml").write_text(text.split("\n", 1)[1])
    shell = Shell(tmp_path)  # in its folder, the copied package comes first
    assert f"{name}  " in (said := shell.dllm("recipe", "list")) and "The tiny recipe on 24 prompts" in said
    shell.dllm("recipe", "use", name)
    whole = yaml.safe_load((tmp_path / "params.yaml").read_text())
    assert whole["train"]["optimizer"]["lr"] == 6e-4, "defaults are written out"
    assert parse_params(whole) == parse_params(yaml.safe_load(text))
