"""Challenge 1 against a real HTTP server on 127.0.0.1 that misbehaves on command.

The oracle is the server's own copy: whatever happened on the way, a file under a final name has the
bytes of one version of it. Waits are written down instead of slept, and timeouts are short, where
the version under test takes `sleep` and `config`.
"""
import contextlib
import hashlib
import inspect
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import load

download = load("01_download")
ACCEPTED = inspect.signature(download.download_shard).parameters
if "sleep" not in ACCEPTED and hasattr(download, "time"):  # a version that sleeps for real
    download.time = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
SCRIPT = download.__file__
NAME = "shard_00000.parquet"
HTML = b"<!DOCTYPE html><html><body>Please log in to this network.</body></html>" * 20


# ---- the server ----------------------------------------------------------------------------------


def make_shard(seed, documents=24):
    """The bytes of a parquet file; all seeds give the same length, so a glued file fits by size."""
    rng = random.Random(seed)
    texts = ["".join(rng.choices("abcdefgh", k=500)) for _ in range(documents)]
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), sink, row_group_size=7, compression="none",
                   use_dictionary=False, write_statistics=False)
    return sink.getvalue()


SHARDS = [make_shard(seed) for seed in range(4)]
assert len({len(shard) for shard in SHARDS}) == 1


class Folder:
    """One folder on the server: its files, what it will do wrong next, and who asked for what."""

    def __init__(self, files, faults=()):
        self.files = dict(files)
        self.faults = list(faults)  # one is used up per GET, then all is well
        self.requests = []  # SimpleNamespace(method, name, range, if_range, encoding, sent)
        self.validators = ("ETag",)
        self.linked = False  # announce the sha256, as the hub does
        self.redirect_to = None


def good(handler, folder, body):
    handler.answer(folder, body)


def status(code, **headers):
    def fault(handler, folder, body):
        handler.start(code, **{"Content-Length": "0"},
                      **{key.replace("_", "-"): value for key, value in headers.items()})
    return fault


def cut(fraction):
    """The right headers, a part of the body, then the connection closes."""
    def fault(handler, folder, body):
        handler.answer(folder, body, keep=fraction)
    return fault


def stall(fraction):
    """The same, but the connection stays open and silent."""
    def fault(handler, folder, body):
        handler.answer(folder, body, keep=fraction)
        handler.server.closing.wait(3)
    return fault


def reset(fraction):
    """The same, but the connection breaks (RST)."""
    def fault(handler, folder, body):
        handler.answer(folder, body, keep=fraction)
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    return fault


def lie(extra):
    """A Content-Length that is wrong by `extra`, in a first answer or in the rest of a resume."""
    def fault(handler, folder, body):
        handler.answer(folder, body, extra=extra)
    return fault


def hang_up(handler, folder, body):
    pass


def html(handler, folder, body):
    handler.start(200, ETag='"html"', **{"Content-Length": str(len(HTML))})
    handler.send(HTML)


def html_cut(handler, folder, body):
    handler.start(200, ETag='"html"', **{"Content-Length": str(len(body))})
    handler.send(HTML)


def ignore_range(handler, folder, body):
    handler.answer(folder, body, ranges=False)


def ignore_if_range(handler, folder, body):
    """The rest of whatever the file is now, for a client that holds the start of something else."""
    handler.answer(folder, body, conditional=False)


def wrong_range(shift):
    """206 whose bytes (and honest Content-Range) are not those that were asked for."""
    def fault(handler, folder, body):
        handler.answer(folder, body, shift=shift)
    return fault


def forced_206(handler, folder, body):
    """The end of the file with status 206, whoever asked for whatever."""
    half = len(body) // 2
    handler.start(206, **{"Content-Length": str(len(body) - half),
                          "Content-Range": f"bytes {half}-{len(body) - 1}/{len(body)}",
                          **handler.version_headers(folder, body)})
    handler.send(body[half:])


def unsatisfiable(handler, folder, body):
    handler.start(416, **{"Content-Range": f"bytes */{len(body)}", "Content-Length": "0"})


def zipped(handler, folder, body):
    handler.start(200, ETag='"zip"', **{"Content-Encoding": "gzip", "Content-Length": "30"})
    handler.send(b"\x1f\x8b" + b"x" * 28)


def shorter(handler, folder, body):
    """An honest answer with a file that somebody truncated on the server."""
    handler.answer(folder, body[:-700])


def holey(handler, folder, body):
    """Bytes are missing in the middle, both ends and the length are right."""
    handler.answer(folder, body[:3000] + body[3500:])


def no_length(fraction):
    def fault(handler, folder, body):
        handler.start(200)
        handler.send(body[:int(len(body) * fraction)])
    return fault


def change(then):
    """From this request on the file is another version, of the same length."""
    def fault(handler, folder, body):
        name = handler.name()
        versions = SHARDS[:3]
        folder.files[name] = versions[(versions.index(body) + 1) % 3]
        then(handler, folder, folder.files[name])
    return fault


