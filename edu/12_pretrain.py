"""Challenge 12: pretraining, where next-token prediction turns text into a base model.

Goal:
    Train the model of challenge 05 on the shards of challenge 01 until it completes sentences, with
    every number beside it that tells a healthy run from a broken one: bits per byte on text it has
    never seen, next to what a table of word pairs would score.

You will learn:
    - Muon: momentum for matrices, orthogonalised; AdamW for the embedding and the head
    - one loss in slices, so that the logits of a batch (tokens x vocabulary) never exist at once
    - gradient accumulation and data parallelism as the same sum, spread over time or over ranks
    - bits per byte, a loss that does not depend on the tokenizer, and MFU, the share of the
      machine's arithmetic that the model uses
    - what a run must save so that it can be killed at any moment and go on to the same bit

Read beside:
    nanochat/scripts/base_train.py, nanochat/muon.py::Muon, nanochat/loss_eval.py::evaluate_bpb.
    Simpler here: gradients are averaged in one visible place instead of inside two distributed
    optimizers. Different: resume is exact, byte lengths come from the raw bytes, and gradient
    clipping is left out (Muon and AdamW both divide the scale of the gradient away).

Run:
    python edu/12_pretrain.py

Expect:
    12 pretrain - cpu - float32 - ...M params - seed 1337
    step     loss  val bpb       lr    tok/s   mfu     eta
    ladder, bits per byte: uniform 3.770, unigram 2.605, bigram 1.249, now 0.484
    The capital of France is|...
    result: val bits per byte, bigram against model 1.249 -> 0.484 (n=549724)

Writes:
    base/model.safetensors
    base/config.json
    base/resume.pt
    base/metrics.jsonl
    base/loss.png
"""

import base64
import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file
from tqdm import tqdm

# ---- settings ------------------------------------------------------------------------------------

SAMPLE_PROMPTS = ("The capital of France is", "7 + 5 =", "The sky is", "One day")


@dataclass
class Config:
    data_dir: Path = field(default_factory=lambda: Path(os.environ.get("EDU_DATA", "data")))
    """Folder with shard_*.parquet and tokenizer/."""
    stage: str = "base"
    """Folder under data_dir that the run writes."""
    # the model: one dial, or every size by hand
    depth: int = 4
    """Layers. nanochat's one dial: with --n-embd 0 --n-head 0 the width and the heads follow."""
    n_embd: int = 128
    """Width C; 0 takes 64 * depth. In two minutes a narrow model that reads more wins."""
    n_head: int = 2
    """Query heads; 0 takes ceil(C / 128)."""
    n_kv_head: int = 0
    """Key and value heads; 0 takes n_head."""
    sequence_len: int = 256
    """Context T in tokens."""
    # the horizon
    num_iterations: int = 750
    """Optimizer steps (two and a half minutes on two cores); 0 takes target_param_data_ratio."""
    target_param_data_ratio: float = 20.0
    """Training tokens per parameter (20 is compute-optimal, arXiv 2203.15556)."""
    max_minutes: float = 0.0
    """Wall-clock budget; the learning rate reaches its end with it. 0: none."""
    target_bpb: float = 0.0
    """Stop at the first evaluation of the whole validation shard at or below this. 0: never."""
    # the batch
    device_batch_size: int = 8
    """Rows in one forward pass; the only number to lower when memory runs out."""
    total_batch_size: int = 2048
    """Tokens in one optimizer step, over all ranks and accumulation steps."""
    # the optimizer: nanochat's values, for a batch that is 256 times larger
    matrix_lr: float = 0.02
    """Muon, for the matrices inside the blocks."""
    embedding_lr: float = 0.2
    """AdamW, for the embedding, times sqrt(768 / C)."""
    unembedding_lr: float = 0.004
    """AdamW, for the head, times sqrt(768 / C)."""
    warmup_ratio: float = 0.0
    """Share of the run over which the learning rate rises."""
    warmdown_ratio: float = 0.5
    """Share of the run over which it falls."""
    final_lr_frac: float = 0.0
    """What is left of it at the end."""
    # looking at the run
    eval_every: int = 150
    """Steps between evaluations."""
    eval_tokens: int = 32_768
    """Validation tokens in an evaluation; the last one, and any claim, takes the whole shard."""
    log_every: int = 50
    """Steps between rows."""
    save_every: int = 150
    """Steps between checkpoints; a killed run goes on from the last one."""
    resume: bool = False
    """Go on from resume.pt."""
    plot: bool = True
    """Write TensorBoard events and the picture of the loss."""
    # the machine
    device_type: str = ""
    """cpu, cuda or mps; empty takes the best there is."""
    dtype: str = "auto"
    """auto, float32 or bfloat16; auto takes bfloat16 only where the hardware multiplies it."""
    compile: str = "auto"
    """auto, on or off; auto compiles when the run is long enough to pay for it."""
    seed: int = 1337
    """Seed of the weights; the data come in the order of the shards."""


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


