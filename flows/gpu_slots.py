"""Slots of GPUs: one concurrency limit of Prefect's for each GPU, which a stage that computes holds while it runs.

A slot is named by the GPU's UUID, `gpu:GPU-1f2e...`: every container of a machine calls the same GPU so, whatever its
own name. A stage holds none while it generates nothing here, or while DVC has its results already.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from prefect import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

from dllm.errors import StageError
from dllm.process import children as process
from dllm.process import gpus
from flows import computes
from flows.children import Place

LOOK_DEADLINE_S = 600.0


def gpu_slot(is_needed: Callable[[], bool]) -> AbstractContextManager[None]:
    """Hold the slots of the GPUs that a stage sees while it runs; without GPUs, hold nothing.

    Taken slots are waited for, all together. A lease that cannot be renewed for a moment does not stop the stage.

    Args:
        is_needed: whether the stage computes on this machine; asked only where there are GPUs.
    """
    names = [f"gpu:{uuid or f'{platform.node()}:{index}'}" for index, uuid in gpus.visible_gpus().items()]
    if not names or not is_needed():
        return nullcontext()
    with get_client(sync_client=True) as client:
        for name in names:
            try:
                client.read_global_concurrency_limit_by_name(name)
            except ObjectNotFound:
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
    return concurrency(names, occupy=1, strict=True, raise_on_lease_renewal_failure=False)


def slot_of_stage(place: Place, stage: str, force: bool) -> AbstractContextManager[None]:
    """Hold the slots that a stage of DVC needs: of one that cannot be looked at in time, all."""
    look = [sys.executable, "-m", "flows.computes", stage, *(["--force"] if force else [])]

    def is_needed() -> bool:
        try:
            return process.run(look, env=place.env, cwd=place.root, deadline_s=LOOK_DEADLINE_S).code != computes.NO
        except StageError:  # DVC hashes for long; the stage itself says what is wrong
            return True

    return gpu_slot(is_needed)
