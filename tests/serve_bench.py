"""Measure 16_serve.py over HTTP: every endpoint's latency, and tokens per second against clients.

    python tests/serve_bench.py --data-dir data --stage rl

Starts the server, and asks it with 1, 2, 4, 8 and 16 clients, each of which streams one answer
after the other. The clients share the machine with the server. Prints JSON in the form of
data/bench.json; `ratio` above 1 says how many times one client's tokens per second there are.
"""

import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from bench import entry
from conftest import ROOT, script_path

QUESTION = "Tell me a story about a cat."
ENDPOINTS = {"GET /": 200, "GET /health": 200, "GET /metrics": 200, "GET /v1/models": 200,
             "POST /v1/chat/completions": 200}


@dataclass
class Config:
    data_dir: Path = field(default_factory=lambda: Path(os.environ.get("EDU_DATA", ROOT / "data")))
    """What my_pipeline.sh has made."""
    stage: str = ""
    """Which model; empty takes the furthest stage."""
    clients: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of clients."""
    seconds: float = 4.0
    """Length of each measurement."""
    rounds: int = 3
    """Turns of each number of clients; the median counts."""
    requests: int = 30
    """Requests to each endpoint."""
    flags: tuple[str, ...] = ()
    """Further flags of the server, such as --flags=--beat=0."""


@contextlib.contextmanager
def served(cfg):
    """The port of a server that runs for as long as this lasts."""
    command = [sys.executable, script_path("16_serve"), "--data-dir", cfg.data_dir, "--port", "0",
               "--no-log-requests", *(["--stage", cfg.stage] if cfg.stage else []), *cfg.flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as process:
        try:
            for line in process.stdout:
                found = re.search(r"chat at http://127\.0\.0\.1:(\d+)", line)
                if found:
                    yield int(found[1])
                    break
            else:
                raise SystemExit("the server did not start; see its message above")
        finally:
            process.terminate()


async def ask(port, method="GET", path="/health", body=None):
    """(seconds to the first piece of text, seconds in all, the response)."""
    data = b"" if body is None else json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began, first = time.perf_counter(), None
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                 f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
                 + data)
    received = bytearray()
    while piece := await reader.read(65536):
        received += piece
        if first is None and b'"delta": {"content"' in received:
            first = time.perf_counter() - began
    writer.close()
    return first, time.perf_counter() - began, bytes(received)


def story(**options):
    return {"messages": [{"role": "user", "content": QUESTION}], "stream": True,
            "stream_options": {"include_usage": True}, **options}


async def crowd(port, clients, seconds):
    """(tokens per second of all clients together, seconds to first tokens)."""
    began, tokens, firsts = time.perf_counter(), 0, []

    async def client(number):
        nonlocal tokens
        while time.perf_counter() - began < seconds:
            first, _, response = await ask(port, "POST", "/v1/chat/completions", story(seed=number))
            assert b" 200 OK" in response[:20] and b"[DONE]" in response, response[-300:]
            tokens += int(re.findall(rb'"completion_tokens": (\d+)', response)[-1])
            firsts.append(first)

    await asyncio.gather(*(client(number) for number in range(clients)))
    return tokens / (time.perf_counter() - began), firsts


async def endpoint(port, name, status, count):
    """Median milliseconds until the response is complete; one token where text is asked for."""
    method, path = name.split()
    body = None if method == "GET" else {
        "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 1}
    times = []
    for _ in range(count):
        _, seconds, response = await ask(port, method, path, body)
        assert response.startswith(f"HTTP/1.1 {status} ".encode()), response[:300]
        times.append(seconds)
    return 1000 * statistics.median(times)


async def measure(cfg, port):
    await crowd(port, max(cfg.clients), 1.0)  # warm up
    rows = {}
    for name, status in ENDPOINTS.items():
        rows[f"serve {name}"] = entry(round(await endpoint(port, name, status, cfg.requests), 1),
                                      "ms")
    idle = [(await ask(port, "POST", "/v1/chat/completions", story()))[0]
            for _ in range(cfg.requests)]
    rows["serve first token"] = entry(round(1000 * statistics.median(idle), 1), "ms")
    rows["serve first token, worst"] = entry(round(1000 * max(idle), 1), "ms")
    speeds = {clients: [] for clients in cfg.clients}
    firsts = {clients: [] for clients in cfg.clients}
    for _ in range(cfg.rounds):
        for clients in cfg.clients:  # in turns: what disturbs one disturbs all
            speed, first = await crowd(port, clients, cfg.seconds)
            speeds[clients].append(speed)
            firsts[clients] += first
    one = round(statistics.median(speeds[cfg.clients[0]]))
    for clients in cfg.clients:
        rows[f"serve {clients}"] = entry(round(statistics.median(speeds[clients])), "tok/s", one,
                                         "one client")
        rows[f"serve {clients} first token"] = entry(
            round(1000 * statistics.median(firsts[clients]), 1), "ms")
    return rows


def main(argv=None):
    cfg = tyro.cli(Config, args=argv, description=__doc__)
    with served(cfg) as port:
        rows = asyncio.run(measure(cfg, port))
    print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
