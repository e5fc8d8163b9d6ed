"""Correct results of prompts, where a source knows them, and whether a response arrives at one.

They are stored beside the prompts and not in their table: `regenerate` must not read them, nor rerun when they change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path

from dllm.errors import DataError
from dllm.files import atomic_write
from dllm.outside import JsonError, parse_json

FILE = "references.json"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def is_right(text: str, reference: str) -> bool:
    """Return whether a text arrives at the reference: by its last number, else by its last lines.

    Numbers are compared by value: `$1,200.` equals `1200.00`. Of the text as many lines count as the reference has.
    Source: the flexible extraction of lm-evaluation-harness's gsm8k.
    """
    number = _NUMBER.fullmatch(reference.strip().lstrip("$"))
    if number is not None:
        found = _NUMBER.findall(text)
        return bool(found) and _value(found[-1]) == _value(number.group())
    wanted = [line.strip() for line in reference.strip().splitlines()]
    return bool(wanted) and [line.strip() for line in text.strip().splitlines()[-len(wanted) :]] == wanted


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


def write_references(references: Mapping[str, str], path: Path) -> None:
    """Write references by prompt id; equal references give equal bytes."""
    atomic_write(path, (json.dumps(references, indent=0, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_references(dir: Path) -> dict[str, str]:
    """Read the references that `prepare` published, by prompt id; empty where there are none.

    Raises:
        DataError: the file is damaged.
    """
    path = dir / FILE
    if not path.is_file():
        return {}
    try:
        found = parse_json(path.read_bytes())
    except JsonError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise DataError("the references are damaged", where=str(path), hint="run `python -m dllm prepare` again")
    return found
