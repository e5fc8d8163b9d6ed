"""Counts of shards and parts add up to the counts of the whole."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm.responses.counts import ManifestCounts
from dllm.responses.flags import FLAGS
from dllm.responses.shards import Row


def row(split: str, source: str, reason: str, num_tokens: int, flags: set[str]) -> Row:
    return Row("00", 0, source, split, [], [], [], reason, num_tokens, flags=sorted(flags))


ROWS = st.lists(
    st.builds(
        row,
        st.sampled_from(["train", "heldout"]),
        st.sampled_from(["a", "b"]),
        st.sampled_from(["stop", "length", "tool_calls"]),
        st.integers(0, 9),
        st.sets(st.sampled_from(FLAGS)),
    ),
    max_size=20,
)


@given(ROWS, st.integers(0, 20), st.integers(0, 3))
def test_counts_of_parts_make_the_counts_of_the_whole(rows: list[Row], cut: int, rejected: int) -> None:
    one, two = ManifestCounts.of(rows[:cut]), ManifestCounts.of(rows[cut:])
    one.rejected, one.dropped["length"] = rejected, rejected
    whole = ManifestCounts.of(rows)
    whole.rejected, whole.dropped["length"] = rejected, rejected
    assert (one + two).to_json() == (two + one).to_json() == whole.to_json()
    assert ManifestCounts.from_json(json.loads(json.dumps(whole.to_json()))) == whole
    cut = sum(row.finish_reason == "length" for row in rows)
    assert whole.lengths()["cut_share"] * len(rows) == pytest.approx(cut)
    assert whole.rows == len(rows) == whole.finish_reasons.total() == whole.splits.total()
    assert whole.tokens == whole.tokens_by_split.total() and {"train", "heldout"} <= whole.tokens_by_split.keys()
