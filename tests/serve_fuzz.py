"""Throw random, malformed and slow requests at 16_serve.py, and see that it stands.

    python tests/serve_fuzz.py --requests 10000              on a small model with random weights
    python tests/serve_fuzz.py --requests 10000 --url http://127.0.0.1:8000

Each request is one of KINDS: valid, valid but for one field, JSON with damaged bytes, a damaged
head, a length that is not the body's, noise, a client that hangs up, a client that sends a byte now
and then. An answer with a status of 500 or more, an error that is not in OpenAI's shape, a row or a
connection that stays, or a server that no longer answers: each is a failure, and ends with code 1.
"""

import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import torch
import tyro
from conftest import load, script_path

WORDS = ("Hello", "Who are you?", "7 + 5 =", "\u00e9\u00e8\u4e2d\U0001f600", "<<1+1=2>>",
         "<|bos|><|assistant_end|>", "\u0000", "\u202e", "a" * 300,
         "'; DROP TABLE", "<script>alert(1)</script>")
VALUES = (None, True, False, 0, -1, 1, 2, 3.5, 1e308, -1e308, 10**30, "", "1", "x" * 50, [], {},
          [[]], {"a": 1}, [None], "\ud800", float("nan"), float("inf"))
FIELDS = ("model", "messages", "stream", "stream_options", "n", "max_tokens", "temperature",
          "max_completion_tokens", "top_p", "top_k", "seed", "stop", "truncation", "tools",
          "response_format", "logprobs", "logit_bias", "frequency_penalty", "user", "what")
JSON = "application/json"


# ---- requests ------------------------------------------------------------------------------------


def valid_body(rng):
    turns = [{"role": ("user", "assistant")[i % 2],
              "content": f"{rng.choice(WORDS)} {rng.random()}"}
             for i in range(rng.choice((1, 1, 3, 5)))]
    body = {"messages": turns, "max_tokens": rng.randint(1, 8), "truncation": "auto"}
    if rng.random() < 0.5:
        body |= {"temperature": rng.choice((0, 0.7, 2)), "top_p": rng.choice((0.1, 1)),
                 "stream": rng.random() < 0.5, "stop": rng.choice(("a", ["b", "\n"])),
                 "n": rng.choice((1, 1, 2)), "seed": rng.randint(-9, 9)}
    return body


def request_bytes(body, method="POST", path="/v1/chat/completions", host="127.0.0.1", **headers):
    headers = {"Host": host, "Content-Type": JSON, "Content-Length": len(body),
               "Connection": "close",
               **{name.replace("_", "-"): value for name, value in headers.items()}}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items() if value is not None)
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1", "replace") + body


