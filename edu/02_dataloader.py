"""Challenge 2: turn parquet files of any size into batches, in constant memory, to be resumed.

Goal:
    Stream text out of the shards, through the tokenizer, into batches of inputs and targets for
    next-token prediction. It reads one row group at a time, splits the groups among ranks, delivers
    each token once per epoch, and hands out a state from which it goes on bit for bit.

You will learn:
    - what a parquet file is made of (row groups, pages, a footer), and how to skip
    - one flat stream of tokens: targets are the same tokens, one place later, also across rows
    - why a batch takes B*T + 1 tokens but moves on by B*T
    - what a state must hold so that a resumed run sees exactly the batches it would have seen
    - where the time goes: one Python int per token costs more than you think

Read beside:
    nanochat/dataloader.py::tokenizing_distributed_data_loader_with_state and dataset.py (Nov 2025).
    Better here: the state is exact to the token (there: to the row group), row groups are counted
    across files, so no rank starves, and a bad shard is named. As there, rows may begin in the
    middle of a document.

Run:
    python edu/02_dataloader.py
    python edu/02_dataloader.py --batch-size 2 --seq-len 64 --rank 1 --world-size 2

Expect:
    02 dataloader - cpu - tokenizer ... of 2048 ids - B 4 x T 256 - rank 0 of 1
    batch  inputs    targets   dtype        epoch    doc  token (of the next batch)
        5  4x256     4x256     torch.int64      0     20     12
    resumed from the state after batch 2: batches 3 to 5 are the same bit for bit
    result: share of raw tiktoken speed - -> 1.03 (n=500000)
    next: python edu/03_check_setup.py

Writes:
    nothing
"""
import base64
import collections
import hashlib
import itertools
import json
import os
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken
import torch
import tyro

# ---- settings -----------------------------------------------------------------------------------


@dataclass
class Config:
    data_dir: Path = field(default_factory=lambda: Path(os.environ.get("EDU_DATA", "data")))
    """folder of the shards and of the trained tokenizer"""
    split: str = "train"
    """train: all shards but the last; val: the last one"""
    batch_size: int = 4
    """B, rows per batch"""
    seq_len: int = 256
    """T, tokens per row"""
    rank: int = 0
    """which of the world_size shares to read"""
    world_size: int = 1
    """number of processes that share the row groups; no process group is needed for that"""
    threads: int = 4
    """tokenizer threads (nanochat: 4)"""
    batches: int = 5
    """batches to print"""
    timed_chars: int = 2_000_000
    """text on which the loader races raw tiktoken"""
    gpt2_patience: float = 30.0
    """seconds to wait for GPT-2's tokenizer, which stands in when none is trained"""


# ---- shared blocks ------------------------------------------------------------------------------

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


# --- shared: tokenizer (home: 11_tokenizer.py) ---
SPECIAL_TOKENS = (
    "<|bos|>",  # begins every document
    "<|user_start|>", "<|user_end|>",
    "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>",  # the model calls the calculator
    "<|output_start|>", "<|output_end|>",  # and the calculator answers
)


