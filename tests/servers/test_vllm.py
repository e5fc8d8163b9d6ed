"""vLLM on the CPU, by `make test-vllm`: the same client, and what it accepts of a draft of ours by its own counters.

DRAFT names the draft's directory; without it the one in out/train/checkpoint, else an untrained one, of which nothing
is accepted.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from dllm.config.params import Params
from dllm.decoding.acceptance import Acceptance
from dllm.decoding.speculative import Decoder
from dllm.engines.readiness import wait_until_ready
from dllm.methods.dflash.build import initial_draft
from dllm.methods.dflash.settings import Dflash
from dllm.models import targets
from dllm.models.drafts.checkpoint import load_draft, save_draft
from dllm.models.packing import packed_linears
from dllm.process import children as process
from dllm.prompts import template as chat
from dllm.prompts.table import HELDOUT, Prompt, read_prompts
from dllm.responses import shards
from tests.arch.source_tree import ROOT
from tests.servers.conftest import PROMPTS, SERVED, START_S, TOKENS, Project
from tests.servers.questions import ask, metrics

QUESTIONS, ANSWER_TOKENS = 16, 128
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": "",
    "PYTHONSAFEPATH": "1",
}


@contextmanager
def vllm(project: Project, *more: str, cwd: Path | None = None) -> Iterator[str]:
    """Serve the target, from a folder if one is named, and yield the address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = targets.locate(project.write().target)
    bin = ROOT / ".venv-vllm" / "bin"
    argv = [
        str(bin / "vllm"), "serve", str(model), "--served-model-name", SERVED, "--dtype", "bfloat16",
        "--max-model-len", "2048", "--max-num-seqs", "8", "--host", "127.0.0.1", "--port", str(port), *more,
    ]  # fmt: skip
    environment = {**ENVIRONMENT, "PATH": f"{bin}:{os.environ['PATH']}"}
    log = project.root / "logs" / "vllm.log"
    with process.background(argv, env=environment, cwd=cwd or project.root, log_file=log, grace_s=20) as child:
        url = f"http://127.0.0.1:{port}/v1"
        wait_until_ready(url, SERVED, child, name="vllm", path=None, timeout_s=START_S)
        assert not child.ended, "\n".join(child.tail)
        yield url


def test_regenerate_asks_it_as_it_asks_sglang(project: Project) -> None:
    with vllm(project) as url:
        project.run(*project.regenerate(url, "from-vllm", "--json"))
    project.run("data", "verify", "from-vllm")
    rows = shards.read_rows(project.root / "from-vllm")
    assert len({row.prompt_id for row in rows}) == len(rows) == PROMPTS
    assert Counter(row.finish_reason for row in rows).keys() <= {"stop", "length"}
    assert all(1 <= row.num_tokens <= 1.2 * TOKENS and row.messages[-1]["content"] for row in rows)


def test_it_accepts_of_a_draft_what_evaluate_says(project: Project, tmp_path: Path) -> None:
    params = project.write()
    trained = given_draft()
    checkpoint = trained or untrained(params, tmp_path / "untrained", {"architecture": "dflash"})
    block = load_draft(checkpoint).config.block_size
    asked = questions(project, checkpoint)
    options = speculation(project, checkpoint, tmp_path / "exported")
    with skipped_without_candidates(project), vllm(project, *options, cwd=tmp_path / "exported") as url:
        before, began = metrics(url), time.monotonic()
        words = [ask(url, prompt.messages, ANSWER_TOKENS) for prompt in asked]
        seconds, after = time.monotonic() - began, metrics(url)
    counted = {name: value - before.get(name, 0.0) for name, value in after.items()}
    rounds = counted["vllm:spec_decode_num_drafts_total"]
    theirs = [by_position(counted, k) / rounds for k in range(block - 1)]
    tokens = counted["vllm:generation_tokens_total"]
    ours, texts = decode(params, checkpoint, asked)
    show(theirs, ours, tokens / seconds, len(asked), checkpoint if trained else None)
    # Both are the target's greedy answers; kernels round differently in bfloat16, so texts part sooner or later.
    same = sum(a.split()[:5] == b.split()[:5] for a, b in zip(words, texts, strict=True))
    assert same >= 0.8 * len(asked), list(zip(words, texts, strict=True))
    assert ours.tau_micro is not None
    assert abs(1 + sum(theirs) - ours.tau_micro) < 0.15 * ours.tau_micro
    if trained:
        assert theirs[0] > 0.2, "an engine that maps our weights wrongly accepts nothing"


