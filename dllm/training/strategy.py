"""The one seam between the training loop and a model family.

Owns the protocol and its data types. The loop calls for sums and pools them; the strategy makes the batches, runs the
model and turns pooled sums into metrics.
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
    """The rows of one split: ids and lengths.

    Units: lengths in tokens.
    """

    ids: Sequence[str]
    lengths: Sequence[int]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class LossSums:
    """Sums over one micro-batch; the loop adds them over micro-batches and ranks before it divides.

    Shapes: numerator scalar, differentiable in training; each of counts as `Strategy.counts` says.
    Units: tokens of the sequences without padding; predictions scored; floating-point operations of the trained model.
    """

    numerator: Tensor
    denominator: float
    tokens: int = 0
    predictions: int = 0
    flops: float = 0.0
    counts: Mapping[str, Tensor | float] = field(default_factory=dict)


class Strategy(Protocol):
    """The model that is trained, and the loss of a batch."""

    @property
    def model(self) -> nn.Module:
        """The module whose parameters are trained."""

    @property
    def train_rows(self) -> Rows:
        """Training rows."""

    @property
    def heldout_rows(self) -> Rows:
        """Validation rows; may be empty."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Name and length of each additional sum in `LossSums.counts`."""

    @property
    def adamw_rates(self) -> Mapping[str, float]:
        """Parameters that AdamW trains beside any optimizer, at a multiple of its rate and without decay, by name."""

    @property
    def predictions_name(self) -> str:
        """Plural name of one prediction in metrics, e.g. block_positions."""

    @property
    def shown(self) -> Sequence[str]:
        """Metrics shown beside the progress bar."""

    def terms(self, split: Split, rows: Sequence[int], epoch: int) -> LossSums:
        """Run the model on some rows of a split.

        All randomness must be a function of the seed, the epoch and each row's id, never of the rank or the batch.
        """

    def metrics(self, sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Turn pooled `counts` into metrics; a metric without observations is left out."""

    def score(self, validation: Mapping[str, float]) -> tuple[float, ...]:
        """Score a validation (keys have the prefix val_); larger is better."""

    def save(self, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write the model's config and float32 weights into a directory; whole ones of a sharded model as `weights`."""

    def load(self, directory: Path) -> None:
        """Load exactly what `save` wrote."""
