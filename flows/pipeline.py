"""The Prefect flow `pipeline`: the four DVC stages one after the other, then the registry.

Prefect decides when, where and how often; DVC decides whether a stage must run; the stage does the work. So tasks have
no results and no caches. Each is called directly: cancellation reaches the main thread, and through it its child.
"""

from __future__ import annotations

import sys

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from dllm.config.load import load_params
from dllm.stages import DVC_STAGES
from dllm.stages import workspace as contract
from flows import artifacts
from flows.children import ROOT, WHEN_A_SERVER_IS_BACK, alone, gpu_slot, reproduce, run_verb


@task(name="prepare", cache_policy=NO_CACHE)
def prepare(force: bool) -> None:
    """Run DVC's stage `prepare`."""
    reproduce(ROOT, "prepare", force)


@task(name="regenerate", cache_policy=NO_CACHE, **WHEN_A_SERVER_IS_BACK)
def regenerate(force: bool) -> None:
    """Run DVC's stage `regenerate`, again after a server could not be reached: finished responses are kept."""
    with gpu_slot():
        reproduce(ROOT, "regenerate", force)


@task(name="train", cache_policy=NO_CACHE)
def train(force: bool) -> None:
    """Run DVC's stage `train`."""
    with gpu_slot():
        reproduce(ROOT, "train", force)


@task(name="evaluate", cache_policy=NO_CACHE)
def evaluate(force: bool) -> None:
    """Run DVC's stage `evaluate`."""
    with gpu_slot():
        reproduce(ROOT, "evaluate", force)


@task(name="register", cache_policy=NO_CACHE)
def register() -> None:
    """Run the verb `register`."""
    run_verb(ROOT, "register")


@flow(name="pipeline")
def pipeline(force: bool = False) -> None:
    """Prepare, regenerate, train, evaluate and register; a stage whose inputs are unchanged is skipped.

    Args:
        force: run every stage again, from scratch.
    """
    load_params(ROOT / "params.yaml")  # before DVC, which would delete what a refused stage has published
    with alone(ROOT):
        if force:
            for stage in DVC_STAGES:
                contract.forget(ROOT, stage)
        prepare(force)
        regenerate(force)
        train(force)
        evaluate(force)
        register()
        artifacts.publish(ROOT)


def _check() -> None:
    load_params(ROOT / "params.yaml")
    with alone(ROOT):
        pass


if __name__ == "__main__":
    from flows.in_process import run

    sys.exit(run(pipeline, _check, force="--force" in sys.argv[1:]))
