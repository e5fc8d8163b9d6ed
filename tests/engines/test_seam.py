"""The seam of engines; tests/extending runs one from outside the package."""

from __future__ import annotations

import pytest

from dllm.config.regenerate import Regenerate
from dllm.registry import ENGINES


def test_every_member_says_what_regeneration_reads() -> None:
    for name, factory in ENGINES.items():
        assert factory.affects <= {"batch_size", "served_model", "sglang"}, name
        assert factory.ignores <= set(Regenerate.model_fields) and not factory.ignores & factory.affects, name
        assert isinstance(factory.is_external, bool) and isinstance(factory.generates, bool)
        assert factory.num_slots(Regenerate()) >= 1
        factory.check(Regenerate(engine=name, turns="last"))


def test_an_unknown_engine_is_one_line_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"expected one of local, openai, sglang, dataset.*did you mean sglang\?"):
        Regenerate(engine="sglan")
