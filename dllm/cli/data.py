"""`data verify` and `data merge`: what they print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dllm.responses import merge as parts
from dllm.responses import verify as checks


def verify(dir: Path, *, as_json: bool = False) -> None:
    """Check a folder of responses and print the checks, as a table or one JSON object.

    Raises:
        DataError: something does not hold.
    """
    found = checks.verify(dir)
    if as_json:
        print(json.dumps({"folder": str(dir), "whole": True, "checked": found}))
        return
    table = Table(title=f"{dir} is whole", show_header=False, title_justify="left")
    for check, finding in found.items():
        table.add_row(check, finding)
    Console(soft_wrap=True).print(table)


def merge(dirs: Sequence[Path], out: Path) -> None:
    """Merge parts and print the totals.

    Raises:
        DataError: the parts do not fit together, or the folder holds something else.
    """
    merged = parts.merge(dirs, out)
    print(f"{out}: {merged['rows']} rows, {merged['tokens']} tokens of {len(dirs)} parts", flush=True)