def garble(handler, folder, body):
    """One byte in the middle is wrong: only the announced sha256 can tell."""
    middle = len(body) // 2
    handler.answer(folder, body, payload=body[:middle] + bytes([body[middle] ^ 1])
                   + body[middle + 1:])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def name(self):
        return self.path.rsplit("/", 1)[1]

    def start(self, code, **headers):
        self.send_response(code)
        for key, value in {"Connection": "close", **headers}.items():
            self.send_header(key, value)
        self.end_headers()

    def send(self, body):
        self.record.sent += len(body)
        if self.command == "GET":
            self.wfile.write(body)

    def version_headers(self, folder, body):
        digest = hashlib.sha256(body).hexdigest()
        known = {"ETag": f'"{digest[:8]}"', "Weak": f'W/"{digest[:8]}"',
                 "Last-Modified": formatdate(int(digest[:7], 16), usegmt=True)}
        headers = {"ETag" if key == "Weak" else key: known[key] for key in folder.validators}
        return headers | ({"X-Linked-Etag": f'"{digest}"'} if folder.linked else {})

    def answer(self, folder, body, keep=1.0, extra=0, ranges=True, conditional=True, shift=0,
               payload=None):
        """What a correct server does; each argument but the first two is a way to be wrong."""
        headers, begin, code = self.version_headers(folder, body), 0, 200
        asked, if_range = self.headers.get("Range"), self.headers.get("If-Range")
        fits = not conditional or if_range in headers.values() and not if_range.startswith("W")
        if ranges and asked and fits:
            begin = int(asked.removeprefix("bytes=").removesuffix("-"))
            if begin >= len(body):
                return unsatisfiable(self, folder, body)
            begin, code = max(0, begin + shift), 206
            headers["Content-Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
        rest = (payload or body)[begin:]
        self.start(code, **headers, **{"Content-Length": str(len(rest) + extra)})
        return self.send(rest[:int(len(rest) * keep)])

    def do_GET(self):
        folder = self.server.folders[self.path.rsplit("/", 1)[0]]
        self.record = SimpleNamespace(method=self.command, name=self.name(), sent=0,
                                      range=self.headers.get("Range"),
                                      if_range=self.headers.get("If-Range"),
                                      encoding=self.headers.get("Accept-Encoding"))
        folder.requests.append(self.record)
        self.close_connection = True
        if folder.redirect_to:
            return self.start(302, Location=folder.redirect_to + "/" + self.name(),
                              **{"Content-Length": "0"}, **self.version_headers(
                                  folder, folder.files[self.name()]))
        body = folder.files.get(self.name())
        if body is None:
            return status(404)(self, folder, body)
        fault = folder.faults.pop(0) if folder.faults and self.command == "GET" else good
        with contextlib.suppress(ConnectionError):  # the client may have left
            fault(self, folder, body)

    do_HEAD = do_GET


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


@pytest.fixture(scope="module")
def server():
    server = Server(("127.0.0.1", 0), Handler)
    server.folders, server.closing = {}, threading.Event()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def mirror(server):
    """mirror(files, faults, ...) opens a folder on the server; it has .url and .requests."""
    def make(files=None, faults=(), **settings):
        folder = Folder(files or {NAME: SHARDS[0]}, faults)
        vars(folder).update(settings)
        path = settings.get("path") or f"/{len(server.folders)}"
        server.folders[path] = folder
        folder.url = f"http://127.0.0.1:{server.server_port}{path}"
        return folder
    return make


def fetch(url, target, index=0, waits=None, **settings):
    """download_shard with short clocks and waits that are written down instead of slept."""
    options = {}
    if "sleep" in ACCEPTED:
        options["sleep"] = (waits if waits is not None else []).append
    elif waits is not None:
        pytest.skip("this version takes no `sleep`, so its waits cannot be seen")
    if "config" in ACCEPTED:
        defaults = {"attempts": 6, "timeout": 0.4, "stall_seconds": 5.0}
        options["config"] = download.Config(**{**defaults, **settings})
    elif settings:
        pytest.skip("this version takes no `config`, so it cannot be set up for this")
    return Path(download.download_shard(index, target, base_url=url, **options))


def if_possible(**settings):
    return settings if "config" in ACCEPTED else {}


def need(name):
    """Skip a test of something that a learner's version does not have, such as a command line."""
    if not hasattr(download, name):
        pytest.skip(f"this version has no `{name}`")


def visible(folder):
    """What a reader of the folder takes for shards."""
    return sorted(p.name for p in Path(folder).glob("*.parquet") if not p.name.startswith("."))


def leftovers(folder):
    return sorted(p.name for p in Path(folder).iterdir() if p.name.startswith("."))


def failure(function, *args, **kwargs):
    """The message of the exception that the call must raise."""
    try:
        function(*args, **kwargs)
    except Exception as error:  # a learner's version names its exceptions itself
        return str(error)
    pytest.fail("no exception was raised")


# ---- one shard -----------------------------------------------------------------------------------


def test_a_healthy_server_is_asked_once_and_the_bytes_are_its_own(mirror, tmp_path):
    folder = mirror()
    path = fetch(folder.url, tmp_path)
    assert Path(path) == tmp_path / NAME and path.read_bytes() == SHARDS[0]
    assert len(folder.requests) == 1 and leftovers(tmp_path) == []


def test_a_complete_shard_costs_no_request(mirror, tmp_path):
    folder = mirror()
    (tmp_path / NAME).write_bytes(SHARDS[0])
    assert fetch(folder.url, tmp_path) == tmp_path / NAME
    assert folder.requests == []


@pytest.mark.parametrize("damage", [
    lambda b: b[:-1], lambda b: b[:len(b) // 2], lambda b: b"", lambda b: HTML,
    lambda b: b[:3000] + b[3500:], lambda b: b"PAR1" + bytes(200) + b"PAR1"])
def test_a_damaged_file_under_the_final_name_is_fetched_again(mirror, tmp_path, damage):
    (tmp_path / NAME).write_bytes(damage(SHARDS[0]))
    assert fetch(mirror().url, tmp_path).read_bytes() == SHARDS[0]


@pytest.mark.parametrize("fault", [
    cut(0.5), cut(0.0), cut(0.999), stall(0.5), reset(0.5), lie(+100), lie(-100), hang_up, html,
    html_cut, zipped, shorter, holey, no_length(0.5), forced_206, unsatisfiable, status(500),
    status(503), status(429, Retry_After="1"), status(408)])
def test_after_one_failure_of_any_kind_the_next_attempts_succeed(mirror, tmp_path, fault):
    folder = mirror(faults=[fault])
    assert fetch(folder.url, tmp_path).read_bytes() == SHARDS[0]
    assert 2 <= len(folder.requests) <= 3 and leftovers(tmp_path) == []


@pytest.mark.parametrize("fault", [
    cut(0.5), stall(0.1), lie(+100), lie(-100), hang_up, html, zipped, shorter, holey,
    no_length(0.5), forced_206, status(500)])
def test_a_failure_that_never_ends_leaves_nothing_under_the_final_name(mirror, tmp_path, fault):
    folder = mirror(faults=[fault] * 50)
    failure(fetch, folder.url, tmp_path, **if_possible(attempts=3, timeout=0.2))
    assert visible(tmp_path) == []
    if "config" in ACCEPTED:
        assert len(folder.requests) == 3


@pytest.mark.parametrize("code", [404, 403, 401, 410])
def test_a_closed_door_is_not_knocked_at_twice(mirror, tmp_path, code):
    folder, waits = mirror(faults=[status(code)] * 9), []
    message = failure(fetch, folder.url, tmp_path, waits=waits)
    assert str(code) in message and folder.url in message
    assert len(folder.requests) == 1 and waits == []


def test_a_log_in_page_with_status_200_is_named_in_the_message(mirror, tmp_path):
    message = failure(fetch, mirror(faults=[html] * 9).url, tmp_path)
    assert "not a parquet file" in message and "<!DOCTYPE html" in message


def test_a_compressed_answer_is_named_as_such_and_was_not_asked_for(mirror, tmp_path):
    folder = mirror(faults=[zipped] * 9)
    assert "compressed" in failure(fetch, folder.url, tmp_path)
    assert {record.encoding for record in folder.requests} == {"identity"}


def test_a_table_without_text_is_refused(mirror, tmp_path):
    sink = io.BytesIO()
    pq.write_table(pa.table({"words": ["a", "b"]}), sink)
    message = failure(fetch, mirror({NAME: sink.getvalue()}).url, tmp_path, attempts=1)
    assert "`text`" in message and "words" in message and visible(tmp_path) == []


def test_one_wrong_byte_is_caught_by_the_announced_sha256(mirror, tmp_path):
    folder = mirror(faults=[garble], linked=True)
    assert fetch(folder.url, tmp_path).read_bytes() == SHARDS[0]
    folder = mirror({"shard_00001.parquet": SHARDS[1]}, faults=[garble] * 9, linked=True)
    assert "sha256" in failure(fetch, folder.url, tmp_path, index=1)
    assert visible(tmp_path) == [NAME]


def test_the_hash_on_a_redirect_counts_and_a_resume_follows_redirects(mirror, tmp_path):
    storage = mirror(faults=[garble, cut(0.5)])
    hub = mirror(redirect_to=storage.url, linked=True)
    assert fetch(hub.url, tmp_path).read_bytes() == SHARDS[0]
    assert [bool(r.range) for r in storage.requests] == [False, False, True]


# ---- waiting -------------------------------------------------------------------------------------


def test_waits_are_drawn_from_a_range_that_doubles(mirror, tmp_path):
    """40 draws from U(0, c) have mean c / 2 within 5 standard errors of c / sqrt(12 * 40)."""
    runs = []
    for _ in range(40):
        waits = []
        failure(fetch, mirror(faults=[status(500)] * 9).url, tmp_path, waits=waits, attempts=6)
        runs.append(waits)
    assert {len(waits) for waits in runs} == {5}  # none after the last attempt
    for k in range(5):
        drawn, ceiling = [waits[k] for waits in runs], 2.0**k
        assert all(0 <= wait <= ceiling for wait in drawn)
        assert abs(sum(drawn) / 40 - ceiling / 2) < 5 * ceiling / (12 * 40) ** 0.5


def test_the_doubling_ends_at_the_longest_wait(mirror, tmp_path):
    waits = []
    failure(fetch, mirror(faults=[status(500)] * 20).url, tmp_path, waits=waits, attempts=12,
            longest_wait=3.0)
    assert len(waits) == 11 and max(waits) <= 3.0


def test_retry_after_in_seconds_and_as_a_date_is_honoured(mirror, tmp_path):
    waits = []
    faults = [status(429, Retry_After="90"), status(503, Retry_After=formatdate(time.time() + 120)),
              status(503, Retry_After="soon"), status(503, Retry_After=formatdate(0))]
    fetch(mirror(faults=faults).url, tmp_path, waits=waits)
    assert waits[0] == 90 and 110 < waits[1] <= 120
    assert waits[2] <= 4 and waits[3] <= 8  # nonsense and the past leave the ordinary backoff


def test_a_server_that_asks_for_an_hour_is_left_alone(mirror, tmp_path):
    folder, waits = mirror(faults=[status(429, Retry_After="3600")] * 9), []
    assert "3600 s" in failure(fetch, folder.url, tmp_path, waits=waits)
    assert len(folder.requests) == 1 and waits == []


def drip(headers_too):
    """A byte every 20 ms for 4 s: never silent for long, and never done."""
    def fault(handler, folder, body):
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nX: " % len(body)
        if not headers_too:
            head += b"\r\n\r\n"
            handler.wfile.write(head)
        for byte in (head if headers_too else b"") + b"P" * 200:
            handler.wfile.write(bytes([byte]))
            time.sleep(0.02)
    return fault


@pytest.mark.parametrize("headers_too", [False, True])
def test_a_server_that_drips_bytes_does_not_hold_us_for_ever(mirror, tmp_path, headers_too):
    began = time.monotonic()
    path = fetch(mirror(faults=[drip(headers_too)]).url, tmp_path, timeout=5.0, stall_seconds=0.4)
    assert path.read_bytes() == SHARDS[0] and time.monotonic() - began < 3


# ---- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("validators", [("ETag",), ("Last-Modified",), ("ETag", "Last-Modified"),
                                        ("Weak", "Last-Modified")])
