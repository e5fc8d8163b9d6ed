"""torchrun as the command of a stage: same options and ranks, but the last line is that of the first failed rank.

Plain `torchrun` adds a traceback and a table of its own below that line, and leaves with 1 whatever the rank said. It
also outlives a parent that is killed outright; this one does not.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from dllm.process import children as process


def main(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments; return the first failed rank's exit code, 128 + n after signal n, else 0."""
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    # torchrun would print four lines on setting OMP_NUM_THREADS to 1; the ranks divide the cores themselves.
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
    if "DVC_STAGE" in os.environ:
        process.die_with_parent()
    try:
        run.main(list(arguments))
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        said = f"rank {rank} was killed by signal {-failure.exitcode}"
        print(f"dllm: {said}; unless it was sent on purpose, memory may have run out", file=sys.stderr, flush=True)
        return 128 - failure.exitcode
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
