"""`generate`: answers stream, figures follow, and the target is found."""

import io
import json
from pathlib import Path

import pytest

from dllm import generation
from dllm.config import Target
from dllm.dflash.export import save_draft
from dllm.diffusion.writing import Wishes
from dllm.errors import ConfigError, DllmError, ModelError
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


def asked(root: Path, checkpoint: str = "out/train", **options) -> str:
    """Ask for what cannot be; return the one line."""
    names = {"raw", "infill", "own_generate", "settings"} & options.keys()
    wishes = Wishes(**{name: options.pop(name) for name in names})
    options |= {"prompts": ["x"], "root": root, "stream": io.StringIO()}
    with pytest.raises(DllmError) as caught:
        generation.generate(checkpoint=checkpoint, wishes=wishes, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_draft_refuses_what_only_diffusion_models_do(root: Path) -> None:
    for sampler in ("llada", "llada2", "nemotron", "self-spec"):
        assert f"sampler {sampler} is for diffusion models" in asked(root, sampler=sampler)
    assert "--steps is for diffusion models" in asked(root, settings={"steps": 3})
    for flag in ("raw", "infill", "show", "own_generate"):
        assert f"--{flag.replace('_', '-')} is for diffusion models" in asked(root, **{flag: True})


def test_a_diffusion_model_refuses_what_only_drafts_do(root: Path) -> None:
    folder = root / "out" / "train" / "checkpoint"
    (folder / "dllm.json").write_text('{"mode": "mdlm", "mask_token_id": 3, "block_size": null}')
    assert "sampler dflash is for drafts" in asked(root, sampler="dflash")
    assert "--target is for drafts" in asked(root, target="builtin:tiny")
    for sampler in ("nemotron", "self-spec", "ar"):
        assert "mode is mdlm" in asked(root, sampler=sampler)
    assert "give a --temperature" in asked(root, settings={"top_p": 0.9})
    assert "--revision is for models off the Hugging Face hub" in asked(root, revision="abc")


def test_a_published_model_runs_its_code_only_when_told(root: Path) -> None:
    folder = root / "out" / "train" / "checkpoint"
    (folder / "config.json").write_text('{"model_type": "llada"}')
    assert "give --trust-remote-code" in asked(root)
    assert "mode is mdlm" in asked(root, sampler="ar", trust_remote_code=True)
    (folder / "config.json").write_text('{"model_type": "nemotron_labs_diffusion"}')
    assert "give --trust-remote-code" in asked(root, sampler="ar")


def test_the_hubs_code_needs_a_commit_and_a_folder_has_none(root: Path) -> None:
    assert "pinned commit" in asked(root, "some/model", trust_remote_code=True)
    with pytest.raises(ConfigError, match="no commit"):
        generation.find("out/train", root, revision="abc")
    assert generation.find("out/train", root, trust_remote_code=True).name == "checkpoint", "no hub is asked"
