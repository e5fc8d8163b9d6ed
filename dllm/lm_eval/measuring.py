"""Load tasks, run them on a model, and collect the results as rows of one table."""

from __future__ import annotations

import contextlib
import math
import sys
import traceback
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from datasets.exceptions import DatasetsError
from datasets.utils.logging import disable_progress_bar
from jinja2 import TemplateError
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

import dllm
from dllm.errors import ConfigError
from dllm.lm_eval.generation_arguments import override

if TYPE_CHECKING:
    from lm_eval.tasks.manager import TaskDict

    from dllm.lm_eval.adapter import HarnessModel

BOOTSTRAP = 1000
"""Bootstrap resamples for the standard error of metrics that are not means; the harness's default takes minutes."""
FEWSHOT_SEED = 1234
"""lm-evaluation-harness's own, so that the examples are the same as for its other models."""


def load_tasks(
    names: Sequence[str],
    include_path: Path | None,
    *,
    num_fewshot: int | None = None,
    generation: Mapping[str, Any] | None = None,
) -> TaskDict:
    """Load tasks, with their data.

    Args:
        names: tasks, groups or tags.
        include_path: folder of task files, the only ones loaded; null takes the harness's own tasks, whose data come
            from the Hugging Face hub.
        num_fewshot: examples before each question, for tasks that do not forbid them.
        generation: generation_kwargs that override the tasks' own.

    Raises:
        ConfigError: there is no such task, or it cannot be loaded.
    """
    disable_progress_bar()
    if include_path is not None and not include_path.is_dir():
        raise ConfigError("no such folder of task files", where=str(include_path))
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    if missing := [name for name in names if name not in manager.all_tasks]:
        there = ", ".join(manager.all_tasks) or "none that can be read"
        raise ConfigError(
            f"no task {', '.join(missing)}",
            where=str(include_path) if include_path is not None else None,
            hint=f"there are: {there}" if include_path is not None else "name your own files by --include-path",
        )
    try:
        loaded = manager.load(list(names))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, IndexError) as error:
        raise _unusable(names, error) from error
    except (yaml.YAMLError, TemplateError, DatasetsError) as error:
        raise _unusable(names, error) from error
    for task in loaded["tasks"].values():
        if generation and task.get_config("output_type") == "generate_until":
            own_kwargs = task.get_config("generation_kwargs") or {}
            task.set_config(key="generation_kwargs", value=override(own_kwargs, generation))
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def greedy_tasks(tasks: TaskDict) -> set[str]:
    """Name the tasks with a metric that needs to know whether a continuation is the greedy one."""
    found = set()
    for name, task in tasks["tasks"].items():
        metrics = {metric.get("metric") for metric in task.get_config("metric_list") or []}
        kind = task.get_config("output_type")
        if (kind == "loglikelihood" and (not metrics or "acc" in metrics)) or (
            kind == "multiple_choice" and "exact_match" in metrics
        ):
            found.add(name)
    return found


def measure(
    model: HarnessModel,
    tasks: TaskDict,
    *,
    limit: int | None = None,
    apply_chat_template: bool = False,
    unsafe_code: bool = False,
    unchecked: Set[str] = frozenset(),
) -> list[dict[str, Any]]:
    """Run tasks; return one row per metric, or nothing on ranks other than the first.

    A row has: task, version, shots, documents, filter, metric, value, stderr (None where there is none),
    higher_is_better.

    Args:
        limit: documents of each task, the first ones; null takes all.
        unsafe_code: allow tasks that execute generated code.
        unchecked: tasks of which it is unknown whether continuations are greedy; metrics that need it have no value.

    Raises:
        ConfigError: a task cannot be run as it is.
    """
    with contextlib.redirect_stdout(sys.stderr):  # the harness prints; stdout is for results only
        try:
            found = evaluate(
                lm=model,
                task_dict=tasks,
                limit=limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=False,
                apply_chat_template=apply_chat_template,
                fewshot_as_multiturn=apply_chat_template,
                confirm_run_unsafe_code=unsafe_code,
            )
        except Exception as error:
            if not _is_the_harness(error):
                raise
            raise _unusable(list(tasks["tasks"]), error, "run") from error
    return [] if found is None else _rows(found, unchecked)


def _is_the_harness(error: Exception) -> bool:
    """Tell whether the harness, or what it calls, raised an error, rather than this package."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if "/lm_eval/" in frame.filename:
            return True
        if frame.filename.startswith(str(Path(dllm.__file__).parent)):
            return False
    return False


def _rows(found: Mapping[str, Any], unchecked: Set[str]) -> list[dict[str, Any]]:
    rows = []
    for task, figures in found["results"].items():
        for name, value in figures.items():
            metric, comma, filter = name.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            if task in unchecked and metric in ("acc", "exact_match"):
                value = figures = {}
            rows.append(
                {
                    "task": task,
                    "version": found["versions"].get(task),
                    "shots": found["n-shot"].get(task),
                    "documents": found["n-samples"].get(task, {}).get("effective"),
                    "filter": filter,
                    "metric": metric,
                    "value": _number(value),
                    "stderr": _number(figures.get(f"{metric}_stderr,{filter}")),
                    "higher_is_better": found["higher_is_better"].get(task, {}).get(metric),
                }
            )
    return rows


def _number(value: Any) -> float | None:
    """Return a figure; the harness returns text where there is none."""
    return None if not isinstance(value, int | float) or not math.isfinite(value) else float(value)


def _unusable(names: Sequence[str], error: Exception, what: str = "load") -> ConfigError:
    message = str(error).strip().split("\n")[0]
    hint = "fix the task's file"
    if "unsafe" in message:
        hint = "read what it runs, then give --confirm-run-unsafe-code"
    return ConfigError(f"cannot {what} {', '.join(names)}: {type(error).__name__}: {message}", hint=hint)
