"""The model card of an exported draft: the README.md that the Hugging Face hub shows.

Names of models, sources and settings come from records, which may be anyone's: each is escaped for the place where it
stands.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dllm.config.params import Params
from dllm.methods.figures import DASH, Table, count, number
from dllm.methods.method import Method
from dllm.models import hub
from dllm.models.drafts.protocol import Draft
from dllm.models.drafts.serving import TRAINED, ServingEngine, layers
from dllm.outside import markdown
from dllm.registry import DRAFTS, METHODS
from dllm.stages.records import Records, trained_method
from dllm.tracking.provenance import library_versions
from dllm.tracking.runs import flatten

HERE = "."
"""The draft in commands: they are run in its folder."""
UNNAMED = "TARGET"


@dataclass(frozen=True)
class Subject:
    """The draft that the card is about."""

    draft: Draft
    dtype: torch.dtype
    target: str | None
    """A Hugging Face id, or another name by which it was trained; None if unknown."""
    digest: str
    """Of the checkpoint that was exported."""

    @property
    def hub_target(self) -> str | None:
        """The target, if it has a name that others can load it by."""
        return self.target if self.target and hub.looks_like_id(self.target) and not self._is_here else None

    @property
    def _is_here(self) -> bool:
        return self.target is not None and Path(self.target).exists()

    @property
    def target_title(self) -> str:
        """The target as the card calls it: without folders of this machine."""
        if self.target is None:
            return "a target that no record names"
        return self.hub_target or _public(str(Path(self.target).resolve()) if self._is_here else self.target)

    @property
    def family(self) -> str:
        """The draft's architecture, by its name in the registry."""
        return next((name for name, family in DRAFTS.items() if family is type(self.draft)), "draft")


def text(
    subject: Subject,
    *,
    engines: Sequence[ServingEngine],
    runs: Records,
    metrics: Records,
    params: Params | None = None,
) -> str:
    """Write the card as Markdown with YAML front matter.

    Args:
        subject: the draft.
        engines: those whose commands it shows.
        runs: run.json of the stages that made and measured it.
        metrics: their metrics.json.
        params: the settings that it was trained with, if they are known.
    """
    sections = [
        _front_matter(subject, params),
        f"# {subject.draft.architectures[0]} for {markdown(subject.target_title)}\n",
        "A draft model for speculative decoding: it proposes blocks of tokens from hidden states of its target, which\n"
        "verifies them. It has no embedding and no head of its own, and generates nothing without that target.\n",
        "## Serve\n",
        *_serving(subject, engines),
        "## Draft\n",
        _pairs(_shape(subject)),
        *_evaluation(runs, metrics),
        "## Data\n",
        _pairs(_data(runs, metrics, params)),
        "## Training\n",
        _pairs(_training(runs, metrics, params)),
        "## Versions\n",
        _pairs(_versions(runs)),
    ]
    return "\n".join(sections)


def _front_matter(subject: Subject, params: Params | None) -> str:
    lines = ["---"]
    if subject.hub_target:
        lines.append(f"base_model: {json.dumps(subject.hub_target)}")
    else:
        lines.append("# base_model: name the target's repository here")
    sources = [source.name for source in params.prepare.sources] if params else []
    if datasets := sorted({name for name in sources if "/" in name and hub.looks_like_id(name)}):
        lines += ["datasets:", *(f"- {json.dumps(name)}" for name in datasets)]
    lines.append("# license: choose one; those of the target and of the prompts bind you")
    lines += ["pipeline_tag: text-generation", "tags:"]
    lines += [f"- {json.dumps(tag)}" for tag in ("speculative-decoding", "draft-model", subject.family, "dllm")]
    return "\n".join([*lines, "---", ""])


def _serving(subject: Subject, engines: Iterable[ServingEngine]) -> Iterator[str]:
    config = subject.draft.config
    yield f"In the folder of this file{'' if subject.hub_target else f', with the target in place of {UNNAMED}'}:\n"
    refused = []
    for engine in engines:
        if (why := engine.refusal(config)) is not None:
            refused.append(f"* {markdown(why)}.")
            continue
        command = engine.command(subject.hub_target or UNNAMED, HERE, config)
        note = engine.note(config.to_json())
        yield f"**{engine.title}**\n\n```sh\n{command}\n```\n" + (f"\n{note}\n" if note else "")
    if refused:
        yield "Other engines cannot decode it as it was trained:\n\n" + "\n".join(refused) + "\n"


