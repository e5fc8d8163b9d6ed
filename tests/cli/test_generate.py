"""`generate`: answers stream, figures follow, and the target is found."""

import io
import json
from pathlib import Path

import pytest

from dllm.cli import generation
from dllm.config.params import Target
from dllm.decoding.diffusion import GenerateOptions
from dllm.decoding.streaming import StreamedResponse
from dllm.errors import ConfigError, DllmError, ModelError
from dllm.models import checkpoints, targets
from dllm.models.drafts.checkpoint import save_draft
from dllm.models.drafts.dflash import DFlashDraft
from tests.decoding import stand_in_drafts

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


def generated(root: Path, prompts: list[str], sampler: str = "dflash", **options) -> tuple[list[dict], str]:
    stream = io.StringIO()
    settings = {"max_new_tokens": 12, "block_size": options.pop("block_size", None)}
    found = generation.generate(
        checkpoint="out/train",
        prompts=prompts,
        root=root,
        options=GenerateOptions(sampler, settings=settings),
        stream=stream,
        **options,
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
    assert ("τ 1." in summary and "tokens per round: 1" in summary) == (sampler == "dflash")


@pytest.mark.parametrize("sampler", ["dflash", "ar"])
def test_a_seed_gives_the_same_text_and_equal_prompts_draw_differently(root: Path, sampler: str) -> None:
    def texts(prompts: list[str], **named) -> list[list[int]]:
        named = {"max_new_tokens": 8, "temperature": 1.0, **named}
        options, stream = GenerateOptions(sampler, settings=named), io.StringIO()
        found = generation.generate(checkpoint="out/train", prompts=prompts, root=root, options=options, stream=stream)
        return [record["token_ids"] for record in found]

    one, again, other = texts(["a", "a"]), texts(["a", "b", "a"]), texts(["a"], seed=1)
    assert one == [again[0], again[2]] and one[0] != one[1] and one[0] != other[0]
    assert texts(["a"], top_k=1) == texts(["a"], temperature=0.0)


@pytest.mark.parametrize("sampler", ["dflash", "ar"])
def test_a_batch_gives_the_same_records_in_the_same_order(root: Path, sampler: str) -> None:
    prompts = ["How many hours?", "Why?", "a", "Why?"]

    def records(size: int | None) -> tuple[list[dict], str]:
        stream = io.StringIO()
        settings = {"max_new_tokens": 9, "temperature": 0.7}
        options = GenerateOptions(sampler, batch_size=size, settings=settings)
        found = generation.generate(checkpoint="out/train", prompts=prompts, root=root, options=options, stream=stream)
        return found, stream.getvalue()

    (alone, _), (together, shown) = records(None), records(3)
    for key in ("prompt", "token_ids", "text", "tokens_per_round", "stopped"):
        assert [record[key] for record in together] == [record[key] for record in alone]
    assert all(record["text"] in shown for record in together) and shown.count("tokens/s]") == 4


def test_text_comes_out_in_whole_characters(root: Path) -> None:
    from dllm.decoding.acceptance import RoundCounts
    from dllm.decoding.speculative import Round

    tokenizer = targets.load_tokenizer(Target(model="builtin:tiny"))
    stream = io.StringIO()
    answer = StreamedResponse(tokenizer, stream)
    seen = []
    for token in tokenizer("日 é")["input_ids"]:
        answer.add(Round((token,), RoundCounts(1, 0, 0), 0.01))
        seen.append(stream.getvalue())
    assert seen[-1] == "日 é" and seen[0] == seen[1] == ""
    assert not any("\ufffd" in text for text in seen)


def test_the_target_is_the_given_then_the_trained_then_the_params(root: Path) -> None:
    checkpoint = checkpoints.find("out/train", root)
    assert checkpoints.target_of(checkpoint, root) == Target(model="builtin:tiny", dtype="float32")
    record = {"identity": {"target": {"model": "some/model", "revision": "abc", "weights": "0"}}}
    (checkpoint.parent / "run.json").write_text(json.dumps(record))
    assert checkpoints.target_of(checkpoint, root) == Target(model="some/model")  # the record pins no revision
    assert checkpoints.target_of(checkpoint, root, "builtin:tiny").dtype == "float32"
    assert checkpoints.target_of(checkpoint, root, "another/model") == Target(model="another/model")
    (checkpoint.parent / "run.json").unlink()
    (root / "params.yaml").unlink()
    with pytest.raises(ModelError, match=r"which target this checkpoint was trained for.*--target"):
        checkpoints.target_of(checkpoint, root)


def test_a_registered_checkpoint_is_found(root: Path, mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from dllm.tracking import model_registry, provenance

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    checkpoint = root / "out" / "train" / "checkpoint"
    digest = provenance.digest(checkpoint)
    kept = Path(shutil.copytree(checkpoint, model_registry.store_path(root, digest)))
    model_registry.register(root, "a-draft", digest=digest, tau=1.5, heldout_digest="h", target="t", tags={})
    assert checkpoints.find("models:/a-draft@champion", root) == kept
    assert checkpoints.find("models:/a-draft/1", root) == kept
    with pytest.raises(ModelError):
        checkpoints.find("models:/a-draft@nobody", root)


def test_a_block_the_draft_cannot_do_is_one_line(root: Path) -> None:
    with pytest.raises(ModelError, match="block size 9 for a draft that was trained on blocks of 4"):
        generated(root, ["x"], block_size=9)


def refused(root: Path, checkpoint: str = "out/train", **options) -> str:
    """Give options that cannot be; return the one line."""
    names = {"sampler", "raw", "infill", "batch_size", "settings"} & options.keys()
    how = GenerateOptions(**{name: options.pop(name) for name in names})
    options |= {"prompts": ["x"], "root": root, "stream": io.StringIO()}
    with pytest.raises(DllmError) as caught:
        generation.generate(checkpoint=checkpoint, options=how, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_draft_refuses_what_only_diffusion_models_do(root: Path) -> None:
    for sampler in ("llada", "llada2", "nemotron", "self-spec"):
        assert f"sampler {sampler} is for diffusion models" in refused(root, sampler=sampler)
    assert "--steps is for diffusion models" in refused(root, settings={"steps": 3})
    for flag in ("raw", "infill", "show"):
        assert f"--{flag} is for diffusion models" in refused(root, **{flag: True})
    for sampler in ("own", "own-ar", "own-self-spec"):
        assert f"sampler {sampler} is for diffusion models" in refused(root, sampler=sampler)
    assert "--mask-token-id is for diffusion models" in refused(root, mask_token_id=3)
    assert "--trust-remote-code is for diffusion models" in refused(root, trust_remote_code=True)
    assert "no use for --block-size" in refused(root, sampler="ar", settings={"block_size": 4})
    for sampler in ("dflash", "ar"):
        said = refused(root, sampler=sampler, settings={"top_p": 0.9, "top_k": 5})
        assert "top_p and top_k require sampling, and temperature 0 is greedy; give a temperature" in said
        assert "top_k requires sampling" in refused(root, sampler=sampler, settings={"top_k": 5})
        for wrong in (1e-9, 3.0, float("nan"), float("inf")):
            assert "temperature must be 0, or a number" in refused(
                root, sampler=sampler, settings={"temperature": wrong}
            )


def test_a_diffusion_model_refuses_what_only_drafts_do(root: Path) -> None:
    folder = root / "out" / "train" / "checkpoint"
    (folder / "dllm.json").write_text('{"mode": "mdlm", "mask_token_id": 3, "block_size": null}')
    assert "sampler dflash is for drafts" in refused(root, sampler="dflash")
    assert "--target is for drafts" in refused(root, target="builtin:tiny")
    for sampler in ("nemotron", "self-spec", "ar"):
        assert "mode is mdlm" in refused(root, sampler=sampler)
    assert "give a --temperature" in refused(root, settings={"top_p": 0.9})
    assert "no use for --max-new-tokens" in refused(root, infill=True, settings={"max_new_tokens": 4})
    assert "this model knows its own" in refused(root, mask_token_id=4)
    assert "--revision is for models off the Hugging Face hub" in refused(root, revision="abc")


def test_a_published_model_runs_its_code_only_when_told(root: Path) -> None:
    folder = root / "out" / "train" / "checkpoint"
    (folder / "config.json").write_text('{"model_type": "llada2_moe"}')
    assert "give --trust-remote-code" in refused(root)
    (folder / "config.json").write_text('{"model_type": "llada"}')
    assert "cannot read the tokenizer" in refused(root), "LLaDA is read as a Llama, and this is none"
    assert "mode is mdlm" in refused(root, sampler="ar", trust_remote_code=True)
    (folder / "config.json").write_text('{"model_type": "nemotron_labs_diffusion"}')
    assert "give --trust-remote-code" in refused(root, sampler="ar")


def test_the_hubs_code_needs_a_commit_and_a_folder_has_none(root: Path) -> None:
    assert "pinned commit" in refused(root, "some/model", trust_remote_code=True)
    with pytest.raises(ConfigError, match="no commit"):
        checkpoints.find("out/train", root, revision="abc")
    assert checkpoints.find("out/train", root, trust_remote_code=True).name == "checkpoint", "no hub is asked"


def test_prompts_without_room_or_text_are_refused_before_any_is_answered(root: Path) -> None:
    stream = io.StringIO()
    for wrong, said in [
        ("word " * 3000, r"more than this model's \d+ \(prompt 2\)"),
        (" ", r"empty prompt \(prompt 2\)"),
    ]:
        with pytest.raises(DllmError, match=said):
            generation.generate(checkpoint="out/train", prompts=["x", wrong], root=root, stream=stream)
    assert stream.getvalue() == ""


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that nothing of ours has written."""
    folder = tmp_path_factory.mktemp("causal")
    settings = Target(model="builtin:tiny", dtype="float32")
    targets.load_target(settings).save_pretrained(folder)
    targets.load_tokenizer(settings).save_pretrained(folder)
    return folder


def test_a_plain_causal_model_writes_word_by_word(root: Path, causal: Path) -> None:
    stream = io.StringIO()
    (found,) = generation.generate(
        checkpoint=str(causal),
        prompts=["Why?"],
        root=root,
        stream=stream,
        options=GenerateOptions("ar", settings={"max_new_tokens": 6}),
    )
    assert found["tokens"] == 6 and found["target"] == str(causal)
    assert "neither a draft nor" in refused(root, str(causal)) and "--mask-token-id" in refused(root, str(causal))
    assert "neither a draft nor" in refused(root, str(causal), sampler="llada")
    assert "--raw is for diffusion models" in refused(root, str(causal), sampler="ar", raw=True)


def test_a_diffusion_model_of_another_tool_is_told_its_mask(root: Path, causal: Path) -> None:
    (found,) = generation.generate(
        checkpoint=str(causal), prompts=["Why?"], root=root, stream=io.StringIO(), mask_token_id=17,
        options=GenerateOptions(settings={"max_new_tokens": 6}),
    )  # fmt: skip
    assert found["sampler"] == "llada" and found["tokens"] == 6 and 17 not in found["token_ids"]
    assert "outside the model's embedding" in refused(root, str(causal), mask_token_id=10**6)


def test_params_of_another_project_say_nothing_of_a_model(root: Path, causal: Path) -> None:
    """Neither broken ones nor those of another target have a say in how a chat is put."""
    (root / "params.yaml").write_text(PARAMS.replace("dtype: float32", "dtype: float32, enable_thinking: true"))
    assert checkpoints.thinking(causal, root) is None
    (root / "params.yaml").write_text("recipe: x")
    assert checkpoints.thinking(causal, root) is None


def test_to_look_for_a_registered_model_makes_no_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ModelError, match="not registered: nothing has been"):
        checkpoints.find("models:/a@b", tmp_path)
    assert list(tmp_path.iterdir()) == []


MALFORMED = [
    '{"mode": "xxx", "mask_token_id": 3}',
    '{"mode": "mdlm", "mask_token_id": "3"}',
    '{"mode": "mdlm"}',
    "[",
    '{"mode": "mdlm", "mask_token_id": 3, "block_size": 0}',
    '{"mode": "mdlm", "mask_token_id": 3, "more": 1}',
]


@pytest.mark.parametrize("content", MALFORMED)
def test_a_malformed_dllm_json_is_one_line(root: Path, content: str) -> None:
    (root / "out" / "train" / "checkpoint" / "dllm.json").write_text(content)
    assert "cannot read the checkpoint's dllm.json" in refused(root) and "dllm.json" in refused(root)
