"""The right answers that a source knows of its prompts, and whether a text comes to one.

They lie beside the prompts and not in their table: who writes answers must not see them, and needs no rerun for them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from dllm.files import atomic_write

FILE = "references.json"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def gsm8k_reference(row: Mapping[str, Any]) -> str:
    """Return what follows the four hashes of a GSM8K solution. Source: Cobbe et al. 2021."""
    return str(row["answer"]).rsplit("####", 1)[-1].strip()


def as_reference(value: Any) -> str | None:
    """Return a row's text or number; none where its column holds something else, which was not meant for us."""
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None


def is_right(text: str, reference: str) -> bool:
    """Tell whether a text comes to the reference: by its last number, else by its last line.

    Numbers are compared by value: `$1,200.` meets `1200.00`.
    Source: the flexible extraction of lm-evaluation-harness's gsm8k.
    """
    wanted = _NUMBER.fullmatch(reference.strip().lstrip("$"))
    if wanted is not None:
        found = _NUMBER.findall(text)
        return bool(found) and _value(found[-1]) == _value(wanted.group())
    lines = text.strip().splitlines()
    return bool(lines) and lines[-1].strip() == reference.strip()


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


def write_references(references: Mapping[str, str], path: Path) -> None:
    """Write references by prompt id; equal ones make equal bytes."""
    atomic_write(path, (json.dumps(references, indent=0, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_references(dir: Path) -> dict[str, str]:
    """Read what `prepare` published, by prompt id; none where it has left none."""
    path = dir / FILE
    return dict(json.loads(path.read_bytes())) if path.is_file() else {}