def _shape(subject: Subject) -> Iterator[tuple[str, Any]]:
    config = subject.draft.config
    raw = config.to_json()
    yield "parameters", count(sum(parameter.numel() for parameter in subject.draft.parameters()))
    yield "weights", str(subject.dtype).removeprefix("torch.")
    yield "layers", config.num_hidden_layers
    yield "attention, by layer", ", ".join(map(str, dict.fromkeys(layers(raw, TRAINED))))
    yield "block size", f"{config.block_size}: the last token and {config.block_size - 1} draft tokens"
    yield "target layers read, from 0", ", ".join(map(str, config.target_layer_ids))
    yield "mask token id", config.mask_token_id
    yield "sha256 of the checkpoint", subject.digest


def _evaluation(runs: Records, metrics: Records) -> Iterator[str]:
    name = trained_method(runs)
    if "evaluate" not in metrics or name is None or name not in METHODS:
        return
    method: Method[Any] = METHODS[name]
    found = metrics["evaluate"]
    yield "## Acceptance\n"
    yield _pairs((label, value) for label, value in method.rows(metrics) if value != DASH)
    yield from (f"{markdown(table.description)}\n\n{_grid(table)}" for table in method.tables(metrics))
    measured = [f"{key} {found[key]}" for key in ("dtype", "device", "threads") if found.get(key) is not None]
    yield f"Measured in {markdown(', '.join(measured))}.\n" if measured else ""


def _data(runs: Records, metrics: Records, params: Params | None) -> Iterator[tuple[str, Any]]:
    sources = metrics.get("prepare", {}).get("sources", {})
    stated = {source.name: source for source in params.prepare.sources} if params else {}
    for name, tally in sources.items():
        source = stated.get(name.partition("@")[0])
        asked = [f"{key} {value}" for key in ("split", "revision") if (value := getattr(source, key, None))]
        yield f"prompts of {_public(name)}", count(tally["train"]) + (f" ({', '.join(asked)})" if asked else "")
    for name, digest in runs.get("prepare", {}).get("inputs", {}).items():
        yield f"sha256 of {_public(name)}", digest
    regenerated = metrics.get("regenerate", {})
    if regenerated:
        yield "responses", f"{count(regenerated.get('rows'))}, {count(regenerated.get('tokens'))} tokens"
        if engine := runs["regenerate"].get("identity", {}).get("engine"):
            yield "responses come from", f"regenerate.engine {engine}"
    if params and regenerated:
        asked_of = params.regenerate
        yield "sampled at", f"temperature {asked_of.temperature}, top_p {asked_of.top_p}"
        yield "at most", f"{asked_of.max_new_tokens} tokens"
        yield "thinking", {None: "the template's default", True: "on", False: "off"}[params.target.enable_thinking]
    for stage, label in (("regenerate", "prompts"), ("train", "responses")):
        for digest in list(runs.get(stage, {}).get("inputs", {}).values())[:1]:
            yield f"sha256 of the {label}", digest


def _training(runs: Records, metrics: Records, params: Params | None) -> Iterator[tuple[str, Any]]:
    run, trained = runs.get("train", {}), metrics.get("train", {})
    target = run.get("identity", {}).get("target", {})
    for key in ("model", "revision", "weights"):
        if target.get(key):
            yield {"model": "target", "revision": "its commit", "weights": "sha256 of its weights"}[key], target[key]
    for label, key in (("recipe", "recipe"), ("ranks", "ranks")):
        if run.get(key):
            yield label, run[key]
    for key in ("rows", "steps", "best_step", "tokens"):
        if key in trained:
            yield key.replace("_", " "), count(trained[key])
    if "seconds" in trained:
        yield "minutes", number(trained["seconds"] / 60, 1)
    if params:
        settings = flatten(params.train.model_dump(mode="json", exclude_none=True))
        yield from ((f"train.{key}", value) for key, value in settings.items())


def _versions(runs: Records) -> Iterator[tuple[str, Any]]:
    run = runs.get("train", {})
    if commit := run.get("git", {}).get("commit"):
        yield "commit", commit
    yield from (run.get("libraries") or library_versions()).items()


def _pairs(rows: Iterable[tuple[str, Any]]) -> str:
    lines = [f"| {markdown(label)} | {markdown(_public(str(value)))} |" for label, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines, ""]) if lines else "No record of it lies beside the checkpoint.\n"


def _public(name: str) -> str:
    """Leave out the folders of a path, which are a matter of the machine, and the way to a store."""
    is_path = re.match(r"\.{0,2}[/\\]|~|[A-Za-z]:\\|\w+://", name)
    return re.split(r"[/\\@]", name.rstrip("/\\"))[-1] if is_path else name


def _grid(table: Table) -> str:
    columns = list(table.rows[0])
    lines = [f"| {' | '.join(map(markdown, columns))} |", "|" + "---|" * len(columns)]
    for row in table.rows:
        cells = [
            number(value, table.digits[name]) if name in table.digits else DASH if value is None else str(value)
            for name, value in row.items()
        ]
        lines.append(f"| {' | '.join(map(markdown, cells))} |")
    return "\n".join([*lines, ""])
