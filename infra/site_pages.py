"""Pages of the docs site that are generated: the command line from its help, the Python API from its docstrings.

A hook of mkdocs (`mkdocs.yml`). Links from docs/ to files that are not part of the site, such as CONTRIBUTING.md, are
left as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
API = {
    "Seams": [
        "dllm.registry",
        "dllm.methods.method",
        "dllm.models.drafts.protocol",
        "dllm.models.diffusion.protocol",
        "dllm.decoding.sampler",
        "dllm.engines.engine",
        "dllm.prompts.protocol",
        "dllm.training.strategy",
    ],
    "Parameters": ["dllm.config.params", "dllm.config.load", "dllm.methods.dflash.settings"],
    "Decoding": ["dllm.decoding.speculative", "dllm.decoding.canvas", "dllm.decoding.acceptance"],
    "Data": ["dllm.responses.shards", "dllm.responses.verify", "dllm.regeneration.standalone"],
    "Checkpoints": ["dllm.models.checkpoints", "dllm.models.targets"],
    "Errors": ["dllm.errors"],
}
"""Modules in the reference, by heading: what code outside this repository may use."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    files.append(File.generated(config, "reference/cli.md", content=command_line()))
    files.append(File.generated(config, "reference/python.md", content=python_api()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Unlink what lies outside the site."""
    depth = page.file.src_uri.count("/")
    up = r"(?:\.\./)" + f"{{{depth + 1}}}"
    return re.sub(rf"\[([^\]]+)\]\({up}(?!\.)[\w./-]+\)", r"\1", markdown)


def python_api() -> str:
    """Write the page of the Python API: a directive per module, which mkdocstrings fills in."""
    lines = ["# Python", "", "Generated from docstrings.", ""]
    for heading, modules in API.items():
        lines += [f"## {heading}", "", *(f"::: {module}\n" for module in modules)]
    return "\n".join(lines)


def command_line() -> str:
    """Write the page of the command line from typer's own objects."""
    from dllm.cli.app import app

    lines = [
        "# Command line",
        "",
        "Generated from `python -m dllm VERB --help`. `python -m dllm --version` prints the version.",
        "",
    ]
    for name, command in _verbs(typer.main.get_command(app), ""):
        lines += [f"## {name}", "", " ".join((command.help or "").split()), ""]
        panels: dict[str, list[str]] = {}
        for parameter in command.params:
            panel = getattr(parameter, "rich_help_panel", None) or "Options"
            panels.setdefault(panel, []).append(_row(parameter))
        for panel, rows in sorted(panels.items(), key=lambda each: each[0] == "Options"):  # those of every use last
            title = "" if len(panels) == 1 else f"**{panel}**\n\n"
            lines += [f"{title}| option | default | means |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def _verbs(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _verbs(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def _row(parameter: Any) -> str:
    names = (
        " ".join(f"`{name}`" for name in parameter.opts)
        if parameter.param_type_name == "option"
        else f"`{parameter.name.upper()}`"
    )
    shown = getattr(parameter, "show_default", True)
    default = shown if isinstance(shown, str) else parameter.default
    plain = default if isinstance(default, str | int | float) and not isinstance(default, bool) else ""
    text = " ".join((getattr(parameter, "help", "") or "").split())
    required = " Required." if parameter.required else ""
    return f"| {names} | {_cell(str(plain))} | {_cell(text)}{required} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")
