"""A project folder with 24 questions and the default target, for servers that are real and slow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dllm.config.load import load_params
from dllm.config.params import Params
from dllm.prompts.table import read_prompts
from tests.arch.source_tree import ROOT

MODEL = "builtin:smollm2-135m-instruct"
SERVED = "smollm2-135m-instruct"
PROMPTS = 24
TOKENS = 48
START_S = 900.0


class Project:
    """A folder that verbs run in."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.questions = root / "questions.jsonl"

    def write(self, **regenerate: Any) -> Params:
        """Write params.yaml with these settings of `regenerate`."""
        raw = load_params(ROOT / "params.yaml").model_dump(mode="json", by_alias=True)
        raw["prepare"] = {"sources": [{"name": "gsm8k", "limit": PROMPTS}], "heldout_fraction": 0.2}
        sglang = {"python": str(ROOT / ".venv-sglang/bin/python"), "start_timeout_s": START_S}
        raw["regenerate"] |= {
            "max_new_tokens": TOKENS,
            "concurrency": 8,
            "shard_size": 10,
            "sglang": sglang,
            **regenerate,
        }
        (self.root / "params.yaml").write_text(json.dumps(raw))
        return load_params(self.root / "params.yaml")

    def start(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        """Start a verb of `python -m dllm`."""
        return subprocess.Popen([sys.executable, "-m", "dllm", *words], cwd=self.root, text=True, **options)

    def run(self, *words: str) -> str:
        """Run a verb to its end and return what it printed."""
        child = self.start(*words, stdout=subprocess.PIPE)
        said, _ = child.communicate(timeout=1200)
        assert child.returncode == 0, f"{words}: exit code {child.returncode}"
        return said

    def regenerate(self, url: str, output: str, *more: str) -> list[str]:
        """Return the words of the standalone command over the questions."""
        return [
            "regenerate", "--input-data", str(self.questions), "--output-dir", output,
            "--model", SERVED, "--tokenizer", MODEL, "--target-server", url, "--concurrency", "8",
            "--temperature", "0", "--max-new-tokens", str(TOKENS), "--shard-size", "10", *more,
        ]  # fmt: skip


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    made = Project(tmp_path_factory.mktemp("project"))
    made.write()
    made.run("prepare")
    asked = read_prompts(made.root / "out" / "prepare")
    assert len(asked) == PROMPTS
    made.questions.write_text("".join(json.dumps({"messages": prompt.messages}) + "\n" for prompt in asked))
    return made
