"""`generate`: which flags a checkpoint accepts, the prompts, and how records are printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch

from dllm.config.params import Target
from dllm.decoding import diffusion, streaming
from dllm.decoding.diffusion import GenerateOptions
from dllm.decoding.sampler import field_names, given
from dllm.errors import ConfigError, DataError
from dllm.models import checkpoints, targets
from dllm.models.diffusion.config import DiffusionConfig
from dllm.models.diffusion.families import load_diffusion_lm
from dllm.outside import is_text, parse_json
from dllm.registry import SAMPLERS


def generate(
    *,
    checkpoint: str,
    prompts: Sequence[str],
    root: Path,
    options: GenerateOptions | None = None,
    target: str | None = None,
    as_json: bool = False,
    show: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
    mask_token_id: int | None = None,
    stream: TextIO | None = None,
    batch_file: Path | None = None,
) -> list[dict[str, Any]]:
    """Generate from prompts with what the checkpoint holds, print each record, and return them.

    Args:
        checkpoint: as in `dllm.models.checkpoints.find`.
        options: how to generate; a draft or a plain causal model accepts only the sampler and its settings.
        target: for a draft: another target than its own.
        as_json: print JSON objects instead of text.
        show: show a diffusion model's canvas after each step.
        trust_remote_code: run code that comes with a diffusion model.
        revision: commit of a Hugging Face repository with such code.
        mask_token_id: for a masked diffusion model without dllm.json, with full attention.
        stream: where records go; stdout by default.
        batch_file: more prompts.

    Raises:
        ConfigError: an option does not fit the sampler, or the sampler the checkpoint.
        ModelError: the checkpoint is missing or broken.
        DataError: there is no prompt.
    """
    prompts = [*prompts, *(read_prompts(batch_file) if batch_file is not None else [])]
    if not prompts:
        raise DataError("no prompt", hint="give --prompt or --batch-file")
    found = checkpoints.identify(checkpoints.find(checkpoint, root, trust_remote_code, revision))
    if mask_token_id is not None:
        if found.kind == "diffusion":
            raise ConfigError("--mask-token-id: this model knows its own", where=str(found.path), hint="leave it out")
        if found.kind == "causal":  # trained with another tool
            found = replace(found, kind="diffusion", config=DiffusionConfig("mdlm", mask_token_id))
    options, stream = options or GenerateOptions(), stream or sys.stdout
    if found.kind == "diffusion":
        options = replace(options, enable_thinking=checkpoints.thinking(found.path, root))
        _check_diffusion(found, options, target, trust_remote_code)
        return _with_diffusion(found, prompts, options, mask_token_id, trust_remote_code, as_json, show, stream)
    flags = {
        "raw": options.raw,
        "infill": options.infill,
        "show": show,
        "trust_remote_code": trust_remote_code,
        "mask_token_id": mask_token_id is not None,
    }
    return _with_target(
        found, prompts, options, [name for name, given in flags.items() if given], target, root, as_json, stream
    )


def read_prompts(path: Path) -> list[str]:
    """Read a batch file: one prompt per line; for .jsonl, one object with the key `prompt` per line; `-` is stdin.

    Raises:
        DataError: it is missing, or a line is no prompt.
    """
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        # Split as editors do: \u2028 and the like are text.
        lines = data.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(f"cannot read the prompts: {reason}", where=str(path)) from None
    if path.suffix.lower() == ".json":
        raise DataError("a list of prompts is not read", where=str(path), hint="write .jsonl, one object per line")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        return [line for _, line in numbered]
    prompts = []
    for number, line in numbered:
        try:
            prompt = parse_json(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str) or not is_text(prompt):
            raise DataError("expected an object with a text under `prompt`", where=f"{path}, line {number}")
        prompts.append(prompt)
    return prompts


def _with_target(
    found: checkpoints.Checkpoint,
    prompts: Sequence[str],
    options: GenerateOptions,
    flags: Sequence[str],
    target: str | None,
    root: Path,
    as_json: bool,
    stream: TextIO,
) -> list[dict[str, Any]]:
    """Generate with a draft and its target, or with a plain causal model.

    Args:
        flags: options given that only diffusion models accept.
    """
    sampler = SAMPLERS[options.sampler or "dflash"]
    if found.kind == "causal" and (options.sampler is None or "causal" not in sampler.settings):
        raise ConfigError(
            "neither a draft nor, without a dllm.json, a diffusion model",
            where=str(found.path),
            hint="a plain causal model takes --sampler ar, a masked diffusion model --mask-token-id",
        )
    if found.kind not in sampler.settings:
        raise ConfigError(
            f"sampler {sampler.name} is for diffusion models, and this is a draft",
            where=str(found.path),
            hint="a draft takes dflash or ar",
        )
    named = given(options.settings)
    accepted = field_names(sampler.settings[found.kind])
    if unused := [*sorted(named.keys() - accepted), *flags]:
        flag = f"--{unused[0].replace('_', '-')}"
        if any(unused[0] in field_names(each.settings.get("draft")) for _, each in SAMPLERS.items()):
            raise ConfigError(f"sampler {sampler.name} has no use for {flag}", hint="leave it out")
        raise ConfigError(f"{flag} is for diffusion models, and this is {found.noun}", where=str(found.path))
    settings = sampler.settings[found.kind](**named)
    causal = checkpoints.target_of(found.path, root, str(found.path) if found.kind == "causal" else target)
    if found.kind == "draft":
        checkpoints.require_same_revision(found.path, causal)
    records = []
    screen, size = None if as_json else stream, options.batch_size or 1
    for record in streaming.generate(found, causal, prompts, sampler, settings, screen, size):
        if as_json:
            print(json.dumps(record), file=stream, flush=True)
        records.append(record)
    return records


def _check_diffusion(
    found: checkpoints.Checkpoint, options: GenerateOptions, target: str | None, trust_remote_code: bool
) -> None:
    """Refuse options that do not fit a diffusion model, before its weights are read.

    Raises:
        ConfigError: there is one.
    """
    sampler = None if options.sampler is None else SAMPLERS[options.sampler]
    if target is not None or (sampler is not None and found.kind not in sampler.settings):
        what = "--target" if target is not None else f"sampler {options.sampler}"
        raise ConfigError(f"{what} is for drafts, and this is a diffusion model", where=str(found.path))
    if sampler is not None:
        sampler.check(found)
    if options.settings.get("top_p", 1) < 1 and not options.settings.get("temperature"):
        raise ConfigError("--top-p requires sampling, and temperature 0 is greedy", hint="give a --temperature too")
    if options.infill and "max_new_tokens" in options.settings:
        raise ConfigError("--infill has no use for --max-new-tokens", hint="[MASK:n] sets the length; leave it out")
    found.require_trust(trust_remote_code)


def _with_diffusion(
    found: checkpoints.Checkpoint,
    prompts: Sequence[str],
    options: GenerateOptions,
    mask_token_id: int | None,
    trust_remote_code: bool,
    as_json: bool,
    show: bool,
    stream: TextIO,
) -> list[dict[str, Any]]:
    """Generate with a diffusion model."""
    device = targets.best_device()
    # On a CPU bfloat16 is no faster, and near ties would differ between batches.
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    target = Target(model=str(found.path), trust_remote_code=trust_remote_code)
    model = load_diffusion_lm(target, dtype, device, mask_token_id=mask_token_id)
    records = []
    canvas = sys.stderr if as_json else stream  # not between the JSON objects
    for record in diffusion.generate(model, prompts, options, canvas if show else None):
        record["checkpoint"] = str(found.path)
        passes = f"{_count(record['passes'], 'pass', 'passes')}" if record["passes"] else "an unknown number of passes"
        rate = f"{_count(record['tokens'], 'token', 'tokens')} in {passes}; {record['tokens_per_s']:.1f} tokens/s"
        print(json.dumps(record) if as_json else f"{record['text']}\n\n[{rate}]", file=stream, flush=True)
        records.append(record)
    return records


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"
