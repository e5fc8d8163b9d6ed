"""`generate --show`: the canvas after each step, in place on a terminal, line by line elsewhere."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Sequence
from itertools import groupby
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

if TYPE_CHECKING:
    from dllm.models.diffusion.protocol import DiffusionLM

BLANK, END = "░", "■"
"""How masks and end tokens are shown."""
FRAME = 0.06
"""Least seconds for which a step stays on a terminal: small models are faster than the eye."""


class Replay:
    """Shows one response while it is generated, through the samplers' `watch`.

    On a terminal the last step's tokens are highlighted, and lines that do not fit are cut around them; at the end the
    picture is erased, as the finished text follows.

    Args:
        model: the model that generates it.
        canvas: tokens before the first step, None for a mask; tokens beyond its end are not shown.
        stream: where to show it.
    """

    def __init__(self, model: DiffusionLM, canvas: list[int | None], stream: TextIO) -> None:
        self.tokenizer, self.eos_ids = model.tokenizer, model.eos_ids
        self.canvas, self.stream = canvas, stream
        self.seconds = 0.0
        """Seconds spent on showing."""
        self.console = Console(file=stream, highlight=False)
        moves = self.console.is_terminal and not self.console.is_dumb_terminal
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if moves else None
        self.step, self.new = 0, set[int]()

    def __enter__(self) -> Replay:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def watch(self, _: int, pairs: list[tuple[int, int]]) -> None:
        """Show what a step has committed."""
        began = time.perf_counter()
        self.new = {index for index, _ in pairs if index < len(self.canvas)}
        for index, token in pairs:
            if index in self.new:
                self.canvas[index] = token
        self.step += 1
        if self.live is None:
            print(f"[{self.step}] {self.text()!r}", file=self.stream, flush=True)
        else:
            self.live.update(self._picture(), refresh=True)
            time.sleep(max(0.0, FRAME - (time.perf_counter() - began)))
        self.seconds += time.perf_counter() - began

    def text(self) -> str:
        """Return the canvas as text, with a blank for each mask."""
        return self._decode(self.canvas)

    def _decode(self, tokens: Sequence[int | None]) -> str:
        parts = []
        for mark, group in groupby(tokens, self._mark):
            run = list(group)
            known = [token for token in run if token is not None]
            parts.append(str(self.tokenizer.decode(known)) if mark is None else mark * len(run))
        return "".join(parts)

    def _mark(self, token: int | None) -> str | None:
        return BLANK if token is None else END if token in self.eos_ids else None

    def _picture(self) -> Group:
        """Draw as many lines of the canvas as fit the terminal, the newest tokens among them."""
        body = Text()
        for (is_blank, is_new), group in groupby(
            range(len(self.canvas)), lambda index: (self.canvas[index] is None, index in self.new)
        ):
            style = "dim" if is_blank else "bold green" if is_new else ""
            body.append(_printable(self._decode([self.canvas[index] for index in group])), style)
        lines = body.wrap(self.console, self.console.width)
        room = max(1, self.console.height - 3)
        newest = max((n for n, line in enumerate(lines) if any("bold" in str(s.style) for s in line.spans)), default=0)
        first = min(max(0, newest - room // 2), max(0, len(lines) - room))
        masks = sum(token is None for token in self.canvas)
        head = f"step {self.step}: {len(self.new)} new, {masks} to go"
        return Group(Text(head, style="dim"), *list(lines)[first : first + room])


def _printable(text: str) -> str:
    """Replace control characters, which could steer the terminal."""
    return "".join(c if c == "\n" or unicodedata.category(c) != "Cc" else "·" for c in text)
