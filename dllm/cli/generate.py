"""The verb `generate`: its flags, which of them a checkpoint accepts, and how records are printed."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

from dllm.cli.options import (
    DECODING,
    MODEL,
    OUTPUT,
    PROMPTS,
    Debug,
    Revision,
    Root,
    TrustRemoteCode,
    flags_from,
    option,
    sampler_option,
    sampler_settings,
)
from dllm.decoding.samplers import field_names, given
from dllm.errors import ConfigError, DataError
from dllm.registry import SAMPLERS

if TYPE_CHECKING:
    from dllm.decoding.diffusion import GenerateOptions
    from dllm.models.checkpoints import Checkpoint


@flags_from(sampler_settings(), into="settings", panel=DECODING)
def command(
    checkpoint: Annotated[
        str,
        option(panel=MODEL, help="models:/NAME@ALIAS, a checkpoint folder, a training step's, or a stage's output."),
    ],
    settings: dict[str, Any],
    prompt: Annotated[list[str], option(panel=PROMPTS, help="A user message. Repeatable.")] = [],  # noqa: B006
    batch_file: Annotated[
        Path | None,
        option(panel=PROMPTS, help="More prompts: one per line, or .jsonl with the key `prompt`; - reads stdin."),
    ] = None,
    raw: Annotated[
        bool, option("--raw", panel=PROMPTS, help="Continue the prompt itself, without a chat template.")
    ] = False,
    infill: Annotated[
        bool, option("--infill", panel=PROMPTS, help="Fill the prompt's [MASK] (one token) and [MASK:n] spans.")
    ] = False,
    target: Annotated[
        str | None, option(panel=MODEL, help="Another target than the one the draft was trained for.")
    ] = None,
    mask_token_id: Annotated[
        int | None, option(panel=MODEL, min=0, help="Mask token of a diffusion model trained with another tool.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    sampler: Annotated[str | None, sampler_option({"draft", "diffusion", "causal"})] = None,
    batch_size: Annotated[
        int | None,
        option(panel=DECODING, min=1, help="Prompts that a diffusion model decodes together.", show_default="8"),
    ] = None,
    as_json: Annotated[bool, option("--json", panel=OUTPUT, help="Print one JSON object per prompt.")] = False,
    show: Annotated[bool, option("--show", panel=OUTPUT, help="Show the canvas after each step.")] = False,
    root: Root = Path(),
    debug: Debug = False,
) -> None:
    """Generate with a draft and its target, or with a diffusion model; print tokens per pass."""
    from dllm.decoding.diffusion import GenerateOptions

    generate(
        checkpoint=checkpoint,
        prompts=prompt,
        batch_file=batch_file,
        options=GenerateOptions(sampler, raw, infill, batch_size, settings=settings),
        target=target,
        as_json=as_json,
        show=show,
        trust_remote_code=trust_remote_code,
        revision=revision,
        mask_token_id=mask_token_id,
        root=root.resolve(),
    )


def generate(
    *,
    checkpoint: str,
    prompts: Sequence[str],
    root: Path,
    options: "GenerateOptions | None" = None,
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
    from dllm.decoding.diffusion import GenerateOptions
    from dllm.models import checkpoints
    from dllm.models.diffusion.config import DiffusionConfig
    from dllm.prompts.batch_file import read_prompts

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
        "batch_size": options.batch_size is not None,
        "trust_remote_code": trust_remote_code,
        "mask_token_id": mask_token_id is not None,
    }
    return _with_target(
        found, prompts, options, [name for name, given in flags.items() if given], target, root, as_json, stream
    )


def _with_target(
    found: "Checkpoint",
    prompts: Sequence[str],
    options: "GenerateOptions",
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
    from dllm.decoding import streaming
    from dllm.models import checkpoints

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
    records = []
    for record in streaming.generate(found, causal, prompts, sampler, settings, None if as_json else stream):
        if as_json:
            print(json.dumps(record), file=stream, flush=True)
        records.append(record)
    return records


def _check_diffusion(
    found: "Checkpoint", options: "GenerateOptions", target: str | None, trust_remote_code: bool
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
    found: "Checkpoint",
    prompts: Sequence[str],
    options: "GenerateOptions",
    mask_token_id: int | None,
    trust_remote_code: bool,
    as_json: bool,
    show: bool,
    stream: TextIO,
) -> list[dict[str, Any]]:
    """Generate with a diffusion model."""
    import torch

    from dllm.config.params import Target
    from dllm.decoding import diffusion
    from dllm.models import targets
    from dllm.models.diffusion.families import load_diffusion_lm

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