def test_a_resume_asks_for_the_missing_bytes_of_that_version_only(mirror, tmp_path, validators):
    folder = mirror(faults=[cut(0.6), cut(0.5)], validators=validators)
    fetch(folder.url, tmp_path)
    first, second, third = folder.requests
    assert first.range is None and second.range == f"bytes={first.sent}-"
    assert second.if_range and not second.if_range.startswith("W/")
    assert first.sent + second.sent + third.sent == len(SHARDS[0])  # no byte twice
    assert (tmp_path / NAME).read_bytes() == SHARDS[0]


@pytest.mark.parametrize("validators", [(), ("Weak",)])
def test_without_a_strong_validator_nothing_is_resumed(mirror, tmp_path, validators):
    folder = mirror(faults=[cut(0.6)], validators=validators)
    assert fetch(folder.url, tmp_path).read_bytes() == SHARDS[0]
    assert [r.range for r in folder.requests] == [None, None]


def test_a_later_run_resumes_what_an_earlier_one_left(mirror, tmp_path):
    folder = mirror(faults=[cut(0.7)])
    failure(fetch, folder.url, tmp_path, attempts=1)
    assert visible(tmp_path) == [] and leftovers(tmp_path) != []
    fetch(folder.url, tmp_path)
    assert folder.requests[1].sent < 0.31 * len(SHARDS[0]) and leftovers(tmp_path) == []


