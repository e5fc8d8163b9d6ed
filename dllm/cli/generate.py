"""The verb `generate`: its flags. `generation` does the work; it imports torch, which --help does without."""

from pathlib import Path
from typing import Annotated, Any

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
        int | None,
        option(panel=MODEL, min=0, max=2**31 - 1, help="Mask token of a diffusion model trained with another tool."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    revision: Revision = None,
    sampler: Annotated[str | None, sampler_option({"draft", "diffusion", "causal"})] = None,
    batch_size: Annotated[
        int | None,
        option(
            panel=DECODING,
            min=1,
            max=2**16,
            help="Prompts decoded together: by default 8 with a diffusion model, and 1 with a draft or ar.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, option("--json", panel=OUTPUT, help="Print one JSON object per prompt.")] = False,
    show: Annotated[bool, option("--show", panel=OUTPUT, help="Show the canvas after each step.")] = False,
    root: Root = Path(),
    debug: Debug = False,
) -> None:
    """Generate with a draft and its target, or with a diffusion model; print tokens per pass."""
    from dllm.cli import generation
    from dllm.decoding.diffusion import GenerateOptions

    generation.generate(
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
