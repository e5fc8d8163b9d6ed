"""Files of a model's own code, copied beside its checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any


def copy_code(source: Path, directory: Path, values: dict[str, Any]) -> None:
    """Put a model's code beside a checkpoint of it, and its config's `values` and `auto_map` as they were published."""
    for file in sorted(source.glob("*.py")):
        shutil.copyfile(file, directory / file.name)
    path = directory / "config.json"
    written, published = json.loads(path.read_text()), json.loads((source / "config.json").read_text())
    for name in (*values, "auto_map"):
        written.pop(name, None)
        if name in published:
            written[name] = published[name]
    path.write_text(json.dumps(written, indent=2) + "\n")