def test_it_loads_a_dflash2_draft_where_it_has_what_that_needs(project: Project, tmp_path: Path) -> None:
    checkpoint = untrained(project.write(), tmp_path / "untrained", {"architecture": "dflash2", "sliding_window": 512})
    options = speculation(project, checkpoint, tmp_path / "exported")
    with skipped_without_candidates(project), vllm(project, *options, cwd=tmp_path / "exported") as url:
        ask(url, "What is 2 + 3?", 16)
        assert metrics(url)["vllm:spec_decode_num_draft_tokens_total"] > 0


@contextmanager
def skipped_without_candidates(project: Project) -> Iterator[None]:
    """Skip where vLLM walks no candidates: only its newer runner does, which compiles the convolutions with Triton."""
    log = project.root / "logs" / "vllm.log"
    before = log.stat().st_size if log.is_file() else 0
    try:
        yield
    except AssertionError:
        if why := re.search("Model Runner V1 does not support: DFlash candidate-head drafts", log.read_text()[before:]):
            pytest.skip(f"this build of vLLM: {why[0]}")
        raise


def untrained(params: Params, folder: Path, draft: dict[str, object]) -> Path:
    """Write an untrained draft of these settings for the project's target."""
    settings = Dflash(**params.train.dflash.model_dump() | {"draft": draft})
    params = params.model_copy(update={"train": params.train.model_copy(update={"dflash": settings})})
    model, tokenizer = targets.load_target(params.target), targets.load_tokenizer(params.target)
    save_draft(initial_draft(params.train.dflash, model, tokenizer, seed=0), folder, model.dtype)
    return folder


def speculation(project: Project, checkpoint: Path, folder: Path) -> list[str]:
    """Export a draft for vLLM; return the options of its card's command, which name the draft as the current folder."""
    project.run("export", "--checkpoint", str(checkpoint.resolve()), "--to", str(folder), "--for", "vllm")
    command = (folder / "README.md").read_text().split("```sh\n")[1].split("```")[0]
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["vllm", "serve"] and words[3] == "--speculative-config"
    return words[3:]


def given_draft() -> Path | None:
    """Find the trained draft; one that is asked for must be there."""
    named = os.environ.get("DRAFT")
    found = Path(named or ROOT / "out" / "train" / "checkpoint").absolute()
    if not (found / "config.json").is_file():
        assert not named, f"no draft in {found}"
        return None
    return found


def questions(project: Project, checkpoint: Path) -> list[Prompt]:
    """Take prompts the draft was not trained on: held out by the project that trained it, else by ours."""
    beside = checkpoint.parents[1] / "prepare"
    return read_prompts(beside if beside.is_dir() else project.root / "out" / "prepare", HELDOUT)[:QUESTIONS]


def by_position(counted: dict[str, float], position: int) -> float:
    name, label = "vllm:spec_decode_num_accepted_tokens_per_pos_total{", f'position="{position}"'
    return sum(value for key, value in counted.items() if key.startswith(name) and label in key)


def decode(params: Params, checkpoint: Path, asked: Sequence[Prompt]) -> tuple[Acceptance, list[str]]:
    """Decode the same prompts as stage `evaluate` does."""
    model, tokenizer = targets.load_target(params.target), targets.load_tokenizer(params.target)
    draft = load_draft(checkpoint, model.config).to(model.device, model.dtype)
    decoder, found, texts = Decoder(model, draft), Acceptance(draft.config.block_size), []
    stops = chat.stop_ids(tokenizer, model.generation_config, model.config.get_text_config())
    with packed_linears(model, draft):
        for prompt in asked:
            ids = chat.prompt_ids(tokenizer, prompt.messages)
            answer = decoder.generate(ids, max_new_tokens=ANSWER_TOKENS, stop_ids=stops)
            found.add(r.counts for r in answer.rounds)
            texts.append(tokenizer.decode(answer.token_ids, skip_special_tokens=True))
    return found, texts


def show(theirs: Sequence[float], ours: Acceptance, rate: float, prompts: int, checkpoint: Path | None) -> None:
    print(f"\n{checkpoint or 'an untrained draft'}: {prompts} held-out prompts, greedy, {ANSWER_TOKENS} tokens at most")
    print("accepted at offset   vLLM   evaluate's loop")
    for k, (one, other) in enumerate(zip(theirs, ours.unconditional, strict=True), start=1):
        print(f"{k:>18} {one:>6.3f} {other or 0:>17.3f}")
    print(f"{'tau micro':>18} {1 + sum(theirs):>6.2f} {ours.tau_micro or 0:>17.2f}")
    print(f"vLLM wrote {rate:.1f} tokens/s for one client")
