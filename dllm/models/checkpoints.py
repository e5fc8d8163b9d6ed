"""Find checkpoints, and identify what is in them.

Owns the order in which a name is resolved, what a directory holds, and which target it was trained for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dllm.config.load import load_params
from dllm.config.params import Target
from dllm.digests import check_files, is_sealed, unsealed
from dllm.disk_faults import is_unreadable
from dllm.errors import ConfigError, ModelError
from dllm.models import builtin, hub, targets
from dllm.models.diffusion.config import DiffusionConfig, config_at, read_config
from dllm.models.diffusion.families import family_at
from dllm.models.drafts.checkpoint import family_of
from dllm.models.drafts.foreign import foreign_family
from dllm.tracking.provenance import RECORDS
from dllm.tracking.runs import REGISTERED

CONFIG, WEIGHTS, ADAPTER = "config.json", "*.safetensors", "adapter_config.json"
SHARDS = "weights-*-of-*.safetensors"
"""Weights in the steps of a training run with fsdp."""
PUBLISHED = "checkpoint/"
"""Where the stage train publishes it, in the names of its run.json."""
RESTORE = "restore it (`python -m dllm verify` says how), or train again"
POINTERS = ("best", "latest", "LATEST", "LATEST.txt")
"""Links, or one-line files, that name a step, in the order in which a run's top directory is read."""
EXPORTS = (".", "checkpoint", "out/train/checkpoint", "consolidated", "model/consolidated", "model")
"""Where in a directory a checkpoint may lie: itself, a stage's output, a project's, a NeMo AutoModel step's."""


@dataclass(frozen=True)
class Checkpoint:
    """What a directory with config.json and weights holds, as far as its files say; no weights are read."""

    path: Path
    kind: Literal["draft", "diffusion", "causal"]
    """A draft model; a diffusion LM; any other causal LM."""
    config: DiffusionConfig | None = None
    """How a diffusion LM was trained: mode, mask token, block size."""
    sets_own_masks: bool = False
    """Whether a diffusion LM's code sets its attention masks."""
    needs_own_code: bool = False
    """Whether it runs only by the code that lies in the directory."""

    @property
    def noun(self) -> str:
        """Name its kind in a message."""
        return {"draft": "a draft", "diffusion": "a diffusion model", "causal": "a plain causal model"}[self.kind]

    def require_trust(self, trust_remote_code: bool) -> None:
        """Refuse a checkpoint that needs its own code where that may not run.

        Raises:
            ConfigError: it may not.
        """
        if self.needs_own_code and not trust_remote_code:
            raise ConfigError(
                "this model runs code of its own", where=str(self.path), hint="read it, then give --trust-remote-code"
            )


def identify(path: Path) -> Checkpoint:
    """Tell a draft, a diffusion LM and a plain causal LM apart.

    Args:
        path: a directory from `find` or `resolve`.

    Raises:
        ModelError: its dllm.json is broken.
    """
    config, family = read_config(path), family_at(path)
    if config is None and family.published is not None:
        mask_token_id = int(family.mask_token_id_in(config_at(path)) or family.published.mask_token_id)
        config = replace(family.published, mask_token_id=mask_token_id)
    if config is not None:
        return Checkpoint(path, "diffusion", config, family.sets_own_masks, not family.can_run_without_code)
    return Checkpoint(path, "draft" if is_draft(path) else "causal")


def find(name: str, root: Path, trust_remote_code: bool = False, revision: str | None = None) -> Path:
    """Return the directory of a checkpoint, registered or not.

    Args:
        name: as in `resolve`.
        trust_remote_code: download the code of a Hugging Face repository too.
        revision: commit of that repository.

    Raises:
        ModelError: nothing by that name holds a checkpoint.
        ConfigError: a revision is given for what is not on the Hugging Face hub.
    """
    is_here = any(path.exists() for path in (Path(name), root / name))
    on_hub = hub.looks_like_id(name) and not is_here
    if on_hub and (trust_remote_code or revision is not None):
        return targets.locate(Target(model=name, revision=revision, trust_remote_code=trust_remote_code))
    if revision is not None:
        raise ConfigError(
            "--revision is for models off the Hugging Face hub", where=name, hint="a directory has no commit"
        )
    return resolve(name, root)


