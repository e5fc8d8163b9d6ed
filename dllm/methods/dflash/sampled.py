"""Acceptance when the responses to held-out prompts are sampled, at `evaluate.temperature`.

Only acceptance is measured, so several prompts are decoded in one batch. Speed-up and identity are those of greedy
decoding, one prompt at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from dllm.config.params import Evaluate
from dllm.decoding.acceptance import Acceptance, RoundCounts
from dllm.decoding.sampling import samplings
from dllm.decoding.settings import SampledSettings
from dllm.decoding.speculative import Decoder
from dllm.decoding.together import decode_together
from dllm.digests import read_sealed, sealed
from dllm.files import atomic_write
from dllm.progress import Progress

BATCH = 8
"""Prompts decoded together."""


class HeldoutPrompt(Protocol):
    """A held-out prompt as ids."""

    @property
    def id(self) -> str:
        """Its id in the prompts table."""

    @property
    def ids(self) -> tuple[int, ...]:
        """Its tokens."""


def sampled_figures(
    decoder: Decoder, settings: Evaluate, prompts: Sequence[HeldoutPrompt], stop_ids: set[int], parts: Path
) -> dict[str, Any]:
    """Sample a response to each prompt, and return the acceptance over all; finished ones stay in `parts`."""
    done = {prompt.id: found for prompt in prompts if (found := _finished(parts / f"{prompt.id}.sampled.json"))}
    how = SampledSettings(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature or 0.0,
        top_p=settings.top_p or 1.0,
        top_k=settings.top_k or 0,
    )
    drawn = samplings([prompt.ids for prompt in prompts], how)
    left = [(prompt, each) for prompt, each in zip(prompts, drawn, strict=True) if prompt.id not in done]
    so_far = _pooled(done.values(), decoder)
    with Progress("evaluate: sampled", len(prompts), "prompts", initial=len(done)) as progress:
        for index, response in decode_together(
            decoder,
            [prompt.ids for prompt, _ in left],
            max_new_tokens=how.max_new_tokens,
            batch_size=BATCH,
            stop_ids=stop_ids,
            samplings=[each for _, each in left],
        ):
            name, rounds = left[index][0].id, response.rounds
            done[name] = {"rounds": [each.counts for each in rounds], "chances": [each.chances for each in rounds]}
            atomic_write(parts / f"{name}.sampled.json", sealed(done[name]))
            so_far.add(done[name]["rounds"], done[name]["chances"])
            progress.update(1, tau=so_far.tau_micro or 1.0)
    acceptance = _pooled([done[prompt.id] for prompt in prompts], decoder)  # they do not end in this order
    return {
        "temperature": how.temperature,
        "top_p": how.top_p,
        "top_k": how.top_k,
        "seed": how.seed,
        "prompts": len(prompts),
        **acceptance.figures(),
        "expected_acceptance_by_offset": acceptance.expected,
        "expected_conditional_acceptance_by_offset": acceptance.expected_conditional,
    }


def _pooled(responses: Iterable[dict[str, Any]], decoder: Decoder) -> Acceptance:
    acceptance = Acceptance(decoder.block_size)
    for each in responses:
        acceptance.add(each["rounds"], each["chances"])
    return acceptance


def _finished(path: Path) -> dict[str, Any] | None:
    if (found := read_sealed(path)) is None:
        return None
    return {"rounds": [RoundCounts(*counts) for counts in found["rounds"]], "chances": found["chances"]}