class Tokenizer:
    """Text <-> ids. Ids 0..255 are bytes, then the merges in order, the special tokens last.

    A str never encodes to a special token, whatever it spells; only prepend and append give one.
    Lone surrogates, which no UTF-8 can hold, become U+FFFD; all else comes back byte for byte.
    Source: nanochat/tokenizer.py::RustBPETokenizer.
    """

    def __init__(self, encoding, sha256, bos_token=SPECIAL_TOKENS[0]):
        self.encoding, self.sha256, self.bos_token = encoding, sha256, bos_token

    @staticmethod
    def identity(rank_file, pattern, special_tokens):
        """sha256 over everything that decides an id: bytes of the rank file, pattern, specials."""
        rest = json.dumps([pattern, special_tokens], sort_keys=True)
        return hashlib.sha256(rank_file + b"\0" + rest.encode()).hexdigest()

    @classmethod
    def from_dir(cls, path):
        """Load what 11_tokenizer.py wrote to `path`. Raises UserError if absent or damaged."""
        path = Path(path)
        remedy = f"train one: python edu/11_tokenizer.py --data-dir {path.parent}"
        try:
            rank_file = (path / "tokenizer.tiktoken").read_bytes()
            config = json.loads((path / "config.json").read_bytes())
            pattern, special_tokens = config["pattern"], config["special_tokens"]
            sha256 = cls.identity(rank_file, pattern, special_tokens)
            if sha256 != config["sha256"]:
                raise ValueError(f"its sha256 is {sha256[:12]}, config.json says otherwise")
            lines = (line.split() for line in rank_file.splitlines())
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        except OSError as error:
            raise UserError(f"no tokenizer in {path} ({error.strerror}); {remedy}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"the tokenizer in {path} is damaged ({error}); {remedy}") from None
        encoding = tiktoken.Encoding(
            f"edu-{sha256[:12]}", pat_str=pattern, mergeable_ranks=ranks,
            special_tokens=special_tokens,
        )
        return cls(encoding, sha256)

    def encode(self, text, prepend=None, append=None, num_threads=8):
        """str -> ids, or list of str -> list of ids; prepend and append: special token or id."""
        before, after = (
            [self.encode_special(extra)] if isinstance(extra, str) else
            [] if extra is None else [extra] for extra in (prepend, append)
        )
        if isinstance(text, str):
            return before + self.encoding.encode_ordinary(text) + after
        rows = self.encoding.encode_ordinary_batch(text, num_threads=num_threads)
        return [before + row + after for row in rows] if before or after else rows

    def encode_special(self, token):
        """The id of a special token. Raises KeyError for any other text."""
        if token not in self.encoding.special_tokens_set:
            raise KeyError(f"{token!r} is no special token")
        return self.encoding.encode_single_token(token)

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes(ids)

    def decode(self, ids):
        """ids -> str; bytes that are not UTF-8, such as half a letter, become U+FFFD."""
        return self.encoding.decode(ids)

    def get_bos_token_id(self):
        return self.encode_special(self.bos_token)

    def get_vocab_size(self):
        return self.encoding.n_vocab

    def token_bytes(self):
        """Raw length in bytes of each id, 0 for special tokens: (V,) list for bits per byte."""
        tokens = enumerate(self.encoding.decode_tokens_bytes(range(self.get_vocab_size())))
        return [0 if self.encoding.is_special_token(i) else len(token) for i, token in tokens]
# --- end shared ---


# --- shared: gpt2 (home: 02_dataloader.py) ---
def fetch_gpt2(patience):
    """GPT-2's encoding as tiktoken has it cached or fetches it: (encoding, "") or (None, reason).

    tiktoken sets no timeout, so a dead network could hold it for ever: a daemon thread may be left
    behind after `patience` seconds, and does not keep the process alive.
    """
    answer = [None, f"no answer within {patience:g} s"]

    def fetch():
        try:
            answer[:] = tiktoken.get_encoding("gpt2"), ""
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            answer[1] = f"{type(error).__name__}: its file is neither cached nor reachable"

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(patience)
    return tuple(answer)
# --- end shared ---


# --- shared: parquet (home: 02_dataloader.py) ---
def list_shards(data_dir, split="train"):
    """Paths of a split in order: the last shard is "val", all before it are "train".

    Raises UserError when there is nothing to read. Source: nanochat/dataset.py.
    """
    paths = sorted(Path(data_dir).glob("shard_*.parquet"))
    if len(paths) < 2:
        found = (f"there is only {paths[0].name}, and the last shard is validation" if paths else
                 "there are none" if Path(data_dir).is_dir() else "the folder does not exist")
        raise UserError(f"{data_dir} must hold two or more shard_*.parquet, but {found}; get them: "
                        "python edu/01_download.py (or, with no network, python "
                        "edu/00_tiny_world.py and python edu/01_download.py --base-url mirror)")
    return paths[:-1] if split == "train" else paths[-1:]


def open_shard(path):
    """An open ParquetFile with text in it. Raises UserError naming what is wrong with the file."""
    remedy = f"delete {path} and fetch it again: python edu/01_download.py"
    try:
        # read page by page through a small buffer: pre_buffer would hold a whole row group's bytes
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; get it: python edu/01_download.py") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a parquet file ({error}); {remedy}") from None
    schema = file.schema_arrow
    kind = schema.field("text").type if "text" in schema.names else None
    if kind not in (pa.string(), pa.large_string()):
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise UserError(f"{path} has no string column `text`, only {columns}; {remedy}")
    if file.metadata.num_rows == 0:
        raise UserError(f"{path} has no rows; {remedy}")
    return file