def test_a_file_that_changes_between_attempts_is_never_glued(mirror, tmp_path):
    for index, fault in enumerate([good, cut(0.9), ignore_range, wrong_range(-50), forced_206]):
        name = f"shard_{index:05d}.parquet"
        folder = mirror({name: SHARDS[0]}, [cut(0.5), change(fault)])
        assert fetch(folder.url, tmp_path, index).read_bytes() == SHARDS[1]


def test_a_server_that_ignores_if_range_is_found_out_by_its_etag(mirror, tmp_path):
    folder = mirror(faults=[cut(0.5), change(ignore_if_range)])
    assert fetch(folder.url, tmp_path).read_bytes() == SHARDS[1]


@pytest.mark.parametrize("shift", [-100, -1, 1, 100])
def test_a_206_with_another_range_than_asked_is_refused(mirror, tmp_path, shift):
    folder = mirror(faults=[cut(0.5), wrong_range(shift)])
    assert fetch(folder.url, tmp_path).read_bytes() == SHARDS[0]
    assert folder.requests[2].range is None  # from the beginning


def test_a_server_that_ignores_range_sends_the_whole_file_again(mirror, tmp_path):
    folder = mirror(faults=[cut(0.5), ignore_range])
    assert fetch(folder.url, tmp_path).read_bytes() == SHARDS[0] and len(folder.requests) == 2


