"""Target hidden states at the tapped layers, cached on disk. `dllm.models.taps` computes them.

Shape suffixes: B batch, S sequence, T tokens of many rows end to end, D hidden, F tapped features (taps * D).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dllm.errors import DataError
from dllm.models.taps import compute

SCHEMA = 1
TOKENS_A_PART = 16_384
"""Tokens in one cache file: about 90 MB at 5 taps of 576, and what a kill can cost."""


def cache_key(
    target: dict[str, Any], layer_ids: Sequence[int], dtype: str, rows: Sequence[Sequence[int]], with_last: bool = False
) -> str:
    """Hash all that determines the features: the target's identity, taps, dtype and every token."""
    made_of = [SCHEMA, target, list(layer_ids), dtype, *(["last"] if with_last else [])]
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode())
    for row in rows:
        digest.update(json.dumps(list(row)).encode())
    return digest.hexdigest()[:16]


class FeatureCache:
    """Features of many rows in safetensors files of about TOKENS_A_PART tokens, each written whole or not at all.

    Args:
        directory: home of this cache; its name should be the `cache_key`.
        rows: token ids of every row, in a fixed order; row i of the cache is rows[i].
        with_last: keep what the target feeds its head, too.
    """

    def __init__(self, directory: Path, rows: Sequence[Sequence[int]], with_last: bool = False) -> None:
        self.directory, self.rows, self.with_last = directory, rows, with_last
        # Similar lengths side by side waste little on padding when the target runs over them.
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
        self.parts: list[list[int]] = []
        tokens = TOKENS_A_PART
        for index in order:
            if tokens + len(rows[index]) > TOKENS_A_PART:
                self.parts.append([])
                tokens = 0
            self.parts[-1].append(index)
            tokens += len(rows[index])
        self._place = {row: (part, at) for part, members in enumerate(self.parts) for row, at in self._starts(members)}
        self._open: dict[int, Any] = {}

    def missing(self) -> list[int]:
        """List the parts that are not on disk yet."""
        return [part for part in range(len(self.parts)) if not self._path(part).exists()]

    def fill(self, part: int, model: Any, layer_ids: Sequence[int], batch_tokens: int = 2048) -> int:
        """Compute one part, write it, and return its number of tokens."""
        members = self.parts[part]
        done: list[Tensor] = []
        while len(done) < len(members):
            width = len(self.rows[members[-1]])
            batch = members[len(done) : len(done) + max(1, batch_tokens // width)]
            done += compute(model, layer_ids, [self.rows[row] for row in batch], self.with_last)
        features_TF = torch.cat(done)
        self.directory.mkdir(parents=True, exist_ok=True)
        aside = self._path(part).with_suffix(f".{os.getpid()}.tmp")
        try:
            save_file({"features": features_TF.contiguous()}, aside)
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            aside.rename(self._path(part))
        finally:
            aside.unlink(missing_ok=True)
        return len(features_TF)

    def read(self, row: int) -> Tensor:
        """Return the features of a row. Shapes: (S, F).

        Raises:
            DataError: its part is missing or damaged.
        """
        part, at = self._place[row]
        if part not in self._open:
            try:
                self._open[part] = safe_open(self._path(part), "pt").get_slice("features")
            except (OSError, RuntimeError, ValueError) as error:
                raise self._damaged(part, str(error)) from None
        features_SF = self._open[part][at : at + len(self.rows[row])]
        if len(features_SF) != len(self.rows[row]):
            raise self._damaged(part, "fewer tokens than its rows hold")
        return features_SF

    def _starts(self, members: list[int]) -> Iterator[tuple[int, int]]:
        at = 0
        for row in members:
            yield row, at
            at += len(self.rows[row])

    def _path(self, part: int) -> Path:
        return self.directory / f"part-{part:05d}.safetensors"

    def _damaged(self, part: int, why: str) -> DataError:
        return DataError(
            f"feature cache cannot be read: {' '.join(why.split())}",
            where=str(self._path(part)),
            hint="delete that file and run the stage again",
        )
