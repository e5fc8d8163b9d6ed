"""prepare: prompt sources become one table of chats with a held-out part.

Reads the sources that params name; leaves `out/prepare/prompts.parquet` and, of prompts whose
right answer is known, `out/prepare/references.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dllm.config.params import Params
from dllm.prompts import references, sources
from dllm.prompts import table as prompts
from dllm.stages.workspace import open_stage


def run(params: Params, root: Path) -> dict[str, Any]:
    """Collect the prompts and publish them; return what was counted.

    Raises:
        DataError: a source cannot be read, or a split would be empty.
    """
    read = {
        f"{sources.label(source)}/{file.name}": file
        for source in params.prepare.sources
        for file in sources.files(source, root)
    }
    with open_stage("prepare", params, sections=[params.prepare], inputs=read, root=root) as stage:
        found, counts = prompts.collect(params.prepare, root)
        table = stage.work / prompts.FILE
        prompts.write_prompts(found, table)
        known = {prompt.id: prompt.reference for prompt in found if prompt.reference is not None}
        counts["references"] = len(known)
        references.write_references(known, stage.work / references.FILE)
        stage.publish({file.name: file for file in (table, stage.work / references.FILE)}, counts)
    for name, tally in counts["sources"].items():
        refused = "".join(f", {n} refused: {reason}" for reason, n in tally["refused"].items())
        print(
            f"prepare: {name}: {tally['rows']} rows, {tally['train']} train, {tally['heldout']} held out, "
            f"{tally['duplicates']} duplicates{refused}"
        )
    return counts
