"""The one seam between the training loop and a model family.

Owns the protocol and what crosses it. The loop asks for sums and pools them; how a batch is made, what the model is
fed and which figures come of the sums is the strategy's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor, nn

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Rows:
    """The rows of one split, as far as the loop needs to know them.

    Units: lengths in tokens.
    """

    ids: Sequence[str]
    lengths: Sequence[int]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class LossSums:
    """Sums over one micro-batch; the loop adds them over micro-batches and ranks, and only then divides.

    Shapes: numerator scalar, differentiable where a backward pass is due; each of counts as `Strategy.counts` says.
    Units: tokens of the sequences, padding aside; predictions scored; floating-point operations of the trained model.
    """

    numerator: Tensor
    denominator: float
    tokens: int = 0
    predictions: int = 0
    flops: float = 0.0
    counts: Mapping[str, Tensor | float] = field(default_factory=dict)


class Strategy(Protocol):
    """What is trained, and what a batch of it means."""

    @property
    def model(self) -> nn.Module:
        """The module whose parameters move."""

    @property
    def train_rows(self) -> Rows:
        """Rows to learn from."""

    @property
    def heldout_rows(self) -> Rows:
        """Rows for validation; may be none."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Name and length of each additional sum in `LossSums.counts`."""

    @property
    def predictions_name(self) -> str:
        """What one prediction is called in metrics, in the plural, e.g. block_positions."""

    @property
    def shown(self) -> Sequence[str]:
        """Figures that stand beside the progress bar."""

    def terms(self, split: Split, rows: Sequence[int], epoch: int) -> LossSums:
        """Run the model on some rows of a split.

        All randomness must follow from the seed, the epoch and each row's id, never from rank or batch.
        """

    def metrics(self, sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Turn pooled `counts` into figures; a figure without observations is left out."""

    def score(self, validation: Mapping[str, float]) -> tuple[float, ...]:
        """Rank a validation (keys carry the prefix val_): the larger, the better."""

    def save(self, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write the model's config and its float32 weights into a directory; where its own are split, `weights`."""

    def load(self, directory: Path) -> None:
        """Take back exactly what `save` wrote."""