def resolve(name: str | Path, root: Path) -> Path:
    """Return the directory with config.json and weights that a name refers to.

    `models:/NAME@ALIAS` and `models:/NAME/VERSION` are registered checkpoints, whose digest is compared. Else are tried
    in this order: a directory that is a checkpoint (an export or a training step), a stage's output (its
    `checkpoint/`), a project's folder (its `out/train/checkpoint/`), a step of NeMo AutoModel (its `consolidated/`), a
    run's top directory (its best step, else its latest), a Hugging Face id.

    Args:
        name: relative paths start at the current directory, else at `root`.
        root: the project's folder.

    Raises:
        ModelError: nothing by that name holds a checkpoint.
    """
    if str(name).startswith(REGISTERED):
        from dllm.tracking import model_registry  # MLflow takes 2 seconds to import

        name = model_registry.resolve(str(name), root)
    given = Path(name).expanduser()
    for path in dict.fromkeys((given, root / given)):
        if _is_folder(path):
            if (found := _inside(path)) is not None:
                check_bytes(found)
                return found
            if any(any(step.glob(SHARDS)) for step in _steps(path)):
                hint = "finish the run; out/train/checkpoint then holds them together"
                return _refuse(name, "the weights lie in shards of a training run that is not over", hint)
            if any((step / ADAPTER).is_file() for step in _steps(path)):
                return _refuse(name, "this is an adapter alone", "name out/train/checkpoint, where it is merged")
            expected = "expected config.json and model.safetensors, or a run's steps"
            return _refuse(name, "no checkpoint in this directory", expected)
    if "/" in str(name) and hub.looks_like_id(str(name)):
        return hub.snapshot(str(name), None, hub.FILES, where="checkpoint")
    return _refuse(name, "no such checkpoint", "name a directory, or models:/NAME@ALIAS for a registered one")


def is_draft(checkpoint: Path) -> bool:
    """Tell whether a checkpoint's config is a draft's."""
    raw = config_at(checkpoint)
    return "dflash_config" in raw or family_of(raw) is not None or foreign_family(raw) is not None


def trained_for(checkpoint: Path) -> dict[str, Any] | None:
    """Read the target's identity from the run.json of the stage that made a checkpoint; None where there is none."""
    return run_record(checkpoint).get("identity", {}).get("target")


def run_record(checkpoint: Path) -> dict[str, Any]:
    """Read the run.json of the stage that made a checkpoint, with a target; {} where there is none."""
    for folder in (checkpoint, checkpoint.parent):
        try:
            record = _run_record(folder)
            target = record["identity"]["target"]
        except (KeyError, TypeError, ModelError):  # a damaged one is refused where the checkpoint is found
            continue
        return record if isinstance(target, dict) and "model" in target else {}
    return {}


def check_bytes(checkpoint: Path) -> None:
    """Compare a checkpoint with the digests in the record beside it: a stage's run.json, a training step's state.json.

    Raises:
        ModelError: a file is missing, damaged, or of another run; it is named.
    """
    step = checkpoint / "state.json"
    if step.is_file():
        files = _read(step).get("files") or {}
        check_files(checkpoint, files, error=ModelError, hint=RESTORE)
        return
    for folder in (checkpoint, checkpoint.parent):
        outputs = _run_record(folder).get("outputs") or {}
        files = {name.removeprefix(PUBLISHED): found for name, found in outputs.items() if name.startswith(PUBLISHED)}
        if files and (folder == checkpoint or checkpoint.name == PUBLISHED.strip("/")):
            check_files(checkpoint, files, error=ModelError, hint=RESTORE, but=RECORDS)
            return


