"""A chat comes back from its columns as it went in."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from dllm.prompts.chats.parquet import chat_fields, from_columns, to_columns

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
MAPPING = st.dictionaries(TEXT, JSON, max_size=3)
MESSAGE = st.fixed_dictionaries(
    {"role": TEXT, "content": TEXT},
    optional={"tool_calls": st.lists(MAPPING, max_size=2), "tool_call_id": TEXT, "name": TEXT},
)


@given(st.lists(st.tuples(st.lists(MESSAGE, max_size=3), st.none() | st.lists(MAPPING, max_size=2)), max_size=4))
def test_chats_and_tools_come_back_whole(chats: list[tuple[list[dict[str, Any]], Any]]) -> None:
    table = pa.Table.from_pylist([to_columns(*chat) for chat in chats], schema=pa.schema(chat_fields()))
    found = [from_columns(row) for row in table.to_pylist()]
    assert [(row["messages"], row["tools"]) for row in found] == chats
