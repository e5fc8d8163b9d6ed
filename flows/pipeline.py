"""The Prefect flow `pipeline`: the four DVC stages one after the other, then the registry.

Prefect decides when, where and how often; DVC decides whether a stage must run; the stage does the work. So tasks have
no results and no caches. Each is called directly: cancellation reaches the main thread, and through it its child.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed, Failed

from dllm.config.load import load_params, read_yaml
from dllm.errors import ConfigError, DllmError
from dllm.process.proxies import is_this_machine
from dllm.stages import STAGES, outside_data
from dllm.stages.records import read_record
from dllm.tracking import places
from dllm.tracking.address import VARIABLE, sqlite_path, tracking_uri, vanishes
from flows import artifacts, checkouts
from flows.children import HERE, ROOT, WHEN_A_SERVER_IS_BACK, Place, alone, out_of_date, reproduce, run_verb
from flows.forced import Forced
from flows.gpu_slots import slot_of_stage
from flows.parameters import (
    PARAMS_FILE,
    Overrides,
    Recipe,
    Request,
    Revision,
    SaveAs,
    Seed,
    Stage,
    is_made_up,
)

warnings.filterwarnings("ignore", message='Field name "register"')  # of pydantic, about the model of the parameters


@task(name="prepare", cache_policy=NO_CACHE)
def prepare(place: Place, force: bool) -> None:
    """Run DVC's stage `prepare`."""
    reproduce(place, "prepare", force)


@task(name="regenerate", cache_policy=NO_CACHE, **WHEN_A_SERVER_IS_BACK)
def regenerate(place: Place, force: bool) -> None:
    """Run DVC's stage `regenerate`, again after a server could not be reached: finished responses are kept."""
    with slot_of_stage(place, "regenerate", force):
        reproduce(place, "regenerate", force)


@task(name="train", cache_policy=NO_CACHE)
def train(place: Place, force: bool) -> None:
    """Run DVC's stage `train`."""
    with slot_of_stage(place, "train", force):
        reproduce(place, "train", force)


@task(name="evaluate", cache_policy=NO_CACHE)
def evaluate(place: Place, force: bool) -> None:
    """Run DVC's stage `evaluate`."""
    with slot_of_stage(place, "evaluate", force):
        reproduce(place, "evaluate", force)


@task(name="register", cache_policy=NO_CACHE)
def register_checkpoint(place: Place) -> None:
    """Run the verb `register`."""
    run_verb(place, "register")


def name_run() -> str:
    """Name the flow run that starts after its parameters, unless its user has named it."""
    if flow_run.name and not is_made_up(flow_run.name):
        return str(flow_run.name)
    given = {key: value for key, value in flow_run.parameters.items() if key != "save_as"}
    return Request(**given).name(ROOT)


@flow(name="pipeline", flow_run_name=name_run)
def pipeline(
    recipe: Recipe = PARAMS_FILE,
    overrides: Overrides = {},  # noqa: B006 (nobody changes it)
    seed: Seed | None = None,
    from_stage: Stage = "prepare",
    force: bool = False,
    register: bool = True,
    checkout: Revision | None = None,
    save_as: SaveAs = "nothing",
) -> State[Any]:
    """Prepare, regenerate, train, evaluate and register; a stage whose inputs are unchanged is skipped.

    Args:
        recipe: a recipe's name; `params.yaml` takes that file as it is.
        overrides: values that differ from it, by key: {"train.epochs": 2}.
        seed: seed of training, `train.seed`.
        from_stage: the first stage to run; the results of earlier ones are taken as they are. A checkout restores them
            from DVC's cache, and runs those again that it lacks.
        force: run these stages again, from scratch; a run that is resumed or retried goes on.
        register: register the checkpoint.
        checkout: a commit, branch or tag ("HEAD") to run in a checkout of its own, beside other runs; null runs in the
            project's folder, which changes its params.yaml, dvc.lock and out/.
        save_as: keep params.yaml and dvc.lock of a checkout as a branch or an experiment of DVC.
    """
    request = Request(recipe, overrides, seed, from_stage, force, register, checkout)
    try:
        with _place(request, save_as) as place:
            _run_stages(place, request)
            said = artifacts.publish(place.root, register)
            if isinstance(place, checkouts.Checkout) and save_as != "nothing":
                said += f"; {place.save(str(flow_run.name), save_as)}"
    except DllmError as error:  # its line is the state's message; raised, it would be a traceback in the log
        get_run_logger().error("%s", error)
        return Failed(message=str(error), data=error)
    get_run_logger().info("%s", said)
    return Completed(message=said)


