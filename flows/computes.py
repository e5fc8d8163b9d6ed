"""Whether a stage will compute on this machine: `python -m flows.computes STAGE` exits with `NO` where it will not.

DVC skips a stage whose results are there and restores one whose results are in its cache; an engine may only ask
servers, or take the dataset's responses. Asked in a process of its own: DVC and the engines take seconds to import.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from dllm.config.load import load_params
from dllm.registry import ENGINES

NO = 10
"""No exit code of an error, after which the stage itself says what is wrong."""


def engine_computes(name: str) -> bool:
    """Return whether an engine generates responses on this machine.

    Raises:
        ConfigError: no engine has that name.
    """
    engine = ENGINES[name]
    return engine.generates and not engine.is_external


def has_results(root: Path, stage: str) -> bool:
    """Return whether DVC has the results of a stage's present inputs, in out/ or in its cache.

    Raises:
        DvcException: an input is missing, dvc.yaml cannot be read, or another process works on the stage.
    """
    from dvc.repo import Repo
    from dvc.stage.cache import RunCacheNotFoundError
    from dvc_data.hashfile.hash_info import HashInfo

    with Repo(str(root)) as repo, repo.lock:
        found = repo.stage.load_one(name=stage)
        if not found.changed():
            return True
        for of_lock in (True, False):  # as `dvc repro` does: what dvc.lock names, then what any earlier run has left
            if not of_lock:
                found.save_deps()  # in memory only
                for out in found.outs:
                    out.hash_info = HashInfo()
            with contextlib.suppress(RunCacheNotFoundError):
                repo.stage_cache.restore(found, run_cache=not of_lock, dry=True)
                return True
        return False


def main(arguments: list[str]) -> int:
    """Look at one stage of the project in the working directory."""
    parser = argparse.ArgumentParser(prog="python -m flows.computes", description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("--force", action="store_true", help="it is run even where DVC has its results")
    asked = parser.parse_args(arguments)
    root = Path.cwd()
    if asked.stage == "regenerate" and not engine_computes(load_params(root / "params.yaml").regenerate.engine):
        return NO
    return NO if not asked.force and has_results(root, asked.stage) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
