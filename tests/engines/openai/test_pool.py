"""What a run makes of servers that fail, lie and come back."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from dllm.engines.engine import EngineStats
from dllm.engines.openai import pool as pools
from dllm.engines.openai.faults import Fault
from dllm.engines.openai.pool import DROP_AFTER, Pool
from dllm.engines.openai.servers import Server
from dllm.errors import ServerError
from tests.patience import LONGEST_S

OUTAGE = Fault("it broke", "outage")


class Script:
    """A client whose replies a test chooses."""

    def __init__(self) -> None:
        self.broken: dict[str, Fault | ServerError] = {}
        self.probes = 0

    async def models(self, server: Server) -> list[dict[str, Any]]:
        self.probes += 1
        if server.url in self.broken:
            raise self.broken[server.url]
        return [{"id": "mine"}]

    async def facts(self, server: Server) -> dict[str, Any]:
        return {}


def make_pool(servers: list[Server], script: Script, timeout_s: float, stats: EngineStats | None = None) -> Pool:
    client: Any = script
    return Pool(client, servers, "mine", timeout_s, stats or EngineStats(), {})


def run(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, LONGEST_S))


def three() -> list[Server]:
    return [Server.at(f"http://{name}:1/v1") for name in "abc"]


def test_requests_go_where_there_is_most_room_and_rather_where_they_were_not() -> None:
    async def scene() -> None:
        a, b, c = all_three = three()
        pool = make_pool(all_three, Script(), 1.0, stats := EngineStats())
        a.in_flight, b.in_flight, c.in_flight = 2, 1, 3
        assert stats.servers_up == 3
        assert await pool.choose(set()) is b and await pool.choose({b}) is a and await pool.choose({a, b, c}) is b
        assert pool.has_other({a, b}) and not pool.has_other({a, b, c})

    run(scene())


def test_faults_in_a_row_drop_a_server_and_a_good_probe_takes_it_back(monkeypatch, caplog) -> None:
    monkeypatch.setattr(pools, "PROBE_EVERY_S", 0.05)

    async def scene() -> None:
        a, b, c = all_three = three()
        script, stats = Script(), EngineStats()
        script.broken[a.url] = Fault("still down", "unreachable")
        pool = make_pool(all_three, script, 1.0, stats)
        for _ in range(DROP_AFTER - 1):
            await pool.failed(a, OUTAGE)
        pool.succeeded(a)
        for _ in range(DROP_AFTER - 1):
            await pool.failed(a, OUTAGE)
            await pool.failed(a, Fault("come back later", "busy"))
        assert a.state == "up"
        await pool.failed(a, OUTAGE)
        assert a.state == "held" and stats.servers_up == 2
        b.in_flight = c.in_flight = 9
        assert await pool.choose(set()) is b
        await asyncio.sleep(0.2)
        assert a.state == "down" and script.probes > 1 and a.reason == "still down"
        script.broken.clear()
        await asyncio.sleep(0.2)
        assert a.state == "up" and await pool.choose(set()) is a and stats.servers_up == 3
        await pool.__aexit__()

    run(scene())
    assert (
        "a:1/v1 is left out until it responds again: it broke" in caplog.text and "a:1/v1 responds again" in caplog.text
    )
    assert len(caplog.records) == 2


def test_a_server_that_only_replies_to_probes_is_held_longer_each_time(monkeypatch) -> None:
    async def scene() -> None:
        (a,) = [Server.at("http://a:1/v1")]
        pool = make_pool([a], Script(), 0.01)
        waited = []
        for _ in range(4):
            for _ in range(DROP_AFTER):
                await pool.failed(a, OUTAGE)
            began = asyncio.get_running_loop().time()
            assert await pool.choose(set()) is a  # held is not gone: patience does not count
            waited.append(asyncio.get_running_loop().time() - began)
        assert waited[0] < 0.1 < 0.3 < waited[1] < waited[2] < waited[3]
        pool.succeeded(a)
        assert a.drops == 0

    run(scene())


def test_when_none_is_left_a_run_waits_and_then_says_why(monkeypatch) -> None:
    monkeypatch.setattr(pools, "PROBE_EVERY_S", 0.05)

    async def scene() -> None:
        a, b = all_two = three()[:2]
        script = Script()
        script.broken = {
            a.url: Fault("connection refused", "unreachable"),
            b.url: ServerError("serves other, not mine"),
        }
        pool = make_pool(all_two, script, 0.3)
        pool.drop(a, "it broke")
        pool.drop(b, "it broke")
        began = asyncio.get_running_loop().time()
        with pytest.raises(
            ServerError, match=r"no server left for 0\.3 s: connection refused; serves other.*kept"
        ) as said:
            await pool.choose(set())
        assert asyncio.get_running_loop().time() - began >= 0.25 and "\n" not in str(said.value)
        del script.broken[b.url]
        pool._timeout_s = 9.0
        assert await pool.choose(set()) is b
        await pool.__aexit__()

    run(scene())


def test_a_server_with_the_wrong_model_never_comes_back() -> None:
    async def scene() -> None:
        a, b = all_two = three()[:2]
        pool = make_pool(all_two, Script(), 9.0)
        pool.exclude(a, "it answered as 'x'")
        pool.drop(a, "late")
        await asyncio.sleep(0.05)
        assert a.state == "wrong_model" and await pool.choose({b}) is b
        pool.exclude(b, "it answered as 'y'")
        with pytest.raises(ServerError, match="no server has the right model: it answered as 'x'; it answered as 'y'"):
            await pool.choose(set())

    run(scene())


def test_requests_to_a_server_that_is_gone_are_given_up() -> None:
    async def scene() -> None:
        a, b = all_two = three()[:2]
        script = Script()
        pool = make_pool(all_two, script, LONGEST_S)

        async def hang(server: Server) -> None:
            async with asyncio.timeout(LONGEST_S) as wait:
                server.deadlines.add(wait)
                await asyncio.sleep(LONGEST_S)

        waiting = [asyncio.create_task(hang(server)) for server in (a, a, b)]
        await asyncio.sleep(0)
        pool.drop(a, "it broke")  # but it answers its probe
        await asyncio.sleep(0.05)
        assert a.state == "up" and not any(task.done() for task in waiting)
        script.broken[a.url] = Fault("no connection in time", "unreachable")
        a.drops = 0
        pool.drop(a, "it broke")
        await asyncio.sleep(0.05)
        assert [task.done() for task in waiting] == [True, True, False]
        assert all(isinstance(task.exception(), TimeoutError) for task in waiting[:2])
        waiting[2].cancel()
        await pool.__aexit__()

    run(scene())
