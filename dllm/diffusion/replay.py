"""`generate --show`: the canvas as it fills, in place on a terminal, line by line elsewhere."""

from __future__ import annotations

from itertools import groupby
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLANK = "░"
"""How a place that is not written yet is shown."""


class Replay:
    """Shows the answers of one batch while they are written; `watch` fits the samplers.

    Args:
        tokenizer: what spells tokens.
        canvases: each row's tokens before the first step, None where there is a mask; they grow if written beyond.
        stream: where to.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, canvases: list[list[int | None]], stream: TextIO) -> None:
        self.tokenizer, self.canvases, self.stream = tokenizer, canvases, stream
        console = Console(file=stream)
        self.live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self.steps = [0] * len(canvases)

    def __enter__(self) -> Replay:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def watch(self, row: int, written: list[tuple[int, int]]) -> None:
        """Take in what a step has written."""
        canvas = self.canvases[row]
        for place, token in written:
            canvas += [None] * (place + 1 - len(canvas))
            canvas[place] = token
        self.steps[row] += 1
        if self.live is None:
            print(f"[{row + 1}:{self.steps[row]}] {self.text(row)!r}", file=self.stream, flush=True)
        else:
            self.live.update(Text("\n\n".join(self.text(each) for each in range(len(self.canvases)))), refresh=True)

    def text(self, row: int) -> str:
        """Spell a row's canvas, with a blank for each mask."""
        parts = []
        for blank, group in groupby(self.canvases[row], lambda token: token is None):
            tokens = list(group)
            known = [token for token in tokens if token is not None]
            parts.append(BLANK * len(tokens) if blank else str(self.tokenizer.decode(known)))
        return "".join(parts)
