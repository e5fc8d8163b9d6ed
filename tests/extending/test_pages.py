"""Each page of docs/extending, run: the member it shows is installed from outside and goes through the verbs."""

import json
from pathlib import Path

import pytest
import yaml

from dllm.config import recipe_book
from dllm.config.load import parse_params
from dllm.models.diffusion.bidirectional import BidirectionalLM
from dllm.responses import shards
from tests.arch.source_tree import ROOT
from tests.extending.pages import Shell, blocks, install

PAGES = ("method", "draft", "objective", "sampler", "source", "engine")
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


@pytest.mark.slow
def test_a_sampler_generates_with_a_diffusion_model(tmp_path: Path) -> None:
    from dllm.models.diffusion.bidirectional import load_bidirectional
    from tests.models.small_models import TINY

    model: BidirectionalLM = load_bidirectional(TINY)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    model.save(checkpoint)
    shell = Shell(tmp_path, install("sampler", tmp_path))
    words = ["generate", "--checkpoint", str(checkpoint), "--prompt", "Why?", "--max-new-tokens", "6", "--json"]
    found = json.loads(shell.dllm(*words, "--sampler", "left-to-right"))
    assert found["sampler"] == "left-to-right" and found["passes"] == found["tokens"] <= 6
    assert model.mask_token_id not in found["token_ids"]


def test_a_source_is_prepared_with_its_limit_and_references(tmp_path: Path) -> None:
    shell = Shell(tmp_path, install("source", tmp_path))
    shell.dllm("recipe", "use", "tiny-dflash")
    said = shell.dllm("prepare", "--set", "prepare.sources=[{name: squares, limit: 30}]")
    assert "prepare: squares: 40 rows" in said
    metrics = json.loads((tmp_path / "out/prepare/metrics.json").read_text())
    assert metrics["references"] == 30
    identity = json.loads((tmp_path / "out/prepare/run.json").read_text())["identity"]
    assert identity == {"squares@train": {"generated": "squares of 1 to 40"}}


def test_an_engine_generates(tmp_path: Path) -> None:
    shell = Shell(tmp_path, install("engine", tmp_path))
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "How many?"}]}) + "\n")
    words = ["--input-data", "chats.jsonl", "--output-dir", "out", "--model", "builtin:tiny", "--engine", "echo"]
    shell.dllm("regenerate", *words)
    (row,) = shards.read_rows(tmp_path / "out")
    assert row.answer_ids == row.prompt_ids and shards.read_manifest(tmp_path / "out")["engine"] == "echo"


def test_a_recipe_states_differences_and_becomes_a_whole_params_file(tmp_path: Path, monkeypatch) -> None:
    (text,) = blocks("recipe")["yaml"]
    name = text.splitlines()[0].removeprefix("# ").removesuffix(".yaml")
    (tmp_path / f"{name}.yaml").write_text(text.split("\n", 1)[1])
    monkeypatch.setattr(recipe_book, "FOLDER", tmp_path)
    assert recipe_book.summaries() == {name: "The tiny recipe on 24 prompts, for one epoch."}
    recipe_book.activate(name, tmp_path / "params.yaml")
    whole = yaml.safe_load((tmp_path / "params.yaml").read_text())
    assert whole["train"]["optimizer"]["lr"] == 6e-4, "defaults are written out"
    assert parse_params(whole) == recipe_book.load(name)
