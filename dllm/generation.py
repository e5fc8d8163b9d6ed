"""The verb `generate`: answer prompts with a checkpoint and its target, as text streams or as JSON.

Owns which target a checkpoint goes with, and how answers and their figures are shown.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from dllm import config
from dllm.config import Target
from dllm.errors import ModelError
from dllm.models import checkpoints, targets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dllm.dflash.speculate import Decoder, Round

REGISTRY_PREFIX = "models:/"
Sampler = Literal["dflash", "ar"]


def run(
    *,
    checkpoint: str,
    prompts: Sequence[str],
    root: Path,
    sampler: Sampler = "dflash",
    max_new_tokens: int = 256,
    block_size: int = 0,
    target: str | None = None,
    as_json: bool = False,
    stream: TextIO | None = None,
) -> list[dict[str, Any]]:
    """Answer each prompt greedily and show it; return what `--json` prints.

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
    """
    from dllm.data.chat import prompt_ids
    from dllm.dflash.export import load_draft
    from dllm.dflash.speculate import Decoder

    stream = stream or sys.stdout
    folder = find(checkpoint, root)
    settings = target_of(folder, root, target)
    model, tokenizer = targets.load_target(settings), targets.load_tokenizer(settings)
    draft = load_draft(folder, model.config) if sampler == "dflash" else None
    decoder = Decoder(model, draft, block_size)
    stop_ids = targets.stop_ids(model, tokenizer)
    shown = []
    for prompt in prompts:
        ids = prompt_ids(tokenizer, [{"role": "user", "content": prompt}], settings.enable_thinking)
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


def find(checkpoint: str, root: Path) -> Path:
    """Return the directory of a checkpoint, registered or not.

    Raises:
        ModelError: nothing by that name holds a checkpoint.
    """
    if checkpoint.startswith(REGISTRY_PREFIX):
        from dllm import registry

        return checkpoints.resolve(registry.resolve(checkpoint, root), root)
    return checkpoints.resolve(checkpoint, root)


def target_of(checkpoint: Path, root: Path, explicit: str | None = None) -> Target:
    """Settle the target: the given one, else the one in the record of the checkpoint's stage, else params.yaml's.

    Raises:
        ModelError: none of them is there.
    """
    path = root / "params.yaml"
    own = config.load(path).target if path.is_file() else None
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
        if each.accepted:
            self.rounds.append(each)
        else:
            self.prefill_s = each.seconds
        self.token_ids += each.tokens
        text = str(self.tokenizer.decode(self.token_ids, skip_special_tokens=True))
        if text.endswith("\ufffd"):  # a character whose bytes are not all there yet
            return
        if self.stream is not None:
            print(text[len(self.text) :], end="", file=self.stream, flush=True)
        self.text = text

    def figures(self) -> dict[str, Any]:
        seconds, decoded = sum(r.seconds for r in self.rounds), len(self.token_ids) - 1
        accepted = [r.accepted for r in self.rounds]
        return {
            "text": str(self.tokenizer.decode(self.token_ids, skip_special_tokens=True)),
            "token_ids": self.token_ids,
            "tokens": len(self.token_ids),
            "rounds": len(accepted),
            "tokens_per_round": accepted,
            "tau": sum(accepted) / len(accepted) if accepted else None,
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