def parquet_texts(paths, rank=0, world_size=1, start=None):
    """Yield the documents (str) of row groups rank, rank + world_size, ... one group at a time.

    Row groups are counted across all files, so no rank starves when a file has fewer groups than
    there are ranks. start: how many of this rank's documents to skip; whole groups are skipped
    by their footer, unread. Raises UserError for a bad file, or a rank that has nothing to read.
    Source: nanochat/dataloader.py::tokenizing_distributed_data_loader.
    """
    groups, skip = 0, start or 0
    for path in paths:
        with open_shard(path) as file:
            mine = [g for g in range(file.num_row_groups) if (groups + g) % world_size == rank]
            groups += file.num_row_groups
            for group in mine:
                rows = file.metadata.row_group(group).num_rows
                if skip >= rows:
                    skip -= rows
                    continue
                try:
                    # one thread: arrow's own would each hold a page, and tokenizing takes longer
                    batches = file.iter_batches(128, [group], ["text"], use_threads=False)
                    for batch in batches:
                        texts = batch.column(0).to_pylist()
                        if None in texts:
                            raise ValueError("a text is null")
                        yield from texts[skip:]
                        skip = max(0, skip - len(texts))
                except (pa.ArrowException, OSError, ValueError) as error:  # also bad UTF-8
                    raise UserError(f"{path} is damaged in row group {group} ({error}); delete it "
                                    "and fetch it again: python edu/01_download.py") from None
    if groups <= rank:
        raise UserError(f"rank {rank} of {world_size} has nothing to read: the {len(paths)} shards "
                        f"hold {groups} row groups; start at most {groups} processes")
# --- end shared ---


# --- shared: loader (home: 02_dataloader.py) ---
def tokenized_documents(paths, tokenizer, rank, world_size, epochs, epoch, doc, least, threads):
    """Yield (epoch, doc, tokens): tokens is <|bos|> + text as uint32 (n,), from a given place on.

    Raises UserError if an epoch has fewer than `least` tokens, or the place lies past the end.
    """
    bos = np.array([tokenizer.get_bos_token_id()], dtype=np.uint32)

    def encode(texts):
        # arrays spare one Python int per token; nothing is disallowed, nothing becomes special
        rows = (tokenizer.encoding.encode_to_numpy(t, disallowed_special=()) for t in texts)
        return [np.concatenate((bos, row)) for row in rows]

    with ThreadPoolExecutor(threads) as pool:
        for epoch in itertools.count(epoch) if epochs is None else range(epoch, epochs):
            first, total, texts = doc, 0, parquet_texts(paths, rank, world_size, start=doc)
            ahead = collections.deque()  # two chunks in the making: threads never wait for us
            while True:
                while len(ahead) < 2 and (chunk := list(itertools.islice(texts, 128))):
                    # one task per 16 documents: one for each short document would be all overhead
                    ahead.append(pool.map(encode, (chunk[i : i + 16] for i in range(0, 128, 16))))
                if not ahead:
                    break
                for tokens in itertools.chain.from_iterable(ahead.popleft()):
                    yield epoch, doc, tokens
                    doc, total = doc + 1, total + len(tokens)
            if not total:
                raise UserError(f"the loader's state begins at document {first}, but rank {rank} "
                                f"has fewer; were these the shards it was made with?")
            if first == 0 and total < least:
                raise UserError(f"a batch takes {least} tokens (B x T + 1), but rank {rank} of "
                                f"{world_size} has only {total}; make the batch smaller, or get "
                                "more shards: python edu/01_download.py")
            doc = 0


