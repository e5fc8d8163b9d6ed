"""One MLflow run per execution of the pipeline, in which the runs of its stages are nested.

The stages are processes of their own, started by a flow, by `dvc repro`, or by hand. What joins them is params.yaml as
a whole. A file per such configuration, `work/executions/DIGEST.json`, names the run and the stages it has; a stage
continues it unless that stage, or a later one, has finished in it. Flow runs with a checkout have one each: two of the
same configuration may go side by side. The run's status is that of its latest stage.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from dllm.config import recipe_book
from dllm.config.brief import brief, brief_pairs
from dllm.config.load import params_digest
from dllm.config.params import Params
from dllm.errors import DllmError
from dllm.files import atomic_write
from dllm.tracking.address import checkout_of, home, page
from dllm.tracking.runs import Status, flatten

FOLDER = Path("work", "executions")
REPORT = PurePosixPath("report", "index.html")
"""Among the artifacts of the run of the last stage: the page of the whole execution."""
ELSEWHERE = "tracked in another store"
FLOW_RUN, DVC_EXPERIMENT = "DLLM_FLOW_RUN", "DVC_EXP_NAME"
"""Variables that the flow and DVC set: the id of the Prefect flow run, the name of the experiment."""


@dataclass(frozen=True)
class Execution:
    """One stage of an execution: what the run around the stage's own is known by."""

    root: Path
    """The project's folder."""
    params: Params
    stage: str
    order: tuple[str, ...]
    """All stages, in the order of the pipeline."""
    earlier: Mapping[str, str] = field(default_factory=dict)
    """MLflow runs of the stages before this one whose results it reads, by stage."""
    experiments: Mapping[str, str] = field(default_factory=dict)
    """MLflow experiments of those runs, by stage. A run that has none is in another store: its results came with
    `dvc pull`, say."""
    experiment: str = field(default_factory=lambda: os.environ.get(DVC_EXPERIMENT, ""))
    """Name of the DVC experiment that it is part of."""

    @property
    def name(self) -> str:
        """The run's name: the recipe and what of it is overridden."""
        prefix = f"{self.experiment}: " if self.experiment else ""
        return prefix + " ".join([self.params.recipe, *brief_pairs(overridden(self.params))])

    @property
    def stage_name(self) -> str:
        """The name of the stage's own run: the stage, the recipe, and what of the stage's section is overridden."""
        own = {key: value for key, value in overridden(self.params).items() if key.partition(".")[0] in self._sections}
        return " ".join([self.stage, self.params.recipe, *brief_pairs(own)])

    @property
    def _sections(self) -> tuple[str, str]:
        return ("target", self.stage)

    @property
    def links(self) -> dict[str, str]:
        """Tags that name the runs of the stages which this execution has not run again."""
        here = {stage: run_id for stage, run_id in self.earlier.items() if stage in self.experiments}
        return {f"dllm.run.{stage}": run_id for stage, run_id in here.items()}

    def tags(self, what: str) -> dict[str, str]:
        """Return tags that say what made a run.

        Args:
            what: the stage, or `pipeline`.
        """
        flow_run = os.environ.get(FLOW_RUN, "")
        made = {"mlflow.source.name": f"python -m dllm {what}", "mlflow.source.type": "JOB" if flow_run else "LOCAL"}
        if what == "pipeline":
            made |= {"mlflow.source.name": "dvc.yaml", "dllm.params": params_digest(self.params)}
        more = {"dllm.flow_run": flow_run, "dllm.dvc_experiment": self.experiment}
        return made | {key: value for key, value in more.items() if value}

    def run_id(self, store: str) -> str | None:
        """Return the run that this stage continues; None where it begins a new one.

        Args:
            store: the MLflow store in use.
        """
        record = self._read()
        known: Mapping[str, Any] = record.get("stages", {})
        place = self.order.index(self.stage)
        later = [stage for stage in known if stage in self.order and self.order.index(stage) > place]
        is_done = known.get(self.stage, {}).get("status") == "FINISHED"
        if record.get("store") != store or later or is_done:
            return None
        return record.get("run_id")

    def note(self, run_id: str, store: str, stage_run_id: str, status: Status | str) -> None:
        """Note how far the execution is."""
        record = self._read()
        stages = record.get("stages", {}) if record.get("run_id") == run_id else {}
        stages[self.stage] = {"run_id": stage_run_id, "status": status}
        text = json.dumps({"run_id": run_id, "store": store, "stages": stages}, indent=2)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self._file, f"{text}\n".encode())

    def describe(self, experiment_id: str) -> str:
        """Write the run's description: what is overridden, and which run has which stage."""
        lines = [f"Recipe `{self.params.recipe}`."]
        lines += [f"* `{key}`: `{brief(value)}`" for key, value in overridden(self.params).items()]
        own = self._read().get("stages", {})
        if (last := own.get(self.order[-1], {})).get("status") == "FINISHED":
            at = _link(experiment_id, last["run_id"], str(REPORT))
            lines += ["", f"[Report]({at}): curves, lineage, sample responses."]
        lines += ["", "| stage | run | |", "|---|---|---|"]
        for stage in self.order:
            if stage in own:
                entry, how = own[stage]["run_id"], own[stage]["status"].lower()
            elif stage in self.earlier:
                entry, how = self.earlier[stage], "unchanged: an earlier run's result"
            else:
                continue
            theirs = experiment_id if stage in own else self.experiments.get(stage)
            named = f"{entry[:8]}, {ELSEWHERE}" if theirs is None else f"[{entry[:8]}]({_link(theirs, entry)})"
            lines.append(f"| {stage} | {named} | {how} |")
        return "\n".join(lines)

    @property
    def _file(self) -> Path:
        names = [params_digest(self.params), checkout_of(self.root)]
        # Of `dvc exp run --temp`, in the project: what is applied there later goes on with it.
        return home(self.root) / FOLDER / f"{'-'.join(filter(None, names))}.json"

    def _read(self) -> dict[str, Any]:
        try:
            record = json.loads(self._file.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        stages = record.get("stages") if isinstance(record, dict) else None
        if not isinstance(stages, dict):
            return {}
        texts = [record.get("run_id"), record.get("store")]
        for each in stages.values():
            texts += [each.get("run_id"), each.get("status")] if isinstance(each, dict) else [None]
        return record if all(isinstance(text, str) for text in texts) else {}


def _link(experiment_id: str, run_id: str, artifact: str = "") -> str:
    """Return a link within MLflow's pages."""
    return page("", experiment_id, run_id, artifact).removeprefix("/")


def overridden(params: Params) -> dict[str, Any]:
    """Return the values that differ from the recipe's, by dotted key; none where no shipped recipe has that name."""
    try:
        recipe = recipe_book.load(params.recipe)
    except DllmError:
        return {}
    theirs, ours = (flatten(each.model_dump(mode="json", by_alias=True)) for each in (recipe, params))
    set_here = flatten(params.model_dump(mode="json", by_alias=True, exclude_defaults=True))  # also within lists
    return {
        key: set_here.get(key, value)
        for key, value in ours.items()
        if theirs.get(key) != value and key != "register.model_name"
    }