# --- shared: compute-init (home: 03_check_setup.py) ---
def autodetect_device_type():
    """The fastest kind of device present: "cuda", else "mps" (Apple), else "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def compute_init(device_type=None, seed=1337, timeout=None):
    """Seed, pick the device, join the other ranks: (ddp, rank, local_rank, world_size, device).

    Under torchrun the ranks talk by nccl on CUDA, by gloo on CPU, and share out the CPU's cores.
    All get the same seed, so that models start equal; sample with seed + rank. timeout: timedelta
    to wait for a rank. Raises UserError. Source: nanochat/common.py::compute_init.
    """
    torch.manual_seed(seed)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    ddp = any(name not in missing for name in names[:3])
    if ddp and missing:
        raise UserError(f"half a torchrun environment: {', '.join(missing)} not set. Start with\n"
                        f"  torchrun --nproc_per_node=2 {sys.argv[0]}\n"
                        "or, for one process: unset RANK LOCAL_RANK WORLD_SIZE")
    rank, local_rank, world_size = (int(os.environ[n]) for n in names[:3]) if ddp else (0, 0, 1)
    device_type = device_type or autodetect_device_type()
    if ddp and device_type == "mps":
        print0("mps cannot exchange tensors between ranks: running on the CPU instead")
        device_type = "cpu"
    present = {"cpu": world_size, "mps": int(torch.backends.mps.is_available()),
               "cuda": torch.cuda.device_count()}
    if local_rank >= present.get(device_type, 0):
        raise UserError(f"local rank {local_rank} finds no {device_type} device of its own (there "
                        f"are {present.get(device_type, 0)}); use --device-type cpu or fewer ranks")
    device = torch.device(device_type, local_rank if device_type == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ddp and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        # torchrun sets 1 where it is unset, and most cores would idle; any other value is yours.
        affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        torch.set_num_threads(max(1, len(affinity(0)) // ranks_here))
    if ddp:
        backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timeout, device_id=bound)
    return ddp, rank, local_rank, world_size, device


def compute_cleanup():
    """Leave the process group, if there is one; torch warns of leaked resources otherwise."""
    if dist.is_initialized():
        dist.destroy_process_group()


def print0(*args):
    """Print at once, on rank 0 only."""
    if int(os.environ.get("RANK") or 0) == 0:
        print(*args, flush=True)


def pick_dtype(device):
    """(dtype, why): bfloat16 only where the hardware multiplies it; emulated it is a crawl."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        fast, why = major >= 8, f"compute capability {major}.{minor}; bf16 units came with 8.0"
    elif device.type == "cpu":
        wanted, has = ("amx_bf16", "avx512_bf16"), torch.cpu.get_capabilities()
        fast = any(has.get(name) for name in wanted)
        why = f"the CPU has {'' if fast else 'no '}bf16 units ({' or '.join(wanted)})"
    else:
        fast, why = False, f"float32 is the safe choice on {device.type}"
    return (torch.bfloat16 if fast else torch.float32), why


def has_compiler():
    """Path of the C++ compiler that torch.compile would use on the CPU; None if it cannot work."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    header = os.path.join(sysconfig.get_path("include"), "Python.h")  # its output includes this
    return shutil.which(os.environ.get("CXX", usual)) if os.path.exists(header) else None
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


# --- shared: block-parts (home: 04_block.py) ---
def norm(x):
    """RMSNorm over the last axis, without parameters: any shape in, the same shape out.

    The next linear layer can learn any scale itself, so a learned one would be idle.
    """
    # y = x / sqrt(mean(x^2) + eps)
    return F.rms_norm(x, (x.size(-1),))


def precompute_rotary(seq_len, head_dim, base=10_000, device=None):
    """Return cos, sin of every position's angles, each (1, T, 1, D/2), float32.

    Channel pair i turns by base^(-2i/D) radians per token: the first pair once around in about
    6 tokens, the last in about 6 * base. Source: arXiv:2104.09864; nanochat/gpt.py::GPT.
    """
    # angle[t, i] = t * base^(-2i/D)
    i = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    t = torch.arange(seq_len, dtype=torch.float32, device=device)
    angle = torch.outer(t, base ** (-i / head_dim))  # (T, D/2)
    return angle.cos()[None, :, None, :], angle.sin()[None, :, None, :]


def apply_rotary_emb(x, cos, sin):
    """Rotate x (B, T, H, D) by its positions' cos, sin (1 or B, T, 1, D/2); shape and dtype stay.

    Half-split: channel i is paired with channel i + D/2, not with its neighbour; mixing the two
    layouts is the classic RoPE bug. The turn is by minus the angle, nanochat's sign; scores see
    only differences, so either sign would do, but weights trained with one need that one.
    """
    T, half = x.size(1), x.size(-1) // 2
    assert cos.shape[1::2] == sin.shape[1::2] == (T, half), (  # T=1 would broadcast, silently
        f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit x {tuple(x.shape)}")
    x1, x2 = x[..., :half], x[..., half:]
    # y1 = x1 cos + x2 sin,  y2 = -x1 sin + x2 cos
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).to(x.dtype)


class MLP(nn.Module):
    """Two linear layers with ReLU^2 between: (B, T, C) -> (B, T, 4C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        # y = W_proj relu(W_fc x)^2
        return self.c_proj(F.relu(self.c_fc(x)).square())
# --- end shared ---


# --- shared: gpt (home: 05_engine.py) ---
@dataclass
class GPTConfig:
    """Sizes of the model, named as in nanochat/gpt.py::GPTConfig."""

    sequence_len: int = 256
    vocab_size: int = 4096
    n_layer: int = 4
    n_head: int = 2
    n_kv_head: int = 2
    n_embd: int = 256


class CachedSelfAttention(nn.Module):
    """Challenge 04's attention, with a cache: (B, T, C) -> (B, T, C).

    Source: nanochat/gpt.py::CausalSelfAttention.
    """

    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.n_embd // config.n_head
        self.c_q = nn.Linear(config.n_embd, self.n_head * self.head_dim, bias=False)
        self.c_k = nn.Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.c_v = nn.Linear(config.n_embd, self.n_kv_head * self.head_dim, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos_sin, kv_cache=None, mask=None):
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        q, k = norm(apply_rotary_emb(q, *cos_sin)), norm(apply_rotary_emb(k, *cos_sin))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        if kv_cache is not None:
            k, v = kv_cache.insert_kv(self.layer_idx, k, v)  # (B, H_kv, cached + T, D)
        # Without a mask: one query sees every key; T queries of an empty cache are a triangle.
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
            enable_gqa=self.n_head != self.n_kv_head)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class CachedBlock(nn.Module):
    """Attention, then MLP, each added to a residual stream that is normalised on the way in."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.attn = CachedSelfAttention(config, layer_idx)
        self.mlp = MLP(config)

    def forward(self, x, cos_sin, kv_cache=None, mask=None):
        x = x + self.attn(norm(x), cos_sin, kv_cache, mask)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """The model of nanochat, Nov 2025; parameter names as there. Source: nanochat/gpt.py::GPT."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "h": nn.ModuleList(CachedBlock(config, i) for i in range(config.n_layer)),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        cos, sin = precompute_rotary(config.sequence_len, config.n_embd // config.n_head)
        self.register_buffer("cos", cos, persistent=False)  # (1, sequence_len, 1, D/2)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Every block starts as the identity and every logit at 0, so the first loss is ln V."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                # std = min(1, sqrt(fan_out / fan_in)) / sqrt(fan_in)      (arXiv 2310.17813)
                fan_out, fan_in = module.weight.shape
                module.weight.normal_(0.0, min(1.0, (fan_out / fan_in) ** 0.5) / fan_in**0.5)
        self.transformer.wte.weight.normal_(0.0, 1.0)
        self.lm_head.weight.zero_()
        for block in self.transformer.h:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()

    def hidden_states(self, idx, kv_cache=None):
        """Token ids (B, T) -> what the head reads, (B, T, C)."""
        B, T = idx.shape
        end = T if kv_cache is None else kv_cache.get_pos() + T
        if end > self.config.sequence_len:
            raise ValueError(f"{end} tokens do not fit a context of {self.config.sequence_len}")
        if kv_cache is None:
            cos_sin, mask = (self.cos[:, :T], self.sin[:, :T]), None
        else:
            positions, mask = kv_cache.positions(T), kv_cache.attention_mask(T)  # (B or 1, T)
            cos_sin = self.cos[0, positions], self.sin[0, positions]  # (B or 1, T, 1, D/2)
        x = norm(self.transformer.wte(idx))
        for block in self.transformer.h:
            x = block(x, cos_sin, kv_cache, mask)
        return norm(x)

    def forward(self, idx, targets=None, kv_cache=None, loss_reduction="mean"):
        """Logits (B, T, V) in float32; with targets (B, T) the cross-entropy in nats instead.

        A target of -1 is ignored. loss_reduction: "mean" (0 where every target is -1), "sum", or
        "none" for (B * T,).
        """
        logits = self.lm_head(self.hidden_states(idx, kv_cache)).float()
        logits = 15.0 * torch.tanh(logits / 15.0)  # softcap: smooth, no logit beyond +-15
        if targets is None:
            return logits
        reduction = "sum" if loss_reduction == "mean" else loss_reduction
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1,
                               reduction=reduction)
        # The mean by hand: PyTorch's own is 0/0 = nan when every target is ignored.
        return loss / (targets != -1).sum().clamp(min=1) if loss_reduction == "mean" else loss
