"""Tasks from local files, run on a model of ours, and what came out of them as rows of one table."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm.errors import ConfigError

if TYPE_CHECKING:
    from lm_eval.tasks.manager import TaskDict

    from dllm.harness.adapter import HarnessModel

BOOTSTRAP = 1000
"""Resamplings behind the standard error of metrics that are no means; the harness's own number takes minutes."""
FEWSHOT_SEED = 1234
"""lm-evaluation-harness's own, so that examples are those of its other models."""


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
        include_path: folder of task files, and the only one looked at; null takes the harness's own tasks, whose data
            come from the Hugging Face hub.
        num_fewshot: examples before each question, for tasks that do not forbid them.
        generation: generation_kwargs that go before the tasks' own.

    Raises:
        ConfigError: there is no such task, or it cannot be loaded.
    """
    import yaml
    from datasets.exceptions import DatasetsError
    from datasets.utils.logging import disable_progress_bar
    from jinja2 import TemplateError
    from lm_eval.tasks import TaskManager

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
            task.set_config(key="generation_kwargs", value=dict(generation), update=True)
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def measure(
    model: HarnessModel, tasks: TaskDict, *, limit: int | None = None, apply_chat_template: bool = False
) -> list[dict[str, Any]]:
    """Run tasks; return one row a metric, or nothing on ranks other than the first.

    A row has: task, version, shots, documents, filter, metric, value, stderr (None where there is none),
    higher_is_better.

    Args:
        limit: documents of each task, the first ones; null takes all.
    """
    from lm_eval.evaluator import evaluate

    with contextlib.redirect_stdout(sys.stderr):  # the harness prints as it goes; results alone are for stdout
        found = evaluate(
            lm=model,
            task_dict=tasks,
            limit=limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
        )
    return [] if found is None else _rows(found)


def _rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for task, figures in found["results"].items():
        for name, value in figures.items():
            metric, comma, filter = name.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
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
    """Return a figure; the harness writes text where there is none."""
    return None if value is None or isinstance(value, str) or not math.isfinite(value) else float(value)


def _unusable(names: Sequence[str], error: Exception) -> ConfigError:
    said = str(error).strip().split("\n")[0]
    return ConfigError(f"cannot load {', '.join(names)}: {type(error).__name__}: {said}", hint="mend the task's file")
