"""Files of prompts for `generate --batch-file`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dllm.errors import DataError


def read_prompts(path: Path) -> list[str]:
    """Read a batch file: one prompt per line; for .jsonl, one object with the key `prompt` per line; `-` is stdin.

    Raises:
        DataError: it is missing, or a line is no prompt.
    """
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        # Split as editors do: \u2028 and the like are text.
        lines = data.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(f"cannot read the prompts: {reason}", where=str(path)) from None
    if path.suffix.lower() == ".json":
        raise DataError("a list of prompts is not read", where=str(path), hint="write .jsonl, one object per line")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix.lower() != ".jsonl":
        return [line for _, line in numbered]
    prompts = []
    for number, line in numbered:
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise DataError("expected an object with a text under `prompt`", where=f"{path}, line {number}")
        prompts.append(prompt)
    return prompts
