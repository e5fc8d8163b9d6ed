"""Pauses, Retry-After, and when too much is refused."""

from __future__ import annotations

import time
from email.utils import format_datetime, formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm.engines.openai.engine import MIN_OUTCOMES, WINDOW, FailureRate
from dllm.engines.openai.faults import retry_after_s
from dllm.engines.openai.pool import MAX_PAUSE_S, pause_s
from dllm.errors import ServerError


@given(st.integers(0, 10**6))
def test_pauses_grow_to_a_bound_and_differ(pauses: int) -> None:
    drawn = {pause_s(pauses, None, 1.0) for _ in range(20)}
    assert len(drawn) > 1 and all(0 <= pause <= min(0.5 * 2 ** min(pauses, 16), MAX_PAUSE_S) for pause in drawn)


@given(st.floats(0, 1e9), st.floats(0.1, 600))
def test_a_named_pause_is_kept_as_far_as_patience_goes(named: float, longest: float) -> None:
    assert min(named, longest) <= pause_s(0, named, longest) <= min(named, longest) + 0.1


def test_retry_after_is_seconds_or_a_date() -> None:
    assert retry_after_s("2") == 2 and retry_after_s(" 0.25 ") == 0.25 and retry_after_s("-3") == 0
    assert retry_after_s(formatdate(time.time() + 60, usegmt=True)) == pytest.approx(60, abs=3)
    assert retry_after_s(formatdate(time.time() - 60, usegmt=True)) == 0


@pytest.mark.parametrize("header", [None, "", "soon", "nan", "inf", "1e999", "Mon, 99 Foo 2026 00:00:00 GMT", "\udcff"])
def test_a_senseless_retry_after_is_none(header: str | None) -> None:
    assert retry_after_s(header) is None


@given(st.text(max_size=40))
def test_no_header_breaks_the_reading(header: str) -> None:
    found = retry_after_s(header)
    assert found is None or found >= 0


@given(st.datetimes())
def test_every_date_is_read(when) -> None:
    found = retry_after_s(format_datetime(when))
    assert found is None or found >= 0


def fates(refused: int, answered: int, limit: float = 0.2) -> FailureRate:
    outcomes = FailureRate(limit)
    for n in range(max(refused, answered)):
        if n < refused:
            outcomes.add(f"reason {n}")
        if n < answered:
            outcomes.add(None)
    return outcomes


def test_a_share_above_the_limit_stops_and_says_why() -> None:
    fates(40, WINDOW - 40).check()
    with pytest.raises(ServerError, match=rf"41 of the latest {WINDOW} requests were refused.*reason 40.*kept"):
        fates(41, WINDOW - 41).check()


def test_few_requests_are_not_judged_and_old_ones_are_forgotten() -> None:
    fates(MIN_OUTCOMES - 1, 0).check()
    with pytest.raises(ServerError, match=f"{MIN_OUTCOMES} of the latest {MIN_OUTCOMES}"):
        fates(MIN_OUTCOMES, 0).check()
    outcomes = fates(30, 0)
    for _ in range(WINDOW):
        outcomes.add(None)
    outcomes.check()
    fates(MIN_OUTCOMES, 0, limit=1.0).check()