def tokenizing_data_loader(
    paths, tokenizer, B, T, rank=0, world_size=1, epochs=None, start=None, num_threads=4
):
    """Yield (inputs, targets, state) for ever, or until `epochs` epochs are through.

    inputs, targets: (B, T) LongTensors, targets = inputs shifted by one along a single stream of
    tokens: <|bos|>, a document, <|bos|>, the next. A row starts wherever the last one stopped, in
    mid-document too. Each token is a target once per epoch, save the very first; epochs follow one
    another without a seam, and only what cannot fill the last batch is left over.
    state: a dict of whole numbers, fit for JSON. As `start` it goes on with the next batch, bit
    for bit; B and T may change then, but paths, tokenizer, rank and world_size may not.
    With `epochs` set, ranks may see different numbers of batches: a trap for collective calls.
    Raises UserError when an epoch cannot fill one batch or `start` belongs to something else.
    Source: nanochat/dataloader.py (its state is exact only to a row group).
    """
    if B < 1 or T < 1:
        raise UserError(f"a batch of {B} x {T} tokens is empty; both must be 1 or more")
    ranks = {"rank": rank, "world_size": world_size}
    start = start or {"epoch": 0, "doc": 0, "token": 0, **ranks}
    if {**start, **ranks} != start:
        raise UserError(f"this loader state is of rank {start['rank']} of {start['world_size']}, "
                        f"not {rank} of {world_size}; resume with as many processes as before")
    documents = collections.deque()  # (epoch, doc, tokens) not yet used up
    used = start["token"]  # tokens of documents[0] that earlier batches took
    step, waiting = B * T, -used
    source = tokenized_documents(paths, tokenizer, rank, world_size, epochs, start["epoch"],
                                 start["doc"], step + 1, num_threads)
    for epoch, doc, tokens in source:
        if not documents and used >= len(tokens):
            raise UserError(f"this loader state begins at token {used} of a document of "
                            f"{len(tokens)}; were these the shards and tokenizer it was made with?")
        documents.append((epoch, doc, tokens))
        waiting += len(tokens)
        while waiting > step:
            # 1. gather B*T + 1 tokens  2. move on by B*T, so the last is the next batch's first
            parts, begin, missing = [], used, step + 1
            for _, _, tokens in documents:
                parts.append(tokens[begin : begin + missing])
                begin, missing = 0, missing - len(parts[-1])
                if not missing:
                    break
            used, waiting = used + step, waiting - step
            while used >= len(documents[0][2]):
                used -= len(documents.popleft()[2])
            flat = torch.from_numpy(np.concatenate(parts, dtype=np.int64))
            inputs = flat[:-1].view(B, T)
            targets = flat[1:].clone().view(B, T)  # a clone: masking targets must not edit inputs
            epoch, doc, _ = documents[0]
            yield inputs, targets, {"epoch": epoch, "doc": doc, "token": used, **ranks}
# --- end shared ---


# ---- the idea -----------------------------------------------------------------------------------

def tokenizer_or_gpt2(data_dir, patience):
    """Ours if it is trained, else GPT-2's. Raises UserError when neither is at hand."""
    folder = Path(data_dir) / "tokenizer"
    if folder.exists():
        return Tokenizer.from_dir(folder)
    remedy = f"train ours, no network needed: python edu/11_tokenizer.py --data-dir {data_dir}"
    encoding, reason = fetch_gpt2(patience)
    if encoding is None:
        raise UserError(f"no tokenizer in {folder}, and no GPT-2's to stand in: {reason}; {remedy}")
    print(f"no tokenizer in {folder}: GPT-2's stands in; {remedy}")
    return Tokenizer(encoding, sha256="gpt2", bos_token="<|endoftext|>")


def print_shift(inputs, targets, tokenizer, width=12):
    """Show the start of the first row and its seam with the second: inputs, targets (B, T)."""
    def text(token):
        return repr(tokenizer.decode([token]))

    print(f"{'row':>5} {'place':>6} {'input':>7} {'target':>7}  input text -> target text")
    T = inputs.shape[1]
    places = [(0, t) for t in range(min(width, T))]
    places += [(0, T - 1), (1, 0)] if len(inputs) > 1 and T > width else []
    for row, t in places:
        this, following = inputs[row, t].item(), targets[row, t].item()
        print(f"{row:>5} {t:>6} {this:>7} {following:>7}  {text(this)} -> {text(following)}")