# --- end shared ---


# ---- the idea: the optimizer ---------------------------------------------------------------------


# --- shared: adamw (home: 12_pretrain.py) ---
class Optimizer:
    """Groups of parameters with their settings, and a state for each: what AdamW and Muon share.

    torch.optim.Optimizer does the same and more, but its first use imports the compiler, a second
    or more at every start of a script.
    """

    def __init__(self, groups, **defaults):
        self.param_groups = [{**defaults, **group, "params": list(group["params"])}
                             for group in groups]
        self.state = {p: {} for group in self.param_groups for p in group["params"]}

    def zero_grad(self):
        for p in self.state:
            p.grad = None

    def state_dict(self):
        """The states in the order of the parameters: tensors and numbers only."""
        return list(self.state.values())

    def load_state_dict(self, states):
        for p, state in zip(self.state, states, strict=True):
            self.state[p] = {name: value.to(p.device) if isinstance(value, torch.Tensor) else value
                             for name, value in state.items()}


class AdamW(Optimizer):
    """Each weight steps by its mean gradient over its root mean square; decay apart from both.

    groups: dicts of params and lr. Source: arXiv 1711.05101, algorithm 2.
    """

    def __init__(self, groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0):
        super().__init__(groups, betas=betas, eps=eps, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["step"] += 1
                # m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
                m = state["m"].lerp_(p.grad, 1 - beta1)
                v = state["v"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                # p <- (1 - lr wd) p - lr m^ / (sqrt(v^) + eps);  m^ = m / (1 - b1^t), v^ likewise
                root = (v / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(m, root, value=-group["lr"] / (1 - beta1 ** state["step"]))
# --- end shared ---


# --- shared: muon (home: 12_pretrain.py) ---
def orthogonalize(G, steps=5, dtype=torch.float32):
    """The nearest matrix with all singular values about 1, for each of a stack G (n, rows, cols).

    Newton-Schulz: an odd polynomial pushes every singular value towards 1 without an SVD.
    Source: nanochat/muon.py::zeropower_via_newtonschulz5, https://kellerjordan.github.io/posts/muon
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.to(dtype)
    if G.size(-2) > G.size(-1):
        X = X.mT  # X X^T on the short side
    # The Frobenius norm bounds the largest singular value, so all of them are below 1 now.
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        # X <- a X + (b A + c A^2) X  with  A = X X^T
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return (X.mT if G.size(-2) > G.size(-1) else X).to(G.dtype)


class Muon(Optimizer):
    """Momentum, orthogonalised: every direction of a weight matrix is stepped by the same amount.

    params: 2-d parameters. Matrices of one shape are stacked and orthogonalised together. Every
    rank holds the same averaged gradients and so takes the same step; nothing is sent from here.
    dtype: of the Newton-Schulz products; torch.optim.Muon insists on bfloat16, which is a hundred
    times slower than float32 where the hardware does not multiply it.
    Source: nanochat/muon.py::Muon.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, dtype=torch.float32):
        super().__init__([{"params": params}], lr=lr, momentum=momentum)
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for (rows, cols), params in by_shape.items():
                moments = [self.state[p].setdefault("momentum", torch.zeros_like(p))
                           for p in params]
                grads = [p.grad for p in params]
                # m <- mu m + (1 - mu) g;  u = orthogonal((1 - mu) g + mu m)   (Nesterov)
                torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
                updates = torch._foreach_lerp(grads, moments, group["momentum"])
                updates = orthogonalize(torch.stack(updates), dtype=self.dtype)
                # A tall matrix gets a larger step: its columns, not its rows, are orthonormal.
                scale = max(1.0, rows / cols) ** 0.5
                torch._foreach_add_(params, list(updates.unbind()), alpha=-group["lr"] * scale)


def build_optimizers(model, cfg, dtype=torch.float32):
    """[AdamW for the embedding and the head, Muon for the matrices of the blocks].

    Source: nanochat/gpt.py::GPT.setup_optimizers.
    """
    scale = (model.config.n_embd / 768) ** -0.5
    adamw = AdamW([{"params": [model.lm_head.weight], "lr": cfg.unembedding_lr * scale},
                   {"params": [model.transformer.wte.weight], "lr": cfg.embedding_lr * scale}])
    muon = Muon(model.transformer.h.parameters(), lr=cfg.matrix_lr, dtype=dtype)
    for optimizer in (adamw, muon):
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return [adamw, muon]
# --- end shared ---


def lr_multiplier(progress, cfg):
    """Trapezoid: up during warmup, flat, down during warmdown. progress: 0 to 1."""
    if progress < cfg.warmup_ratio:
        return progress / cfg.warmup_ratio
    if progress > 1.0 - cfg.warmdown_ratio:
        left = max(0.0, 1.0 - progress) / cfg.warmdown_ratio
        return left + (1.0 - left) * cfg.final_lr_frac
    return 1.0


# ---- the idea: the loss --------------------------------------------------------------------------


# --- shared: train-step (home: 12_pretrain.py) ---
class SlicedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of softcapped logits, with its gradient, a slice of the tokens at a time.

    The logits of a batch, 4096 tokens x 4096 words, are 64 MB that softcap, softmax and their
    backward passes would each read and write. A slice stays in the cache of the processor, and its
    gradient is known as soon as its loss is, so it is taken at once and the logits overwritten.
    Equal to GPT.forward's loss; the test compares values and gradients.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype):
        """hidden (N, C), weight (V, C), targets (N,) with -1 ignored -> mean loss in nats."""
        N, V = hidden.size(0), weight.size(0)
        h, w = hidden.detach().to(dtype), weight.detach().to(dtype)
        d_hidden, d_weight = torch.empty_like(h), torch.zeros_like(weight)
        counted = targets != -1
        losses, count = torch.zeros(N, device=h.device), counted.sum().clamp(min=1)
        rows = max(64, 2 ** (20 if h.device.type == "cpu" else 26) // V)
        logits, probs = h.new_empty(rows, V), weight.new_empty(rows, V)  # for every slice anew
        for s in (slice(i, i + rows) for i in range(0, N, rows)):
            x, mask, index = h[s], counted[s][:, None], targets[s].clamp(min=0)[:, None]
            # z = 15 tanh(x w^T / 15);  loss = -log softmax(z)[target]: no logit beyond +-15, so no
            # probability is too small for its logarithm
            tanh = torch.mm(x, w.T, out=logits[: len(x)]).float().div_(15.0).tanh_()
            grad = torch.mul(tanh, 15.0, out=probs[: len(x)])
            torch.softmax(grad, dim=-1, out=grad)
            losses[s] = -(grad.gather(1, index).log_() * mask)[:, 0]
            # dloss/dz = softmax(z) - onehot(target);  dz/d(x w^T) = 1 - tanh^2
            grad.scatter_add_(1, index, grad.new_full(index.shape, -1.0)).mul_(mask / count)
            grad = grad.addcmul_(grad, tanh.square_(), value=-1).to(dtype)
            torch.mm(grad, w, out=d_hidden[s])
            d_weight += grad.T @ x
        ctx.save_for_backward(d_hidden.to(hidden.dtype), d_weight)
        return losses.sum() / count

    @staticmethod
    def backward(ctx, grad_output):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad_output, d_weight * grad_output, None, None


class TrainStep:
    """Forward, backward and optimizer step of one global batch; what a benchmark should time.

    run_hidden: model.hidden_states, compiled or not. dtype: of the large matrix products.
    """

    def __init__(self, model, optimizers, dtype=torch.float32, compiled=False, world_size=1):
        self.model, self.optimizers, self.dtype = model, optimizers, dtype
        self.run_hidden = (torch.compile(model.hidden_states, dynamic=False) if compiled
                           else model.hidden_states)
        self.world_size = world_size

    def backward(self, inputs, targets, share=1.0):
        """Add share * gradient of the mean loss of (B, T) tokens; return the loss, a 0-d tensor."""
        with torch.autocast(inputs.device.type, torch.bfloat16,
                            enabled=self.dtype == torch.bfloat16):
            hidden = self.run_hidden(inputs)
        loss = SlicedCrossEntropy.apply(hidden.flatten(0, 1), self.model.lm_head.weight,
                                        targets.flatten(), self.dtype)
        (loss * share).backward()
        return loss.detach()

    def average_gradients(self):
        """g <- sum over ranks of g / W: after it every rank takes the same optimizer step."""
        grads = [p.grad for p in self.model.parameters()]
        flat = torch.cat([g.flatten() for g in grads])  # one message instead of one a parameter
        dist.all_reduce(flat)
        torch._foreach_copy_(grads, [piece.view_as(g) for piece, g in zip(
            (flat / self.world_size).split([g.numel() for g in grads]), grads)])

    def __call__(self, batches, lr_scale=1.0, momentum=0.95):
        """batches: the accumulation steps, a list of (inputs, targets) -> (loss, gradient norm)."""
        loss = sum(self.backward(x, y, 1.0 / len(batches)) for x, y in batches) / len(batches)
        if self.world_size > 1:
            self.average_gradients()
            dist.all_reduce(loss)
            loss = loss / self.world_size
        norm_of_all = torch.nn.utils.get_total_norm(
            [p.grad for p in self.model.parameters()]).item()
        # A step on a non-finite gradient would spoil every weight: the caller stops instead.
        if math.isfinite(norm_of_all) and math.isfinite(loss.item()):
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * lr_scale
                    if "momentum" in group:
                        group["momentum"] = momentum
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return loss.item(), norm_of_all
# --- end shared ---


# ---- the idea: bits per byte and what it is measured against -------------------------------------


# --- shared: bits-per-byte (home: 12_pretrain.py) ---
def validation_rows(texts, tokenizer, T, max_tokens=None):
    """The validation text as rows (N, T) of inputs and targets, every token a target once.

    The last row is padded: input 0, target -1. max_tokens: stop there.
    """
    bos, ids = tokenizer.get_bos_token_id(), []
    for text in texts:
        ids += [bos, *tokenizer.encode(text)]
        if max_tokens is not None and len(ids) > max_tokens:
            ids = ids[: max_tokens + 1]
            break
    if len(ids) < 2:
        raise UserError("the validation shard holds no text, so nothing can be measured.\n"
                        "  Make the shards again: python edu/00_tiny_world.py")
    count = math.ceil((len(ids) - 1) / T)
    inputs, targets = torch.zeros(count * T, dtype=torch.long), torch.full((count * T,), -1)
    inputs[: len(ids) - 1] = torch.tensor(ids[:-1])
    targets[: len(ids) - 1] = torch.tensor(ids[1:])
    return inputs.view(count, T), targets.view(count, T)


@torch.no_grad()
def evaluate_bpb(model, inputs, targets, token_bytes, dtype, batch_size=16, rank=0, world_size=1):
    """(bits per byte, bytes counted) over rows (N, T), which the ranks share.

    Special tokens have no bytes and do not count, neither above nor below the line.
    Source: nanochat/loss_eval.py::evaluate_bpb, but with the length of a token's raw bytes.
    """
    device, token_bytes = model.lm_head.weight.device, token_bytes.to(model.lm_head.weight.device)
    nats, num_bytes = torch.zeros(2, dtype=torch.float64, device=device).unbind()
    for i in range(rank * batch_size, len(inputs), world_size * batch_size):
        x, y = inputs[i : i + batch_size].to(device), targets[i : i + batch_size].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            losses = model(x, y, loss_reduction="none")
        lengths = token_bytes[y.flatten().clamp(min=0)] * (y.flatten() != -1)
        nats += (losses * (lengths > 0)).sum()
        num_bytes += lengths.sum()
    if world_size > 1:
        both = torch.stack((nats, num_bytes))
        dist.all_reduce(both)
        nats, num_bytes = both.unbind()
    # bpb = nats / (ln 2 * bytes)
    return (nats / (math.log(2) * num_bytes)).item(), int(num_bytes)
# --- end shared ---


def count_ladder(train_ids, inputs, targets, token_bytes):
    """Bits per byte, on rows (N, T), of three models that only count: uniform, unigram, bigram.

    train_ids: numpy array of training tokens. A model above the bigram has learned less than which
    word follows which: it is broken, or has hardly begun.
    """
    V = len(token_bytes)
    x, y = inputs.flatten().numpy(), targets.flatten().numpy()
    lengths = token_bytes.numpy()[y.clip(min=0)] * (y != -1)
    x, y, num_bytes = x[lengths > 0], y[lengths > 0], lengths.sum()
    single = np.bincount(train_ids, minlength=V)
    unigram = (single + 1) / (single.sum() + V)
    pairs, counts = np.unique(train_ids[:-1].astype(np.int64) * V + train_ids[1:],
                              return_counts=True)
    found = np.searchsorted(pairs, x * V + y).clip(max=len(pairs) - 1)
    seen = np.where(pairs[found] == x * V + y, counts[found], 0)
    # p(b | a) = (n(a, b) + k p(b)) / (n(a) + k): counts, smoothed by the unigram; k = 10
    bigram = (seen + 10 * unigram[y]) / (single[x] + 10)
    nats = {"uniform": len(y) * math.log(V), "unigram": -np.log(unigram[y]).sum(),
            "bigram": -np.log(bigram).sum()}
    return {name: float(value / (math.log(2) * num_bytes)) for name, value in nats.items()}


@torch.no_grad()
def complete(model, tokenizer, prompt, max_tokens=16):
    """The greedy continuation of a prompt as text; without a cache, for a few words."""
    ids = tokenizer.encode(prompt, prepend="<|bos|>")
    room = min(max_tokens, model.config.sequence_len - len(ids))
    start = len(ids)
    for _ in range(room):
        idx = torch.tensor([ids], device=model.lm_head.weight.device)
        ids.append(int(model(idx)[0, -1].argmax()))
        if ids[-1] == tokenizer.get_bos_token_id():
            break
    return tokenizer.decode([i for i in ids[start:] if i != tokenizer.get_bos_token_id()])


# ---- the loop ------------------------------------------------------------------------------------


def model_config(cfg, vocab_size):
    """The depth dial, with every size that was given by hand in its place.

    Source: nanochat/scripts/base_train.py (dim = 64 * depth, head size about 128).
    """
    n_embd = cfg.n_embd or 64 * cfg.depth
    n_head = cfg.n_head or math.ceil(n_embd / 128)
    n_kv_head = cfg.n_kv_head or n_head
    if min(cfg.depth, n_embd, n_head, n_kv_head, cfg.sequence_len) < 1:
        raise UserError("every size of the model must be at least 1.")
    if n_embd % (2 * n_head):
        raise UserError(f"--n-embd {n_embd} does not divide into {n_head} heads of an even size, "
                        f"which RoPE needs: try --n-head {max(1, n_embd // 64)}.")
    if n_head % n_kv_head:
        raise UserError(f"--n-kv-head {n_kv_head} does not divide --n-head {n_head}: every key "
                        "head must serve the same number of query heads.")
    return GPTConfig(cfg.sequence_len, vocab_size, cfg.depth, n_head, n_kv_head, n_embd)


def flops_per_token(model):
    """Floating-point operations of forward and backward for a token.

    6 (N - N_wte) + 12 L H D T.  Source: nanochat/gpt.py::GPT.estimate_flops (PaLM, appendix B).
    """
    c = model.config
    N = sum(p.numel() for p in model.parameters()) - model.transformer.wte.weight.numel()
    return 6 * N + 12 * c.n_layer * c.n_embd * c.sequence_len


def measure_peak_flops(device, dtype, n=1024, seconds=0.2):
    """FLOP/s of the best of many n x n matmuls: the peak of this machine, for the MFU."""
    a = torch.randn(n, n, device=device).to(dtype)
    best, start = math.inf, time.perf_counter()
    while time.perf_counter() - start < seconds:
        t = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - t)
    return 2 * n**3 / best


# --- shared: stopping (home: 12_pretrain.py) ---
class StopRequest:
    """Ctrl-C or SIGTERM asks the loop to stop at the end of a step, where all state is whole."""

    def __enter__(self):
        self.asked = False
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, signum, frame):
        if self.asked:  # twice: at once
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)


