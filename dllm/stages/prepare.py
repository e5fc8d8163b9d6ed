"""prepare: collect the prompt sources in one table of chats with a held-out split.

Reads the sources that params name; publishes `out/prepare/prompts.parquet` and `out/prepare/references.json`, the
correct results of the prompts where a source knows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dllm.config.params import Params
from dllm.outside import one_line
from dllm.prompts import references, sets, sources, stream
from dllm.prompts import table as prompts
from dllm.prompts.protocol import label
from dllm.stages import outside_data, preflight
from dllm.stages.workspace import open_stage

HEADLINE = ("prompts", "train", "heldout", "duplicates", "refused", "references")
"""Figures of headline.json."""


def run(params: Params, root: Path) -> dict[str, Any]:
    """Collect the prompts and publish them; return the counts.

    Raises:
        ConfigError, ModelError: an option of a source has no effect on it, or a later stage would refuse the target,
            the draft, the template or the engine.
        DataError: a source or prompt set cannot be read, too many of its rows cannot, or a split would be empty.
    """
    tokenizer = preflight.check(params)
    for entry in params.evaluate.sets or []:
        sets.identity(entry, root)  # loaded now: one that is out of reach must not stop the run after the training
    section = params.prepare
    files = {
        f"{label(source)}/{name}": path
        for source in section.sources
        for name, path in sources.inputs(source, root).items()
    }
    identity: dict[str, Any] = {}
    for number, source in enumerate(section.sources):
        if found_identity := sources.identity(source, root):
            name = f"{label(source)}@{source.split}"
            identity[name if name not in identity else f"{name} {number}"] = found_identity
    with open_stage("prepare", params, sections=[params.prepare], inputs=files, identity=identity, root=root) as stage:
        tallies: dict[str, stream.Tally] = {}
        try:
            found, counts = stream.collect(section, root, tallies)
        finally:
            _print(tallies, tokenizer)
        prompts.write_prompts(found, stage.work / prompts.FILE)
        known = {prompt.id: prompt.reference for prompt in found if prompt.reference is not None}
        references.write_references(known, stage.work / references.FILE)
        counts["references"] = len(known)
        headline = {name: counts[name] for name in HEADLINE}
        outside = outside_data.files(params, root)
        stage.record[outside_data.RECORD] = outside_data.stamps(outside)
        stage.record["read"] = {name: tally.to_json() | tally.reading.to_json() for name, tally in tallies.items()}
        stage.publish({name: stage.work / name for name in (prompts.FILE, references.FILE)}, counts, headline=headline)
    for name in outside_data.source_names(params, root):
        print(f"prepare: {one_line(name)}: {outside_data.NOTE}")
    for name, tally in counts["sources"].items():
        refused = "".join(f", {n} refused: {reason}" for reason, n in tally["refused"].items())
        print(
            f"prepare: {one_line(name)}: {tally['rows']} rows, {tally['train']} train, {tally['heldout']} held out, "
            f"{tally['duplicates']} duplicates{refused}"
        )
    return counts


def _print(tallies: Mapping[str, stream.Tally], tokenizer: PreTrainedTokenizerBase) -> None:
    for name, tally in tallies.items():
        for line in [*tally.lines(), *tally.unseen(tokenizer)]:
            print(f"prepare: {one_line(name)}: {line}", flush=True)
