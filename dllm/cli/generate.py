"""The verb `generate`: answer prompts with a checkpoint, as text streams or as JSON.

Owns whether a checkpoint is a draft or a model of its own, which target a draft goes with, and how answers and their
figures are shown.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from dllm.config.load import load_params
from dllm.config.params import Target
from dllm.errors import ConfigError, DataError, ModelError
from dllm.models import checkpoints, targets
from dllm.prompts.batch_file import read_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dllm.decoding.diffusion import GenerateOptions
    from dllm.decoding.speculative import Decoder, Round

REGISTRY_PREFIX = "models:/"
DEFAULT_NEW_TOKENS = 256
Sampler = Literal["dflash", "ar", "llada", "llada2", "nemotron", "self-spec"]


def generate(
    *,
    checkpoint: str,
    prompts: Sequence[str],
    root: Path,
    sampler: Sampler | None = None,
    max_new_tokens: int | None = None,
    block_size: int | None = None,
    target: str | None = None,
    as_json: bool = False,
    show: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    mask_token_id: int | None = None,
    stream: TextIO | None = None,
    batch_file: Path | None = None,
    wishes: GenerateOptions,
) -> list[dict[str, Any]]:
    """Answer prompts with a draft and its target, or with a diffusion model, as the checkpoint and sampler ask for.

    Args:
        max_new_tokens: tokens an answer may have; null takes 256.
        block_size: slots a round, or columns a block; null or 0 takes the checkpoint's.
        batch_file: more prompts.
        wishes: for diffusion models: how to write; a draft accepts none.
        show: show the canvas of a diffusion model as it fills.
        trust_remote_code: run code that comes with a model.
        mask_token_id: of a masked diffusion model without a note of ours; it sees all of its canvas.
        revision: commit of a Hugging Face repository with such code.

    Others as in `run`.

    Raises:
        ConfigError: an option is not this sampler's, or the sampler not this checkpoint's.
        ModelError: the checkpoint is missing or broken.
        DataError: there is no prompt.
    """
    from dllm.models.diffusion.bidirectional import read_note
    from dllm.models.diffusion.remote import kind_at, needs_its_code

    prompts = [*prompts, *(read_prompts(batch_file) if batch_file is not None else [])]
    if not prompts:
        raise DataError("no prompt", hint="give --prompt or --batch-file")
    folder = find(checkpoint, root, trust_remote_code, revision)
    note, kind = read_note(folder), kind_at(folder)
    named = {name for name, value in wishes.settings.items() if value is not None}
    if mask_token_id is not None and (note is not None or kind is not None):
        raise ConfigError("--mask-token-id: this model knows its own", where=str(folder), hint="leave it out")
    if note is None and kind is None and mask_token_id is None:
        own = {
            "raw": wishes.raw,
            "infill": wishes.infill,
            "show": show,
            "own_generate": wishes.own_generate is not None,
            "batch_size": wishes.batch_size is not None,
            "trust_remote_code": trust_remote_code,
        }
        is_draft = checkpoints.is_draft(folder)
        _check_draft(folder, is_draft, sampler, [*sorted(named), *(name for name, value in own.items() if value)])
        if sampler == "ar" and block_size:
            raise ConfigError("sampler ar has no use for --block-size", hint="leave it out")
        return run(
            checkpoint=str(folder),
            prompts=prompts,
            root=root,
            sampler="ar" if sampler == "ar" else "dflash",
            max_new_tokens=max_new_tokens or DEFAULT_NEW_TOKENS,
            block_size=block_size or 0,
            target=target if is_draft else str(folder),
            as_json=as_json,
            stream=stream,
        )
    mode = note.mode if note is not None else kind.mode if kind is not None else "mdlm"
    _check_model(folder, mode, sampler, wishes, target)
    if wishes.infill and max_new_tokens is not None:
        raise ConfigError("--infill has no use for --max-new-tokens", hint="[MASK:n] says how many; leave it out")
    if needs_its_code(folder) and not trust_remote_code:
        raise ConfigError(
            "this model runs code of its own", where=str(folder), hint="read it, then give --trust-remote-code"
        )
    assert sampler != "dflash"  # refused above
    return _write(
        folder,
        prompts,
        replace(
            wishes,
            sampler=sampler,
            enable_thinking=thinking(folder, root),
            settings={
                **wishes.settings,
                "max_new_tokens": max_new_tokens or DEFAULT_NEW_TOKENS,
                "block_size": block_size or None,
            },
        ),
        mask_token_id,
        trust_remote_code,
        as_json,
        show,
        stream or sys.stdout,
    )


def _check_draft(folder: Path, is_draft: bool, sampler: Sampler | None, asked: Sequence[str]) -> None:
    """Refuse what a draft and its target, or a plain causal model, cannot do.

    Raises:
        ConfigError: it was asked for.
    """
    if not is_draft and sampler != "ar":
        raise ConfigError(
            "neither a draft nor, for want of a dllm.json, a diffusion model",
            where=str(folder),
            hint="a plain causal model takes --sampler ar, a masked diffusion model --mask-token-id",
        )
    if sampler not in (None, "dflash", "ar"):
        raise ConfigError(
            f"sampler {sampler} is for diffusion models, and this is a draft",
            where=str(folder),
            hint="a draft takes dflash or ar",
        )
    if asked:
        flag, what = asked[0].replace("_", "-"), "a draft" if is_draft else "a plain causal model"
        raise ConfigError(f"--{flag} is for diffusion models, and this is {what}", where=str(folder))


def _check_model(folder: Path, mode: str, sampler: Sampler | None, wishes: GenerateOptions, target: str | None) -> None:
    """Refuse what a diffusion model cannot do, as far as its mode tells.

    Raises:
        ConfigError: it was asked for.
    """
    if sampler == "dflash" or target is not None:
        what = "--target" if target is not None else "sampler dflash"
        raise ConfigError(f"{what} is for drafts, and this is a diffusion model", where=str(folder))
    if mode == "mdlm" and sampler in ("nemotron", "self-spec", "ar"):
        raise ConfigError(
            f"sampler {sampler} needs a model that also learnt to write causally, and this one's mode is mdlm",
            where=str(folder),
            hint="take llada, or llada2 if it is block-causal",
        )
    if (wishes.settings.get("top_p") or 1) < 1 and not wishes.settings.get("temperature"):
        raise ConfigError("--top-p is for drawing, and temperature 0 draws nothing", hint="give a --temperature too")


def _write(
    folder: Path,
    prompts: Sequence[str],
    wishes: GenerateOptions,
    mask_token_id: int | None,
    trust_remote_code: bool,
    as_json: bool,
    show: bool,
    stream: TextIO,
) -> list[dict[str, Any]]:
    """Answer prompts with a diffusion model."""
    import torch

    from dllm.decoding.diffusion import write
    from dllm.models.diffusion.bidirectional import load_bidirectional

    device = targets.best_device()
    # On a processor bfloat16 decoding is no faster, and near ties would fall differently from batch to batch.
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    settings = Target(model=str(folder), trust_remote_code=trust_remote_code)
    model = load_bidirectional(settings, dtype, device, mask_token_id)
    shown = []
    watched = sys.stderr if as_json else stream  # the replay would stand between the objects
    for record in write(model, prompts, wishes, watched if show else None):
        record["checkpoint"] = str(folder)
        passes = (
            f"{record['passes']} pass{'' if record['passes'] == 1 else 'es'}" if record["passes"] else "no pass told"
        )
        tokens = f"{record['tokens']} token{'' if record['tokens'] == 1 else 's'}"
        rate = f"{tokens} in {passes}; {record['tokens_per_s']:.1f} tokens/s"
        print(json.dumps(record) if as_json else f"{record['text']}\n\n[{rate}]", file=stream, flush=True)
        shown.append(record)
    return shown


def thinking(folder: Path, root: Path) -> bool | None:
    """Find how the checkpoint's target was asked; None, the template's own way, where nothing says.

    A params.yaml that is about another target, or broken, says nothing.
    """
    trained = checkpoints.trained_for(folder)
    try:
        return None if trained is None else target_of(folder, root).enable_thinking
    except (ModelError, ConfigError):
        return None


def run(
    *,
    checkpoint: str,
    prompts: Sequence[str],
    root: Path,
    sampler: Literal["dflash", "ar"] = "dflash",
    max_new_tokens: int = 256,
    block_size: int = 0,
    target: str | None = None,
    as_json: bool = False,
    stream: TextIO | None = None,
) -> list[dict[str, Any]]:
    """Answer each prompt greedily with a draft and its target, and show it; return what `--json` prints.

    Args:
        checkpoint: what `checkpoints.resolve` understands, or `models:/NAME@ALIAS`.
        prompts: what the user says, one chat each.
        root: the project's folder.
        sampler: `dflash` is speculative; `ar` is the target alone, one token at a time.
        max_new_tokens: tokens an answer may have.
        block_size: slots a round; 0 takes the draft's.
        target: another target than the checkpoint's own.
        as_json: one JSON object a prompt and line, instead of streaming text.
        stream: where answers go; the standard output by default.

    Raises:
        ModelError: the checkpoint or its target is missing, or they do not fit.
        DataError: a prompt is empty, or leaves no room for its answer.
    """
    from dllm.decoding.encoding import check_room, checked
    from dllm.decoding.speculative import Decoder
    from dllm.models.drafts.checkpoint import load_draft
    from dllm.prompts.template import prompt_ids

    stream = stream or sys.stdout
    folder = find(checkpoint, root)
    settings = target_of(folder, root, target)
    model, tokenizer = targets.load_target(settings), targets.load_tokenizer(settings)
    draft = load_draft(folder, model.config) if sampler == "dflash" else None
    decoder = Decoder(model, draft, block_size, named_by="--block-size")
    stop_ids = targets.stop_ids(model, tokenizer)
    asked = []
    for number, prompt in enumerate(prompts, 1):
        ids = prompt_ids(tokenizer, [{"role": "user", "content": checked(prompt, number)}], settings.enable_thinking)
        check_room(len(ids), max_new_tokens, decoder.limit, number)
        asked.append((prompt, ids))
    shown = []
    for prompt, ids in asked:
        answer = _Streamed(tokenizer, None if as_json else stream)
        for each in decoder.decode(ids, max_new_tokens=max_new_tokens, stop_ids=stop_ids):
            answer.add(each)
        record = {
            "prompt": prompt,
            **answer.figures(),
            "stopped": answer.token_ids[-1] in stop_ids,
            "sampler": sampler,
            "block_size": decoder.block_size,
            "target": settings.model,
            "checkpoint": str(folder),
        }
        print(json.dumps(record) if as_json else answer.summary(decoder), file=stream, flush=True)
        shown.append(record)
    return shown


def find(checkpoint: str, root: Path, trust_remote_code: bool = False, revision: str | None = None) -> Path:
    """Return the directory of a checkpoint, registered or not.

    Args:
        trust_remote_code: take the code along that a Hugging Face repository brings.
        revision: commit of that repository.

    Raises:
        ModelError: nothing by that name holds a checkpoint.
        ConfigError: a revision is given of what is in no repository.
    """
    is_here = any(path.exists() for path in (Path(checkpoint), root / checkpoint))
    on_hub = targets.looks_like_hub_id(checkpoint) and not is_here
    if on_hub and (trust_remote_code or revision is not None):
        return targets.locate(Target(model=checkpoint, revision=revision, trust_remote_code=trust_remote_code))
    if revision is not None:
        raise ConfigError(
            "--revision is for models off the Hugging Face hub", where=checkpoint, hint="a directory has no commit"
        )
    if checkpoint.startswith(REGISTRY_PREFIX):
        from dllm.tracking import model_registry

        return checkpoints.resolve(model_registry.resolve(checkpoint, root), root)
    return checkpoints.resolve(checkpoint, root)


def target_of(checkpoint: Path, root: Path, explicit: str | None = None) -> Target:
    """Settle the target: the given one, else the one in the record of the checkpoint's stage, else params.yaml's.

    Raises:
        ModelError: none of them is there.
    """
    path = root / "params.yaml"
    own = load_params(path).target if path.is_file() else None
    trained = checkpoints.trained_for(checkpoint) if explicit is None else None
    if explicit is not None:
        wanted = Target(model=explicit)
    elif trained is not None:
        wanted = Target(model=trained["model"], revision=trained.get("revision"))
    elif own is not None:
        return own
    else:
        raise ModelError(
            "nothing says which target this checkpoint was trained for",
            where=str(checkpoint),
            hint="name it by --target",
        )
    # params.yaml knows more of the same target: its dtype, its thinking mode, whether its code is trusted.
    if own is not None and own.model == wanted.model:
        return own.model_copy(update={"revision": wanted.revision or own.revision})
    return wanted


@dataclass
class _Streamed:
    """An answer while it grows: its text goes out as soon as it is whole characters."""

    tokenizer: PreTrainedTokenizerBase
    stream: TextIO | None
    token_ids: list[int] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    prefill_s: float = 0.0
    text: str = ""

    def add(self, each: Round) -> None:
        if each.is_prefill:
            self.prefill_s = each.seconds
        else:
            self.rounds.append(each)
        self.token_ids += each.tokens
        text = str(self.tokenizer.decode(self.token_ids, skip_special_tokens=True))
        if text.endswith("\ufffd"):  # a character whose bytes are not all there yet
            return
        if self.stream is not None:
            print(text[len(self.text) :], end="", file=self.stream, flush=True)
        self.text = text

    def figures(self) -> dict[str, Any]:
        seconds, decoded = sum(r.seconds for r in self.rounds), len(self.token_ids) - 1
        emitted = [r.counts.num_emitted for r in self.rounds]
        return {
            "text": str(self.tokenizer.decode(self.token_ids, skip_special_tokens=True)),
            "token_ids": self.token_ids,
            "tokens": len(self.token_ids),
            "rounds": len(emitted),
            "tokens_per_round": emitted,
            "tau": sum(emitted) / len(emitted) if emitted else None,
            "tokens_per_s": decoded / seconds if seconds else None,
            "prefill_s": self.prefill_s,
            "decode_s": seconds,
        }

    def summary(self, decoder: Decoder) -> str:
        found = self.figures()
        rest = found["text"][len(self.text) :] if self.stream is not None else ""
        if found["tau"] is None:
            return f"{rest}\n\n[{found['tokens']} token, no round]"
        rate = f"{found['tokens_per_s']:.1f} tokens/s"
        if decoder.draft is None:
            return f"{rest}\n\n[{found['tokens']} tokens, one a round; {rate}]"
        rounds = " ".join(map(str, found["tokens_per_round"]))
        return (
            f"{rest}\n\n[tokens a round: {rounds}]\n[{found['tokens']} tokens in {found['rounds']} rounds of up to "
            f"{decoder.block_size}; τ {found['tau']:.2f}; {rate}]"
        )
