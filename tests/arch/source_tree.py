"""The project's source as syntax trees: what the layout tests ask about, without importing any of it."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dllm"


def python_files(*folders: str) -> list[Path]:
    """List the project's Python files, whole or under some folders."""
    tops = folders or ("dllm", "flows", "benchmarks", "tests")
    return sorted(path for top in tops for path in (ROOT / top).rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    """Parse a file."""
    return ast.parse(path.read_text(), filename=str(path))


def module_name(path: Path) -> str:
    """Name a file as Python imports it."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """Name the room of a dllm module: its folder, or itself where it lies at the top."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "dllm"


def imports(path: Path) -> set[str]:
    """Collect what a file imports anywhere in it, functions included, as dotted names.

    `from dllm import config` counts as `dllm.config.params`; only-for-typing imports count too.
    """
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_name(path).split(".")
                package = package[: len(package) - node.level + (path.name == "__init__.py")]
                base = ".".join([*package, base]).rstrip(".")
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def line(path: Path, text: str) -> str:
    """Write a complaint that names its file."""
    return f"{path.relative_to(ROOT)}: {text}"
