"""One prompt decoded with and without a draft: the time of each, and whether the tokens are the same.

Owns the sums behind speed-up and agreement. A time is counted over tokens after the first one: the prefill is the same
work for both. The draft's pass over the prompt's features is counted.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dllm.decoding.acceptance import Acceptance, RoundCounts
from dllm.decoding.speculative import Decoder, Generation


@dataclass(frozen=True)
class Pair:
    """One prompt's figures, ready for JSON and for a table.

    Units: seconds of wall clock after the first token; tokens after the first one.
    """

    prompt_id: str
    source: str
    prompt_tokens: int
    ar_tokens: int
    ar_s: float
    spec_tokens: int
    spec_s: float
    same_prefix: int
    """Leading ids that agree, the first token included."""
    identical: bool
    rounds: tuple[RoundCounts, ...]
    token_ids: tuple[int, ...] = ()
    """The response that was decoded speculatively."""

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Pair:
        """Read what `to_json` returned."""
        rounds = tuple(RoundCounts(*counts) for counts in raw["rounds"])
        return cls(**{**raw, "rounds": rounds, "token_ids": tuple(raw["token_ids"])})


class Comparison:
    """The same target with and without a draft.

    Args:
        plain: decodes one token at a time.
        speculative: decodes with the draft.
    """

    def __init__(self, plain: Decoder, speculative: Decoder) -> None:
        self.plain, self.speculative = plain, speculative

    def decode(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        stop_ids: Collection[int],
        prompt_id: str = "",
        source: str = "",
        speculative_first: bool = False,
    ) -> Pair:
        """Decode a prompt with both decoders, one right after the other, and compare."""
        found: dict[Decoder, Generation] = {}
        order = (self.plain, self.speculative)
        for decoder in reversed(order) if speculative_first else order:
            found[decoder] = decoder.generate(prompt_ids, max_new_tokens=max_new_tokens, stop_ids=stop_ids)
        ar, spec = (found[decoder] for decoder in order)
        return Pair(
            prompt_id=prompt_id,
            source=source,
            prompt_tokens=len(prompt_ids),
            ar_tokens=ar.decoded,
            ar_s=ar.decode_s,
            spec_tokens=spec.decoded,
            spec_s=spec.decode_s,
            same_prefix=same_prefix(ar.token_ids, spec.token_ids),
            identical=ar.token_ids == spec.token_ids,
            rounds=tuple(r.counts for r in spec.rounds),
            token_ids=tuple(spec.token_ids),
        )


def same_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the leading ids that two responses share."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


def figures(pairs: Sequence[Pair], block_size: int) -> dict[str, Any]:
    """Return acceptance, speed and agreement over pairs.

    Units: `*_ms_per_token` milliseconds of decoding; `speedup` is autoregressive over speculative time per
        token, of sums; `speedup_median` is the median over prompts, and far from it where other work disturbed the
        machine.
    """
    acceptance = Acceptance(block_size)
    for pair in pairs:
        acceptance.add(pair.rounds)
    ar_tokens, ar_s = sum(p.ar_tokens for p in pairs), sum(p.ar_s for p in pairs)
    spec_tokens, spec_s = sum(p.spec_tokens for p in pairs), sum(p.spec_s for p in pairs)
    ratios = [r for p in pairs if (r := _over(p.ar_s * p.spec_tokens, p.spec_s * p.ar_tokens)) is not None]
    shared, longest = sum(p.same_prefix for p in pairs), sum(max(p.ar_tokens, p.spec_tokens) + 1 for p in pairs)
    return {
        **acceptance.figures(),
        "prompts": len(pairs),
        "tokens": spec_tokens + len(pairs),
        "tokens_ar": ar_tokens + len(pairs),
        "tokens_per_s_ar": _over(ar_tokens, ar_s),
        "tokens_per_s_spec": _over(spec_tokens, spec_s),
        "ms_per_token_ar": _over(1000 * ar_s, ar_tokens),
        "ms_per_token_spec": _over(1000 * spec_s, spec_tokens),
        "ms_per_round": _over(1000 * spec_s, acceptance.rounds),
        "speedup": _over(ar_s * spec_tokens, spec_s * ar_tokens),
        "speedup_median": statistics.median(ratios) if ratios else None,
        "identical_fraction": _over(sum(p.identical for p in pairs), len(pairs)),
        "same_prefix_fraction": _over(shared, longest),
    }


def table(pairs: Sequence[Pair]) -> dict[str, list[Any]]:
    """Return pairs as columns, one row per prompt."""
    rows = [
        {
            "prompt_id": p.prompt_id,
            "source": p.source,
            "prompt_tokens": p.prompt_tokens,
            "tokens": p.spec_tokens + 1,
            "rounds": len(p.rounds),
            "tau": _over(sum(counts.num_emitted for counts in p.rounds), len(p.rounds)),
            "ms_per_token_ar": _over(1000 * p.ar_s, p.ar_tokens),
            "ms_per_token_spec": _over(1000 * p.spec_s, p.spec_tokens),
            "identical": p.identical,
        }
        for p in pairs
    ]
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def _over(part: float, whole: float) -> float | None:
    return part / whole if whole else None
