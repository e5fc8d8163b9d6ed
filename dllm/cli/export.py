"""The verb `export`: a draft in the form that serving engines load, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dllm.cli.options import Debug, Root
from dllm.registry import SERVING_ENGINES

if TYPE_CHECKING:
    from dllm.config.params import Params
    from dllm.models.drafts.protocol import Draft

NAMES = "|".join(SERVING_ENGINES)


def command(
    checkpoint: Annotated[
        str,
        typer.Option(help="models:/NAME@ALIAS, a checkpoint folder, a training step's, a stage's output, or a hub id."),
    ],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Output folder: new, or empty.")],
    engine: Annotated[
        str | None,
        typer.Option("--for", metavar=NAMES, help="Refuse what this engine cannot decode; its command on the card."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="The target's name on the card, such as its Hugging Face id.")
    ] = None,
    root: Root = Path(),
    debug: Debug = False,
) -> None:
    """Write a draft as serving engines load it, checked against each of them, with a model card."""
    from dllm.models.drafts import serving

    draft = export(checkpoint, to, engine_name=engine, target=target, root=root.resolve())
    refused = {} if engine else serving.refusals(draft.config)
    able = [name for name in SERVING_ENGINES if name not in refused] if engine is None else [engine]
    print(f"{to}: {draft.architectures[0]} of block size {draft.config.block_size} for {', '.join(able)}", flush=True)
    for why in refused.values():
        print(f"note: {why}", flush=True)


def export(checkpoint: str, to: Path, *, engine_name: str | None, target: str | None, root: Path) -> Draft:
    """Write a draft and its card into a folder, in one step; return the draft.

    Raises:
        ModelError: nothing by that name holds a draft, or the engine cannot decode it.
        ConfigError: no engine has that name.
        StageError: the folder is not empty, or lies in the result of a stage.
    """
    from dllm.cli import model_card
    from dllm.errors import ModelError, StageError
    from dllm.files import atomic_folder, atomic_write
    from dllm.models import checkpoints
    from dllm.models.drafts import serving
    from dllm.models.drafts.checkpoint import load_draft, save_draft, stored_dtype
    from dllm.secrets import hide
    from dllm.stages.records import check_outside_results, lineage
    from dllm.tracking.provenance import digest

    to = to.expanduser().resolve()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise StageError("the output folder is not empty", where=str(to), hint="name another by --to")
    check_outside_results(to)
    found = checkpoints.find(checkpoint, root)
    if (kind := checkpoints.identify(found)).kind != "draft":
        raise ModelError(f"export writes drafts, and this is {kind.noun}", where=str(found))
    draft = load_draft(found)
    engine = None if engine_name is None else serving.require(engine_name, draft.config, str(found))
    made_of = digest(found)
    runs, metrics = lineage(root, made_of)
    runs = {"train": record} | runs if (record := checkpoints.run_record(found)) else runs
    trained_for = (checkpoints.trained_for(found) or {}).get("model")
    card = model_card.text(
        model_card.Subject(draft, stored_dtype(found), target or trained_for, made_of),
        engines=[engine] if engine else list(dict(SERVING_ENGINES.items()).values()),
        runs=runs,
        metrics=metrics,
        params=_params(root, runs),
    )
    with atomic_folder(to) as aside:
        save_draft(draft, aside, stored_dtype(found))
        atomic_write(aside / "README.md", hide(card).encode())
    return draft


def _params(root: Path, runs: dict[str, Any]) -> Params | None:
    """Return params.yaml if a draft was trained by it; None if it has changed, or was another's."""
    from dllm.config.load import load_params, params_digest
    from dllm.errors import ConfigError
    from dllm.stages import other_work

    trained = runs.get("train", {})
    try:
        params = load_params(root / "params.yaml")
    except (ConfigError, OSError):
        return None
    settings = other_work.determining(params.train, trained.get("ranks") or 1)
    return params if params_digest(params.target, settings) == trained.get("params") else None
