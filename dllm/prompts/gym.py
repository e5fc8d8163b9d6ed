"""The source `reasoning-gym`: questions that the package of that name generates, with their answers.

They are generated in a process of their own: a few tasks depend on Python's hash seed, which is fixed there, and some
search for a long time, which a deadline ends. The package is never imported in this process.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import json
import os
import random
import select
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm.config.params import Source
from dllm.errors import DataError
from dllm.outside import one_line
from dllm.process.parent import PARENT, follow_parent
from dllm.prompts.protocol import SourceRow

PACKAGE = "reasoning-gym"
TASK, SIZE, SEED = "gsm_symbolic", 1000, 0
"""What is generated where the source does not say."""
MADE_OF_OTHERS = {"composite"}
"""Tasks that only mix other ones."""


@dataclass(frozen=True)
class ReasoningGym:
    """Questions of one task of the package, which `subset` names; the same ones for the same size and seed.

    Question n depends on `seed` + n in most tasks: two seeds that are closer than `size` share questions.
    """

    deadline_s: float = 120.0
    """Longest wait for the next question."""
    options = frozenset({"subset", "size", "seed"})

    def inputs(self, source: Source, root: Path) -> dict[str, Path]:
        """Return nothing: no file is read."""
        return {}

    def identity(self, source: Source) -> dict[str, Any]:
        """Return the package's version, the task, size and seed: together they determine the questions.

        Raises:
            DataError: the package is not installed.
        """
        return {PACKAGE: _version(), **_asked(source)}

    def rows(self, source: Source, root: Path) -> Iterator[SourceRow]:
        """Generate the questions in order; an answer that is a text is the reference.

        Raises:
            DataError: there is no such task, it fails, or its next question takes too long.
        """
        _version()
        asked = _asked(source)
        name = f"{source.name}:{asked['task']}"
        argv = [sys.executable, "-m", __name__, *map(str, asked.values())]
        environment = {**os.environ, "PYTHONHASHSEED": "0", PARENT: str(os.getpid())}
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment) as child:
            try:
                number = 0
                for number, item in enumerate(self._items(child, name), 1):
                    if "error" in item:
                        raise DataError(item["error"], where=f"prepare.sources: {name}", hint=item["hint"])
                    place = f"{name} seed {asked['seed']} question {number}"
                    yield SourceRow(place, item["question"], None, item["answer"])
                if number < asked["size"]:
                    what = f"the process that generates ended after {number} of {asked['size']} questions"
                    raise DataError(what, where=f"prepare.sources: {name}", hint="see the lines above")
            finally:
                child.kill()

    def _items(self, child: subprocess.Popen[bytes], name: str) -> Iterator[dict[str, Any]]:
        assert child.stdout is not None
        rest = b""
        while True:
            if not select.select([child.stdout], [], [], self.deadline_s)[0]:
                what = f"no further question within {self.deadline_s:g} s"
                raise DataError(what, where=f"prepare.sources: {name}", hint="choose another task, or a smaller size")
            read = os.read(child.stdout.fileno(), 1 << 16)
            if not read:
                return
            *lines, rest = (rest + read).split(b"\n")
            yield from map(json.loads, lines)


REASONING_GYM = ReasoningGym()


def _asked(source: Source) -> dict[str, Any]:
    size, seed = (SIZE if source.size is None else source.size), (SEED if source.seed is None else source.seed)
    return {"task": source.subset or TASK, "size": size, "seed": seed}


def _version() -> str:
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        hint = "run `pip install 'dllm[reasoning-gym]'`"
        raise DataError("the package is not installed", where=f"prepare.sources: {PACKAGE}", hint=hint) from None


def _generate(task: str, size: int, seed: int) -> Iterator[dict[str, Any]]:
    """Generate questions and answers, and where that fails, an error and a hint."""
    with warnings.catch_warnings(category=SyntaxWarning, action="ignore"):  # of what it imports, when it is compiled
        from reasoning_gym.factory import DATASETS, create_dataset  # 2 seconds, and only ever in the child

    names = sorted(set(DATASETS) - MADE_OF_OTHERS)
    if task not in names:
        near = difflib.get_close_matches(task.lower().replace("-", "_"), names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        yield {"error": f"reasoning-gym has no task {task!r}", "hint": hint}
        return
    try:
        random.seed(seed)  # for tasks that draw from the global generator
        dataset = create_dataset(task, size=size, seed=seed)
        for number in range(size):
            item = dataset[number]
            answer = item["answer"]
            yield {"question": str(item["question"]), "answer": answer if isinstance(answer, str) else None}
    except Exception as error:  # of any of a hundred tasks
        reason = one_line(f"{type(error).__name__}: {error}", 200)
        yield {"error": f"the task cannot be generated: {reason}", "hint": "choose another task, size or seed"}


def main() -> None:
    follow_parent()
    task, size, seed = sys.argv[1:]
    with os.fdopen(os.dup(1), "w", encoding="utf-8", errors="surrogateescape") as pipe:
        os.dup2(2, 1)  # what a task prints
        with contextlib.suppress(BrokenPipeError):
            for item in _generate(task, int(size), int(seed)):
                print(json.dumps(item), file=pipe, flush=True)


if __name__ == "__main__":
    main()