def test_a_partial_file_of_another_address_is_not_resumed(mirror, tmp_path):
    failure(fetch, mirror(faults=[cut(0.5)]).url, tmp_path, attempts=1)
    other = mirror({NAME: SHARDS[1]})
    assert fetch(other.url, tmp_path).read_bytes() == SHARDS[1]
    assert other.requests[0].range is None


def test_death_between_the_last_byte_and_the_rename_costs_no_request(mirror, tmp_path, monkeypatch):
    folder, replace = mirror(), os.replace

    def die(source, target):
        if Path(target).name == NAME:
            raise KeyboardInterrupt
        replace(source, target)
    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        fetch(folder.url, tmp_path)
    assert visible(tmp_path) == []
    monkeypatch.setattr(os, "replace", replace)
    assert fetch(folder.url, tmp_path).read_bytes() == SHARDS[0] and len(folder.requests) == 1


def test_the_bytes_are_flushed_to_the_disk_before_they_get_the_final_name(
        mirror, tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda source, target: (events.append(Path(target).name),
                                                               replace(source, target)))
    path = fetch(mirror().url, tmp_path)
    assert events.index(path.stat().st_ino) < events.index(NAME)


# ---- any weather ---------------------------------------------------------------------------------


def random_fault(rng, linked):
    part = rng.choice([0.0, rng.random(), rng.random(), 0.9999])
    kinds = [cut(part), reset(part), lie(rng.randint(1, 2000)), lie(-rng.randint(1, 2000)), hang_up,
             html, html_cut, zipped, shorter, holey, no_length(part), forced_206, unsatisfiable,
             ignore_range, wrong_range(rng.randint(-300, 300)), status(500), status(502),
             status(503, Retry_After="2"), status(429, Retry_After=formatdate(0)), cut(part),
             cut(part), change(cut(part)), change(good), change(forced_206),
             change(ignore_if_range)]
    kinds += [stall(part)] if rng.random() < 0.5 else []
    return rng.choice(kinds + ([garble] if linked else []))


def test_in_300_random_fault_schedules_no_bad_file_ever_gets_a_final_name(mirror, tmp_path):
    """Each schedule twice: with few attempts anything may happen but a bad file; then, with enough
    of them to outlast the faults, the download resumes what the first left, and must succeed."""
    versions = {hashlib.sha256(shard).hexdigest() for shard in SHARDS[:3]}

    def schedule(seed):
        rng = random.Random(seed)
        linked = rng.random() < 0.3
        faults = [random_fault(rng, linked) for _ in range(rng.randint(1, 7))]
        folder = mirror({NAME: SHARDS[seed % 3]}, faults, linked=linked, path=f"/weather/{seed}",
                        validators=rng.choice([("ETag",), ("ETag",), ("Last-Modified",), ("Weak",),
                                               ()]))
        target = tmp_path / str(seed)
        outcome = "whole"
        with contextlib.suppress(Exception):
            fetch(folder.url, target, **if_possible(attempts=rng.randint(1, 4)))
        if visible(target):
            digest = hashlib.sha256((target / NAME).read_bytes()).hexdigest()
            assert digest in versions, f"seed {seed}: a bad file under a final name"
        else:
            outcome = "failed first"
        fetch(folder.url, target, **if_possible(attempts=20))
        digest = hashlib.sha256((target / NAME).read_bytes()).hexdigest()
        assert digest in versions and leftovers(target) == [], f"seed {seed}"
        return outcome

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(schedule, range(300)))
    assert outcomes.count("whole") > 60 and outcomes.count("failed first") > 60  # both were tried


def test_threads_that_want_the_same_shard_share_one_download(mirror, tmp_path):
    folder = mirror(faults=[cut(0.3), cut(0.3)])
    with ThreadPoolExecutor(6) as pool:
        paths = list(pool.map(lambda _: fetch(folder.url, tmp_path), range(6)))
    assert {path.read_bytes() for path in paths} == {SHARDS[0]}
    assert len(folder.requests) == 3


# ---- processes that die, and processes that compete ----------------------------------------------