def _run_stages(place: Place, request: Request) -> None:
    stages = request.stages()
    params = load_params(place.root / "params.yaml")
    places.check(ROOT, params.register_.store, registers=request.register)  # before hours of training
    _warn_of_places(request.register)
    forced = Forced(place.root, str(flow_run.id), keep_lock=place is not HERE) if request.force else None
    if forced is not None:
        forced.begin(stages)
    changed = {"prepare": outside_data.changed(params, place.root)} if "prepare" in stages else {}
    changed["evaluate"] = outside_data.changed_sets(params, place.root)
    for stage, names in changed.items():
        if names:
            get_run_logger().info("%s: run again, since %s has changed outside data/", stage, ", ".join(names)[:200])
    tasks = {"prepare": prepare, "regenerate": regenerate, "train": train, "evaluate": evaluate}
    for stage, run_stage in tasks.items():
        if stage in stages or request.checkout is not None:  # a checkout has nothing yet: DVC restores it
            is_forced = forced is not None and stage in stages and forced.is_due(stage)
            run_stage(place, is_forced or bool(changed.get(stage)))
            if forced is not None and is_forced:
                forced.finished(stage)
        else:
            read_record(place.root, stage, "run.json")
            if why := out_of_date(place, stage):
                get_run_logger().warning("%s: its result is taken as it is, although %s", stage, why)
    if request.register:
        register_checkpoint(place)


def _warn_of_places(registers: bool) -> None:
    """Log which results will be gone, and that other workers of a shared server have another registry."""
    if not registers and vanishes(ROOT):
        get_run_logger().warning("only the MLflow runs will stay: %s is deleted after this flow run", ROOT)
    host = urlsplit(PREFECT_API_URL.value() or "").hostname
    if host is None or is_this_machine(host) or (store := sqlite_path(tracking_uri(ROOT))) is None:
        return
    told = "runs and champions go only into %s, which workers on other machines do not see: set %s to a server"
    get_run_logger().warning(told, store, VARIABLE)


@contextlib.contextmanager
def _place(request: Request, save_as: str) -> Iterator[Place]:
    """Check what is asked for, then give the folder to run in, with its params.yaml written."""
    check(request, save_as)
    if request.checkout is None:
        with alone(ROOT):
            request.write_params(ROOT, force=False)
            yield HERE
        return
    checkouts.warn_of_changes(ROOT)
    name = str(flow_run.id)
    with checkouts.checked_out(ROOT, request.checkout, name, from_scratch=request.force) as place:
        request.write_params(place.root, force=True)
        yield place


def check(request: Request, save_as: str) -> None:
    """Refuse what no stage could run, before one starts: DVC would delete what a refused stage has published.

    Raises:
        ConfigError: a value is wrong, two do not go together, or one is of a stage that is left out.
        StageError: another flow runs in the project's folder.
    """
    if request.checkout is None or request.recipe != PARAMS_FILE:  # a commit has its own
        request.params(ROOT)
    request.check_left_out(ROOT)
    if request.checkout is not None:
        checkouts.resolve(ROOT, request.checkout)
    elif save_as != "nothing":
        raise ConfigError("only a checkout is saved", where=f"save_as: {save_as}", hint="give checkout: HEAD")
    else:
        with alone(ROOT):
            pass


def _parse(arguments: list[str]) -> tuple[Request, str]:
    parser = argparse.ArgumentParser(
        prog="python -m flows.pipeline", description="Run the pipeline.", allow_abbrev=False
    )
    parser.add_argument("--recipe", default=PARAMS_FILE, help=f"a recipe's name; by default {PARAMS_FILE} as it is")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a value that differs from it")
    parser.add_argument("--seed", type=int, help="seed of training")
    parser.add_argument("--from-stage", choices=STAGES, default=STAGES[0], help="the first stage to run")
    parser.add_argument("--force", action="store_true", help="run these stages again, from scratch")
    parser.add_argument("--no-register", dest="register", action="store_false", help="register nothing")
    parser.add_argument("--checkout", metavar="COMMIT", nargs="?", const="HEAD", help="run in a checkout of its own")
    parser.add_argument("--save-as", choices=["nothing", "branch", "experiment"], default="nothing")
    given = vars(parser.parse_args(arguments))
    overrides, save_as = {}, given.pop("save_as")
    for text in given.pop("set"):
        key, separator, value = text.partition("=")
        try:
            overrides[key] = read_yaml(value)
        except ValueError as error:
            parser.error(f"--set {text}: {error}")
        if not separator:
            parser.error(f"--set takes KEY=VALUE, got {text}")
    return Request(overrides=overrides, **given), save_as


if __name__ == "__main__":
    from flows.in_process import run

    asked, how = _parse(sys.argv[1:])
    sys.exit(run(pipeline, lambda: check(asked, how), **vars(asked), save_as=how))
