"""The seam for training methods: what the stages, the report and params.yaml ask of the method that `train.mode` names.

A method is an instance in `dllm.registry.METHODS`. Its module is imported when params.yaml is loaded, at the latest:
it imports torch, transformers and `dllm.config.params` inside the functions that need them, or for typing only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from dllm.config.section import Section
from dllm.methods.figures import Points, Records, Row, Table

if TYPE_CHECKING:
    from dllm.config.params import Params
    from dllm.tracking.runs import Tracker
    from dllm.training.batches import Example
    from dllm.training.distributed import Ranks
    from dllm.training.loop import Outcome
    from dllm.training.plan import Plan, Workload
    from dllm.training.strategy import Split, Strategy

Settings = TypeVar("Settings", bound=Section)


@dataclass(frozen=True)
class Score:
    """The figure by which the registry compares two checkpoints; larger is better."""

    key: str
    """Its name in out/register/metrics.json."""
    name: str
    """Its name in the verdict."""
    value: float
    interval: tuple[float, float] | None = None
    """95 % interval of the value, where it has one."""


@dataclass(frozen=True)
class TrainContext(Generic[Settings]):
    """One run of the stage `train`, on each of its ranks."""

    params: Params
    settings: Settings
    """The method's section of `train`."""
    root: Path
    ranks: Ranks
    target: Mapping[str, Any]
    """Identity of the target."""
    splits: Mapping[Split, Sequence[Example]]
    work: Path
    """Scratch of this configuration, the same for all ranks."""


@dataclass(frozen=True)
class PlanContext(Generic[Settings]):
    """A run of the stage `train` that is planned, not started."""

    params: Params
    settings: Settings
    """The method's section of `train`."""
    target: Any
    """A transformers causal model on the meta device."""
    workload: Workload
    ranks: int
    device: str = "cuda"
    """Kind of the device that it will run on."""


@dataclass(frozen=True)
class Publication:
    """What a trained model leaves in out/train/, besides the log and the metrics.

    Each maps a name, which may hold `/`, to a file in work.
    """

    checkpoint: Mapping[str, Path]
    """Files of out/train/checkpoint/, which is registered."""
    panels: Sequence[Sequence[str]]
    """Metrics that share a panel of curves.png, panel by panel."""
    curves: Mapping[str, str] = field(default_factory=dict)
    """Metrics that `dvc plots` shows over steps besides the loss, by plot (dllm/stages/plots.py)."""
    evaluation: Mapping[str, Path] = field(default_factory=dict)
    """Files of out/train/evaluation/: inputs of this method's evaluation other than the prompts and the checkpoint."""
    beside: Mapping[str, Path] = field(default_factory=dict)
    """Other files of out/train/."""


@dataclass(frozen=True)
class EvaluateContext:
    """One run of the stage `evaluate`."""

    params: Params
    root: Path
    work: Path
    """Scratch of this configuration; it is kept when a run is killed."""
    tracker: Tracker
    checkpoint: Path
    """What is measured: a folder with config.json and weights."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    metrics: dict[str, Any]
    """metrics.json; `heldout_digest` names the data, so that only scores on the same data are compared."""
    picture: Path
    """A PNG."""
    headline: Mapping[str, Any] = field(default_factory=dict)
    """headline.json, at most 10 figures, which `dvc metrics` and `dvc exp show` print."""
    plots: Mapping[str, Points] = field(default_factory=dict)
    """Points of what `dvc plots` shows, by plot (dllm/stages/plots.py)."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Other files of out/evaluate/: name to a file in work."""
    scratch: Sequence[Path] = ()
    """Folders in work to delete after publication, so that the next run measures again."""


class Method(Protocol[Settings]):
    """A way to train: its settings, its strategy, its checkpoint and its evaluation."""

    settings: type[Settings]
    """Its section of params.yaml under `train`, with a default for every key."""
    evaluation: Mapping[str, type[Section]]
    """Sections of `evaluate` that it adds, by name; methods may share one."""
    reads: Mapping[str, str]
    """Inputs of its evaluation besides the checkpoint: name to path in the project. dvc.yaml lists the paths."""

    def check(self, params: Params) -> None:
        """Raise ValueError where settings of several sections conflict under this method."""

    def check_models(self, params: Params) -> str | None:
        """Check by their configs that the models can be trained so, before anything is generated; read no weights.

        Returns: a line for `prepare` to print, what works with the target; None has none.

        Raises:
            ConfigError, ModelError: one cannot; the line says why.
        """

    def identity(self, params: Params) -> Mapping[str, Any]:
        """Return ids, revisions and digests of models other than the target that training starts from."""

    def plan(self, ctx: PlanContext[Settings]) -> Plan:
        """Count parameters, memory and operations of a run from shapes alone.

        Raises:
            ConfigError, ModelError: the target cannot be trained so, or its shapes are not known.
        """

    def build(self, ctx: TrainContext[Settings]) -> Strategy:
        """Load the models and data that are trained; all ranks call it."""

    def sizes(self, strategy: Any) -> Mapping[str, int | None]:
        """Return the sizes of the trained model for out/train/metrics.json."""

    def publish(self, ctx: TrainContext[Settings], strategy: Any, outcome: Outcome, work: Path) -> Publication:
        """Export the best checkpoint into work, in train.compute_dtype; rank 0 alone calls it."""

    def evaluate(self, ctx: EvaluateContext) -> Evaluation:
        """Measure the checkpoint."""

    def score(self, metrics: Mapping[str, Any]) -> Score:
        """Return the score in a metrics.json of its evaluation; KeyError where it has none."""

    def rows(self, metrics: Records) -> Iterable[Row]:
        """Label and format the main figures of train and evaluate, with dashes for those of a missing stage."""

    def tables(self, metrics: Records) -> Iterable[Table]:
        """Return the tables for which there are figures."""