def spawn(data_dir, url, *flags):
    """The script as a process of its own, with short waits."""
    need("main")
    return subprocess.Popen([sys.executable, SCRIPT, "--data-dir", str(data_dir), "--base-url", url,
                             "--base-delay", "0.01", *flags], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def wait_for_half(data_dir, process):
    """Until half a shard lies in the folder under some temporary name."""
    deadline = time.monotonic() + 20
    while not any(path.stat().st_size >= len(SHARDS[0]) // 2 - 1 for path in data_dir.glob(".*")):
        assert process.poll() is None and time.monotonic() < deadline, "the download did not begin"
        time.sleep(0.02)


def test_a_second_run_after_kill_9_fetches_only_the_rest(mirror, tmp_path):
    folder = mirror(faults=[stall(0.5)])
    with spawn(tmp_path, folder.url, "--num-shards", "1") as process:
        wait_for_half(tmp_path, process)
        process.kill()
    assert visible(tmp_path) == []
    assert fetch(folder.url, tmp_path).read_bytes() == SHARDS[0]
    assert folder.requests[-1].sent <= len(SHARDS[0]) // 2 + 1


def test_ctrl_c_ends_at_once_keeps_the_partial_file_and_says_how_to_go_on(mirror, tmp_path):
    folder = mirror(faults=[stall(0.5)])
    with spawn(tmp_path, folder.url, "--num-shards", "1") as process:
        wait_for_half(tmp_path, process)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    assert process.returncode == 130 and time.monotonic() - began < 2.5
    assert "go on with: python edu/01_download.py" in errors and "--num-shards 1" in errors
    assert "Traceback" not in errors and visible(tmp_path) == []
    fetch(folder.url, tmp_path)
    assert folder.requests[-1].range and folder.requests[-1].sent <= len(SHARDS[0]) // 2 + 1


def test_processes_that_want_the_same_shards_share_one_download(mirror, tmp_path):
    files = {f"shard_{i:05d}.parquet": SHARDS[i] for i in range(3)}
    folder = mirror(files, [stall(0.3), cut(0.5), cut(0.5), cut(0.2), reset(0.5)])
    flags = ("--num-shards", "3", "--timeout", "0.5")
    processes = [spawn(tmp_path, folder.url, *flags) for _ in range(3)]
    for process in processes:
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
    assert {path.name: path.read_bytes() for path in tmp_path.glob("shard_*")} == files
    assert len(folder.requests) == 8  # 3 shards and 5 faults: nobody fetched twice
    assert leftovers(tmp_path) == [".shards_from"]


# ---- the command line ----------------------------------------------------------------------------


FOUR = {f"shard_{i:05d}.parquet": SHARDS[i] for i in range(4)}


@pytest.fixture
def script(tmp_path, capsys):
    """script(flags...) runs main on tmp_path/data; returns (exit code, output, errors)."""
    def run(*flags):
        need("main")
        capsys.readouterr()
        try:
            code = download.main(["--data-dir", str(tmp_path / "data"), "--base-delay", "0.001",
                                  "--timeout", "0.4", *flags])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return run


@pytest.fixture
def data(tmp_path):
    return tmp_path / "data"


@pytest.mark.parametrize("flags, expected", [((), 2), (("--num-shards", "3"), 3),
                                             (("--num-shards", "0"), 4)])
def test_the_number_of_shards_is_two_or_the_given_one_or_all(script, data, mirror, flags, expected):
    code, out, err = script("--base-url", mirror(FOUR).url, *flags)
    assert code == 0 and err == ""
    assert visible(data) == sorted(FOUR)[:expected]
    assert all((data / name).read_bytes() == FOUR[name] for name in visible(data))


def test_the_report_has_the_house_shape(script, data, mirror):
    url = mirror(FOUR).url
    _, out, _ = script("--base-url", url, "--num-shards", "2")
    lines, size = out.splitlines(), len(SHARDS[0]) / 1e6
    assert lines[0] == f"01 download - {url} - 4 workers"
    assert lines[-4:] == [f"wrote {data / 'shard_00000.parquet'} ({size:.1f} MB)",
                          f"wrote {data / 'shard_00001.parquet'} ({size:.1f} MB)",
                          f"result: shards on disk 0 -> 2 (n={2 * size:.1f} MB)",
                          "next: python edu/02_dataloader.py"]
    _, out, _ = script("--base-url", url, "--num-shards", "0")
    assert "shards: 4 wanted, 2 already here, 2 to fetch" in out
    assert "shard_00001.parquet was validation" in out  # the last shard on disk is another one now
    assert "shards on disk 2 -> 4" in out


def test_a_second_run_asks_the_server_for_nothing(script, mirror):
    folder = mirror(FOUR)
    script("--base-url", folder.url)
    asked = len(folder.requests)
    code, out, _ = script("--base-url", folder.url)
    assert code == 0 and len(folder.requests) == asked and "2 already here, 0 to fetch" in out


def test_one_shard_is_possible_with_a_word_about_validation(script, mirror):
    code, out, _ = script("--base-url", mirror(FOUR).url, "--num-shards", "1")
    assert code == 0 and "validation" in out


def test_a_shard_that_fails_is_named_and_the_others_arrive(script, data, mirror):
    files = {name: body for name, body in FOUR.items() if "2" not in name}
    folder = mirror({**files, "shard_00002.parquet": HTML})
    code, out, err = script("--base-url", folder.url, "--num-shards", "4")
    assert code == 1 and visible(data) == sorted(files)
    assert "could not be fetched: 1" in err and "shard_00002.parquet: gave up after 6" in err
    assert "not a parquet file" in err and f"--base-url {folder.url} --num-shards 4" in err
    assert "result: shards on disk 0 -> 3" in out and "next:" not in out
    folder.files, folder.requests[:] = dict(FOUR), []
    assert script("--base-url", folder.url, "--num-shards", "4")[0] == 0
    assert visible(data) == sorted(FOUR)
    assert {record.name for record in folder.requests} == {"shard_00002.parquet"}


def test_more_shards_than_there_are_is_a_404_with_its_address(script, data, mirror):
    folder = mirror(FOUR)
    code, _, err = script("--base-url", folder.url, "--num-shards", "5")
    assert code == 1 and f"404 Not Found for {folder.url}/shard_00004.parquet" in err
    assert visible(data) == sorted(FOUR)


def test_without_a_network_the_default_says_why_and_what_works_offline(script, data, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, _, err = script("--attempts", "2")
    assert code == 1 and "Connection refused" in err and visible(data) == []
    assert "00_tiny_world.py" in err and "--base-url mirror" in err and "Traceback" not in err


def test_with_the_network_down_the_rest_of_many_shards_is_not_tried(script, data):
    code, _, err = script("--base-url", "http://127.0.0.1:9/x", "--num-shards", "700",
                          "--attempts", "2")
    assert code == 1 and "could not be fetched: 700" in err and "Connection refused" in err
    assert "... shard_00699.parquet" in err and "not tried" in err and err.count("\n") < 40


def test_hf_endpoint_names_another_hub(script, data, mirror, monkeypatch, server):
    mirror(FOUR, path="/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    code, out, _ = script()
    assert code == 0 and visible(data) == sorted(FOUR)[:2]
    assert "disk: about 200.0 MB to fetch" in out


def test_a_proxy_setting_does_not_stand_before_127_0_0_1(script, mirror, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert script("--base-url", mirror(FOUR).url)[0] == 0


@pytest.mark.parametrize("form", ["path", "file://", "inside the data folder"])
def test_a_folder_is_copied_whole_and_left_as_it_was(script, data, tmp_path, form):
    source = data / "mirror" if form == "inside the data folder" else tmp_path / "my shards"
    source.mkdir(parents=True)
    for name, body in FOUR.items():
        (source / name).write_bytes(body)
        (source / name).chmod(0o444)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in source.iterdir()}
    url = {"path": str(source), "file://": source.as_uri()}.get(form, "mirror")
    code, out, _ = script("--base-url", url)
    assert code == 0 and "shards on disk 0 -> 4" in out
    assert {name: (data / name).read_bytes() for name in visible(data)} == FOUR
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in source.iterdir()} == before


def test_a_damaged_shard_in_a_folder_is_not_copied(script, data, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / NAME).write_bytes(SHARDS[0])
    (source / "shard_00001.parquet").write_bytes(SHARDS[1][:-9])
    code, _, err = script("--base-url", str(source))
    assert code == 1 and "shard_00001.parquet: parquet footer" in err and visible(data) == [NAME]


def test_two_corpora_are_never_mixed_in_one_folder(script, data, mirror, tmp_path):
    tiny, other = mirror(FOUR), mirror(FOUR)
    assert script("--base-url", tiny.url)[0] == 0
    code, _, err = script("--base-url", other.url)
    assert code == 2 and tiny.url in err and other.url in err and "rm " in err
    assert other.requests == []
    for path in data.glob("shard_*"):
        path.unlink()
    assert script("--base-url", other.url)[0] == 0


def test_a_folder_that_was_made_anew_is_not_mixed_with_its_older_self(script, data):
    """Another seed of the tiny world: same names, same number, other text."""
    (data / "mirror").mkdir(parents=True)
    for name, body in FOUR.items():
        (data / "mirror" / name).write_bytes(body)
    assert script("--base-url", "mirror")[0] == script("--base-url", "mirror")[0] == 0
    (data / "mirror" / NAME).write_bytes(SHARDS[1])
    code, _, err = script("--base-url", "mirror")
    assert code == 2 and f"is not the {NAME} that" in err and "rm " in err
    assert (data / NAME).read_bytes() == SHARDS[0]
    (data / NAME).write_bytes(b"cut short")  # damaged is another matter: that is mended
    assert script("--base-url", "mirror")[0] == 0
    assert (data / NAME).read_bytes() == SHARDS[1]


def test_the_same_name_on_another_port_or_as_a_folder_is_the_same_data(script, data, mirror):
    folder = mirror(FOUR, path="/mirror")
    script("--base-url", folder.url)
    assert script("--base-url", "http://127.0.0.1:9/mirror/")[0] == 0  # both are here: no request
    (data / "mirror").mkdir()
    (data / "mirror" / NAME).write_bytes(SHARDS[0])
    assert script("--base-url", "mirror")[0] == 0


def test_shards_that_cannot_be_counted_are_a_failure_with_its_reason(script, data):
    code, _, err = script("--base-url", "http://127.0.0.1:9/x", "--num-shards", "0")
    assert code == 1 and "cannot count the shards" in err and "Connection refused" in err


@pytest.mark.parametrize("flags, words", [
    (("--num-shards", "3", "--depth", "4"), ("--depth 4", "--num-shards 3", "give one")),
    (("--num-shards", "-1"), ("--num-shards is -1", "at least 0")),
    (("--depth", "0"), ("--depth is 0", "at least 1")),
    (("--workers", "0"), ("--workers is 0", "at least 1")),
    (("--attempts", "0"), ("--attempts is 0", "at least 1")),
    (("--num-shards", "1824"), ("1824 shards", "1823")),
    (("--base-url", "no/such/folder"), ("no/such/folder", "00_tiny_world.py")),
    (("--base-url", "ftp://example.org/x"), ("ftp://example.org/x", "http(s)://")),
    (("--base-url", "http://"), ("http://", "host")),
    (("--base-url", "http://127.0.0.1:port/"), ("port",))])
def test_a_mistake_gets_one_message_and_exit_code_2(script, data, flags, words):
    code, _, err = script(*flags)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words) and visible(data) == []


def test_a_folder_without_shards_and_a_data_dir_that_is_a_file_are_mistakes(script, data, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = script("--base-url", str(tmp_path / "empty"))
    assert code == 2 and "there is no shard_00000.parquet" in err
    shutil.rmtree(data, ignore_errors=True)
    data.write_text("not a folder")
    code, _, err = script()
    assert code == 2 and "is a file" in err


def test_an_unknown_flag_exits_with_2(script):
    assert script("--shards", "3")[0] == 2


def test_a_disk_that_refuses_is_reported_without_a_traceback(script, data, mirror):
    (data / NAME).mkdir(parents=True)  # a folder where the file should be
    code, _, err = script("--base-url", mirror(FOUR).url)
    assert code == 1 and NAME in err and "Traceback" not in err
    assert (data / "shard_00001.parquet").read_bytes() == SHARDS[1]


def test_the_size_of_a_model_follows_from_its_depth():
    """nanochat prints these two for its d20 and d32."""
    need("parameters_at")
    assert download.parameters_at(20) == 560_988_160
    assert download.parameters_at(32) == 1_879_048_192


def test_depth_tells_shards_and_disk_before_it_starts(script, data, mirror, monkeypatch):
    """d20: 560,988,160 * 20 * 4.8 = 53.85e9 characters / 250e6 = 215.4: 216 shards and one more."""
    full = shutil.disk_usage("/")._replace(free=int(20e9))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    folder = mirror(FOUR)
    code, out, err = script("--base-url", folder.url, "--depth", "20")
    assert code == 2 and "216 shards + 1 to validate" in out
    assert "disk: about 21.7 GB to fetch, 20.0 GB free" in out
    assert "--num-shards 200" in err and folder.requests == [] and visible(data) == []


def test_depth_fetches_what_it_announced(script, data, mirror):
    """d1: 2 * 65536 * 64 + 12 * 64^2 = 8.44M parameters, 0.81e9 characters: 4 shards and one."""
    five = {**FOUR, "shard_00004.parquet": make_shard(4)}
    code, out, _ = script("--base-url", mirror(five).url, "--depth", "1")
    assert code == 0 and "4 shards + 1 to validate" in out and visible(data) == sorted(five)


# ---- the shared block ----------------------------------------------------------------------------


def test_atomic_write_shows_the_old_file_or_the_new_one(tmp_path):
    need("atomic_write")
    path = tmp_path / "new folder" / "file.json"
    with download.atomic_write(path) as temporary:
        temporary.write_text("[1]")
        assert not path.exists() and temporary.parent == path.parent
    with pytest.raises(ZeroDivisionError), download.atomic_write(path) as temporary:
        temporary.write_text("[")
        raise ZeroDivisionError
    assert json.loads(path.read_text()) == [1] and list(path.parent.iterdir()) == [path]


def test_two_corpora_of_one_hub_are_not_mixed_and_a_copy_on_another_host_is_the_same(tmp_path):
    config = download.Config(data_dir=tmp_path)
    first = "https://hub.example/datasets/team/one/resolve/main"
    download.remember_source(first, config)
    (tmp_path / "shard_00000.parquet").touch()
    download.remember_source(first.replace("hub", "mirror"), config)
    with pytest.raises(download.UserError, match="came from"):
        download.remember_source(first.replace("one", "two"), config)
