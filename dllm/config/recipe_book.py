"""The shipped recipes: complete params files, one a model family, and how one becomes params.yaml.

A recipe leaves no key out, so that params.yaml always shows every value a run depends on.
"""

import difflib
import os
import tempfile
from pathlib import Path

from dllm.errors import ConfigError

FOLDER = Path(__file__).parent / "recipes"
"""Where the recipes lie: one NAME.yaml each, whose first line is a comment that sums it up."""


def names() -> list[str]:
    """List the recipes by name."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def summaries() -> dict[str, str]:
    """Map each recipe to the one sentence in its first line."""
    return {name: text(name).splitlines()[0].lstrip("# ") for name in names()}


def text(name: str) -> str:
    """Read a recipe, comments and all.

    Raises:
        ConfigError: no recipe has that name.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "`python -m dllm recipe list` names them"
        raise ConfigError(f"no recipe {name!r}", where="dllm/config/recipes", hint=hint)
    return (FOLDER / f"{name}.yaml").read_text()


def activate(name: str, path: Path, *, force: bool = False) -> None:
    """Write a recipe to `path`, atomically.

    Raises:
        ConfigError: no recipe has that name, or the file at `path` equals no recipe and `force` is not given.
    """
    wanted = text(name)
    if path.exists() and not force and path.read_text() not in {text(other) for other in names()}:
        raise ConfigError("it was edited by hand", where=str(path), hint="keep a copy and give --force to overwrite it")
    if not path.parent.is_dir():
        raise ConfigError("no such folder", where=str(path.parent))
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(wanted)
            file.flush()
            os.fsync(file.fileno())
        Path(draft).chmod(0o644)
        Path(draft).replace(path)
    finally:
        Path(draft).unlink(missing_ok=True)