def _run_record(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    return _read(path) if path.is_file() else {}


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON record that may be sealed; {} for one of another tool."""
    try:
        data = path.read_bytes()
        record = unsealed(data)
        lost = bool({"outputs", "files"} & record.keys()) and not is_sealed(data)
    except (OSError, ValueError, RecursionError) as error:
        if is_unreadable(error):
            raise
        raise ModelError(f"damaged: {' '.join(str(error).split())[:200]}", where=str(path), hint=RESTORE) from None
    if lost:
        raise ModelError("damaged: it has lost its seal", where=str(path), hint=RESTORE)
    return record


def target_of(checkpoint: Path, root: Path, explicit: str | None = None) -> Target:
    """Choose the target: the given one, else the one in the record of the checkpoint's stage, else params.yaml's.

    Only the model's name is taken from the record, which came with the checkpoint: what is to be trusted, at which
    commit, stands in params.yaml alone.

    Raises:
        ModelError: there is none, or the record names a directory.
    """
    path = root / "params.yaml"
    configured = load_params(path).target if path.is_file() else None
    recorded = trained_for(checkpoint) if explicit is None else None
    name = explicit if recorded is None else str(recorded["model"])
    if configured is not None and name in (None, configured.model):
        return configured  # it knows more of the same target: its revision, dtype and thinking mode, and whom to trust
    if name is None:
        raise ModelError(
            "nothing says which target this checkpoint was trained for",
            where=str(checkpoint),
            hint="name it by --target",
        )
    if recorded is not None and not name.startswith(builtin.PREFIX) and not hub.looks_like_id(name):
        raise ModelError(
            f"its run.json names a directory as its target, {name!r}, and a record is not followed to a path",
            where=str(checkpoint),
            hint="name the target by --target, or in params.yaml",
        )
    return Target(model=name)


def require_same_revision(checkpoint: Path, target: Target) -> None:
    """Refuse a target from the Hugging Face hub at another commit than the one a checkpoint was trained for.

    Raises:
        ModelError: with the recorded commit.
    """
    recorded = trained_for(checkpoint)
    if recorded is None or recorded["model"] != target.model or not recorded.get("revision"):
        return
    if (found := targets.locate(target).name) != recorded["revision"]:
        raise ModelError(
            f"trained for commit {str(recorded['revision'])[:40]} of {target.model}, and {found} was found",
            where=str(checkpoint),
            hint="if you trust that commit, set it as target.revision in params.yaml",
        )


def thinking(checkpoint: Path, root: Path) -> bool | None:
    """Return the `enable_thinking` of the checkpoint's target; None, the template's default, where it is unknown.

    A params.yaml for another target, or a broken one, is ignored.
    """
    try:
        return None if trained_for(checkpoint) is None else target_of(checkpoint, root).enable_thinking
    except (ModelError, ConfigError):
        return None


def _inside(path: Path) -> Path | None:
    """Find the checkpoint that a directory is or holds."""
    places = (folder / part for folder in _steps(path) for part in EXPORTS)
    return next(filter(_holds_weights, places), None)


def _steps(path: Path) -> list[Path]:
    """List a directory and the steps that its pointers name."""
    pointed = (_follow(steps / pointer) for steps in (path, path / "checkpoints") for pointer in POINTERS)
    return [path, *(step for step in pointed if step is not None)]


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that is too long, or has a null byte
        return False


def _follow(pointer: Path) -> Path | None:
    if _is_folder(pointer):
        return pointer
    if not pointer.is_file():
        return None
    name = pointer.read_text(errors="replace").strip()
    step = pointer.parent / name
    return step if name == Path(name).name and _is_folder(step) else None  # a step beside it, never a path


def _holds_weights(path: Path) -> bool:
    try:
        return (path / CONFIG).is_file() and any(path.glob(WEIGHTS))
    except OSError:  # such as a name that is too long
        return False


def _refuse(name: str | Path, message: str, hint: str | None = None) -> Path:
    raise ModelError(message, where=str(name), hint=hint)
