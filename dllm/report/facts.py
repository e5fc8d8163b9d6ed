"""What a report says of a run, from the records that its stages left under out/. Computes no figure.

A figure that a stage did not leave shows as a dash.
"""

from collections.abc import Iterator
from pathlib import Path

from dllm.errors import StageError
from dllm.methods.figures import DASH, Row, count, number
from dllm.methods.method import Method
from dllm.registry import METHODS
from dllm.stages import STAGES
from dllm.stages.records import Records, read_records, trained_method


def records(root: Path) -> tuple[Records, Records]:
    """Return the metrics.json and the run.json of every finished stage under `root/out`.

    Raises:
        StageError: no stage has finished yet.
        DataError: a record is not JSON.
    """
    metrics, runs = read_records(root, "metrics.json"), read_records(root, "run.json")
    if not metrics:
        raise StageError("no stage has run yet", where=str(root / "out"), hint="start with `make run` or `dvc repro`")
    return metrics, runs


def recipe(runs: Records, root: Path) -> str:
    """Return the name of the recipe, or of the folder if no record has one."""
    return next((run["recipe"] for run in runs.values() if "recipe" in run), root.name)


def method(runs: Records) -> Method | None:
    """Return the method that was trained; None of runs of older versions, which do not name theirs."""
    name = trained_method(runs) or ""
    return METHODS[name] if name in METHODS else None  # noqa: SIM401 (a registry has no get)


def data(metrics: Records) -> Iterator[Row]:
    """Yield what was regenerated and for how many steps a model was trained."""
    found, trained = metrics.get("regenerate", {}), metrics.get("train", {})
    yield "prompts regenerated", f"{count(found.get('prompts'))} ({count(found.get('rows'))} responses)"
    yield "tokens regenerated", count(found.get("tokens"))
    cut = found.get("cut_share")
    lengths = f"{number(found.get('tokens_per_response'), 1)}, {DASH if cut is None else f'{cut:.0%}'} cut by the limit"
    yield "tokens per response", lengths
    yield "optimizer steps", f"{count(trained.get('steps'))} (best at {count(trained.get('best_step'))})"


def registered(metrics: Records) -> Iterator[Row]:
    """Yield the version and the verdict."""
    found = metrics.get("register", {})
    name, version = found.get("model_name"), found.get("version")
    aliases = ", ".join(f"@{alias}" for alias in found.get("aliases", []))
    yield "registered", f"{name} version {version} {aliases}" if version else DASH
    yield "champion?", found.get("verdict") or DASH


def places(root: Path) -> Iterator[Row]:
    """Yield where there is more to see."""
    plots = sorted(path.relative_to(root) for stage in STAGES for path in (root / "out" / stage).glob("*.png"))
    yield "plots", ", ".join(map(str, plots)) or DASH
    yield "more", "out/report/index.html; `make ui` opens MLflow and Prefect"
    yield "in a shell", "`. infra/env.sh` puts its python, dvc and prefect on the path"
