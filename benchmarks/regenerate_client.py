"""How full a client keeps a server of fixed capacity: ours, a bare loop, and NeMo AutoModel's own script.

    python benchmarks/regenerate_client.py [--rounds 3] [--rows 1200] [--slots 32] [--token-ms 10] [--json FILE]

The server is a process of its own: a number of slots, a fixed time per token, first come first served; the length of a
row's response is a function of its question. Arms, each a process of its own, in turn in every round:

* `engine`: dllm's `OpenAIEngine` alone;
* `command`: all of `python -m dllm regenerate`, reading, journal and shards included;
* `bare`: as many asyncio tasks with aiohttp as the concurrency, which write nothing;
* `nemo`: `nemo_automodel.components.speculative.regenerate`, run as its documentation says (its default shard size).

Time is taken at the server, from the first request to the last response, so that imports do not count. The server's
capacity is slots / token time. Needs `pip install --no-deps nemo-automodel==0.7.0`; nothing of it is part of
dllm.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODEL = "builtin:tiny"
ARMS = ("engine", "command", "bare", "nemo")
RATIOS = (("engine", "bare"), ("engine", "nemo"), ("command", "bare"), ("command", "nemo"))
LONGEST = 128
"""Tokens of the longest response."""


def num_tokens(question: str) -> int:
    """Choose a response's length by its question: mostly short, some long."""
    number = int(hashlib.sha256(question.encode()).hexdigest()[:8], 16)
    return 8 + (number % 101) ** 2 // 85


class Meter:
    """What the server has done since its meter was last read."""

    def __init__(self) -> None:
        self.first = self.last = 0.0
        self.tokens = self.answers = self.open = self.peak = 0

    def figures(self) -> dict[str, Any]:
        """Return the figures. Units: seconds; `peak` is the largest number of requests open at once."""
        return {"seconds": self.last - self.first, **vars(self)}


async def serve(slots: int, token_s: float) -> None:
    """Serve chat completions on a free port, which is the first line printed."""
    room = asyncio.Semaphore(slots)
    meters = [Meter()]

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                path = head.split(" ", 2)[1]
                length = int(head.partition("content-length:")[2].partition("\r\n")[0] or 0)
                body = await reader.readexactly(length)
                if path.endswith("/chat/completions"):
                    data = await answer(json.loads(body))
                elif path == "/meter":
                    data = meters.pop().figures()
                    meters.append(Meter())
                elif path == "/v1/models":
                    data = {"object": "list", "data": [{"id": MODEL, "object": "model"}]}
                else:
                    data = None
                text = json.dumps(data).encode()
                status = "404 Not Found" if data is None else "200 OK"
                head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
                writer.write(head.encode() + text)
        writer.close()

    async def answer(body: dict[str, Any]) -> dict[str, Any]:
        meter = meters[0]
        meter.first = meter.first or time.perf_counter()
        meter.open += 1
        meter.peak = max(meter.peak, meter.open)
        count = num_tokens(body["messages"][-1]["content"])
        async with room:
            await asyncio.sleep(count * token_s)
        meter.open -= 1
        meter.answers += 1
        meter.tokens += count
        meter.last = time.perf_counter()
        message = {"role": "assistant", "content": "word " * (count - 1)}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"completion_tokens": count}
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": MODEL,
            "choices": [choice],
            "usage": usage,
        }

    server = await asyncio.start_server(talk, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


def engine(url: str, rows: list[list[dict[str, str]]], concurrency: int) -> int:
    """Generate with dllm's engine; return the number of responses."""
    from dllm.config.params import Target
    from dllm.config.regenerate import Regenerate
    from dllm.engines.engine import Request, RequestList, Response
    from dllm.engines.openai.engine import OpenAIEngine
    from dllm.models.targets import load_tokenizer

    target = Target(model=MODEL)
    settings = Regenerate(engine="openai", concurrency=concurrency)
    asking = OpenAIEngine([url], settings, target, load_tokenizer(target))
    requests = [Request(f"{n}:0:0", (1,), messages, LONGEST, 0.0, 1.0, n) for n, messages in enumerate(rows)]
    return sum(isinstance(outcome, Response) for outcome in asking.answer(RequestList(requests)))


def bare(url: str, rows: list[list[dict[str, str]]], concurrency: int) -> int:
    """Generate with asyncio and aiohttp alone; return the number of responses."""
    import aiohttp

    waiting, answers = iter(rows), []

    async def work(session: aiohttp.ClientSession) -> None:
        for messages in waiting:
            asked = {"model": MODEL, "messages": messages, "max_tokens": LONGEST, "temperature": 0.0, "top_p": 1.0}
            async with session.post(f"{url}/v1/chat/completions", json=asked) as reply:
                answers.append((await reply.json())["choices"][0]["message"]["content"])

    async def run() -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(work(session) for _ in range(concurrency)))

    asyncio.run(run())
    return len(answers)


