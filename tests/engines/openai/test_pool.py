"""What a run makes of servers that fail, lie and come back."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from dllm.engines.engine import EngineStats
from dllm.engines.openai import pool as pools
from dllm.engines.openai.pool import DROP_AFTER, Pool
from dllm.engines.openai.retry import Fault
from dllm.engines.openai.servers import Server
from dllm.errors import ServerError

OUTAGE = Fault("it broke", "outage")


class Sight:
    """What a look at each server finds."""

    def __init__(self) -> None:
        self.broken: dict[str, Fault | ServerError] = {}
        self.looks = 0

    async def __call__(self, server: Server) -> None:
        self.looks += 1
        if server.url in self.broken:
            raise self.broken[server.url]


def run(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 20))


def three() -> list[Server]:
    return [Server.at(f"http://{name}:1/v1") for name in "abc"]


def test_requests_go_where_there_is_most_room_and_rather_where_they_were_not() -> None:
    async def scene() -> None:
        a, b, c = all_three = three()
        pool = Pool(all_three, Sight(), 1.0, pace := EngineStats())
        a.in_flight, b.in_flight, c.in_flight = 2, 1, 3
        assert pace.servers_up == 3
        assert await pool.room(set()) is b and await pool.room({b}) is a and await pool.room({a, b, c}) is b
        assert pool.has_other({a, b}) and not pool.has_other({a, b, c})

    run(scene())


def test_faults_in_a_row_drop_a_server_and_a_good_probe_takes_it_back(monkeypatch, caplog) -> None:
    monkeypatch.setattr(pools, "PROBE_EVERY_S", 0.05)

    async def scene() -> None:
        a, b, c = all_three = three()
        sight, pace = Sight(), EngineStats()
        sight.broken[a.url] = Fault("still down", "unreached")
        pool = Pool(all_three, sight, 1.0, pace)
        for _ in range(DROP_AFTER - 1):
            pool.failed(a, OUTAGE)
        pool.answered(a)
        for _ in range(DROP_AFTER - 1):
            pool.failed(a, OUTAGE)
            pool.failed(a, Fault("come back later", "busy"))
        assert a.state == "up"
        pool.failed(a, OUTAGE)
        assert a.state == "held" and pace.servers_up == 2
        b.in_flight = c.in_flight = 9
        assert await pool.room(set()) is b
        await asyncio.sleep(0.2)
        assert a.state == "gone" and sight.looks > 1 and a.reason == "still down"
        sight.broken.clear()
        await asyncio.sleep(0.2)
        assert a.state == "up" and await pool.room(set()) is a and pace.servers_up == 3
        await pool.close()

    run(scene())
    assert (
        "a:1/v1 is left out until it answers again: it broke" in caplog.text and "a:1/v1 answers again" in caplog.text
    )
    assert len(caplog.records) == 2


def test_a_server_that_only_answers_probes_is_held_longer_each_time(monkeypatch) -> None:
    async def scene() -> None:
        (a,) = [Server.at("http://a:1/v1")]
        pool = Pool([a], Sight(), 0.01, EngineStats())
        waited = []
        for _ in range(4):
            for _ in range(DROP_AFTER):
                pool.failed(a, OUTAGE)
            began = asyncio.get_running_loop().time()
            assert await pool.room(set()) is a  # held is not gone: patience does not count
            waited.append(asyncio.get_running_loop().time() - began)
        assert waited[0] < 0.1 < 0.3 < waited[1] < waited[2] < waited[3]
        pool.answered(a)
        assert a.drops == 0

    run(scene())


def test_when_none_is_left_a_run_waits_and_then_says_why(monkeypatch) -> None:
    monkeypatch.setattr(pools, "PROBE_EVERY_S", 0.05)

    async def scene() -> None:
        a, b = all_two = three()[:2]
        sight = Sight()
        sight.broken = {a.url: Fault("connection refused", "unreached"), b.url: ServerError("serves other, not mine")}
        pool = Pool(all_two, sight, 0.3, EngineStats())
        pool.drop(a, "it broke")
        pool.drop(b, "it broke")
        began = asyncio.get_running_loop().time()
        with pytest.raises(
            ServerError, match=r"no server left for 0\.3 s: connection refused; serves other.*kept"
        ) as said:
            await pool.room(set())
        assert asyncio.get_running_loop().time() - began >= 0.25 and "\n" not in str(said.value)
        del sight.broken[b.url]
        pool._patience_s = 9.0
        assert await pool.room(set()) is b
        await pool.close()

    run(scene())


def test_a_liar_never_comes_back() -> None:
    async def scene() -> None:
        a, b = all_two = three()[:2]
        pool = Pool(all_two, Sight(), 9.0, EngineStats())
        pool.exclude(a, "it answered as 'x'")
        pool.drop(a, "late")
        await asyncio.sleep(0.05)
        assert a.state == "wrong_model" and await pool.room({b}) is b
        pool.exclude(b, "it answered as 'y'")
        with pytest.raises(ServerError, match="no server has the right model: it answered as 'x'; it answered as 'y'"):
            await pool.room(set())

    run(scene())


def test_requests_to_a_server_that_is_gone_are_given_up() -> None:
    async def scene() -> None:
        a, b = all_two = three()[:2]
        sight = Sight()
        pool = Pool(all_two, sight, 9.0, EngineStats())

        async def hang(server: Server) -> None:
            async with asyncio.timeout(9.0) as wait:
                server.waits.add(wait)
                await asyncio.sleep(9.0)

        waiting = [asyncio.create_task(hang(server)) for server in (a, a, b)]
        await asyncio.sleep(0)
        pool.drop(a, "it broke")  # but it answers its probe
        await asyncio.sleep(0.05)
        assert a.state == "up" and not any(task.done() for task in waiting)
        sight.broken[a.url] = Fault("no connection in time", "unreached")
        a.drops = 0
        pool.drop(a, "it broke")
        await asyncio.sleep(0.05)
        assert [task.done() for task in waiting] == [True, True, False]
        assert all(isinstance(task.exception(), TimeoutError) for task in waiting[:2])
        waiting[2].cancel()
        await pool.close()

    run(scene())
