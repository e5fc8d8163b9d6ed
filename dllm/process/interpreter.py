"""Pythons without the packages, and settings of Python under which those that are installed do not work."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from dllm.errors import ConfigError

OWN = ("dllm", "flows")
"""The project's packages: a module of theirs that is missing is a bug."""
NO_DOCSTRINGS = 2
"""`PYTHONOPTIMIZE=2`, or `python -OO`."""


def check_docstrings() -> None:
    """Refuse an interpreter that drops docstrings.

    Raises:
        ConfigError: it does. transformers makes classes from its docstrings, and the help of every verb is one.
    """
    if sys.flags.optimize >= NO_DOCSTRINGS:
        hint = "unset it, or set it to 1; leave out -OO"
        raise ConfigError("this Python drops docstrings, which packages need", where="PYTHONOPTIMIZE", hint=hint)


def explain_import(error: BaseException) -> ConfigError | None:
    """Explain an error of an import by what this Python lacks, or by PYTHONPATH; None where neither is the cause.

    A folder there comes before the installed packages, so that its `yaml.py` is everyone's `yaml`.
    """
    if not isinstance(error, ImportError | AttributeError):
        return None
    places = {Path(path).resolve() for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path}
    installed = [path for path in sys.path if Path(path).resolve() not in places]
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "/")
        folder = file.parent.parent if file.stem == "__init__" else file.parent
        if "." not in name and folder.resolve() in places and PathFinder.find_spec(name, installed):
            what = f"{file} stands in place of the installed {name}: {error}"
            return ConfigError(what, where="PYTHONPATH", hint="unset it, or rename that file")
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return _not_installed(name) if name and name not in OWN else None


def exit_without(name: str) -> None:
    """Leave the process with one line where a package is not installed."""
    if importlib.util.find_spec(name) is None:
        error = _not_installed(name)
        print(f"dllm: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _not_installed(name: str) -> ConfigError:
    hint = "install it there, or enter the project's environment with `. infra/env.sh`"
    return ConfigError(f"the package {name} is not installed", where=sys.executable, hint=hint)