def command_line(arm: str, url: str, rows: Path, concurrency: int, out: Path) -> list[str]:
    """Return the command line of one arm."""
    asked = ["--input-data", str(rows), "--output-dir", str(out), "--model", MODEL, "--target-server", f"{url}/v1"]
    asked += ["--concurrency", str(concurrency), "--max-new-tokens", str(LONGEST), "--temperature", "0.0"]
    if arm == "nemo":
        return [sys.executable, "-m", "nemo_automodel.components.speculative.regenerate", *asked]
    if arm == "command":
        return [sys.executable, "-m", "dllm", "regenerate", *asked]
    return [sys.executable, __file__, "--arm", arm, "--url", url, "--data", str(rows), "--at", str(concurrency)]


def measure(arm: str, url: str, rows: Path, concurrency: int, count: int) -> dict[str, Any]:
    """Run one arm once; return the server's figures."""
    with tempfile.TemporaryDirectory() as out, urllib.request.urlopen(f"{url}/meter"):
        asked = command_line(arm, url, rows, concurrency, Path(out) / "out")
        quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": out}
        done = subprocess.run(asked, capture_output=True, text=True, env={**os.environ, **quiet}, check=False)
        with urllib.request.urlopen(f"{url}/meter") as reply:
            figures = json.load(reply)
    if done.returncode or figures["answers"] != count:
        sys.exit(f"{arm} at {concurrency}: exit {done.returncode}, {figures['answers']} answers\n{done.stderr[-2000:]}")
    return {**figures, "tokens_per_s": figures["tokens"] / figures["seconds"]}


@contextlib.contextmanager
def server(slots: int, token_ms: float) -> Iterator[str]:
    """Run the server in a process; yield its address."""
    asked = [sys.executable, __file__, "--serve", "--slots", str(slots), "--token-ms", str(token_ms)]
    with subprocess.Popen(asked, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            yield f"http://127.0.0.1:{int(child.stdout.readline())}"
        finally:
            child.kill()


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Run all arms in turn, round by round, and print the table."""
    result: dict[str, Any] = {"slots": args.slots, "token_ms": args.token_ms, "rows": args.rows, "runs": []}
    bound = f"at most {args.slots / args.token_ms * 1000:.0f} tokens/s"
    print(f"{args.slots} slots, {args.token_ms:g} ms per token: {bound}; medians of {args.rounds} rounds")
    print(f"{'concurrency':>11} " + " ".join(f"{arm:>10}" for arm in args.arms) + "   tokens/s")
    with server(args.slots, args.token_ms) as url, tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        chats = ([{"role": "user", "content": f"Question {n}: say some words."}] for n in range(args.rows))
        rows.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
        for concurrency in args.concurrency:
            rates: dict[str, list[float]] = {arm: [] for arm in args.arms}
            for turn in range(args.rounds):
                for arm in args.arms[turn % len(args.arms) :] + args.arms[: turn % len(args.arms)]:
                    figures = measure(arm, url, rows, concurrency, args.rows)
                    rates[arm].append(figures["tokens_per_s"])
                    result["runs"].append({"arm": arm, "concurrency": concurrency, "turn": turn, **figures})
            print(f"{concurrency:>11} " + " ".join(f"{statistics.median(rates[arm]):>10.0f}" for arm in args.arms))
            for ours, other in RATIOS:
                if ours in rates and other in rates:
                    ratios = [a / b for a, b in zip(rates[ours], rates[other], strict=True)]
                    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
                    print(f"{'':>11} {ours} / {other}: {statistics.median(ratios):.3f} ({spread})", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--token-ms", type=float, default=10.0)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    for name, kind in (("--arm", str), ("--url", str), ("--data", Path), ("--at", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        asyncio.run(serve(args.slots, args.token_ms / 1000))
    elif args.arm:
        rows = [json.loads(line)["messages"] for line in args.data.read_text().splitlines()]
        answered = {"engine": engine, "bare": bare}[args.arm](args.url, rows, args.at)
        sys.exit(answered != len(rows))
    else:
        result = compare(args)
        if args.json:
            args.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