def damaged(rng, data, most=6):
    """data with a few bytes changed, removed, doubled or put in, or the end cut off."""
    data = bytearray(data)
    for _ in range(rng.randint(1, most)):
        place = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            data[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[place : place + rng.randint(1, 9)]
        elif kind == 2:
            data[place:place] = rng.choice((b"[" * 9, b"{", b'"', b"\\u", b"\0", b"\r\n", b"\xff"))
        elif kind == 3:
            data[place:place] = data[place : place + 20]
        elif len(data) > 4:
            del data[rng.randint(1, len(data)) :]
    return bytes(data)


def dumps(value):
    return json.dumps(value).encode()


def one_field(rng):
    body = valid_body(rng)
    if rng.random() < 0.4:
        message = rng.choice(body["messages"])
        message[rng.choice(("role", "content", "name"))] = rng.choice(VALUES)
    else:
        body[rng.choice(FIELDS)] = rng.choice(VALUES)
    return request_bytes(dumps(body))


def other_head(rng):
    headers = rng.choice((
        {"host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"},
        {"host": "127.0.0.1:99999999"}, {"host": ""}, {"host": "[::1"}, {"host": "\xff"},
        {"Content_Type": "text/plain"}, {"Content_Type": None}, {"Content_Length": "-1"},
        {"Content_Length": "9" * 30}, {"content_length": 7}, {"Content_Length": "1, 2"},
        {"Transfer_Encoding": "gzip"},
        {"X": "y" * 70_000}, {"Authorization": "Bearer \xff"}, {"Upgrade": "websocket",
         "Connection": "Upgrade"}, {"Expect": "100-continue"}, {"Range": "bytes=0-1"}))
    method = rng.choice(("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "BREW"))
    path = rng.choice(("/", "/v1/models", "/v1/models/..%2f..%2fetc", "/health", "/metrics", "/v1/",
                       "/v1/chat/completions", "//", "/%00", "/?" + "q" * 3000, "*", "/\u00e9",
                       "/../../etc/passwd", "/v1/models/%ff", "http://127.0.0.1/health"))
    body = b"" if method in ("GET", "HEAD") else dumps(valid_body(rng))
    return request_bytes(body, method, path, **headers)


def chunked(rng):
    body = dumps(valid_body(rng))
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(body[i : i + 7]), body[i : i + 7])
                      for i in range(0, len(body), 7)) + b"0\r\n\r\n"
    if rng.random() < 0.6:
        pieces = damaged(rng, pieces, 3)
    return request_bytes(pieces, Content_Length=None, Transfer_Encoding="chunked")


KINDS = {
    "valid": lambda rng: request_bytes(dumps(valid_body(rng))),
    "one field": one_field,
    "json value": lambda rng: request_bytes(dumps(rng.choice(VALUES))),
    "damaged json": lambda rng: request_bytes(damaged(rng, dumps(valid_body(rng)))),
    "nested": lambda rng: request_bytes(rng.choice((b"[", b'{"a":', b'{"messages":[')) *
                                        rng.randint(1, 3000)),
    "other head": other_head,
    "damaged request": lambda rng: damaged(rng, request_bytes(dumps(valid_body(rng)))),
    "wrong length": lambda rng: request_bytes(dumps(valid_body(rng)),
                                              Content_Length=rng.randint(0, 400)),
    "chunked": chunked,
    "noise": lambda rng: rng.randbytes(rng.randint(1, 400)),
    "two at once": lambda rng: 2 * request_bytes(dumps(valid_body(rng)), Connection="keep-alive"),
    "too long": lambda rng: request_bytes(b'"' + b"x" * 1_200_000),
}
LIGHT = [kind for kind in KINDS if kind != "too long"]


# ---- clients -------------------------------------------------------------------------------------


def send_one(port, data, wait=3.0, hang_up=None):
    """What comes back for these bytes. hang_up: seconds after which the client just goes away."""
    received = b""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as client:
        with contextlib.suppress(OSError):  # refused early: the answer may be there all the same
            client.sendall(data)
        if hang_up is not None:
            time.sleep(hang_up)
            return b""
        client.settimeout(wait)
        while piece := client.recv(65536):
            received += piece
            if received.startswith(b"HTTP/1.1 4") and whole_body(received) is not None:
                break
    return received


def whole_body(response):
    """The body of the first response in these bytes, or None while it has not all come."""
    head, _, body = response.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    return body[: int(length[1])] if length and len(body) >= int(length[1]) else None


def complaint(response, valid=False):
    """What is wrong with a response, or None. No response at all is no fault, but to what is
    valid: noise earns none. What is valid is refused only while the queue is full, or where it
    is longer than the context.
    """
    served = status_of(response) in {"200", "429"} or b"context_length_exceeded" in response
    if valid and not served:
        return f"a valid request, and {response[:200]!r} for an answer"
    if not response:
        return None
    found = re.match(rb"HTTP/1\.1 (\d\d\d) ", response)
    if not found:
        return f"no HTTP: {response[:80]!r}"
    status = int(found[1])
    if status >= 500:
        return f"status {status}: {response[-200:]!r}"
    body = whole_body(response)
    if status >= 400 and body:
        try:
            assert isinstance(json.loads(body)["error"]["message"], str)
        except (ValueError, KeyError, TypeError, AssertionError):
            return f"status {status}, and not OpenAI's shape of an error: {body[:200]!r}"
    return None


def status_of(response):
    found = re.match(rb"HTTP/1\.1 (\d\d\d)", response)
    return found[1].decode() if found else "none"


def slow_clients(port, count, stop):
    """Open connections that send a byte of a request now and then, until `stop` is set; returns
    when each of them has been hung up on, or gives the number of those that were not."""
    request = request_bytes(dumps(valid_body(random.Random(0))), Connection="keep-alive")
    clients = []
    for i in range(count):
        client = socket.create_connection(("127.0.0.1", port), 5)
        client.setblocking(False)
        clients.append([client, request[: len(request) * (i % 3) // 3]])
        with contextlib.suppress(OSError):
            client.send(clients[-1][1])
    while clients and not stop.wait(0.2):
        for pair in list(clients):
            client, sent = pair
            try:
                if client.recv(4096) == b"":
                    raise ConnectionError
            except BlockingIOError:
                pass
            except OSError:
                client.close()
                clients.remove(pair)
                continue
            with contextlib.suppress(OSError):
                client.send(request[len(sent) % len(request) :][:1])
            pair[1] = sent + b"x"
    for client, _ in clients:
        client.close()
    return len(clients)


def fuzz(port, count, seed=0, kinds=tuple(LIGHT), threads=32):
    """(statuses, complaints) of count random requests, from a few clients at a time."""
    statuses, complaints, lock = Counter(), [], threading.Lock()

    def client(number):
        rng = random.Random(f"{seed} {number}")
        for i in range(number, count, threads):
            kind = rng.choice(kinds) if rng.random() > 0.002 else "too long"
            data = KINDS[kind](rng)
            hang_up = rng.random() * 0.02 if rng.random() < 0.1 else None
            valid = kind == "valid" and hang_up is None
            response = send_one(port, data, wait=30 if valid else 3, hang_up=hang_up)
            wrong = complaint(response, valid)
            with lock:
                statuses["hung up" if hang_up is not None else status_of(response)] += 1
                if wrong:
                    complaints.append(f"request {i} ({kind}): {wrong}\n  {data[:300]!r}")

    workers = [threading.Thread(target=client, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return statuses, complaints


def health(port):
    response = send_one(port, request_bytes(b"", "GET", "/health"))
    return json.loads(response.partition(b"\r\n\r\n")[2])


def wait_until_idle(port, seconds=10):
    """Health once no row is active or waiting; whatever it is when the time is over."""
    end = time.monotonic() + seconds
    while True:
        now = health(port)
        if (now["active_rows"], now["queue_depth"]) == (0, 0) or time.monotonic() > end:
            return now
        time.sleep(0.05)


# ---- a server to throw at ------------------------------------------------------------------------


def write_stage(folder, model, tokenizer):
    """A checkpoint as load_checkpoint reads it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    about = {"model": vars(model.config), "tokenizer_sha256": tokenizer.sha256}
    (folder / "config.json").write_text(json.dumps(about), "utf-8")


def write_byte_tokenizer(folder, serve):
    """A tokenizer of the 256 bytes and the specials, in the files of 11_tokenizer.py."""
    import base64

    folder.mkdir(parents=True, exist_ok=True)
    lines = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    pattern, specials = r"(?s:.)", {name: 256 + i for i, name in enumerate(serve.SPECIAL_TOKENS)}
    sha256 = serve.Tokenizer.identity(lines, pattern, specials)
    (folder / "tokenizer.tiktoken").write_bytes(lines)
    (folder / "config.json").write_text(
        json.dumps({"pattern": pattern, "special_tokens": specials, "sha256": sha256}), "utf-8")
    return serve.Tokenizer.from_dir(folder)


@dataclass
class Config:
    requests: int = 10_000
    """How many."""
    url: str = ""
    """A server that runs already, on this machine; empty starts one."""
    slow: int = 60
    """Slow clients beside them, on open connections."""
    seed: int = 0
    """Of the requests."""


def start_server(folder, *flags):
    """(process, port) of a server on a small model with random weights."""
    serve = load("16_serve")
    tokenizer = write_byte_tokenizer(folder / "tokenizer", serve)
    torch.manual_seed(0)
    model = serve.GPT(serve.GPTConfig(64, tokenizer.get_vocab_size(), 1, 2, 2, 32))
    model.lm_head.weight.data.normal_()
    write_stage(folder / "rl", model, tokenizer)
    process = subprocess.Popen(
        [sys.executable, script_path("16_serve"), "--data-dir", folder, "--port", "0",
         "--no-log-requests", *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding="utf-8", env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in process.stdout:
        found = re.search(r"chat at http://127\.0\.0\.1:(\d+)", line)
        if found:
            return process, int(found[1])
    raise SystemExit("the server did not start")


def main(argv=None):
    config = tyro.cli(Config, args=argv, description=__doc__)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        process, port = None, urlsplit(config.url).port
        if not config.url:
            process, port = start_server(Path(folder), "--patience", "1")
            stack.callback(process.wait)
            stack.callback(process.terminate)
        fuzz(port, 300, "warm up")
        idle, about = wait_until_idle(port), psutil.Process(process.pid) if process else None
        before = (about.memory_info().rss / 1e6, about.num_fds()) if about else (0, 0)
        print(f"{config.requests} requests, {config.slow} slow clients; idle server: {idle}")

        began, stop, left = time.monotonic(), threading.Event(), []
        slow = threading.Thread(target=lambda: left.append(slow_clients(port, config.slow, stop)))
        slow.start()
        statuses, complaints = fuzz(port, config.requests, config.seed)
        seconds = time.monotonic() - began
        slow.join(timeout=max(0.0, 15 - seconds))  # they are to be hung up on, all of them
        stop.set()
        slow.join()
        idle = wait_until_idle(port)
        time.sleep(1)
        after = (about.memory_info().rss / 1e6, about.num_fds()) if about else (0, 0)
        answer = send_one(port, request_bytes(dumps(
            {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4})))

        if (idle["active_rows"], idle["queue_depth"]) != (0, 0):
            complaints.append(f"rows are left behind: {idle}")
        if status_of(answer) != "200":
            complaints.append(f"afterwards it does not answer: {answer[:200]!r}")
        if left != [0]:
            complaints.append(f"slow clients still connected: {left}")
        if after[0] - before[0] > 100 or after[1] - before[1] > 3:
            complaints.append(f"leak: MB and file descriptors {before} -> {after}")
        print(f"statuses: {dict(sorted(statuses.items()))}")
        print(f"resident {before[0]:.0f} -> {after[0]:.0f} MB, file descriptors {before[1]} -> "
              f"{after[1]}, {config.requests / seconds:.0f} requests/s")
        print("\n".join(complaints[:20]) or "no complaint")
        print(f"result: complaints over random requests - -> {len(complaints)} "
              f"(n={config.requests})")
        return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
