"""From typed text to records: samplers by name, chats, spans, batches, and the replay."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from dllm.cli import generation
from dllm.cli.generation import read_prompts
from dllm.decoding.diffusion import GenerateOptions, generate
from dllm.decoding.encoding import span_ids
from dllm.decoding.settings import Settings
from dllm.errors import ConfigError, DataError, ModelError
from dllm.models.diffusion.config import DiffusionConfig
from dllm.models.diffusion.families import load_diffusion_lm
from dllm.models.diffusion.protocol import DiffusionLM
from dllm.registry import SAMPLERS
from tests.models.small_models import TINY

TEXTS = ["How many hours?", "Why?", "A man sells three books and then one more."]


@pytest.fixture(scope="module")
def model() -> DiffusionLM:
    return load_diffusion_lm(TINY)


@pytest.fixture
def hybrid(model: DiffusionLM):
    model.config = DiffusionConfig("hybrid", model.mask_token_id, 4)
    yield model
    model.config = DiffusionConfig("mdlm", model.mask_token_id)


def short(**settings) -> dict:
    return {"max_new_tokens": 8, "block_size": 4, **settings}


def test_a_record_says_what_was_written_and_at_what_cost(model: DiffusionLM) -> None:
    records = list(generate(model, TEXTS, GenerateOptions(batch_size=2, settings=short())))
    assert [r["prompt"] for r in records] == TEXTS
    for record in records:
        assert record["tokens"] == len(record["token_ids"]) <= 8
        assert record["tokens_per_pass"] == record["tokens"] / record["passes"]
        assert model.mask_token_id not in record["token_ids"]
        assert record["sampler"] == "llada"
    one = list(generate(model, TEXTS, GenerateOptions(batch_size=1, settings=short())))
    assert [r["token_ids"] for r in one] == [r["token_ids"] for r in records]


@pytest.mark.parametrize("sampler", ["llada", "llada2", "nemotron", "self-spec", "ar"])
def test_every_sampler_writes_with_a_hybrid(hybrid: DiffusionLM, sampler) -> None:
    asked = {"max_new_tokens": 8} if sampler == "ar" else short()
    (record,) = generate(hybrid, TEXTS[:1], GenerateOptions(sampler=sampler, settings=asked))
    assert record["sampler"] == sampler
    assert record["tokens"] >= 1


def test_self_speculation_says_what_ar_says(hybrid: DiffusionLM) -> None:
    spec = list(generate(hybrid, TEXTS, GenerateOptions(sampler="self-spec", settings=short())))
    plain = list(generate(hybrid, TEXTS, GenerateOptions(sampler="ar", settings={"max_new_tokens": 8})))
    assert [r["token_ids"] for r in spec] == [r["token_ids"] for r in plain]


@pytest.mark.parametrize("raw", [True, False])
def test_infilling_keeps_the_text_around_its_spans(model: DiffusionLM, raw: bool) -> None:
    text = "He sells [MASK:3] and [MASK][MASK:2] more."
    (record,) = generate(model, [text], GenerateOptions(raw=raw, infill=True))
    assert record["tokens"] == 6
    assert record["text"].startswith("He sells ") and record["text"].endswith(" more.")
    first, second = record["text"].removeprefix("He sells ").removesuffix(" more.").split(" and ", 1)
    new = [token for token, old in zip(record["token_ids"], _spans(model, text, raw), strict=True) if old is None]
    assert [first, second] == [model.tokenizer.decode(part, skip_special_tokens=True) for part in (new[:3], new[3:])]


def _spans(model: DiffusionLM, text: str, raw: bool) -> list[int | None]:
    """Encode text with a None for each token of its spans."""
    ids = span_ids(model.tokenizer, text, raw, model.mask_token_id, model.max_length, 1)
    return [None if id == model.mask_token_id else id for id in ids]


def refused(model, options: GenerateOptions, message: str, text: str = TEXTS[0], kind=ConfigError, **more) -> None:
    with pytest.raises(kind, match=message) as caught:
        list(generate(model, [text], options, **more))
    assert "\n" not in str(caught.value)


def test_what_does_not_go_together_is_refused(model: DiffusionLM) -> None:
    for options, message in [
        (GenerateOptions(sampler="llada2"), "block-causal"),
        (GenerateOptions(sampler="ar", infill=True), "sampler ar cannot infill"),
        (GenerateOptions(sampler="ar", settings={"threshold": 0.5}), "sampler ar has no use for --threshold"),
        (
            GenerateOptions(sampler="ar", settings={"block_size": 4, "cache": "dual"}),
            "no use for --block-size, --cache",
        ),
        (GenerateOptions(sampler="self-spec", settings={"top_p": 0.9}), "no use for --top-p"),
        (
            GenerateOptions(sampler="nemotron", settings={"cache": "none", "cfg_scale": 1.0}),
            "no use for --cache, --cfg-scale",
        ),
        (GenerateOptions(sampler="ar", settings={"schedule": "cosine"}), "no use for --schedule"),
        (GenerateOptions(sampler="self-spec", settings={"entropy_bound": 1.0}), "no use for --entropy-bound"),
        (GenerateOptions(settings={"entropy_bound": 1.0}), "take remasking entropy"),
        (GenerateOptions(sampler="nemotron", settings={"editing_threshold": 0.5}), "no use for --editing-threshold"),
        (GenerateOptions(settings={"threshold": 0.5, "factor": 1.0}), "exclude"),
        (GenerateOptions(settings={"threshold": 0.5, "remasking": "random"}), "take low_confidence or margin"),
        (GenerateOptions(settings={"cache": "block"}), "take prefix or dual"),
        (GenerateOptions("own"), "brings no generation code"),
        (GenerateOptions("own", infill=True), "cannot infill"),
        (GenerateOptions(settings={"steps": 0}), "steps must be"),
        (GenerateOptions(settings={"top_p": 0.0}), "top_p must be"),
    ]:
        refused(model, options, message)


def test_texts_that_cannot_be_answered_are_refused_before_any_is(model: DiffusionLM) -> None:
    fill, raw = GenerateOptions(infill=True, raw=True), GenerateOptions(raw=True)
    refused(model, fill, "nothing to fill", kind=DataError)
    refused(model, fill, r"\[MASK:0\] is no span", "a [MASK] and [MASK:0]", DataError)
    refused(model, fill, r"\[MASK:x\] is no span", "[MASK:x]", DataError)
    refused(model, fill, "the mask token itself", f"[MASK] {model.tokenizer.mask_token}", DataError)
    refused(model, fill, "100000 tokens, and a text of this model has 2048", "a [MASK:100000]", DataError)
    refused(model, raw, "more than this model's 2048", "How " * 2000, DataError)
    refused(model, raw, "holds the mask token", f"a {model.tokenizer.mask_token}", DataError)
    for options in (raw, GenerateOptions()):
        refused(model, options, "empty prompt", " ", DataError)
    answers = generate(model, [*TEXTS, ""], GenerateOptions(batch_size=1, settings=short()))
    with pytest.raises(DataError, match="prompt 4"):
        next(answers)


def test_without_a_chat_template_text_is_taken_raw_only(model: DiffusionLM, monkeypatch) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    for options, text in ((GenerateOptions(), "Why?"), (GenerateOptions(infill=True), "Why [MASK]?")):
        refused(model, options, "no chat template; give --raw", text, DataError)
    assert len(list(generate(model, ["Why?"], GenerateOptions(raw=True, settings=short())))) == 1


def test_a_sampler_is_taken_that_shows_text_as_training_did(model: DiffusionLM, monkeypatch) -> None:
    for config, sampler in [
        (DiffusionConfig("mdlm", model.mask_token_id), "llada"),
        (DiffusionConfig("mdlm", model.mask_token_id, 4), "llada"),
        (DiffusionConfig("hybrid", model.mask_token_id, 4), "nemotron"),
        (DiffusionConfig("hybrid", model.mask_token_id), "llada"),  # its blocks were never seen behind causal text
    ]:
        monkeypatch.setattr(model, "config", config)
        assert model.default_sampler == sampler


def test_a_default_threshold_gives_way_to_an_order_without_probabilities(hybrid: DiffusionLM) -> None:
    for sampler in ("llada2", "nemotron"):
        assert SAMPLERS[sampler].settle(hybrid, {"remasking": "entropy"}).threshold is None
        assert SAMPLERS[sampler].settle(hybrid, {"remasking": "margin"}).threshold is not None


def test_defaults_give_way_to_the_model_and_both_to_what_is_named(hybrid: DiffusionLM) -> None:
    assert SAMPLERS["nemotron"].settle(hybrid, {}).block_size == 4
    assert SAMPLERS["nemotron"].settle(hybrid, {}).threshold == 0.9
    assert SAMPLERS["nemotron"].settle(hybrid, {"factor": 1.0}).threshold is None
    bounded = {"entropy_bound": 1.0, "remasking": "entropy"}
    assert SAMPLERS["nemotron"].settle(hybrid, bounded).threshold is None
    assert SAMPLERS["llada"].settle(hybrid, {"schedule": "cosine"}).schedule == "cosine"
    assert SAMPLERS["llada2"].settle(hybrid, {"block_size": 8}).block_size == 8
    assert SAMPLERS["llada2"].settle(hybrid, {}).cache == "block"


def test_the_replay_ends_with_the_text(model: DiffusionLM) -> None:
    stream = io.StringIO()
    first, second = generate(model, TEXTS[:2], GenerateOptions(raw=True, settings=short()), show=stream)
    lines = stream.getvalue().splitlines()
    assert len(lines) == first["passes"] + second["passes"]
    assert "░" in lines[0]
    assert lines[first["passes"] - 1].startswith(f"[{first['passes']}] ")
    written = str(model.tokenizer.decode(second["token_ids"], skip_special_tokens=True))
    assert repr(written)[1:-1] in lines[-1]


def test_generate_reads_a_saved_checkpoint_and_a_batch_file(model: DiffusionLM, tmp_path) -> None:
    model.save(tmp_path / "out" / "train" / "checkpoint")
    batch = tmp_path / "prompts.jsonl"
    batch.write_text("\n".join(json.dumps({"prompt": text}) for text in TEXTS) + "\n")
    stream = io.StringIO()
    records = generation.generate(
        checkpoint=str(tmp_path),
        prompts=read_prompts(batch),
        root=tmp_path,
        as_json=True,
        stream=stream,
        options=GenerateOptions(settings={"max_new_tokens": 6}),
    )
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == records
    assert [r["prompt"] for r in records] == TEXTS
    with pytest.raises(ConfigError, match="mode is mdlm"):
        generation.generate(
            checkpoint=str(tmp_path), prompts=["x"], root=tmp_path, options=GenerateOptions("self-spec")
        )


def test_a_batch_file_with_another_line_is_refused(tmp_path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"question": "b"}\n')
    with pytest.raises(DataError, match="line 2"):
        read_prompts(path)
    path.write_text('{"prompt": "a"}\n\n{"question": "b"}\n')
    with pytest.raises(DataError, match="line 3"):  # as an editor counts them
        read_prompts(path)
    path.with_suffix(".JSON").write_text("[]")
    with pytest.raises(DataError, match=r"write \.jsonl"):
        read_prompts(path.with_suffix(".JSON"))


def test_lines_of_a_batch_file_are_an_editors(tmp_path) -> None:
    plain, lines = tmp_path / "p.txt", tmp_path / "p.JSONL"
    plain.write_bytes("\ufeffa\r\n\nb\x0cc\u2028d\n".encode())
    assert read_prompts(plain) == ["a", "b\x0cc\u2028d"]
    lines.write_bytes('\ufeff{"prompt": "a\u2028b"}\n'.encode())
    assert read_prompts(lines) == ["a\u2028b"]


def test_prompts_come_from_the_input_too(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\n")))
    assert read_prompts(Path("-")) == ["a", "b"]


@pytest.mark.parametrize("infill", [False, True])
def test_equal_prompts_get_different_responses_whatever_the_batch(model: DiffusionLM, infill) -> None:
    text = "A [MASK:4] man" if infill else "Why?"
    size = {} if infill else {"max_new_tokens": 6}
    found = [
        [
            r["token_ids"]
            for r in generate(model, 6 * [text], GenerateOptions(raw=True, infill=infill, batch_size=n, settings=drawn))
        ]
        for drawn in ({**size, "temperature": 1.0},)
        for n in (1, 4, 6)
    ]
    assert found[0] == found[1] == found[2]
    assert len({tuple(ids) for ids in found[0]}) == 6


def test_spans_are_filled_with_text_alone(model: DiffusionLM, monkeypatch) -> None:
    """End tokens and their like are not written inside a text, however likely they are."""
    ends = sorted({*model.eos_ids, *model.tokenizer.all_special_ids} - {model.mask_token_id})
    plain = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: plain(hidden).index_fill(-1, torch.tensor(ends), 1e3))
    (record,) = generate(model, ["A [MASK:4] man"], GenerateOptions(raw=True, infill=True))
    assert record["tokens"] == 4 and not set(record["token_ids"]) & set(ends)
    (answer,) = generate(model, ["A man"], GenerateOptions(raw=True, settings={"max_new_tokens": 4}))
    assert set(answer["token_ids"]) <= set(ends)


def test_weights_that_have_diverged_are_one_line(model: DiffusionLM, monkeypatch) -> None:
    monkeypatch.setattr(model, "logits", lambda hidden: torch.full((*hidden.shape[:-1], 1400), torch.nan))
    with pytest.raises(ModelError, match="logits are not numbers"):
        list(generate(model, ["A man"], GenerateOptions(raw=True, settings={"max_new_tokens": 4})))


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"temperature": float("inf")}, "temperature must be 0, or a number"),
        ({"temperature": 1e-320}, "temperature must be 0, or a number"),
        ({"temperature": float("nan")}, "temperature must be 0, or a number"),
        ({"cfg_scale": float("nan")}, "cfg_scale must be a number"),
        ({"threshold": float("nan")}, "threshold must be a number"),
        ({"factor": 1.0, "steps": 4}, "steps make a plan"),
        ({"entropy_bound": 0.1, "remasking": "entropy", "steps": 4}, "steps make a plan"),
        ({"max_post_steps": 3}, "max_post_steps limits edits"),
    ],
)
def test_what_would_be_ignored_or_break_is_refused(named, said) -> None:
    with pytest.raises(ConfigError, match=said):
        Settings(**named)


@pytest.mark.parametrize("text", [" \n", "\udce9"])
@pytest.mark.parametrize("infill", [False, True])
def test_what_is_no_text_is_refused(model: DiffusionLM, text, infill) -> None:
    with pytest.raises(DataError, match="prompt 1"):
        list(generate(model, [text], GenerateOptions(raw=True, infill=infill)))
