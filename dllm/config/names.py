"""Names in params.yaml that become those of a folder, or of a model in MLflow."""

from __future__ import annotations


def model_name(name: str) -> str:
    """Check a name by MLflow's rules for registered models, which it would apply after hours of work."""
    if any(mark in name for mark in "/:") or ("'" in name and '"' in name):
        raise ValueError("a registered model's name has no / or :, and quotes of one kind only")
    return _name(name, 250)


def recipe_name(name: str) -> str:
    """Check that a name is one of a folder, and stays inside the one it lies in."""
    if any(mark in name for mark in "/\\"):
        raise ValueError("a recipe's name has no / or \\")
    return _name(name, 120)


def _name(name: str, longest: int) -> str:
    if not name or name != name.strip() or name in (".", ".."):
        raise ValueError("not a name: it is empty, . or .., or has blanks at an end")
    if (size := len(name.encode(errors="replace"))) > longest:
        raise ValueError(f"a name of {size} bytes; at most {longest} are allowed")
    return name
