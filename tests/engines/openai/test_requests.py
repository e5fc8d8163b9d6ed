"""Requests on their way: every fault of a server, bounded in time and count, and what becomes of each request."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import pytest

from dllm.engines.engine import Refusal, Request, RequestList, Response
from dllm.engines.openai import pool
from dllm.errors import DataError, ServerError
from tests.engines.openai.asking import answers, engine, outcomes, refusal, requests
from tests.engines.openai.loopback_server import echo, serving
from tests.patience import LONGEST_S

AT_ONCE = {"Retry-After": "0"}


@pytest.fixture(autouse=True)
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "PROBE_EVERY_S", 0.1)


def test_busy_and_broken_replies_are_asked_again_after_the_time_the_server_names(
    server, tokenizer, monkeypatch
) -> None:
    monkeypatch.setattr(pool.random, "uniform", lambda low, high: low if high == pool.JITTER_S else LONGEST_S)
    server.faults.extend([(429, {"Retry-After": "1"}), (503, {"Retry-After": "0.05"})])
    asked = engine(server.url, tokenizer)
    answers(asked)
    assert len(server.times) == 3 and asked.stats.retries == 2
    assert server.times[1] - server.times[0] >= 1.0
    assert server.times[2] - server.times[1] < LONGEST_S  # our own pause


@pytest.mark.parametrize("fault", ["drop", "half", "garbage", "nonsense", "babble", (408, {}), (409, {}), (500, {})])
def test_a_fault_that_passes_costs_a_try_and_no_row(server, tokenizer, fault) -> None:
    server.faults.extend([fault] * 2)
    answers(engine(server.url, tokenizer), 3)
    assert len(server.bodies) == 5


def test_silence_is_given_up_after_the_time_named(server, tokenizer) -> None:
    server.faults.append("stall")
    answers(engine(server.url, tokenizer, timeout_s=0.3))
    server.always = "stall"
    found = refusal(engine(server.url, tokenizer, timeout_s=0.3, max_retries=1))
    assert found.reason == f"no response within 0.3 s ({server.url}/v1), tried 2 times" and found.is_transient


def test_a_row_that_takes_too_long_everywhere_is_not_asked_at_every_server_each_time(tokenizer) -> None:
    with serving() as one, serving() as two:
        one.always = two.always = "stall"
        found = refusal(engine([one.url, two.url], tokenizer, timeout_s=0.3, max_retries=2))
        assert "tried 3 times" in found.reason and (len(one.bodies), len(two.bodies)) == (2, 1)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_row_is_put_aside_at_once_with_its_reason(server, tokenizer, status) -> None:
    server.faults.append((status, {}))
    found = outcomes(engine(server.url, tokenizer, concurrency=1), 3)
    assert [type(outcome) for outcome in found] == [Refusal, Response, Response] and len(server.bodies) == 3
    assert found[0] == Refusal(requests(1)[0].key, f"the server answered {status}: made to fail ({server.url}/v1)")


def test_a_row_that_always_breaks_the_server_is_put_aside(server, tokenizer) -> None:
    def reply(body: dict[str, Any]) -> tuple[str, str]:
        if body["messages"][-1]["content"] == "question 3":
            raise RuntimeError("the connection is dropped")
        return echo(body)

    server.reply = reply
    found = outcomes(engine(server.url, tokenizer, max_retries=2, concurrency=2), 10)
    refused = [outcome for outcome in found if isinstance(outcome, Refusal)]
    assert len(found) == 10 and len(refused) == 1 and refused[0].key == requests(4)[3].key
    assert "the connection broke" in refused[0].reason and "tried 3 times" in refused[0].reason


def test_an_unknown_ending_is_tried_again_and_then_put_aside(tokenizer) -> None:
    with serving(reply=lambda body: ("half", "abort")) as server:
        found = refusal(engine(server.url, tokenizer, max_retries=1))
    assert "'abort'" in found.reason and len(server.bodies) == 2


@pytest.mark.parametrize(("fault", "hint"), [((403, {}), "OPENAI_API_KEY"), ((404, {}), "/v1"), ((302, {}), "/v1")])
def test_a_wrong_configuration_ends_the_run(server, tokenizer, fault, hint) -> None:
    server.faults.append(fault)
    with pytest.raises(ServerError, match=rf"the server answered {fault[0]}.*{hint}"):
        outcomes(engine(server.url, tokenizer), 5)


def test_reasoning_kept_apart_ends_the_run(server, tokenizer) -> None:
    server.extra = {"reasoning_content": "first I think"}
    with pytest.raises(ServerError, match="reasoning parser"):
        outcomes(engine(server.url, tokenizer), 5)


def test_too_many_refusals_end_the_run_after_what_finished(server, tokenizer) -> None:
    server.always = (400, {})
    stream = engine(server.url, tokenizer, concurrency=4).answer(RequestList(requests(100)))
    seen = []
    with pytest.raises(ServerError, match=r"20 of the latest 20 requests were refused.*made to fail"):
        seen.extend(stream)
    assert len(server.bodies) < 40
    server.always = None
    assert not [o for o in outcomes(engine(server.url, tokenizer), 100) if isinstance(o, Refusal)]


def test_what_finished_before_a_failure_is_handed_over(server, tokenizer) -> None:
    stream = engine(server.url, tokenizer, concurrency=1).answer(RequestList(requests(30)))
    first = [next(stream), next(stream)]
    server.faults.append((401, {}))
    with pytest.raises(ServerError):
        first.extend(stream)
    assert [answer and answer.key for answer in first] == [request.key for request in requests(len(first))]
    assert len(first) == len(server.bodies) - 1


def test_an_abandoned_generator_leaves_nothing_running(server, tokenizer) -> None:
    before = threading.active_count()
    stream = engine(server.url, tokenizer, concurrency=4).answer(RequestList(requests(40)))
    next(stream)
    stream.close()
    server.settle()
    asked = len(server.bodies)
    assert asked <= 12
    time.sleep(0.3)
    assert len(server.bodies) == asked and threading.active_count() <= before + 1


def test_time_passes_visibly_while_nothing_finishes(server, tokenizer) -> None:
    server.delay_s = 2.5
    asked = engine(server.url, tokenizer)
    seen = []
    for outcome in asked.answer(RequestList(requests(3))):
        seen.append((outcome is None, asked.stats.in_flight, asked.stats.servers_up))
    assert seen[:2] == [(True, 3, 1)] * 2 and Counter(is_none for is_none, _, _ in seen)[False] == 3


class Chain:
    """A feed in which an answer makes the next request ready."""

    def __init__(self, length: int) -> None:
        self.waiting, self.next, self.length = requests(1), 1, length

    def take(self) -> Request | None:
        return self.waiting.pop() if self.waiting else None

    def answered(self) -> None:
        if self.next < self.length:
            self.waiting = requests(1, first=self.next)
            self.next += 1


def test_answers_that_make_more_ready_go_on(server, tokenizer) -> None:
    feed = Chain(6)
    keys = []
    for outcome in engine(server.url, tokenizer).answer(feed):
        if outcome is not None:
            keys.append(outcome.key)
            feed.answered()
    assert keys == [request.key for request in requests(6)]


def test_what_was_sent_and_not_yet_taken_is_never_more_than_may_be_in_flight(server, tokenizer) -> None:
    """So a kill costs no more than that: the caller writes each answer down before it asks for the next."""
    taken = 0
    for outcome in engine(server.url, tokenizer, concurrency=3).answer(RequestList(requests(20))):
        time.sleep(0.02)  # a slow reader: replies to all that was sent are there
        assert len(server.bodies) <= taken + 3
        taken += outcome is not None
    assert taken == len(server.bodies) == 20


def test_a_feed_that_fails_fails_the_run_as_it_is(server, tokenizer) -> None:
    class Broken(RequestList):
        def take(self) -> Request | None:
            request = super().take()
            if request is None:
                raise DataError("line 4 is no chat", where="mine.jsonl")
            return request

    seen = []
    with pytest.raises(DataError, match="line 4"):
        seen.extend(engine(server.url, tokenizer, concurrency=1).answer(Broken(requests(3))))
    assert len(seen) == 3


def test_two_servers_share_the_work_by_room(tokenizer) -> None:
    with serving() as quick, serving() as slow:
        slow.delay_s = 1.0
        asked = engine([slow.url, quick.url], tokenizer, concurrency=8)
        answers(asked, 80)
        assert len(quick.bodies) + len(slow.bodies) == 80 and asked.stats.servers_up == 2
        assert len(quick.bodies) > 2 * len(slow.bodies) > 0
        assert quick.peak + slow.peak <= 10


def test_a_server_s_own_faults_cost_no_try_while_another_can_answer(tokenizer) -> None:
    with serving() as broken, serving() as sound:
        broken.always = (500, {})
        asked = engine([broken.url, sound.url], tokenizer, max_retries=0)
        answers(asked, 40)
        assert len(sound.bodies) == 40 and 0 < len(broken.bodies) < 30
        assert asked.stats.retries == len(broken.bodies)


def test_a_server_that_dies_is_left_out_and_taken_back(tokenizer, caplog) -> None:
    with serving() as lasting, serving() as dying:
        lasting.delay_s = dying.delay_s = 0.05
        asked = engine([dying.url, lasting.url], tokenizer, max_retries=0, concurrency=8)
        stream = asked.answer(RequestList(requests(400)))
        keys = [outcome.key for _, outcome in zip(range(40), stream, strict=False) if outcome]
        dying.end()
        keys += [outcome.key for _, outcome in zip(range(60), stream, strict=False) if outcome]
        assert asked.stats.servers_up == 1
        with serving(port=dying.port) as back:
            keys += [outcome.key for outcome in stream if outcome]
            assert asked.stats.servers_up == 2 and len(back.bodies) > 20
    assert sorted(keys) == [request.key for request in requests(400)]
    assert "is left out until it responds again" in caplog.text and "responds again" in caplog.text


def test_the_only_server_may_be_restarted(tokenizer) -> None:
    with serving() as first:
        first.delay_s = 0.05
        asked = engine(first.url, tokenizer, max_retries=3, concurrency=4)
        stream = asked.answer(RequestList(requests(60)))
        keys = [next(stream).key for _ in range(10)]
        first.end()
        while asked.stats.servers_up:
            keys += [outcome.key for outcome in [next(stream)] if isinstance(outcome, Response)]
        with serving(port=first.port):
            found = [outcome for outcome in stream if outcome]
    assert not [outcome for outcome in found if isinstance(outcome, Refusal)]
    assert sorted(keys + [outcome.key for outcome in found]) == [request.key for request in requests(60)]


def test_no_server_left_ends_the_run(tokenizer) -> None:
    with serving() as server:
        server.delay_s = 0.05
        stream = engine(server.url, tokenizer, timeout_s=1.0).answer(RequestList(requests(400)))
        first = [next(stream) for _ in range(10)]
        server.end()
        with pytest.raises(ServerError, match=r"no server left for 1 s: cannot connect.*finished responses are kept"):
            first.extend(stream)
        assert len(first) >= 10


def test_a_server_that_lies_in_its_answers_is_left_out_for_good(tokenizer) -> None:
    with serving() as honest, serving() as wrong_model:
        wrong_model.answers_as = "other/model"
        found = answers(engine([wrong_model.url, honest.url], tokenizer, max_retries=0, concurrency=4), 40)
        assert len(found) == 40 and len(wrong_model.bodies) <= 4
        with pytest.raises(ServerError, match=r"no server has the right model: .*answered as 'other/model'"):
            outcomes(engine(wrong_model.url, tokenizer), 3)


@pytest.mark.parametrize("fault", [(404, {}), None], ids=["refuses", "answers"])
def test_a_server_that_changes_its_model_is_left_out_until_it_has_it_again(tokenizer, fault) -> None:
    with serving() as steady, serving() as fickle:
        steady.delay_s = fickle.delay_s = 0.02
        asked = engine([fickle.url, steady.url], tokenizer, max_retries=0, concurrency=4)
        stream = asked.answer(RequestList(requests(200)))
        keys = [next(stream).key for _ in range(20)]
        fickle.always, fickle.model = fault, "other/model"
        keys += [next(stream).key for _ in range(20)]
        assert asked.stats.servers_up == 1
        fickle.always, fickle.model = None, "builtin:tiny"
        keys += [outcome.key for outcome in stream if outcome]
        assert asked.stats.servers_up == 2
    assert sorted(keys) == [request.key for request in requests(200)]


def test_all_faults_at_once_lose_nothing(tokenizer) -> None:
    faults = ["drop", "half", "garbage", "nonsense", "babble", (429, AT_ONCE), (500, {}), (503, AT_ONCE), "stall"]
    with serving() as one, serving() as two:
        one.faults.extend(faults)
        two.faults.extend(reversed(faults))
        answers(engine([one.url, two.url], tokenizer, timeout_s=1.0, max_retries=5, concurrency=6), 120)
        assert not one.faults and not two.faults
