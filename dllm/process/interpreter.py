"""Settings of Python itself under which installed packages do not work."""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from dllm.errors import ConfigError

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
    """Explain an error of an import by modules that PYTHONPATH puts in the place of installed ones; None if none does.

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
    return None