def agree(value, device, ddp):
    """The largest value over the ranks: all must stop, and schedule, at the same step."""
    if not ddp:
        return value
    tensor = torch.tensor(value, dtype=torch.float64 if device.type == "cpu" else torch.float32,
                          device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.item()


class TrainingFailed(Exception):
    """The run cannot go on (a loss that is not a number); exit code 1."""
# --- end shared ---


# --- shared: save-checkpoint (home: 12_pretrain.py) ---
def plain_config(cfg):
    """The Config as a dict of str, int, float and bool, which weights_only=True will load."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(cfg).items()}


def save_checkpoint(folder, model, tokenizer, step, metrics, config):
    """Write folder/model.safetensors and folder/config.json: weights, and all that explains them.

    metrics: dict of numbers; config: the script's Config.
    """
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    about = {
        "model": dataclasses.asdict(model.config), "tokenizer_sha256": tokenizer.sha256,
        "step": step, "metrics": metrics, "script": dataclasses.asdict(config),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
    }
    with atomic_write(folder / "model.safetensors") as temporary:
        save_file(weights, temporary)
    with atomic_write(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(about, indent=2, default=str), encoding="utf-8")
# --- end shared ---


# --- shared: metrics (home: 12_pretrain.py) ---
class MetricsLog:
    """metrics.jsonl, and the same scalars as TensorBoard events; rows after `step` are dropped."""

    def __init__(self, folder, step, tensorboard):
        self.path, self.writer = folder / "metrics.jsonl", None
        self.rows = [row for row in read_metrics(self.path) if row["step"] < step]
        with atomic_write(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows),
                                 encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, so only when used

            self.writer = SummaryWriter(folder / "tb", purge_step=step)

    def write(self, **row):
        self.rows.append(row)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.writer:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self.writer.add_scalar(name, value, row["step"])

    def close(self):
        if self.writer:
            self.writer.close()


def read_metrics(path):
    """The rows of a metrics.jsonl; a line that a kill cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows
# --- end shared ---


def plot_loss(rows, ladder, path):
    """A picture: training loss by step, and validation bits per byte above the ladder."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot([r["step"] for r in rows], [r["loss"] for r in rows], color="tab:blue", lw=1)
    left.set(xlabel="step", ylabel="training loss (nats per token)", title="training loss")
    seen = [r for r in rows if r.get("val_bpb") is not None]
    right.plot([r["step"] for r in seen], [r["val_bpb"] for r in seen], "o-", ms=3,
               color="tab:orange", label="model")
    for name, style in zip(("unigram", "bigram"), (":", "--")):
        right.axhline(ladder[name], color="gray", ls=style, lw=1, label=name)
    right.set(xlabel="step", ylabel="bits per byte", title="validation", ylim=(0, None))
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


# --- shared: resume (home: 12_pretrain.py) ---
def fingerprint(data):
    """Of bytes: 12 hexadecimal digits that will be others if a single byte is another."""
    return hashlib.sha256(data).hexdigest()[:12]


def save_resume(folder, cfg, origin, **state):
    """Write folder/resume.pt: the state of a run, its settings, and what it is made from.

    origin: {what: fingerprint} of what is no setting and yet makes this run this run.
    """
    with atomic_write(folder / "resume.pt") as temporary:
        torch.save({"config": plain_config(cfg), "origin": origin, **state}, temporary)


def load_resume(folder, cfg, origin, free):
    """The contents of resume.pt if --resume asks for it and it is there, else None.

    free: settings that may be others than then. Raises UserError naming all the rest that are: a
    run that goes on with other settings is neither of the two.
    """
    path = folder / "resume.pt"
    if not path.exists():
        if cfg.resume:
            print0(f"nothing to resume, so from the start: there is no {path}")
        return None
    if not cfg.resume:
        print0(f"starting over: {path} will be overwritten (--resume would go on from it)")
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        then = {**state["config"], **state["origin"]}
    except Exception as error:  # whatever torch makes of a damaged file, the remedy is one
        raise UserError(f"{path} cannot be read ({error}).\n  Start over without --resume.") \
            from error
    changed = [f"{name} {value} -> {then.get(name)}"
               for name, value in {**plain_config(cfg), **origin}.items()
               if name not in free and value != then.get(name)]
    if changed:
        raise UserError(f"{path} belongs to another run (now -> then): {', '.join(changed)}.\n"
                        "  Use the same, or start over without --resume.")
    return state
# --- end shared ---


def shards_fingerprint(paths):
    """Of names, sizes and last 64 kB, where parquet lists its pieces: all of it would take long."""
    facts = []
    for path in paths:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 65536))
            facts.append(f"{path.name} {size} {fingerprint(file.read())}")
    return fingerprint("\n".join(facts).encode())


# What a resumed run may change without becoming another run: how it is watched, not what it learns.
FREE_ON_RESUME = {"data_dir", "resume", "max_minutes", "target_bpb", "log_every", "save_every",
                  "eval_every", "eval_tokens", "plot", "device_type"}


def check_settings(cfg, world_size):
    """Refuse what cannot work before anything is loaded; return the accumulation steps."""
    tokens = cfg.device_batch_size * cfg.sequence_len * world_size
    if cfg.device_batch_size < 1 or cfg.total_batch_size < 1 or cfg.total_batch_size % tokens:
        raise UserError(
            f"--total-batch-size {cfg.total_batch_size} is not a multiple of {tokens} = "
            f"{cfg.device_batch_size} rows x {cfg.sequence_len} tokens x {world_size} ranks, so no "
            f"whole number of passes adds up to it: try --total-batch-size {max(tokens, 1)}.")
    if min(cfg.log_every, cfg.save_every, cfg.eval_every, cfg.eval_tokens) < 1:
        raise UserError("--log-every, --save-every, --eval-every and --eval-tokens count from 1.")
    if cfg.num_iterations < 0 or (cfg.num_iterations == 0 and
                                  not 0 < cfg.target_param_data_ratio < math.inf):
        raise UserError(f"--num-iterations {cfg.num_iterations} with --target-param-data-ratio "
                        f"{cfg.target_param_data_ratio} asks for no training at all.")
    if cfg.num_iterations and cfg.target_param_data_ratio != Config.target_param_data_ratio:
        raise UserError(f"--num-iterations {cfg.num_iterations} sets the steps, so "
                        f"--target-param-data-ratio {cfg.target_param_data_ratio:g} would do "
                        "nothing: add --num-iterations 0.")
    if not all(0 <= share <= 1 for share in (cfg.warmup_ratio, cfg.warmdown_ratio)):
        raise UserError(f"--warmup-ratio {cfg.warmup_ratio:g} --warmdown-ratio "
                        f"{cfg.warmdown_ratio:g}: shares of the run lie between 0 and 1.")
    for name, allowed in (("dtype", ("auto", "float32", "bfloat16")),
                          ("compile", ("auto", "on", "off"))):
        if getattr(cfg, name) not in allowed:
            raise UserError(f"--{name} {getattr(cfg, name)}: choose one of {', '.join(allowed)}.")
    return cfg.total_batch_size // tokens


def check_stage(cfg):
    """Refuse a folder where something else lives: a base model would take its place for good."""
    folder = cfg.data_dir / cfg.stage
    if Path(cfg.stage).name != cfg.stage or cfg.stage in ("", ".."):
        raise UserError(f"--stage {cfg.stage!r} must be the plain name of a folder: try base.")
    with contextlib.suppress(OSError, ValueError):  # nothing here, or nothing that can be read
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "target_param_data_ratio" not in about.get("script", {}):  # a setting of ours alone
            raise UserError(f"{folder} is another script's work, and this run would overwrite it: "
                            "choose another --stage.")


def train(cfg):
    """Pretrain as cfg says; returns {"step", "val_bpb", "ladder", "rows"} (rows: metrics.jsonl)."""
    ddp, rank, _, world_size, device = compute_init(cfg.device_type or None, cfg.seed)
    started = time.perf_counter()
    accumulation = check_settings(cfg, world_size)
    check_stage(cfg)
    folder = cfg.data_dir / cfg.stage
    tokenizer = Tokenizer.from_dir(cfg.data_dir / "tokenizer")
    token_bytes = torch.tensor(tokenizer.token_bytes())

    # 1. the model, its optimizers, and how fast this machine could be
    model = GPT(model_config(cfg, tokenizer.get_vocab_size())).to(device)
    num_params = sum(p.numel() for p in model.parameters())
    dtype, why_dtype = pick_dtype(device)
    if cfg.dtype != "auto":
        dtype, why_dtype = getattr(torch, cfg.dtype), "asked for by --dtype"
    print0(f"12 pretrain - {device.type} - {str(dtype)[6:]} - {num_params / 1e6:.1f}M params - "
           f"seed {cfg.seed}")
    num_iterations = cfg.num_iterations or max(
        1, int(cfg.target_param_data_ratio * num_params) // cfg.total_batch_size)
    flops = flops_per_token(model)
    peak = agree(measure_peak_flops(device, dtype), device, ddp)  # all ranks decide alike
    shards, val_shards = (list_shards(cfg.data_dir, split) for split in ("train", "val"))
    origin = {"tokenizer": tokenizer.sha256[:12], "shards": shards_fingerprint(shards + val_shards)}
    resumed = load_resume(folder, cfg, origin, FREE_ON_RESUME)
    compiled, why_compile = decide_compile(
        cfg, device, num_iterations * cfg.total_batch_size * flops / peak / world_size, resumed)
    optimizers = build_optimizers(model, cfg, dtype)
    train_step = TrainStep(model, optimizers, dtype, compiled, world_size)
    print0(f"{model.config.n_layer} layers x {model.config.n_embd} wide, "
           f"{num_iterations} steps x {cfg.total_batch_size} tokens, peak {peak / 1e9:.0f} GFLOP/s")
    print0(f"precision: {why_dtype}; compile: {why_compile}; tokenizer {tokenizer.sha256[:12]}")

    # 2. the data, from the start or from where the last run stopped
    first = 0
    if resumed:
        model.load_state_dict(resumed["model"])
        for optimizer, states in zip(optimizers, resumed["optimizers"]):
            optimizer.load_state_dict(states)
        torch.set_rng_state(resumed["rng"])
        first = resumed["step"]
        print0(f"resumed at step {first} of {num_iterations}")
    loader_state = resumed["loader"][rank] if resumed else None
    batches = tokenizing_data_loader(shards, tokenizer, cfg.device_batch_size, cfg.sequence_len,
                                     rank=rank, world_size=world_size, start=loader_state)
    val_texts = parquet_texts(val_shards)
    val_inputs, val_targets = validation_rows(val_texts, tokenizer, cfg.sequence_len)
    few = max(1, cfg.eval_tokens // cfg.sequence_len)
    some = torch.linspace(0, len(val_inputs) - 1, min(few, len(val_inputs))).long()

    def measure_bpb(rows=slice(None)):
        return evaluate_bpb(model, val_inputs[rows], val_targets[rows], token_bytes, dtype,
                            cfg.device_batch_size, rank, world_size)

    # 3. what models that only count reach on the same validation text
    ladder = count_ladder(ladder_tokens(shards, tokenizer), val_inputs, val_targets, token_bytes)
    print0("ladder, bits per byte: " + ", ".join(f"{k} {v:.3f}" for k, v in ladder.items()))

    def save(step, val_bpb):
        """resume.pt first: whatever kills the run in between, the pair for inference is whole."""
        loaders = [loader_state] * world_size
        if ddp:
            dist.all_gather_object(loaders, loader_state)
        if rank == 0:
            save_resume(folder, cfg, origin, step=step, model=model.state_dict(), loader=loaders,
                        optimizers=[o.state_dict() for o in optimizers], compiled=compiled,
                        rng=torch.get_rng_state(),
                        minutes=minutes_before + (time.perf_counter() - loop_started) / 60)
            save_checkpoint(folder, model, tokenizer, step,
                            {"val_bpb": val_bpb, "ladder": ladder}, cfg)

    log = MetricsLog(folder, first, cfg.plot) if rank == 0 else None
    print0(f"{'step':>6} {'loss':>8} {'val bpb':>8} {'lr':>8} {'tok/s':>8} {'mfu':>5} {'eta':>7}")
    step, val_bpb, loop_started, failure = first, None, time.perf_counter(), None
    timer, timed_from, asked = loop_started, first, False
    minutes_before = resumed["minutes"] if resumed else 0.0
    bar = tqdm(total=num_iterations, initial=first, unit="step", leave=False,
               disable=True if rank else None)
    with StopRequest() as stop:
        while step < num_iterations:
            # 4. learn: the schedule follows the steps, or the clock where that runs out first
            minutes = agree(minutes_before + (time.perf_counter() - loop_started) / 60, device, ddp)
            progress = max(step / num_iterations,
                           minutes / cfg.max_minutes if cfg.max_minutes else 0.0)
            if progress >= 1.0:
                print0(f"--max-minutes {cfg.max_minutes:g} is over at step {step}")
                break
            micro_batches = []
            for _ in range(accumulation):
                inputs, targets, loader_state = next(batches)
                micro_batches.append((inputs.to(device), targets.to(device)))
            lr_scale = lr_multiplier(progress, cfg)
            # Muon's momentum grows with the run: early gradients are soon out of date.
            momentum = 0.85 + 0.10 * min(1.0, step / max(1, min(300, num_iterations // 4)))
            loss, grad_norm = train_step(micro_batches, lr_scale, momentum)
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                failure = (f"loss {loss} and gradient norm {grad_norm} at step {step}: the run has "
                           "diverged (the weights of this step were not touched).\n  What was "
                           f"saved before stays in {folder}. Lower the learning rates, for example "
                           f"--matrix-lr {cfg.matrix_lr / 2:g}, or check the data.")
                break
            step += 1
            bar.update()

            # 5. look: evaluate, report, save; none of it counts as training time
            looked = time.perf_counter()
            asked = agree(float(stop.asked), device, ddp) > 0
            last, val_bpb = step == num_iterations or asked, None
            if step % cfg.eval_every == 0 and not last:
                model.eval()
                val_bpb, _ = measure_bpb(some)
                model.train()
                if cfg.target_bpb and val_bpb <= cfg.target_bpb * 1.02:
                    val_bpb, _ = measure_bpb()  # a part of the shard only hints; this is the claim
            if step % cfg.log_every == 0 or val_bpb is not None or last or step == 1:
                speed = (step - timed_from) * cfg.total_batch_size / (looked - timer)
                timer, timed_from = looked, step
                eta = (num_iterations - step) * cfg.total_batch_size / speed
                mfu = speed * flops / (peak * world_size)
                report_step(bar, step - 1, loss, val_bpb, lr_scale, speed, mfu, eta)
                if rank == 0:
                    log.write(step=step - 1, loss=loss, val_bpb=val_bpb, lr=lr_scale,
                              grad_norm=grad_norm, tok_per_s=round(speed, 1), mfu=round(mfu, 4))
            if cfg.target_bpb and val_bpb is not None and val_bpb <= cfg.target_bpb:
                print0(f"--target-bpb {cfg.target_bpb:g} is reached at step {step}")
                break
            if step % cfg.save_every == 0 and not last:
                save(step, val_bpb)
            timer += time.perf_counter() - looked
            if asked:
                break
    bar.close()
    if failure:
        compute_cleanup()
        raise TrainingFailed(failure)
    save(step, val_bpb)  # before anything slow: who asks to stop may not ask twice
    if asked and step < num_iterations:
        print0(f"stopped at step {step} of {num_iterations}; --resume goes on, with the same flags")
        compute_cleanup()
        return {"step": step, "val_bpb": val_bpb, "ladder": ladder,
                "rows": read_metrics(folder / "metrics.jsonl")}

    # 6. the claim: the whole validation shard, once
    model.eval()
    val_bpb, val_bytes = measure_bpb()
    if rank == 0:
        save_checkpoint(folder, model, tokenizer, step, {"val_bpb": val_bpb, "ladder": ladder}, cfg)
    print0("ladder, bits per byte: " + ", ".join(f"{k} {v:.3f}" for k, v in ladder.items())
           + f", now {val_bpb:.3f}")
    rows = []
    if rank == 0:
        log.write(step=step, loss=None, val_bpb=val_bpb, ladder_bigram=ladder["bigram"])
        log.close()
        rows = log.rows
        for prompt in SAMPLE_PROMPTS:
            print(f"  {prompt}|{complete(model, tokenizer, prompt)}")
        if cfg.plot:
            plot_loss(rows, ladder, folder / "loss.png")
        for name in ("model.safetensors", "config.json", "resume.pt", "metrics.jsonl",
                     *(["loss.png"] if cfg.plot else [])):
            print(f"wrote {folder / name}")
        print(f"trained {step - first} steps in {time.perf_counter() - loop_started:.0f} s, "
              f"{time.perf_counter() - started:.0f} s in all")
        print(f"result: val bits per byte, bigram against model {ladder['bigram']:.3f} -> "
              f"{val_bpb:.3f} (n={val_bytes})")
        print("next: python edu/05_engine.py")
    compute_cleanup()
    return {"step": step, "val_bpb": val_bpb, "ladder": ladder, "rows": rows}


def ladder_tokens(shards, tokenizer, max_chars=16_000_000):
    """Token ids of the first documents, for the models that only count: numpy (N,)."""
    bos, ids, chars = tokenizer.get_bos_token_id(), [], 0
    for text in parquet_texts(shards):
        ids += [bos, *tokenizer.encode(text)]
        chars += len(text)
        if chars > max_chars:
            break
    return np.array(ids, dtype=np.int64)


def decide_compile(cfg, device, seconds_at_peak, resumed):
    """(whether to torch.compile, why). seconds_at_peak: the run's arithmetic at full speed."""
    if resumed:  # other kernels round otherwise, and the run would not be the same run
        return resumed["compiled"], "as before the resume"
    if cfg.compile != "auto":
        return cfg.compile == "on", f"--compile {cfg.compile}"
    if device.type == "cpu" and not has_compiler():
        return False, "off, no C++ compiler found"
    if device.type == "mps" or seconds_at_peak < 45:
        return False, "off, the run is too short to pay for 15 s of compiling"
    return True, "on, 15 s once, then 1.1 to 1.3 times the speed"


def report_step(bar, step, loss, val_bpb, lr_scale, speed, mfu, eta):
    """One row of the table, above the progress bar."""
    if bar.disable is True and int(os.environ.get("RANK", 0)):
        return
    bpb = "" if val_bpb is None else f"{val_bpb:.4f}"
    bar.write(f"{step:>6} {loss:>8.4f} {bpb:>8} {lr_scale:>8.3f} {speed:>8.0f} {mfu:>5.0%} "
              f"{eta // 60:>4.0f}:{eta % 60:02.0f}")


# ---- the command line ----------------------------------------------------------------------------


def run_pretraining(cfg):
    try:
        train(cfg)
    except TrainingFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_script(run_pretraining, Config, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
