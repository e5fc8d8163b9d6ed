"""prepare: collect the prompt sources in one table of chats with a held-out split.

Reads the sources that params name; publishes `out/prepare/prompts.parquet` and `out/prepare/references.json`, the
correct results of the prompts where a source knows them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dllm.config.params import Params
from dllm.prompts import references, sources, stream
from dllm.prompts import table as prompts
from dllm.stages import preflight
from dllm.stages.workspace import open_stage


def run(params: Params, root: Path) -> dict[str, Any]:
    """Collect the prompts and publish them; return the counts.

    Raises:
        DataError: a source cannot be read, or a split would be empty.
        ConfigError, ModelError: a later stage would refuse the target, the draft, the template or the engine.
    """
    preflight.check(params)
    section = params.prepare
    files = {
        f"{sources.label(source)}/{name}": path
        for source in section.sources
        for name, path in sources.inputs(source, root).items()
    }
    identity = {f"{sources.label(source)}@{source.split}": sources.identity(source, root) for source in section.sources}
    identity = {name: found for name, found in identity.items() if found}
    with open_stage("prepare", params, sections=[section], inputs=files, identity=identity, root=root) as stage:
        found, counts = stream.collect(section, root)
        prompts.write_prompts(found, stage.work / prompts.FILE)
        known = {prompt.id: prompt.reference for prompt in found if prompt.reference is not None}
        references.write_references(known, stage.work / references.FILE)
        counts["references"] = len(known)
        stage.publish({name: stage.work / name for name in (prompts.FILE, references.FILE)}, counts)
    for name, tally in counts["sources"].items():
        refused = "".join(f", {n} refused: {reason}" for reason, n in tally["refused"].items())
        print(
            f"prepare: {name}: {tally['rows']} rows, {tally['train']} train, {tally['heldout']} held out, "
            f"{tally['duplicates']} duplicates{refused}"
        )
    return counts
