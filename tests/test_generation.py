"""`generate`: answers stream, figures follow, and the target is found."""

import io
import json
from pathlib import Path

import pytest

from dllm import generation
from dllm.config import Target
from dllm.dflash.export import save_draft
from dllm.errors import ModelError
from dllm.models import targets
from dllm.models.draft import DFlashDraft
from tests.dflash import stand_in_drafts

PARAMS = """
recipe: x
target: {model: "builtin:tiny", dtype: float32}
prepare: {sources: [{name: gsm8k}]}
register: {model_name: x}
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)  # names are tried in the current folder first, and the project's may hold results
    (tmp_path / "params.yaml").write_text(PARAMS)
    draft = DFlashDraft(stand_in_drafts.config(targets.load_target(Target(model="builtin:tiny")), 4))
    draft.reset_parameters(seed=3)
    save_draft(draft, tmp_path / "out" / "train" / "checkpoint")
    return tmp_path


def generated(root: Path, prompts: list[str], **options) -> tuple[list[dict], str]:
    stream = io.StringIO()
    found = generation.run(
        checkpoint="out/train", prompts=prompts, root=root, max_new_tokens=12, stream=stream, **options
    )
    return found, stream.getvalue()


def test_json_is_one_object_a_prompt_and_both_samplers_agree(root: Path) -> None:
    prompts = ["How many hours?", "Why?"]
    spec, text = generated(root, prompts, as_json=True)
    assert [json.loads(line) for line in text.splitlines()] == spec
    plain, _ = generated(root, prompts, as_json=True, sampler="ar")
    assert [r["token_ids"] for r in spec] == [r["token_ids"] for r in plain]
    for record, prompt in zip(spec, prompts, strict=True):
        assert record["prompt"] == prompt and record["target"] == "builtin:tiny" and record["block_size"] == 4
        assert record["tokens"] == len(record["token_ids"]) <= 12
        assert record["tau"] == sum(record["tokens_per_round"]) / record["rounds"]
        assert record["tokens_per_s"] > 0
    assert plain[0]["tau"] == 1.0 and plain[0]["block_size"] == 1


@pytest.mark.parametrize("sampler", ["dflash", "ar"])
def test_the_streamed_text_is_the_answer(root: Path, sampler: str) -> None:
    records, shown = generated(root, ["How many hours?"], sampler=sampler)
    text, _, summary = shown.partition("\n\n[")
    assert text == records[0]["text"]
    assert "12 tokens" in summary
    assert ("τ 1." in summary and "tokens a round: 1" in summary) == (sampler == "dflash")


def test_text_comes_out_in_whole_characters(root: Path) -> None:
    from dllm.dflash.speculate import Round

    tokenizer = targets.load_tokenizer(Target(model="builtin:tiny"))
    stream = io.StringIO()
    answer = generation._Streamed(tokenizer, stream)
    seen = []
    for token in tokenizer("日 é")["input_ids"]:
        answer.add(Round((token,), 1, 0, 0, 0.01))
        seen.append(stream.getvalue())
    assert seen[-1] == "日 é" and seen[0] == seen[1] == ""
    assert not any("\ufffd" in text for text in seen)


def test_the_target_is_the_given_then_the_trained_then_the_params(root: Path) -> None:
    checkpoint = generation.find("out/train", root)
    assert generation.target_of(checkpoint, root) == Target(model="builtin:tiny", dtype="float32")
    record = {"identity": {"target": {"model": "some/model", "revision": "abc", "weights": "0"}}}
    (checkpoint.parent / "run.json").write_text(json.dumps(record))
    assert generation.target_of(checkpoint, root) == Target(model="some/model", revision="abc")
    assert generation.target_of(checkpoint, root, "builtin:tiny").dtype == "float32"
    assert generation.target_of(checkpoint, root, "another/model") == Target(model="another/model")
    (checkpoint.parent / "run.json").unlink()
    (root / "params.yaml").unlink()
    with pytest.raises(ModelError, match=r"which target this checkpoint was trained for.*--target"):
        generation.target_of(checkpoint, root)


def test_a_registered_checkpoint_is_found(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from dllm import provenance, registry

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    checkpoint = root / "out" / "train" / "checkpoint"
    digest = provenance.digest(checkpoint)
    kept = Path(shutil.copytree(checkpoint, registry.store_path(root, digest)))
    registry.register(root, "a-draft", digest=digest, tau=1.5, heldout_digest="h", target="t", tags={})
    assert generation.find("models:/a-draft@champion", root) == kept
    assert generation.find("models:/a-draft/1", root) == kept
    with pytest.raises(ModelError):
        generation.find("models:/a-draft@nobody", root)


def test_a_block_the_draft_cannot_do_is_one_line(root: Path) -> None:
    with pytest.raises(ModelError, match="block size 9 for a draft that was trained on blocks of 4"):
        generated(root, ["x"], block_size=9)
