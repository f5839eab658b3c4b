"""Challenge 1: fetch the text, and never let half a file pass for a whole one.

Goal:
    Bring shard_00000.parquet, shard_00001.parquet, ... into data/: `python edu/01_download.py` the
    first two of FineWeb-Edu (100 MB each) from the hub, the line below those of the tiny world,
    offline.
    A file named shard_NNNNN.parquet is whole, whatever happens on the way.

You will learn:
    - which failures deserve a retry, exponential backoff, why it needs jitter, Retry-After
    - the ways to hang on a server, and the clock that ends each of them
    - resuming with Range and If-Range, and how a careless resume glues two versions into one file
    - verify, flush, rename: the order that makes a file appear whole or not at all
    - how much text a compute-optimal model of a given depth eats (--depth)

Read beside:
    nanochat/dataset.py::download_single_file (Nov 2025): retries and a temporary name. New here:
    jitter, resume, checks of length, footer and hash, a guard against stalls, a lock, exit code 1.
    nanochat/dataset.py::parquets_iter_batched: the last shard on disk is validation.

Run:
    python edu/01_download.py --base-url mirror

Expect:
    01 download - mirror - 4 workers
    shards: 5 wanted, 0 already here, 5 to fetch
    wrote ...shard_00000.parquet (0.8 MB)
    result: shards on disk 0 -> 5 (n=3.6 MB)
    next: python edu/02_dataloader.py

Writes:
    shard_00000.parquet  and its followers; the last one is validation
    .shards_from  where they came from, so that two corpora are never mixed in one folder
"""
import contextlib
import email.utils
import filecmp
import hashlib
import json
import math
import os
import queue
import random
import re
import shlex
import shutil
import sys
import threading
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass, field, fields
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import requests
import tyro
import urllib3
from filelock import FileLock
from tqdm import tqdm

# ---- settings ------------------------------------------------------------------------------------

DATASET = "/datasets/karpathy/fineweb-edu-100b-shuffle/resolve/main"
DATASET_SHARDS = 1823  # shard_00000 ... shard_01822
SHARD_CHARS = 250e6  # text in one of them
SHARD_BYTES = 100e6  # the same on disk, compressed
TOKENS_PER_PARAMETER = 20  # compute-optimal (Chinchilla), as in nanochat/scripts/base_train.py
CHARS_PER_TOKEN = 4.8  # at nanochat's vocabulary of 65,536
CHUNK_BYTES = 1 << 20
NOT_TRIED = "not tried, too many failed in a row"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def hub_url():
    """Where FineWeb-Edu lives; HF_ENDPOINT names another host with the same layout."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/") + DATASET


@dataclass
class Config:
    data_dir: Path = field(default_factory=lambda: Path(os.environ.get("EDU_DATA", "data")))
    """folder that receives the shards"""
    base_url: str = field(default_factory=hub_url)
    """http(s):// address of the shards, or a folder (also one inside --data-dir, such as mirror)"""
    num_shards: int | None = None
    """shards wanted, validation included; 0 = all there are; default 2, or all of a folder"""
    depth: int | None = None
    """instead of --num-shards: what a compute-optimal nanochat model of this depth needs"""
    workers: int = 4
    """shards fetched at the same time"""
    attempts: int = 6
    """tries per shard: the waits between six of them add up to 15 s on average"""
    give_up_after: int = 4
    """failures in a row after which the rest is not tried: that is the network, not a shard"""
    base_delay: float = 1.0
    """seconds; the wait after failure k is drawn from 0 to base_delay * 2^k"""
    longest_wait: float = 300.0
    """seconds; where that doubling ends; a server that asks for a longer wait gets another run"""
    timeout: float = 20.0
    """seconds to connect, and of silence before a connection counts as dead"""
    stall_seconds: float = 60.0
    """seconds until an answer must have begun, and over which min_speed is judged"""
    min_speed: float = 1000.0
    """bytes per second below which a connection is given up: 100 MB would take a day"""


# ---- shared blocks -------------------------------------------------------------------------------


# --- shared: cli (home: 00_tiny_world.py) ---
class UserError(Exception):
    """A mistake the user can mend: what is wrong, why it matters, the command that fixes it."""


def run_script(run, config_class, argv, description):
    """Turn argv into a config_class, call run(config), and return the exit code.

    0 or whatever run returns; 2 for a UserError, shown as one message without a traceback;
    130 for Ctrl-C; 141 when nobody reads on. tyro itself exits with 2 on a flag it does not know.
    """
    config = tyro.cli(config_class, args=argv, description=description)
    try:
        code = run(config) or 0
        sys.stdout.flush()  # here, where a reader that has gone can still be met
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has enough, as `head` has after its lines
        # what is still to be printed goes nowhere: else Python would complain of it at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