def same_batches(ours, theirs):
    """Whether two lists of (inputs, targets, state) agree bit for bit."""
    return len(ours) == len(theirs) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2]
        for a, b in zip(ours, theirs)
    )


def race_raw_tiktoken(paths, tokenizer, B, T, chars, threads, rounds=3):
    """Tokens per second on the same text: (loader, raw encode_ordinary_batch) per round, and n.

    Raw has the text in memory already and keeps its lists; the loader reads parquet and makes
    n tokens of batches. The two alternate, so that a busy machine slows both.
    """
    texts = []
    for text in parquet_texts(paths):
        texts.append(text)
        chars -= len(text)
        if chars <= 0:
            break
    total = sum(map(len, tokenizer.encoding.encode_ordinary_batch(texts, num_threads=threads)))
    batches = max(1, total // (B * T) - 1)
    speeds = []
    for _ in range(rounds):
        loader = tokenizing_data_loader(paths, tokenizer, B, T, num_threads=threads)
        began = time.perf_counter()
        for _ in itertools.islice(loader, batches):
            pass
        ours = batches * B * T / (time.perf_counter() - began)
        loader.close()
        began = time.perf_counter()
        tokenizer.encoding.encode_ordinary_batch(texts, num_threads=threads)
        speeds.append((ours, total / (time.perf_counter() - began)))
    return speeds, batches * B * T


# ---- the loop -----------------------------------------------------------------------------------

def run(config):
    B, T = config.batch_size, config.seq_len
    if config.split not in ("train", "val"):
        raise UserError(f"--split {config.split} is neither train nor val")
    if not 0 <= config.rank < config.world_size:
        raise UserError(f"--rank {config.rank} is not in 0..{config.world_size - 1}, the ranks of "
                        f"--world-size {config.world_size}")
    if min(config.threads, config.batches, config.timed_chars) < 1:
        raise UserError("--threads, --batches and --timed-chars must be 1 or more")
    paths = list_shards(config.data_dir, config.split)
    tokenizer = tokenizer_or_gpt2(config.data_dir, config.gpt2_patience)
    print(f"02 dataloader - cpu - tokenizer {tokenizer.sha256[:12]} of "
          f"{tokenizer.get_vocab_size()} ids - B {B} x T {T} - rank {config.rank} of "
          f"{config.world_size}")

    # 1. look at batches  2. see the shift  3. resume  4. race
    def load(start=None):
        return tokenizing_data_loader(paths, tokenizer, B, T, config.rank, config.world_size,
                                      start=start, num_threads=config.threads)

    print("batch  inputs    targets   dtype        epoch    doc  token (of the next batch)")
    batches = list(itertools.islice(load(), config.batches))
    for i, (inputs, targets, state) in enumerate(batches, 1):
        shapes = ["x".join(map(str, tensor.shape)) for tensor in (inputs, targets)]
        print(f"{i:>5}  {shapes[0]:<9} {shapes[1]:<9} {inputs.dtype} {state['epoch']:>6} "
              f"{state['doc']:>6} {state['token']:>6}")

    print_shift(*batches[0][:2], tokenizer)

    middle = len(batches) // 2
    if middle:
        state = json.loads(json.dumps(batches[middle - 1][2]))  # as a checkpoint would keep it
        again = list(itertools.islice(load(state), len(batches) - middle))
        assert same_batches(again, batches[middle:]), f"resuming from {state} gave other batches"
        print(f"resumed from the state after batch {middle}: batches {middle + 1} to "
              f"{len(batches)} are the same bit for bit")

    speeds, n = race_raw_tiktoken(paths, tokenizer, B, T, config.timed_chars, config.threads)
    ours, raw = (statistics.median(column) for column in zip(*speeds))
    print(f"speed: {ours:,.0f} tokens/s, raw tiktoken {raw:,.0f} ({config.threads} threads)")
    share = statistics.median(ours / raw for ours, raw in speeds)
    print(f"result: share of raw tiktoken speed - -> {share:.2f} (n={n})")
    print("next: python edu/03_check_setup.py")
    return 0


# ---- the command line ---------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> int:
    return run_script(run, Config, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