# --- end shared ---


# --- shared: atomic-write (home: 01_download.py) ---
@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`; flush it to disk and rename it only on success.

    os.replace is atomic within one folder, so a reader sees the old file or the new one whole,
    never half of it, whatever kills the writer.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
# --- end shared ---


# ---- the idea: what is whole ---------------------------------------------------------------------


class DownloadError(Exception):
    """This attempt failed, the next may not. retry_after: seconds the server asked us to wait."""

    def __init__(self, message, retry_after=0.0):
        super().__init__(message)
        self.retry_after = retry_after


class PermanentError(DownloadError):
    """Trying again would bring the same answer: a shard that does not exist, a closed door."""


def shard_name(index):
    return f"shard_{index:05d}.parquet"


def check_shard(path, sha256=None):
    """Raise DownloadError, saying why, unless path is a whole parquet file with a `text` column.

    Parquet is PAR1, column chunks, footer, footer length, PAR1. The footer tells where each chunk
    lies, so bytes lost in the middle push the last chunk beyond the place where the footer begins.
    Bytes that changed while their number stayed the same show only in the sha256.
    """
    with open(path, "rb") as file:
        begin = file.read(40)
    if not begin.startswith(b"PAR1"):  # often a log-in page or a proxy's error with status 200
        raise DownloadError(f"not a parquet file, it begins with {begin!r}")
    try:
        footer = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise DownloadError(f"parquet footer missing or damaged: {error}") from error
    if "text" not in footer.schema.names:
        raise DownloadError(f"no column `text`, only {footer.schema.names}")
    footer_begins = path.stat().st_size - 8 - footer.serialized_size
    for group in range(footer.num_row_groups):
        chunk = footer.row_group(group).column(footer.num_columns - 1)
        chunk_begins = chunk.dictionary_page_offset or chunk.data_page_offset
        if chunk_begins + chunk.total_compressed_size > footer_begins:
            raise DownloadError(f"bytes are missing before the footer, in row group {group}")
    if sha256:
        with pa.memory_map(str(path)) as file:
            found = hashlib.sha256(file.read_buffer()).hexdigest()
        if found != sha256:
            raise DownloadError(f"its sha256 is {found}, the server announced {sha256}")


def is_whole(path):
    try:
        check_shard(path)
    except (DownloadError, OSError):
        return False
    return True


# ---- the idea: when to try again -----------------------------------------------------------------


def with_retries(attempt_once, what, config, sleep):
    """Return attempt_once(); after a failure wait and try again, config.attempts times in all.

    Raises PermanentError at once, DownloadError with the last reason when the attempts are used up.
    """
    for k in range(config.attempts):
        try:
            return attempt_once()
        except PermanentError:
            raise
        except (DownloadError, requests.RequestException, urllib3.exceptions.HTTPError) as error:
            reason, asked = plain_reason(error), getattr(error, "retry_after", 0.0)
        if k + 1 < config.attempts:
            # wait_k = max(U(0, min(longest, base * 2^k)), what the server asked for)
            # Without the random draw, a thousand clients that one hiccup cut off together come back
            # together, and again, in step: the hiccup turns into an outage.
            wait = random.uniform(0, min(config.longest_wait, config.base_delay * 2**k))
            wait = max(wait, asked)
            tqdm.write(f"{what}: {reason}; attempt {k + 2} of {config.attempts} in {wait:.1f} s",
                       file=sys.stderr)
            sleep(wait)
    raise DownloadError(f"gave up after {config.attempts} attempts, the last: {reason}")


def plain_reason(error):
    """The innermost cause, without what requests and urllib3 wrap around it."""
    inner = error.args[0] if error.args else error
    reason = str(getattr(inner, "reason", None) or error)
    return re.sub(r"^HTTPS?Connection(Pool)?\(host=.*?\): ", "", reason)


# ---- the idea: one request -----------------------------------------------------------------------


def open_response(method, url, headers, config):
    """Send one request; return the response with its body still unread.

    requests' timeouts bound the silence between two pieces, not the sum: a name server that hangs
    and a server that drips its headers byte by byte pass both. Hence a clock outside, and a thread
    that is left behind when it rings (a daemon, so it cannot keep the process alive).
    """
    session, answer = requests.Session(), queue.Queue()
    session.trust_env = urllib.parse.urlsplit(url).hostname not in LOOPBACK  # no proxy to oneself
    # identity: lengths and ranges count bytes of the file, not of a gzip of it
    headers = {"Accept-Encoding": "identity", **headers}

    def ask():
        try:
            answer.put(session.request(method, url, headers=headers, stream=True,
                                       timeout=config.timeout, allow_redirects=True))
        except Exception as error:  # handed over, and raised in the thread that waits
            answer.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        response = answer.get(timeout=config.stall_seconds)
    except queue.Empty:
        raise DownloadError(f"no answer within {config.stall_seconds:g} s") from None
    if isinstance(response, Exception):
        raise response
    return response


def check_status(response, config):
    """Let 200 and 206 pass; DownloadError for passing trouble, PermanentError for the rest."""
    status = f"HTTP {response.status_code} {response.reason}"
    if response.status_code in (200, 206):
        return
    if response.status_code not in (408, 425, 429) and response.status_code < 500:
        raise PermanentError(f"{status} for {response.url}")
    wait = seconds_to_wait(response.headers.get("Retry-After", ""))
    if wait > config.longest_wait:
        raise PermanentError(f"{status}, and the server asks to come back in {wait:.0f} s")
    raise DownloadError(status, wait)


def seconds_to_wait(retry_after):
    """Retry-After comes as seconds or as a date; anything else counts as 0."""
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


# ---- the idea: resume, verify, rename ------------------------------------------------------------


class PartialFile:
    """Bytes on their way to `path`, and beside them a note of which version of the file they are.

    Without the note a resume would glue the new file's end to the old file's beginning. Both
    outlive kill -9: a run that died after 90 of 100 MB costs 10 MB more, not 100.
    """

    def __init__(self, path, url):
        self.data = path.with_name(f".{path.name}.part")
        self.note_path = path.with_name(f".{path.name}.part.json")
        self.url = url

    def load(self):
        """(bytes here, note) of something that can be resumed, else (0, {})."""
        try:
            note = json.loads(self.note_path.read_text(encoding="utf-8"))
            if note["url"] == self.url and note["size"] and note["version"]:
                return self.data.stat().st_size, note
        except (OSError, ValueError):
            pass  # nothing here yet
        return 0, {}

    def begin(self, note):
        self.discard()  # first: old bytes under a new note are the glued file
        with atomic_write(self.note_path) as temporary:
            temporary.write_text(json.dumps(note), encoding="utf-8")

    def discard(self):
        self.data.unlink(missing_ok=True)
        self.note_path.unlink(missing_ok=True)


def describe(response, url):
    """The note on an answer: the file's size, which version of it this is, its hash if known."""
    etag, length = (response.headers.get(name, "") for name in ("ETag", "Content-Length"))
    # If-Range takes no weak tag (W/"..."): that promises the same meaning, not the same bytes
    version = etag if etag.startswith('"') else response.headers.get("Last-Modified")
    # the hub puts the sha256 of a large file on the redirect to its storage
    linked = [r.headers.get("X-Linked-Etag", "").strip('"') for r in [*response.history, response]]
    sha256 = next((tag for tag in linked if re.fullmatch("[0-9a-f]{64}", tag)), None)
    return {"url": url, "size": int(length) if length.isdigit() else None, "version": version,
            "sha256": sha256}


def accept(response, partial, have, note, config):
    """Return (first byte of the file that the body brings, note), or raise DownloadError.

    200: the whole file, from 0. 206: the rest of ours, and only if it is exactly that.
    """
    if response.status_code == 416:
        partial.discard()
        raise DownloadError("the server's file ends before our part of it")
    check_status(response, config)
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise DownloadError("the server compressed what it was asked to send as it is")
    theirs = describe(response, partial.url)
    if response.status_code == 200:  # first request, or changed file, or a server without Range
        partial.begin(theirs)
        return 0, theirs
    ours = (f"bytes {have}-{note['size'] - 1}/{note['size']}", note["version"]) if have else None
    if (response.headers.get("Content-Range"), theirs["version"]) != ours:
        partial.discard()
        raise DownloadError(f"asked for {ours}, got {response.headers.get('Content-Range')!r} of "
                            f"version {theirs['version']!r}")
    return have, note


def receive(response, file, have, size, config, report):
    """Append the body to file; raise DownloadError when it ends too early or crawls."""
    since, had = time.monotonic(), have
    # read1 returns what one recv brought. read(n) and requests' iter_content(n) stay inside until
    # they have n bytes: at one byte every few seconds no line of this loop would ever run.
    while chunk := response.raw.read1(CHUNK_BYTES):
        file.write(chunk)
        have += len(chunk)
        report(have, size)
        elapsed = time.monotonic() - since
        if elapsed > config.stall_seconds:
            if have - had < config.min_speed * elapsed:
                raise DownloadError(f"stalled: {have - had} bytes in {elapsed:.1f} s")
            since, had = time.monotonic(), have
    if size and have < size:
        raise DownloadError(f"the connection closed after {have} of {size} bytes")


def fetch_once(url, path, config, report):
    """One attempt: 1. ask for what is missing  2. append it  3. verify the whole  4. rename."""
    partial = PartialFile(path, url)
    have, note = partial.load()
    if not have or have != note["size"]:  # equal: killed between the last byte and the rename
        resume = {"Range": f"bytes={have}-", "If-Range": note["version"]} if have else {}
        with open_response("GET", url, resume, config) as response:
            have, note = accept(response, partial, have, note, config)
            with open(partial.data, "ab") as file:
                receive(response, file, have, note["size"], config, report)
    try:
        check_shard(partial.data, note["sha256"])
    except DownloadError:
        partial.discard()  # complete and wrong: nothing in it is worth a resume
        raise
    with open(partial.data, "rb+") as file:
        os.fsync(file.fileno())  # before the rename, or a power cut leaves the name without bytes
    os.replace(partial.data, path)
    partial.discard()


def download_shard(index, target_dir, base_url=None, config=None, sleep=time.sleep,
                   report=lambda have, size: None):
    """Have shard `index` in target_dir, whole, and return its path.

    No request at all when it is there already. base_url: http(s) address or folder, the hub by
    default. report(have, size) is told the bytes so far and in all (None: unknown). Threads and
    processes may ask for the same shard at once: one fetches, the others wait and find it.
    Raises DownloadError when the attempts are used up or pointless, OSError when the disk refuses.
    After nanochat/dataset.py::download_single_file.
    """
    config, base_url = config or Config(), base_url or hub_url()
    path = Path(target_dir) / shard_name(index)
    if is_whole(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with FileLock(lock):  # the system frees it when its holder dies, unlike a mere marker file
        if not is_whole(path):
            folder, url = folder_of(base_url), f"{base_url.rstrip('/')}/{path.name}"
            if folder:
                copy_shard(folder / path.name, path, report)
            else:
                with_retries(lambda: fetch_once(url, path, config, report), path.name, config,
                             sleep)
        with contextlib.suppress(OSError):  # Windows refuses while another waits for it
            lock.unlink()
    return path


def folder_of(base_url):
    """The folder that base_url names, as a path or as file://, or None when it is http(s)."""
    parts = urllib.parse.urlsplit(base_url)
    if parts.scheme in ("http", "https"):
        return None
    return Path(urllib.request.url2pathname(parts.path) if parts.scheme == "file" else base_url)


def copy_shard(source, path, report):
    if not source.is_file():
        raise PermanentError(f"there is no {source}")
    with atomic_write(path) as temporary:
        shutil.copyfile(source, temporary)
        check_shard(temporary)
    report(path.stat().st_size, path.stat().st_size)


# ---- the loop ------------------------------------------------------------------------------------


def download_all(indices, base_url, config):
    """Fetch the shards `indices`, config.workers at a time; return {index: why it failed}."""
    failures, seen, in_a_row, lock = {}, {}, [], threading.Lock()

    def fetch(index):
        def report(have, size):
            with lock:
                seen[index] = (have, size or have)
                # total = mean size of the shards begun * number of shards
                bar.total = sum(size for _, size in seen.values()) * len(indices) // len(seen)
                bar.update(sum(have for have, _ in seen.values()) - bar.n)
        if len(in_a_row) >= config.give_up_after:
            failures[index] = NOT_TRIED
            return
        try:
            download_shard(index, config.data_dir, base_url, config, report=report)
            in_a_row.clear()
        except (DownloadError, OSError) as error:
            failures[index] = str(error)
            in_a_row.append(index)

    # Threads suffice: a thread that waits for the network does not hold the interpreter lock. Those
    # of ThreadPool are daemons, so Ctrl-C ends now, not when the slowest server has answered.
    with tqdm(unit="B", unit_scale=True, disable=None) as bar, ThreadPool(config.workers) as pool:
        for _ in pool.imap_unordered(fetch, indices):
            pass
    return failures


# ---- the command line ----------------------------------------------------------------------------


def parameters_at(depth, vocab_size=65536):
    """Parameters of nanochat's d<depth> (scripts/base_train.py): C = 64 * depth, untied head."""
    channels = 64 * depth
    # N = 2 V C + depth * (4 C^2 for attention + 8 C^2 for the MLP)
    return 2 * vocab_size * channels + depth * 12 * channels**2


def shards_for_depth(depth):
    """Shards for a compute-optimal model: enough text that none repeats, and one to validate."""
    parameters = parameters_at(depth)
    characters = parameters * TOKENS_PER_PARAMETER * CHARS_PER_TOKEN
    train = math.ceil(characters / SHARD_CHARS)
    print(f"depth {depth}: {parameters / 1e6:.1f}M parameters x {TOKENS_PER_PARAMETER} tokens x "
          f"{CHARS_PER_TOKEN} characters = {characters / 1e9:.1f}B: {train} shards + 1 to validate")
    return train + 1


def shards_there(base_url, config):
    """How many shards there are, counted one by one from 0 to the first that is missing."""
    folder, count = folder_of(base_url), 0

    def exists():
        if folder:
            return (folder / shard_name(count)).is_file()
        url = f"{base_url.rstrip('/')}/{shard_name(count)}"
        with open_response("HEAD", url, {}, config) as response:
            return response.status_code != 404 and check_status(response, config) is None

    while with_retries(exists, shard_name(count), config, time.sleep):
        count += 1
    return count


def shards_wanted(base_url, config):
    if config.depth is not None:
        return shards_for_depth(config.depth)
    if config.num_shards == 0 or (config.num_shards is None and folder_of(base_url)):
        return shards_there(base_url, config)
    return 2 if config.num_shards is None else config.num_shards


def check_config(config):
    """Raise UserError for values that cannot work; return the source, a folder made absolute."""
    if config.depth is not None and config.num_shards is not None:
        raise UserError(f"--depth {config.depth} and --num-shards {config.num_shards} both say how "
                        "many shards to fetch: give one of them")
    for name, least in (("depth", 1), ("num_shards", 0), ("workers", 1), ("attempts", 1),
                        ("give_up_after", 1)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least {least}")
    if config.data_dir.exists() and not config.data_dir.is_dir():
        raise UserError(f"--data-dir {config.data_dir} is a file: name a folder for the shards")
    folder = folder_of(config.base_url)
    if folder is None:
        try:
            return requests.Request("GET", config.base_url).prepare() and config.base_url
        except requests.RequestException as error:
            raise UserError(f"--base-url {config.base_url} is no address: {error}") from error
    for candidate in (folder, config.data_dir / folder):
        if candidate.is_dir():
            return str(candidate.resolve())
    raise UserError(f"--base-url {config.base_url} is neither an http(s):// address nor a folder "
                    "here. For the offline world: python edu/00_tiny_world.py, then "
                    "python edu/01_download.py --base-url mirror")


def check_supply(wanted, missing, base_url, config):
    """Raise UserError when the source has too few shards or the disk too little room."""
    if wanted == 0:
        raise UserError(f"there is no {shard_name(0)} at {base_url}: name the place that has it")
    if base_url == hub_url() and wanted > DATASET_SHARDS:
        raise UserError(f"{wanted} shards wanted, FineWeb-Edu has {DATASET_SHARDS} here: take them "
                        f"all with --num-shards {DATASET_SHARDS} and train more than one epoch")
    if not missing or (base_url != hub_url() and config.depth is None):
        return  # nothing to fetch, or of unknown size
    needed, free = missing * SHARD_BYTES, shutil.disk_usage(config.data_dir).free
    print(f"disk: about {human(needed)} to fetch, {human(free)} free")
    if needed > free:
        raise UserError(f"{missing} shards take about {human(needed)}, and {config.data_dir} has "
                        f"{human(free)} free: name another disk with --data-dir, or fetch fewer "
                        f"with --num-shards {max(2, wanted - missing + int(free // SHARD_BYTES))}")


def remember_source(base_url, config):
    """Note where the shards come from; raise UserError when those here came from elsewhere.

    Without it, shard_00000 of the tiny world would pass for shard_00000 of FineWeb-Edu, and the
    model would train on a mixture. An address that ends in the same name passes for the same data:
    http://127.0.0.1:8000/mirror and the folder mirror, a hub and its copy on another host. (On the
    hub the name stands before /resolve/main.)
    """
    record = config.data_dir / ".shards_from"
    before = record.read_text(encoding="utf-8") if record.exists() else base_url
    here, asked = (Path(urllib.parse.urlsplit(url).path.removesuffix("/resolve/main")).name
                   for url in (before, base_url))
    if here != asked and shards_in(config.data_dir):
        raise UserError(f"the shards in {config.data_dir} came from {before}, not from {base_url}, "
                        "and a mixture would pass unseen: take another folder with --data-dir, or "
                        f"remove them: rm {shlex.quote(str(config.data_dir))}/shard_*.parquet")
    check_twins(base_url, config)
    with atomic_write(record) as temporary:
        temporary.write_text(base_url, encoding="utf-8")


def check_twins(base_url, config):
    """Raise UserError when a whole shard here is not what the folder base_url holds by now.

    A world that was made anew keeps its name and its number of shards: the old ones would pass for
    it, and the model would learn from one world and be examined on another.
    """
    for path in shards_in(config.data_dir) if folder_of(base_url) else []:
        twin = folder_of(base_url) / path.name
        if twin.is_file() and is_whole(path) and not filecmp.cmp(path, twin, shallow=False):
            raise UserError(f"{path} is not the {path.name} that {base_url} has now: take another "
                            "folder with --data-dir, or remove the old ones: "
                            f"rm {shlex.quote(str(config.data_dir))}/shard_*.parquet")


def shards_in(folder):
    return sorted(folder.glob("shard_*.parquet"))


def human(size):
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def same_command(config):
    """The command line that gives this config again."""
    words, default = ["python edu/01_download.py"], Config()
    for name in (f.name for f in fields(Config)):
        if getattr(config, name) != getattr(default, name):
            words += [f"--{name.replace('_', '-')}", shlex.quote(str(getattr(config, name)))]
    return " ".join(words)


def run(config):
    base_url = check_config(config)
    print(f"01 download - {config.base_url} - {config.workers} workers")
    try:
        wanted = shards_wanted(base_url, config)
    except DownloadError as error:
        print(f"error: cannot count the shards at {base_url}: {error}", file=sys.stderr)
        return 1
    config.data_dir.mkdir(parents=True, exist_ok=True)
    before = shards_in(config.data_dir)
    missing = [i for i in range(wanted) if not is_whole(config.data_dir / shard_name(i))]
    print(f"shards: {wanted} wanted, {wanted - len(missing)} already here, {len(missing)} to fetch")
    check_supply(wanted, len(missing), base_url, config)
    remember_source(base_url, config)
    try:
        failures = download_all(missing, base_url, config)
    except KeyboardInterrupt:
        print(f"partial files are kept, go on with: {same_command(config)}", file=sys.stderr)
        raise
    report_shards(before, [i for i in missing if i not in failures], config)
    return report_failures(failures, config)


def report_shards(before, fetched, config):
    after = shards_in(config.data_dir)
    if len(after) == 1:
        print("note: the last shard is validation, with one there is none to train on")
    if before and before[-1] != after[-1]:
        print(f"note: {before[-1].name} was validation and is training text from now on: do not "
              "compare bits per byte across this change")
    for path in (config.data_dir / shard_name(index) for index in fetched):
        print(f"wrote {path} ({human(path.stat().st_size)})")
    total = human(sum(path.stat().st_size for path in after))
    print(f"result: shards on disk {len(before)} -> {len(after)} (n={total})")


def report_failures(failures, config):
    """Say which shards failed and why, and how to go on; return the exit code."""
    if not failures:
        print("next: python edu/02_dataloader.py")
        return 0
    print(f"error: shards that could not be fetched: {len(failures)}", file=sys.stderr)
    for index, reason in sorted(failures.items()):
        if reason != NOT_TRIED:
            print(f"  {shard_name(index)}: {reason}", file=sys.stderr)
    if NOT_TRIED in failures.values():
        names = [shard_name(index) for index in sorted(failures) if failures[index] == NOT_TRIED]
        print(f"  {names[0]} ... {names[-1]} ({len(names)} of them): {NOT_TRIED}", file=sys.stderr)
    print(f"go on, keeping what is here: {same_command(config)}", file=sys.stderr)
    if config.base_url == hub_url():
        print("no network? python edu/00_tiny_world.py makes a small world, then "
              "python edu/01_download.py --base-url mirror", file=sys.stderr)
    return 1


def main(argv: list[str] | None = None) -> int:
    return run_script(run, Config, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
