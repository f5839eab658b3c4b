"""Challenge 14: evaluation, where "it seems to work" becomes a number with an error bar.

Goal:
    Put the same questions to every stage of a model's life: how well it predicts text (bits per
    byte), what it knows without being taught to answer (CORE), and what it answers in a chat. Every
    score stands beside its n, what guessing would score, and a 95% interval.

You will learn:
    - three ways to ask a model that can only continue text: which ending, which beginning, or
      exactly which tokens are the likeliest
    - why a score is centred: 0 is guessing and 1 is perfect, whatever the number of choices
    - to score rows of many lengths in one batch and get the same numbers as one by one
    - what it takes to run code that a model has written, and why it is still no security boundary

Read beside:
    nanochat/core_eval.py, nanochat/loss_eval.py, scripts/base_eval.py, scripts/chat_eval.py,
    nanochat/execution.py, tasks/. Different here: one batch holds options of many questions; every
    score has an interval; a program passes only if its tests have run to their end.

Run:
    python edu/14_evaluate.py
    python edu/14_evaluate.py --stage sft --tasks core --max-per-task 50

Expect:
    14 evaluate - cpu - float32 - base, mid, sft, rl - seed 1337
    score                     n  chance  ...
    CORE                   ...
    ChatCORE               ...
    result: ChatCORE, base against rl 0.079 -> 0.632 (n=400)

Writes:
    base/eval.json
    sft/eval.json
    rl/eval.json
"""

import ast
import base64
import contextlib
import csv
import dataclasses
import hashlib
import json
import math
import operator
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

# ---- settings ------------------------------------------------------------------------------------

PARTS = ("bpb", "core", "chat")


@dataclass
class Config:
    data_dir: Path = field(default_factory=lambda: Path(os.environ.get("EDU_DATA", "data")))
    """Folder with tokenizer/, the stages, the shards, tiny_eval/ and the test files."""
    compare: str = "base,mid,sft,rl"
    """Stages to evaluate and set side by side; those that are not there are named."""
    stage: str = ""
    """One stage only, instead of compare."""
    tasks: str = "bpb,core,chat"
    """What to measure: bits per byte, tasks for a base model, tasks for a chat model."""
    fresh: bool = False
    """Measure again what eval.json says of the same weights, settings and questions already, and
    forget what else stands there."""
    # how much: an interval shrinks with the root of n, the time grows with n
    bpb_tokens: int = 12_288
    """Tokens of each split, in rows spread over its first million characters; 0 takes all of it."""
    max_per_task: int = 200
    """Questions of each CORE task; 0 takes all. nanochat: 500 while training, then all."""
    chat_per_task: int = 100
    """Questions of each chat task; 0 takes all."""
    # other questions
    bundle: Path | None = None
    """A folder in the layout of DCLM's eval_bundle, in place of the tiny world's CORE tasks."""
    gsm8k: Path | None = None
    """JSONL in the format of GSM8K: a chat task more."""
    humaneval: Path | None = None
    """JSONL in the format of HumanEval: a chat task more, which runs what the model writes."""
    hub: bool = False
    """ARC, MMLU, GSM8K and HumanEval through the library `datasets`, over the network."""
    # how replies are sampled
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int = 50
    """Sample among the k likeliest tokens only; 0 means all. Of no effect at temperature 0."""
    num_samples: int = 1
    """Replies to each question; it counts as right when one of them is."""
    max_new_tokens: int = 80
    """Longest reply; raise it for GSM8K (256) and HumanEval (512)."""
    code_seconds: float = 5.0
    """How long a program that the model wrote may run."""
    # the machine
    batch_tokens: int = 8192
    """Tokens in one forward pass, padding included; lower it when memory runs out."""
    device_type: str = ""
    """cpu, cuda or mps; empty takes the best there is."""
    seed: int = 1337
    """Seed of the sampling and of the choices that wrong answers are drawn from."""


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


# --- shared: kv-cache (home: 05_engine.py) ---
class KVCache:
    """Keys and values of every layer for the tokens seen so far, in one tensor.

    data: (B, n_layer, 2, n_kv_head, max_seq_len, head_dim), keys at [:, :, 0], values at [:, :, 1].
    Rows share one write column, `pos`. A row with a shorter prompt is padded on the left and its
    first real column is start[b]; padding is masked, and positions count from start[b], so that a
    row computes exactly what it would compute alone. Source: nanochat/engine.py::KVCache.
    """

    def __init__(self, batch_size, n_layer, n_kv_head, max_seq_len, head_dim,
                 dtype=torch.float32, device="cpu"):
        shape = (batch_size, n_layer, 2, n_kv_head, max_seq_len, head_dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.layers = self.data.unbind(1)  # views, (B, 2, n_kv_head, max_seq_len, head_dim) each
        self.start = None  # (B,) long, or None while no row is padded
        self.pos = 0  # columns filled

    def get_pos(self):
        return self.pos

    def insert_kv(self, layer_idx, k, v):
        """Store k, v (B, n_kv_head, T, head_dim); return all so far, (B, n_kv_head, pos + T, D).

        `pos` moves when the last layer has written. Raises ValueError when the cache is full.
        """
        keys, values = self.layers[layer_idx].unbind(1)
        end = self.pos + k.size(2)
        if end > keys.size(2):
            raise ValueError(f"the KV cache is full: {end} tokens, room for {keys.size(2)}")
        keys[:, :, self.pos : end] = k
        values[:, :, self.pos : end] = v
        if layer_idx == len(self.layers) - 1:
            self.pos = end
        return keys[:, :, :end], values[:, :, :end]

    def positions(self, T):
        """Positions of the next T tokens: (1, T), or (B, T) when rows are padded."""
        columns = torch.arange(self.pos, self.pos + T, device=self.data.device)[None]
        return columns if self.start is None else (columns - self.start[:, None]).clamp(min=0)

    def attention_mask(self, T):
        """Who may see whom, (1 or B, 1, T, pos + T) bool; None where SDPA needs to be told nothing.

        The trap: is_causal aligns its triangle to the top left corner, so with a filled cache and
        T > 1 it would hide the prefix and show the future.
        """
        if self.start is None and (T == 1 or self.pos == 0):
            return None
        columns = torch.arange(self.pos + T, device=self.data.device)
        mask = columns <= columns[self.pos :, None]  # causal: (T, pos + T)
        if self.start is None:
            return mask[None, None]
        mask = mask & (columns >= self.start[:, None, None])  # no padding: (B, T, pos + T)
        # A padded query would see nothing, and a softmax over nothing is nan: let it see itself.
        return (mask | (columns == columns[self.pos :, None]))[:, None]

    def repeat_rows(self, count):
        """Make count copies of every row, next to each other."""
        data = self.data.new_empty(len(self.data) * count, *self.data.shape[1:])
        data[..., : self.pos, :] = self.data[..., : self.pos, :].repeat_interleave(count, dim=0)
        self.data, self.layers = data, data.unbind(1)
        self.start = None if self.start is None else self.start.repeat_interleave(count)

    def keep_rows(self, rows):
        """Drop all but `rows` (list, rising); return the order in which they stand now.

        A gap is filled with a row from the end: to move a few costs less than to copy them all.
        """
        gaps = sorted(set(range(len(rows))) - set(rows))
        moved = rows[len(rows) - len(gaps) :]
        self.data[gaps, ..., : self.pos, :] = self.data[moved, ..., : self.pos, :]
        order = list(range(len(rows)))
        for gap, row in zip(gaps, moved):
            order[gap] = row
        self.data = self.data[: len(rows)]
        self.layers = self.data.unbind(1)
        self.start = None if self.start is None else self.start[order]
        return order
# --- end shared ---


# --- shared: decode-step (home: 05_engine.py) ---
class DecodeStep:
    """The model once more, for one new token in each row: the same numbers, sooner.

    One token is so little arithmetic that the time goes into reading the weights and into the fixed
    price of each PyTorch operation, 2 to 15 us. So q, k and v are one product, every norm is three
    cheap operations, and a matrix lies in slices of its columns, two for each core: left whole, so
    small a product would be read by one core alone, at half the speed of memory. The price: a
    second copy of the weights, which must be made anew when they change (`is_current`).
    """

    def __init__(self, model):
        self.wte, self.sums, config = model.transformer.wte, self.weight_sums(model), model.config
        C, D = config.n_embd, config.n_embd // config.n_head
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, D
        slices = 2 * torch.get_num_threads() if self.wte.weight.device.type == "cpu" else 1

        def pack(*linears, scale=1.0):  # (n, C_in, C_out / n), each slice read front to back
            weight = torch.cat([linear.weight * scale for linear in linears])  # (C_out, C_in)
            return weight.unflatten(0, (math.gcd(slices, len(weight)), -1)).mT.contiguous()

        # norm(x) = sqrt(C) unit(x): the factor moves into the matrix that comes after it
        self.layers = [(pack(block.attn.c_q, block.attn.c_k, block.attn.c_v, scale=C**0.5),
                        pack(block.attn.c_proj), pack(block.mlp.c_fc, scale=C**0.5),
                        pack(block.mlp.c_proj)) for block in model.transformer.h]
        self.head = pack(model.lm_head, scale=C**0.5 / 15.0)
        # y = x (cos, cos) + (x2, x1) (sin, -sin) is RoPE on x = (x1, x2), with a norm's sqrt(D)
        cos, sin = model.cos[0, :, 0] * D**0.5, model.sin[0, :, 0] * D**0.5  # (sequence_len, D/2)
        self.cos_sin = torch.cat((cos, cos, sin, -sin), dim=-1).to(self.head.dtype)
        eps = torch.finfo(self.head.dtype).eps  # what F.rms_norm adds to the mean of the squares
        self.eps = {n: self.head.new_tensor((n * eps) ** 0.5) for n in (C, D)}

    @staticmethod
    def weight_sums(model):
        return [weight.sum().item() for weight in model.parameters()]

    def is_current(self, model):
        """Are these still the model's weights? Adding them all up takes about one decode step."""
        return self.wte is model.transformer.wte and self.sums == self.weight_sums(model)

    def unit(self, x):
        """x (..., C) / sqrt(|x|^2 + C eps), a vector of length 1."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / torch.hypot(length, self.eps[x.size(-1)])

    @staticmethod
    def times(x, packed):
        """x (B, C_in) times a packed matrix -> (B, C_out); the cores share out the slices."""
        y = torch.bmm(x.expand(len(packed), -1, -1), packed)  # (n, B, C_out / n)
        return y.transpose(0, 1).flatten(1)

    def __call__(self, ids, cache):
        """Ids of the new tokens (B,), and the cache of all before them -> float32 logits (B, V)."""
        B, D, heads = len(ids), self.head_dim, self.n_head + self.n_kv_head
        cos, sin = self.cos_sin[cache.positions(1)].chunk(2, dim=-1)  # (1 or B, 1, D)
        x, mask = norm(self.wte(ids)), cache.attention_mask(1)  # (B, C), (B, 1, 1, pos + 1) or None
        for i, (w_qkv, w_attn, w_fc, w_mlp) in enumerate(self.layers):
            qkv = self.times(self.unit(x), w_qkv).view(B, -1, D)  # (B, H + 2 H_kv, D)
            qk = self.unit(qkv[:, :heads])  # norm first is the same: rotation keeps the length
            qk = torch.addcmul(qk * cos, qk.roll(D // 2, -1), sin)
            k, v = cache.insert_kv(i, qk[:, self.n_head :, None], qkv[:, heads:, None])
            # the query heads that share a key are the rows of one matrix: no head is copied
            q = qk[:, : self.n_head].view(B, self.n_kv_head, -1, D)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + self.times(y.reshape(B, -1), w_attn)
            x = x + self.times(torch.relu(self.times(self.unit(x), w_fc)).square_(), w_mlp)
        return torch.tanh(self.times(self.unit(x), self.head).float()).mul_(15.0)
# --- end shared ---


# --- shared: sampling (home: 05_engine.py) ---
def sample_next_token(logits, u, temperature=1.0, top_k=0):
    """One token for each row: logits (B, V), u (B,) uniform in [0, 1) -> (B,) long.

    Inverse-transform sampling: the token in whose slice of the cumulative distribution u falls.
    One number per row and step makes a row's text independent of who else is in the batch.
    """
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    if 0 < top_k < logits.size(-1):
        logits, tokens = logits.topk(top_k, dim=-1)  # (B, k), (B, k)
    else:
        tokens = None
    cdf = torch.softmax(logits / temperature, dim=-1).cumsum(dim=-1)
    # cdf[i-1] <= u * cdf[-1] < cdf[i]: a token of probability 0 has no slice and is never drawn.
    choice = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)
    choice = choice.clamp(max=logits.size(-1) - 1)  # (B, 1)
    return (choice if tokens is None else tokens.gather(1, choice))[:, 0]
# --- end shared ---


# --- shared: calculator (home: 05_engine.py) ---
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv,
             ast.UAdd: operator.pos, ast.USub: operator.neg}


def evaluate_node(node):
    """The value of a parsed expression made of numbers, + - * / and 'text'.count('letter')."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            return OPERATORS[type(op)](evaluate_node(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](evaluate_node(left), evaluate_node(right))
        case ast.Call(func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
                      args=[ast.Constant(value=str() as letters)], keywords=[]):
            return text.count(letters)
    raise ValueError(f"{type(node).__name__} is not on the calculator's list")


def use_calculator(expression):
    """The result of an arithmetic expression as text, or None where it has none.

    Parsed and walked over a whitelist: no names, no calls but str.count, no powers, and at most
    100 characters, so that neither 9**9**9 nor 200 brackets cost anything. Six decimals at most.
    Source: nanochat/engine.py::use_calculator, which hands the text to Python's own evaluator.
    """
    expression = expression.strip()
    if len(expression) > 100:
        return None
    if "'" not in expression and '"' not in expression:
        expression = re.sub(r"(?<=\d),(?=\d{3}\b)", "", expression)  # 1,234 is a number here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a model writes things like 3in: Python warns
            value = evaluate_node(ast.parse(expression, mode="eval").body)
        if isinstance(value, float):
            value = round(value, 6)  # 0.1 + 0.2 is 0.3
            value = int(value) if abs(value) < 1e15 and value.is_integer() else value  # 12 / 4 is 3
        return str(value) if math.isfinite(value) else None
    except (SyntaxError, ValueError, ArithmeticError):
        return None
# --- end shared ---


# --- shared: engine (home: 05_engine.py) ---
class RowState:
    """What the engine remembers of one row. Source: nanochat/engine.py::RowState."""

    def __init__(self):
        self.forced = deque()  # tokens the tool wants written next
        self.expression = None  # tokens since <|python_start|>, None outside of a call


class Engine:
    """Generates with a cache, many rows at once. Source: nanochat/engine.py::Engine."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.packed = model, tokenizer, None
        special = tokenizer.encode_special
        self.python_start, self.python_end = special("<|python_start|>"), special("<|python_end|>")
        self.output_start, self.output_end = special("<|output_start|>"), special("<|output_end|>")
        self.stops = {special("<|assistant_end|>"), tokenizer.get_bos_token_id()}

    def check_request(self, prompts, num_samples, max_tokens, temperature):
        """The number of new tokens, all that fit for None; ValueError before anything is computed.

        A context has room for sequence_len tokens, and rows of different lengths share its columns.
        """
        limit, longest = self.model.config.sequence_len, max(map(len, prompts), default=0)
        if not prompts or min(map(len, prompts)) == 0:
            raise ValueError("every prompt needs at least one token: begin with <|bos|>")
        if num_samples < 1 or temperature < 0 or (max_tokens is not None and max_tokens < 1):
            raise ValueError(f"num_samples {num_samples} and max_tokens {max_tokens} must be at "
                             f"least 1, temperature {temperature} at least 0")
        room = limit - longest
        if room < (max_tokens or 1):
            raise ValueError(
                f"a prompt of {longest} tokens and {max_tokens or 1} new ones do not fit the "
                f"context of {limit}: " + (f"ask for {room} at most" if room > 0
                                           else f"cut {1 - room} tokens from the prompt"))
        return max_tokens or room

    def prefill(self, prompts, max_tokens):
        """Run prompts (lists of ids) through the model: last logits (B, V) and the filled cache."""
        config, weight = self.model.config, self.model.lm_head.weight
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=weight.device)
        longest = int(lengths.max())
        cache = KVCache(len(prompts), config.n_layer, config.n_kv_head, longest + max_tokens,
                        config.n_embd // config.n_head, weight.dtype, weight.device)
        if (lengths != longest).any():
            cache.start = longest - lengths
        rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        hidden = self.model.hidden_states(torch.tensor(rows, device=weight.device), cache)
        return self.head(hidden), cache

    def head(self, hidden):
        """Logits of the last position only, (B, T, C) -> (B, V): the others are not needed."""
        return 15.0 * torch.tanh(self.model.lm_head(hidden[:, -1]).float() / 15.0)

    def decode_step(self):
        """The DecodeStep of the model's present weights, kept from call to call while they last."""
        if self.packed is None or not self.packed.is_current(self.model):
            self.packed = DecodeStep(self.model)
        return self.packed

    def advance_tool(self, state, token):
        """Follow the calculator's tokens through a row; queue its answer when a call closes."""
        if token == self.python_start:
            state.expression = []
        elif state.expression is None:
            return
        elif token == self.python_end:
            result = use_calculator(self.tokenizer.decode(state.expression))
            state.expression = None
            if result is not None:
                state.forced.extend([self.output_start, *self.tokenizer.encode(result),
                                     self.output_end])
        else:
            state.expression.append(token)

    @torch.inference_mode()
    def stream(self, prompts, num_samples=1, max_tokens=None, temperature=1.0, top_k=0, seed=42):
        """Decode every prompt num_samples times, all rows together, one column of tokens a step.

        Yields (tokens, masks), lists with an entry for each of the len(prompts) * num_samples rows;
        row i belongs to prompt i // num_samples. token None: the row had finished before. mask 1:
        sampled, 0: forced by the tool. The stop token (<|assistant_end|> or <|bos|>) is yielded.
        """
        max_tokens = self.check_request(prompts, num_samples, max_tokens, temperature)
        # 1. prefill each prompt once, then give every sample its own copy of the cache
        logits, cache = self.prefill(prompts, max_tokens)
        device, num_rows = logits.device, len(prompts) * num_samples
        if num_samples > 1:
            logits = logits.repeat_interleave(num_samples, dim=0)
            cache.repeat_rows(num_samples)
        decode_step = self.decode_step()
        states, active = [RowState() for _ in range(num_rows)], list(range(num_rows))
        # A row's random numbers are its own, so rows that finish earlier cannot change its text.
        rng = torch.Generator().manual_seed(seed)
        u = torch.rand(num_rows, max_tokens, generator=rng).T.to(device)  # (step, row)
        for step in range(max_tokens):
            # 2. sample a token for each row that is still running, or take the forced one
            sampled = sample_next_token(logits, u[step], temperature, top_k).tolist()
            tokens, masks, ids = [None] * num_rows, [None] * num_rows, []
            for row, token in zip(active, sampled):
                forced = states[row].forced
                masks[row] = 0 if forced else 1
                tokens[row] = forced.popleft() if forced else token
                self.advance_tool(states[row], tokens[row])
                ids.append(tokens[row])
            yield tokens, masks
            # 3. drop the rows that have finished: from here on they cost nothing
            keep = [i for i, token in enumerate(ids) if token not in self.stops]
            if not keep or step == max_tokens - 1:
                return
            if len(keep) < len(ids):
                order = cache.keep_rows(keep)
                active, ids, u = [active[i] for i in order], [ids[i] for i in order], u[:, order]
            # 4. one pass over one new token for each row
            logits = decode_step(torch.tensor(ids, device=device), cache)

    def generate(self, tokens, num_samples=1, max_tokens=None, temperature=1.0, top_k=0, seed=42):
        """Stream num_samples continuations of one prompt (a list of ids): see `stream`."""
        yield from self.stream([tokens], num_samples, max_tokens, temperature, top_k, seed)

    def generate_batch(self, prompts, num_samples=1, max_tokens=None, temperature=1.0, top_k=0,
                       seed=42):
        """Decode different prompts together: (results, masks), a list of each for every row.

        results: the prompt and what was written, stop token included; masks: 1 for the tokens the
        model chose itself, the stop token among them, 0 for the prompt and for forced tokens.
        """
        results = [list(prompt) for prompt in prompts for _ in range(num_samples)]
        masks = [[0] * len(row) for row in results]
        for tokens, column in self.stream(prompts, num_samples, max_tokens, temperature, top_k,
                                          seed):
            for row, token in enumerate(tokens):
                if token is not None:
                    results[row].append(token)
                    masks[row].append(column[row])
        return results, masks
# --- end shared ---


# --- shared: load-checkpoint (home: 05_engine.py) ---
def load_checkpoint(folder, tokenizer, device):
    """(model, the contents of config.json). Weights are safetensors: loading runs no code.

    Raises UserError when the folder holds no checkpoint or the tokenizer is another one: its ids
    would mean other words, and the model would write plausible rubbish.
    """
    script = {"mid": "13_midtrain", "sft": "08_sft", "rl": "10_rl"}.get(folder.name, "12_pretrain")
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "model.safetensors")
        model, trained_with = GPT(GPTConfig(**about["model"])), about["tokenizer_sha256"]
        model.load_state_dict(weights, strict=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} holds no checkpoint that can be read ({error}).\n"
                        f"  Train one: python edu/{script}.py") from error
    if trained_with != tokenizer.sha256:
        raise UserError(
            f"{folder} was trained with another tokenizer: {trained_with[:12]} there, "
            f"{tokenizer.sha256[:12]} here.\n  Train it again: python edu/{script}.py")
    return model.to(device).eval(), about
# --- end shared ---


# --- shared: conversation (home: 07_sft_data.py) ---
# What stands around each part of an answer, and whether the model is to learn it.
PART_TOKENS = {"text": (None, None, 1), "python": ("<|python_start|>", "<|python_end|>", 1),
               "python_output": ("<|output_start|>", "<|output_end|>", 0)}


def check_messages(messages):
    """Raise ValueError, naming the message, unless user and assistant alternate, user first.

    messages: [{"role", "content"}, ...]; one system message may come first. content is a str, or
    for the assistant a list of parts {"type": "text" | "python" | "python_output", "text": str}.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("no messages")
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError(f"{message!r} should be an object with role and content")
    turns = messages[1:] if messages[0].get("role") == "system" else messages
    if turns is not messages and not isinstance(messages[0].get("content"), str):
        raise ValueError(f"the system message must be a text, not {messages[0].get('content')!r}")
    if not turns:
        raise ValueError("a system message, and nobody answers it")
    for i, message in enumerate(turns):
        role, content = message.get("role"), message.get("content")
        if role != ("user", "assistant")[i % 2]:
            raise ValueError(f"turn {i} is by {role!r}, but user and assistant take turns")
        parts = [content] if isinstance(content, str) else content
        if not isinstance(parts, list) or not parts or (role == "user" and parts is content):
            raise ValueError(f"turn {i}: content must be a text, not {content!r}")
        for part in parts:
            if part is not content and not (
                    isinstance(part, dict) and part.get("type") in PART_TOKENS
                    and isinstance(part.get("text"), str)):
                raise ValueError(f"turn {i}: {part!r} is no part of type {', '.join(PART_TOKENS)}")


def render_conversation(messages, tokenizer, max_tokens=257):
    """A conversation as (ids, mask), two lists of one length; mask 1: the model is to learn it.

    Trained: all that the assistant says, its calls of the calculator, and <|assistant_end|>, or it
    would never stop. Not trained: the user, <|assistant_start|> (the program writes it), and what
    the calculator answers. A system message becomes the beginning of the first user message.
    Whatever lies beyond max_tokens is cut off. Raises ValueError for a bad conversation.
    Source: nanochat/tokenizer.py::RustBPETokenizer.render_conversation.
    """
    check_messages(messages)
    special, ids, mask = tokenizer.encode_special, [tokenizer.get_bos_token_id()], [0]

    def add(tokens, trained):
        ids.extend(tokens)
        mask.extend([trained] * len(tokens))

    before = ""
    for message in messages:
        content = message["content"]
        if message["role"] == "system":
            before = content + "\n\n"
        elif message["role"] == "user":
            add([special("<|user_start|>"), *tokenizer.encode(before + content),
                 special("<|user_end|>")], 0)
            before = ""
        else:
            add([special("<|assistant_start|>")], 0)
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for part in parts:
                start, end, trained = PART_TOKENS[part["type"]]
                text = tokenizer.encode(part["text"])
                add([special(start), *text, special(end)] if start else text, trained)
            add([special("<|assistant_end|>")], 1)
    return ids[:max_tokens], mask[:max_tokens]


def render_for_completion(messages, tokenizer):
    """The ids after which the assistant is to speak: all but its last message, and its start token.

    Source: nanochat/tokenizer.py::RustBPETokenizer.render_for_completion.
    """
    messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    ids, _ = render_conversation(messages, tokenizer, max_tokens=None)
    return [*ids, tokenizer.encode_special("<|assistant_start|>")]


def render_rows(conversations, tokenizer, max_tokens=257):
    """(rows, counts): rendered conversations as (ids, mask), and how many were "cut" or "dropped".

    The rule: a row is cut at max_tokens, the end goes; a row that is left without one target is
    dropped, since the mean over no token is 0/0. Raises ValueError naming the conversation.
    """
    rows, counts = [], {"cut": 0, "dropped": 0}
    for number, conversation in enumerate(conversations):
        try:
            ids, mask = render_conversation(conversation["messages"], tokenizer, max_tokens + 1)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"conversation {number}: {error}") from error
        counts["cut"] += len(ids) > max_tokens
        ids, mask = ids[:max_tokens], mask[:max_tokens]
        if any(mask[1:]):
            rows.append((ids, mask))
        else:
            counts["dropped"] += 1
    return rows, counts


def collate(rows):
    """Rows (ids, mask) -> inputs, targets: LongTensors (B, T), T of the longest row less one.

    Targets are the inputs shifted by one, and -1 wherever the model is not to be trained: where the
    mask is 0, and in the padding on the right, which causal attention keeps from mattering.
    """
    T = max(len(ids) for ids, _ in rows) - 1
    inputs, targets = torch.zeros(len(rows), T, dtype=torch.long), torch.full((len(rows), T), -1)
    for row, (ids, mask) in enumerate(rows):
        n = len(ids) - 1
        inputs[row, :n] = torch.tensor(ids[:-1])
        # target t is id t + 1, and it counts where that id itself is trained: mask[t + 1]
        trained = torch.tensor(mask[1:], dtype=torch.bool)
        targets[row, :n] = torch.where(trained, torch.tensor(ids[1:]), -1)
    return inputs, targets


def read_conversations(path):
    """The conversations of a JSONL file, a list of dicts. Raises UserError naming file and line."""
    try:
        # Not splitlines: it would also cut at U+2028, which may stand inside of a text.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read conversations from {path} ({error}).") from error
    conversations = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            conversation = json.loads(line)
            check_messages(conversation["messages"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, line {number}, is no conversation ({error!r}); it should be "
                            'like {"messages": [{"role": "user", "content": "Hi"}, ...]}') from None
        conversations.append(conversation)
    if not conversations:
        raise UserError(f"{path} is empty: no conversation in it.")
    return conversations
# --- end shared ---


# --- shared: gsm8k (home: 09_gsm8k.py) ---
# What the calculator is asked and what it says is no part of the answer: a reply must state it.
TOOL_USE = re.compile(
    r"<\|python_start\|>.*?(?:<\|python_end\|>|\Z)|<\|output_start\|>.*?(?:<\|output_end\|>|\Z)",
    re.DOTALL,
)
# After the mark: sign and currency in either order, the number, then anything without a digit.
# That last part is what refuses "42 or 43", "1 2 3", "3/4", "7:30", and commas in wrong places.
ONE_NUMBER = re.compile(
    r"\s*(?:[$\u00a3\u20ac]\s*)?(?:([-+\u2212])\s*)?(?:[$\u00a3\u20ac]\s*)?"
    r"(?=\.?[0-9])([0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.([0-9]+))?\D*"
)


def extract_answer(text):
    """The number after "####" in its plainest spelling ("-1234.5"), or None.

    None as well for several marks or several numbers after it: were one right answer among many
    enough, a policy would learn to list numbers. Unit, currency and full stop do not matter, nor
    do 1,000.00 for 1000, +5 for 5, .5 for 0.5 or -0 for 0. Format: Cobbe et al. 2021 (GSM8K).
    """
    pieces = TOOL_USE.sub(" ", text).split("####")  # a space, lest 4<call>2 become 42
    found = len(pieces) == 2 and ONE_NUMBER.fullmatch(pieces[1])
    if not found:
        return None
    # As text, not as a float: no rounding, and no limit on how long a reply's number may be.
    sign, whole, fraction = found.groups(default="")
    whole, fraction = whole.replace(",", "").lstrip("0") or "0", fraction.rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return f"-{number}" if sign in ("-", "\u2212") and number != "0" else number


def parse_answer(answer):
    """A solution with <<expression=result>> calls as parts [{"type", "text"}, ...].

    Types: text; python, which the model writes; python_output, which the calculator writes.
    A call that lacks a half is dropped, and the text goes on: its result stands after it anyway,
    and an empty output would teach that the calculator has nothing to say.
    Source: nanochat tasks/gsm8k.py::GSM8K.get_example.
    """
    parts = []
    for i, piece in enumerate(re.split(r"<<([^<>\n]*)>>", answer)):
        if i % 2:  # inside of << >>; the last = is the one before the result
            expression, _, result = (half.strip() for half in piece.rpartition("="))
            if expression and result:
                parts += [{"type": "python", "text": expression},
                          {"type": "python_output", "text": result}]
        elif piece and parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += piece
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


class GSM8K:
    """Word problems with a checkable answer: len(task), get_example(i), reward(i, completion).

    source "tiny" is data_dir/tiny_gsm_{split}.jsonl, "hub" the dataset openai/gsm8k; a path to a
    JSONL file wins over both. Read whole, and checked, at once: it is 5 MB at most.
    Raises UserError for a source out of reach, and for a row that no reply could ever solve.
    """

    def __init__(self, split="train", source="tiny", path=None, data_dir="data"):
        for name, value, allowed in (("split", split, ("train", "test")),
                                     ("source", source, ("tiny", "hub"))):
            if value not in allowed:
                raise UserError(f"{name} is {value!r}, but there is only {' and '.join(allowed)}")
        if path is not None:
            remedy = 'each line must be {"question": "...", "answer": "... #### 42"}'
            rows = self.rows_of_file(Path(path), remedy)
        elif source == "tiny":
            remedy = f"make it: python edu/00_tiny_world.py --data-dir {data_dir}"
            rows = self.rows_of_file(Path(data_dir) / f"tiny_gsm_{split}.jsonl", remedy)
        else:
            remedy = "offline: leave --source hub out, or give --path FILE.jsonl"
            rows = self.rows_of_hub(split, data_dir)
        self.questions, self.answers, self.truths = [], [], []
        for where, row in rows:
            pair = [row.get(key) if isinstance(row, dict) else None for key in
                    ("question", "answer")]
            if not all(isinstance(text, str) and text.strip() for text in pair):
                raise UserError(f"{where} lacks a text as question or answer; {remedy}")
            truth = extract_answer(pair[1])
            if truth is None:
                raise UserError(f"{where} ends in {pair[1][-40:]!r}: without exactly one number "
                                f"after one #### no reply to it can be right; {remedy}")
            for known, value in zip((self.questions, self.answers, self.truths), (*pair, truth)):
                known.append(value)
        if not self.questions:
            raise UserError(f"{path or source} has no problems in it; {remedy}")

    @staticmethod
    def rows_of_file(path, remedy):
        """Yield (where, row) for each line of a JSONL file that is not blank."""
        number = 0
        try:
            # Line by line: str.splitlines would also cut at U+2028, which stands inside of texts.
            with open(path, encoding="utf-8-sig") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path} line {number}", json.loads(line)
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror}); {remedy}") from None
        except UnicodeDecodeError:  # read in pieces, so the line is not known
            raise UserError(f"{path} is not UTF-8 text; {remedy}") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number} is not JSON ({error.msg}); {remedy}") from None

    @staticmethod
    def rows_of_hub(split, data_dir):
        """Yield (where, row) of the dataset itself: 7473 rows to train on, 1319 to test."""
        offline = (f"two ways need no network: the tiny world's problems (python "
                   f"edu/00_tiny_world.py --data-dir {data_dir}, then leave --source hub out), or "
                   "a copy of the dataset as a JSONL file (--path FILE.jsonl)")
        try:
            import datasets  # takes seconds to import, and only this source needs it

            rows = datasets.load_dataset("openai/gsm8k", "main", split=split)
        except ImportError as error:
            raise UserError(f"--source hub needs the library `datasets` ({error}); pip install -r "
                            f"requirements.txt; {offline}") from None
        except Exception as error:  # of three libraries one upon the other: no common base
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"openai/gsm8k is out of reach ({type(error).__name__}: {reason}); "
                            f"{offline}") from None
        for number, row in enumerate(rows, 1):
            yield f"openai/gsm8k {split} row {number}", row

    def __len__(self):
        return len(self.questions)

    def get_example(self, i):
        """{"messages": [user, assistant]}: the prompt, and the reference solution in parts."""
        return {"messages": [{"role": "user", "content": self.questions[i]},
                             {"role": "assistant", "content": parse_answer(self.answers[i])}]}

    def reward(self, i, completion):
        """1.0 if the reply (str; tool use as special tokens) ends in the right number, else 0.0."""
        # r = 1 if answer(reply) = answer(reference) else 0
        return float(extract_answer(completion) == self.truths[i])
# --- end shared ---


# --- shared: answers (home: 08_sft.py) ---
def answer_is_right(reply, answers):
    """Does the reply hold one of the answers, whole words and numbers, whatever their case?"""
    return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w|[.,]\d)", reply, re.IGNORECASE)
               for answer in answers)
# --- end shared ---


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


# ---- the idea: a score has an error bar ----------------------------------------------------------


# --- shared: wilson (home: 14_evaluate.py) ---
def wilson_interval(share, n, z=1.96):
    """95% interval (low, high) of a share seen in n tries; within 0 and 1, even at 0 or 1."""
    if n == 0:
        return 0.0, 1.0
    middle, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n
                                                            + z * z / (4 * n * n))
    return (max(0.0, (middle - spread) / (1 + z * z / n)),
            min(1.0, (middle + spread) / (1 + z * z / n)))
# --- end shared ---


def centre(accuracy, random_baseline):
    """0 for guessing, 1 for perfect, negative for worse than guessing. random_baseline: percent.

    Source: arXiv 2406.11794 (DCLM), nanochat/scripts/base_eval.py.
    """
    # c = (accuracy - 0.01 b) / (1 - 0.01 b)
    return (accuracy - 0.01 * random_baseline) / (1.0 - 0.01 * random_baseline)


def share_score(kind, right, random_baseline):
    """The record of a task: right, a list of bools; random_baseline in percent."""
    n = len(right)
    share = sum(right) / n
    low, high = wilson_interval(share, n)
    return {"kind": kind, "score": share, "n": n, "chance": 0.01 * random_baseline, "low": low,
            "high": high, "centred": centre(share, random_baseline)}


def mean_centred(kind, scores):
    """The record of a mean of centred scores {task: record}: CORE and ChatCORE.

    The interval puts together those of the tasks: the distance to the mean's bound is the root of
    the sum of their squared distances, over their number (MOVER, Zou & Donner 2008).
    """
    k = len(scores)
    mean = sum(score["centred"] for score in scores.values()) / k
    spread = {}
    for bound in ("low", "high"):
        distances = [centre(score[bound], 100 * score["chance"]) - score["centred"]
                     for score in scores.values()]
        spread[bound] = math.sqrt(sum(d * d for d in distances)) / k
    return {"kind": kind, "score": mean, "n": sum(score["n"] for score in scores.values()),
            "chance": 0.0, "low": mean - spread["low"], "high": mean + spread["high"],
            "of": list(scores)}


# ---- the idea: bits per byte, with the spread between pieces of text -----------------------------


def spread_rows(shards, tokenizer, T, max_tokens, max_chars=1_000_000):
    """Rows (N, T) of inputs and targets, evenly spread over the text; max_tokens 0: all of it."""
    texts, chars = [], 0
    for text in parquet_texts(shards):
        if max_tokens and chars >= max_chars:
            break
        texts.append(text)
        chars += len(text)
    inputs, targets = validation_rows(texts, tokenizer, T)
    count = min(len(inputs), max(1, max_tokens // T)) if max_tokens else len(inputs)
    chosen = torch.linspace(0, len(inputs) - 1, count).long()
    return inputs[chosen], targets[chosen]


def bpb_score(model, inputs, targets, token_bytes, batch_tokens, pieces=24):
    """The record of bits per byte: the interval is that of a ratio of sums over pieces of text."""
    size = max(1, min(math.ceil(len(inputs) / pieces), batch_tokens // inputs.size(1)))
    measured = [evaluate_bpb(model, inputs[i : i + size], targets[i : i + size], token_bytes,
                             torch.float32, size) for i in range(0, len(inputs), size)]
    measured = [(bpb * count, count) for bpb, count in measured if count]
    bits, num_bytes = map(sum, zip(*measured))
    bpb, m = bits / num_bytes, len(measured)
    # se^2 = m / (m - 1) sum (bits_i - bpb bytes_i)^2 / bytes^2
    error = math.sqrt(m / max(1, m - 1) * sum((b - bpb * n) ** 2 for b, n in measured)) / num_bytes
    V, targeted = len(token_bytes), token_bytes[targets.clamp(min=0)] * (targets != -1)
    chance = math.log2(V) * (targeted > 0).sum().item() / num_bytes
    return {"kind": "bpb", "score": bpb, "n": num_bytes, "chance": chance,
            "low": bpb - 1.96 * error, "high": bpb + 1.96 * error}


# ---- the idea: three ways to ask a model that only continues text --------------------------------

CORE_KEYS = {"multiple_choice": ("query", "choices", "gold"),
             "schema": ("context_options", "continuation", "gold"),
             "language_modeling": ("context", "continuation")}


@dataclass
class CoreTask:
    """A task of DCLM's CORE: label, how it is asked, and its questions."""

    label: str
    kind: str  # a key of CORE_KEYS
    num_fewshot: int
    delimiter: str  # between a question and its answer
    random_baseline: float  # percent
    items: list


def render_core(task, item, shots):
    """The texts to be compared: one for each option, or, for language modelling, [without, with]
    the continuation. shots: solved questions that stand before.
    """
    def solved(item):
        if task.kind == "multiple_choice":
            return item["query"] + task.delimiter + item["choices"][item["gold"]]
        if task.kind == "schema":
            return item["context_options"][item["gold"]] + task.delimiter + item["continuation"]
        return item["context"].strip() + task.delimiter + item["continuation"]

    before = "".join(solved(shot) + "\n\n" for shot in shots)
    if task.kind == "multiple_choice":
        return [before + item["query"] + task.delimiter + choice for choice in item["choices"]]
    if task.kind == "schema":
        return [before + context + task.delimiter + item["continuation"]
                for context in item["context_options"]]
    # Without the delimiter's space, which would be a token of its own: " Paris" is one token.
    return [(before + item["context"].strip() + task.delimiter).strip(),
            (before + solved(item)).strip()]


def common_length(rows):
    """How many ids all rows begin with."""
    shortest = min(map(len, rows))
    return next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest)


def core_spans(kind, rows, sequence_len):
    """[(ids, start, end)]: of each row (list of ids, <|bos|> first) the ids that are scored.

    Multiple choice: from where the choices part. Schema: the end that all contexts share. Language
    modelling: what the row with the continuation has more. A span holds one id at least (a choice
    may be the beginning of another). A row longer than the context loses its beginning.
    """
    if kind == "schema":
        shared = max(1, common_length([row[::-1] for row in rows]))
        spans = [(row, len(row) - shared, len(row)) for row in rows]
    else:
        start = common_length(rows)
        rows = rows[1:] if kind == "language_modeling" else rows
        start = min(start, min(map(len, rows)) - 1)
        spans = [(row, start, len(row)) for row in rows]
    cut = [max(0, len(row) - sequence_len) for row, _, _ in spans]
    return [(row[c:], max(1, start - c), end - c) for c, (row, start, end) in zip(cut, spans)]


# --- shared: batched-logits (home: 14_evaluate.py) ---
def like_lengths(lengths, budget):
    """Yield lists of row numbers: rows of like length together, budget ids at most with padding."""
    batch = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and lengths[i] * (len(batch) + 1) > budget:  # rising: i is the longest so far
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def hidden_of(model, rows):
    """What the head reads, (B, T, C), for rows of ids. Padding stands on the right, where causal
    attention keeps it from mattering."""
    inputs = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        inputs[i, : len(row)] = torch.tensor(row)
    return model.hidden_states(inputs.to(model.lm_head.weight.device))


def logits_of(model, hidden):
    """(N, C) -> (N, V), softcapped as in GPT.forward; only for the places that are wanted."""
    return 15.0 * torch.tanh(model.lm_head(hidden).float() / 15.0)
# --- end shared ---


@torch.inference_mode()
def score_spans(model, spans, budget=8192):
    """[(ids, start, end)] -> [(mean nats of ids[start:end], whether each of them is the argmax)].

    All rows in few batches; the numbers are those of one row at a time.
    """
    results = [None] * len(spans)
    for batch in like_lengths([len(ids) - 1 for ids, _, _ in spans], budget):
        hidden = hidden_of(model, [spans[i][0][:-1] for i in batch])
        sizes = [spans[i][2] - spans[i][1] for i in batch]
        # the id at place t is predicted from place t - 1
        rows = torch.tensor([b for b, size in enumerate(sizes) for _ in range(size)])
        places = torch.tensor([t - 1 for i in batch for t in range(*spans[i][1:])])
        targets = torch.tensor([t for i in batch for t in spans[i][0][slice(*spans[i][1:])]])
        logits = logits_of(model, hidden[rows.to(hidden.device), places.to(hidden.device)]).cpu()
        losses = F.cross_entropy(logits, targets, reduction="none").split(sizes)
        hits = (logits.argmax(-1) == targets).split(sizes)
        for i, loss, hit in zip(batch, losses, hits):
            results[i] = (loss.mean().item(), bool(hit.all()))
    return results


def few_shots(items, i, count):
    """The solved questions that stand before question i, the same in every implementation.

    Source: nanochat/core_eval.py::evaluate_example (a generator of its own for each question).
    """
    others = [j for j in range(len(items)) if j != i]
    return [items[j] for j in random.Random(1234 + i).sample(others, min(count, len(others)))]


def core_right(model, tokenizer, task, budget=8192, at_once=256):
    """Whether each question of the task is answered right: list of bools."""
    right = []
    for first in range(0, len(task.items), at_once):
        spans, counts = [], []
        for i in range(first, min(first + at_once, len(task.items))):
            texts = render_core(task, task.items[i], few_shots(task.items, i, task.num_fewshot))
            rows = tokenizer.encode(texts, prepend="<|bos|>")
            new = core_spans(task.kind, rows, model.config.sequence_len)
            spans, counts = spans + new, [*counts, len(new)]
        scored = iter(score_spans(model, spans, budget))
        for item, count in zip(task.items[first : first + at_once], counts):
            options = [next(scored) for _ in range(count)]
            losses = [loss for loss, _ in options]
            right.append(options[0][1] if task.kind == "language_modeling"
                         else losses.index(min(losses)) == item["gold"])
    return right


# ---- the idea: where the questions come from -----------------------------------------------------


def read_items(path, keys, remedy):
    """The objects of a JSONL file that has these keys in every line. Raises UserError."""
    items = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    items.append(json.loads(line))
                    missing = [key for key in keys if key not in items[-1]]
                    if missing:
                        raise ValueError(f"line {number} has no {', '.join(missing)}")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot take questions from {path} ({error}); {remedy}") from None
    if not items:
        raise UserError(f"{path} has no questions in it; {remedy}")
    return items


def make_core_task(entry, folder, random_baseline, max_items, remedy):
    """The CoreTask of an entry {"label", "dataset_uri", "icl_task_type", ...}; files in folder."""
    kind = entry["icl_task_type"]
    if kind not in CORE_KEYS:
        raise UserError(f"{entry['label']} is of type {kind!r}; CORE has {', '.join(CORE_KEYS)}")
    shots = entry["num_fewshot"]
    shots = shots[0] if isinstance(shots, list) else shots
    items = read_items(folder / entry["dataset_uri"], CORE_KEYS[kind], remedy)
    random.Random(1337).shuffle(items)  # some files are sorted by answer; this order is nanochat's
    return CoreTask(entry["label"], kind, shots, entry.get("continuation_delimiter", " "),
                    float(random_baseline), items[: max_items or None])


def core_tasks(cfg):
    """The tasks of --bundle DIR (core.yaml, eval_meta_data.csv, eval_data/), else of tiny_eval/."""
    folder = cfg.bundle or cfg.data_dir / "tiny_eval"
    remedy = (f"make it: python edu/00_tiny_world.py --data-dir {cfg.data_dir}" if not cfg.bundle
              else "--bundle takes the unpacked eval_bundle of DCLM: core.yaml, eval_meta_data.csv "
              "and eval_data/")
    try:
        if cfg.bundle:
            entries = yaml.safe_load((folder / "core.yaml").read_text(encoding="utf-8"))[
                "icl_tasks"]
            with open(folder / "eval_meta_data.csv", encoding="utf-8", newline="") as file:
                baselines = {row["Eval Task"]: row["Random baseline"]
                             for row in csv.DictReader(file)}
        else:
            entries = json.loads((folder / "index.json").read_text(encoding="utf-8"))
            baselines = {entry["label"]: entry["random_baseline"] for entry in entries}
        inside = folder / "eval_data" if cfg.bundle else folder
        return [make_core_task(entry, inside, baselines[entry["label"]], cfg.max_per_task, remedy)
                for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{folder} does not hold CORE tasks ({type(error).__name__}: {error}).\n"
                        f"  {remedy[0].upper()}{remedy[1:]}") from None


# --- shared: multiple-choice (home: 14_evaluate.py) ---
LETTERS = "ABCDEFGHIJ"


def render_choices(question, choices):
    """A multiple-choice question as a user asks it: each choice, then its letter.

    The letter comes after the choice, so that the model, when it reads the letter, has read what it
    stands for; and no space before it, so that it is the very token that the answer begins with.
    Form: nanochat/tasks/common.py::render_mc.
    """
    lines = [f"- {choice}={letter}" for choice, letter in zip(choices, LETTERS)]
    return "\n".join([f"Choose: {question}", *lines, "Answer with the letter alone."])


def choices_from_chats(conversations, seed):
    """Multiple-choice questions [{"question", "choices", "gold"}] made of chats about facts.

    The three wrong choices are right answers to questions of the same form: two replies have one
    form when, their answers left out, they differ in a single word ("The capital of France is _").
    Each question comes once; a fact with too few of its form is left out.
    """
    rng, forms, right, asked = random.Random(seed), {}, {}, {}
    for row in conversations:
        if row.get("kind") == "fact" and row["answer"] in row["messages"][-1]["content"]:
            frame = tuple(row["messages"][-1]["content"].replace(row["answer"], "_", 1).split())
            asked.setdefault(row["messages"][-2]["content"], (frame, row["answer"]))
            right.setdefault(frame, set()).add(row["answer"])
            for i in range(len(frame)):
                forms.setdefault((frame[:i], frame[i + 1 :]), set()).add(frame)
    questions = []
    for question, (frame, answer) in asked.items():
        others = {other for i in range(len(frame)) for other in forms[frame[:i], frame[i + 1 :]]}
        wrong = sorted(set().union(*(right[other] for other in others)) - right[frame])
        if len(wrong) >= 3:
            choices, gold = rng.sample(wrong, 3), rng.randrange(4)
            choices.insert(gold, answer)
            questions.append({"question": question, "choices": choices, "gold": gold})
    return questions


@torch.inference_mode()
def choice_right(model, tokenizer, questions, budget=8192):
    """Whether the likeliest letter, among the letters of the choices only, is the right one.

    One forward pass and no sampling: a model that would rather talk is still understood. A prompt
    that does not fit the context counts as wrong. Returns a list of bools.
    """
    letters = [tokenizer.encode(letter) for letter in LETTERS]
    assert all(len(ids) == 1 for ids in letters), f"letters must be single tokens: {letters}"
    letters, right = torch.tensor(letters)[:, 0], [False] * len(questions)
    prompts = [render_for_completion([{"role": "user", "content": render_choices(
        item["question"], item["choices"])}], tokenizer) for item in questions]
    fit = [i for i, ids in enumerate(prompts) if len(ids) < model.config.sequence_len]
    for batch in like_lengths([len(prompts[i]) for i in fit], budget):
        batch = [fit[b] for b in batch]
        hidden = hidden_of(model, [prompts[i] for i in batch])
        last = torch.tensor([len(prompts[i]) - 1 for i in batch], device=hidden.device)
        logits = logits_of(model, hidden[torch.arange(len(batch), device=hidden.device), last])
        for i, row in zip(batch, logits.cpu()[:, letters]):
            count = len(questions[i]["choices"])
            right[i] = int(row[:count].argmax()) == questions[i]["gold"]
    return right
# --- end shared ---


@dataclass
class ChoiceTask:
    """Chat questions whose answer is a letter: [{"question", "choices", "gold"}]."""

    items: list

    def random_baseline(self):
        """What guessing scores, in percent."""
        return 100 * sum(1 / len(item["choices"]) for item in self.items) / len(self.items)


@dataclass
class ReplyTask:
    """Chat questions that are answered in words: [(messages, check)], check(reply) -> bool."""

    items: list

    def random_baseline(self):
        return 0.0


def gsm8k_task(task, count):
    """Word problems, right when the one number after #### is."""
    def solved(i):
        return lambda reply: task.reward(i, reply) > 0

    return ReplyTask([(task.get_example(i)["messages"], solved(i))
                      for i in range(len(task))[: count or None]])


def humaneval_task(rows, cfg):
    """Programs to complete, right when their tests run through: see run_program."""
    def passes(row):
        return lambda reply: run_program(program_of(row, reply), cfg.code_seconds)[0]

    return ReplyTask([([{"role": "user", "content": row["prompt"]}], passes(row))
                      for row in rows[: cfg.chat_per_task or None]])


def hub_choices(name, subset, count):
    """ARC and MMLU from the hub as a ChoiceTask."""
    items = []
    rows = hub_rows(name, subset)
    random.Random(1337).shuffle(rows)  # they lie subject by subject
    for row in rows[: count or None]:
        choices, gold = row["choices"], row.get("answer")
        if isinstance(choices, dict):  # ARC: {"text": [...], "label": [...]}, and the right label
            choices, gold = choices["text"], choices["label"].index(row["answerKey"])
        items.append({"question": row["question"], "choices": list(choices), "gold": gold})
    return ChoiceTask(items)


def hub_rows(name, subset=None, split="test"):
    """The rows of a dataset on the hub. Raises UserError when it is out of reach."""
    offline = ("leave --hub out: the tiny world's chat tasks need no network, and local copies go "
               "with --gsm8k FILE.jsonl and --humaneval FILE.jsonl")
    try:
        import datasets  # takes seconds to import, and only this source needs it

        return list(datasets.load_dataset(name, subset, split=split))
    except ImportError as error:
        raise UserError(f"--hub needs the library `datasets` ({error}); pip install -r "
                        f"requirements.txt; or {offline}") from None
    except Exception as error:  # of three libraries one upon the other: no common base
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{name} is out of reach ({type(error).__name__}: {reason}); {offline}") \
            from None


def chat_tasks(cfg):
    """{name: ChoiceTask or ReplyTask}, and what is left out because its file is not there."""
    count, tasks, absent = cfg.chat_per_task, {}, []
    chats, problems = (cfg.data_dir / f"tiny_{name}_test.jsonl" for name in ("chat", "gsm"))
    if chats.exists():
        rows = read_conversations(chats)
        tasks["multiple choice"] = ChoiceTask(choices_from_chats(rows, cfg.seed)[: count or None])
        for name, kinds in (("facts", ("fact",)), ("spelling", ("spell", "count"))):
            tasks[name] = ReplyTask([
                (row["messages"], lambda reply, row=row: answer_is_right(reply, [row["answer"]]))
                for row in rows if row.get("kind") in kinds and row.get("answer")][: count or None])
    if problems.exists():
        tasks["word problems"] = gsm8k_task(GSM8K("test", data_dir=cfg.data_dir), count)
    absent += [path.name for path in (chats, problems) if not path.exists()]
    if cfg.hub:
        for name in ("ARC-Easy", "ARC-Challenge"):
            tasks[name] = hub_choices("allenai/ai2_arc", name, count)
        tasks["MMLU"] = hub_choices("cais/mmlu", "all", count)
    if cfg.gsm8k or cfg.hub:
        tasks["GSM8K"] = gsm8k_task(GSM8K("test", "hub", cfg.gsm8k, cfg.data_dir), count)
    if cfg.humaneval or cfg.hub:
        keys = ("prompt", "entry_point", "canonical_solution", "test")
        remedy = "each line must be like a problem of HumanEval: task_id, " + ", ".join(keys)
        tasks["HumanEval"] = humaneval_task(
            read_items(cfg.humaneval, keys, remedy) if cfg.humaneval
            else hub_rows("openai/openai_humaneval"), cfg)
    return {name: task for name, task in tasks.items() if task.items}, absent


# ---- the idea: chat tasks ------------------------------------------------------------------------


def chat_prompts(task, model, tokenizer):
    """The ids of every prompt, None for one that leaves no room in the context for a reply."""
    asked = ([{"role": "user", "content": render_choices(item["question"], item["choices"])}]
             if isinstance(task, ChoiceTask) else item[0] for item in task.items)
    prompts = (render_for_completion(messages, tokenizer) for messages in asked)
    return [ids if len(ids) < model.config.sequence_len else None for ids in prompts]


# --- shared: replies (home: 14_evaluate.py) ---
def sample_replies(engine, prompts, num_samples=1, max_tokens=80, temperature=0.0, top_k=0, seed=0,
                   batch_size=64):
    """For each prompt (ids) a list of num_samples (reply, it ended); calls stand in the reply.

    A prompt None, one that does not fit the context, has no replies.
    """
    replies, context = [[] for _ in prompts], engine.model.config.sequence_len
    end = engine.tokenizer.encode_special("<|assistant_end|>")
    order = sorted((i for i, ids in enumerate(prompts) if ids), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), batch_size):  # like lengths together: little padding
        batch = order[first : first + batch_size]
        room = context - max(len(prompts[i]) for i in batch)
        rows, _ = engine.generate_batch([prompts[i] for i in batch], num_samples,
                                        min(max_tokens, room), temperature, top_k, seed + first)
        for n, row in enumerate(rows):
            i = batch[n // num_samples]
            new = row[len(prompts[i]) :]
            replies[i].append((engine.tokenizer.decode([t for t in new if t not in engine.stops]),
                               new[-1] == end))
    return replies
# --- end shared ---


def reply_right(engine, task, cfg):
    """Whether one of the sampled replies to each question passes its check: list of bools."""
    prompts = chat_prompts(task, engine.model, engine.tokenizer)
    replies = sample_replies(engine, prompts, cfg.num_samples, cfg.max_new_tokens, cfg.temperature,
                             cfg.top_k, cfg.seed)
    return [any(check(reply) for reply, _ in some) for (_, check), some in zip(task.items, replies)]


# ---- the idea: running code that a model has written ---------------------------------------------

# What stands between such code and this machine: a process with limits, in a folder of its own and,
# where the system allows, without network and other processes. All this holds off accidents. It is
# no security boundary: the code can read whatever the user who runs it can read.
WARNING = ("warning: HumanEval runs code that the model has written, in a process with limits.\n"
           "  That is no security boundary: for a model you do not trust, use a virtual machine.\n"
           "  Limits on time, memory and files hold; ")

# Runs in a fresh interpreter, which is small and has no threads, and becomes the program's
# interpreter. Each step may be refused by the system; what was granted goes to the pipe `done`.
LAUNCHER = r"""
import ctypes, json, os, resource, sys

done, seconds, granted = int(sys.argv[1]), int(sys.argv[2]), []
root, inside = os.getuid() == 0, False
if sys.platform == "linux":
    libc = ctypes.CDLL(None)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: no setuid program gives more rights
    new_user, apart = 0x10000000, 0x40000000 | 0x20000000 | 0x08000000  # network, processes, IPC
    inside = libc.unshare(apart | (0 if root else new_user)) == 0
    inside = inside or libc.unshare(apart | new_user) == 0
granted += ["no network"] if inside else []
child = os.fork() if inside else 0  # the first process of the new namespace; all end with it
if child:
    os.close(done)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.exit(code if code >= 0 else 128 - code)

if root:  # limits on the number of processes do not bind root: become nobody, if he may run Python
    nobody = 65534
    try:
        os.chmod(".", 0o777)
        os.setgroups([]), os.setegid(nobody), os.seteuid(nobody)
        may = all(os.access(path, os.R_OK, effective_ids=True)
                  for path in (sys.executable, os.__file__))
        os.seteuid(0), os.setegid(0)
        if may:
            os.setgid(nobody), os.setuid(nobody)
    except (OSError, NotImplementedError):
        pass
granted += ["few processes"] if os.getuid() else []
if inside:
    libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG: killed with the launcher, whatever group it is in
for name, limit in {"CPU": seconds, "AS": 512 << 20, "FSIZE": 1 << 20, "CORE": 0, "NOFILE": 64,
                    "NPROC": 8}.items():
    try:
        hard = resource.getrlimit(getattr(resource, "RLIMIT_" + name))[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
    except (AttributeError, OSError, ValueError):
        granted.append("not limited: " + name)
os.write(done, (", ".join(granted) + "\n").encode())
# The program comes through stdin: Python reads all of it before the first line runs, so that the
# program finds nothing left to read, and no file of itself.
os.execv(sys.executable, [sys.executable, "-I", "-"])
"""

# Before the program: where the network is not out of reach, Python's own way to it is.
PRELUDE = """import socket
def _refuse(*args, **kwargs):
    raise OSError("no network here")
socket.socket.__init__ = _refuse
del socket, _refuse
"""


def program_of(row, reply):
    """The program to run: what the reply adds to the prompt, the tests, and the call of them.

    Code is what stands between ``` and ```, else the whole reply. It may be the rest of the prompt
    or the function anew; then only the prompt's imports go before it.
    """
    fenced = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", reply, re.DOTALL)
    code, name = fenced[1] if fenced else reply, row["entry_point"]
    if re.search(rf"^(async )?def {re.escape(name)}\b", code, re.MULTILINE):
        start = "\n".join(line for line in row["prompt"].splitlines()
                          if re.match(r"(import|from)\s", line))
    else:
        start = row["prompt"]
    start += "\n" if start and not start.endswith("\n") else ""
    return f"{start}{code}\n{row['test']}\ncheck({name})\n"


def run_program(program, seconds=5.0):
    """(passed, why not): does the Python text run to its end within `seconds`?

    The end is known by a word, chosen anew each time, that the program writes as its last deed: an
    exit before that, with whatever code, is no success.
    """
    word = secrets.token_hex(16)
    heard, said, why = run_apart(program, word, seconds)
    if word in heard:
        return True, ""
    lines = said.strip().splitlines()
    return False, why or (lines[-1][:200] if lines else "it ended before its tests did")


def sandbox_report():
    """What this system grants, in words: for the user to know before anything is run."""
    granted = run_apart("", "", 5.0)[0].strip().split(", ")
    hopes = {"no network": "no network and no process left behind",
             "few processes": "8 processes at most"}
    return "; ".join(text if hope in granted else f"NOT so here: {text}"
                     for hope, text in hopes.items())


def run_apart(program, word, seconds):
    """Run the Python text in a process with limits: (what came through the pipe: the launcher's
    grants and the word, the end of what it printed, why it was killed or "").
    """
    if os.name != "posix":
        raise UserError("programs are run under the limits of a POSIX system, which Windows does "
                        "not have: use WSL, or leave --humaneval and --hub out.")
    read, done = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, \
            open(read, "rb", buffering=0) as pipe, open(Path(folder) / ".said", "w+b") as said:
        try:
            program = f"{PRELUDE}{program}\n__import__('os').write({done}, b'{word}')\n"
            why = watch_program(program, done, seconds, folder, said)
        finally:
            os.close(done)
        os.set_blocking(read, False)  # a process that got away may hold the other end open
        heard = pipe.read(4096) or b""
        said.seek(max(0, said.seek(0, os.SEEK_END) - 2000))
        return heard.decode("utf-8", "replace"), said.read().decode("utf-8", "replace"), why


def watch_program(program, done, seconds, folder, said):
    """Start the launcher, feed it the program, kill all that is left; why it did not end, or ""."""
    command = [sys.executable, "-I", "-S", "-c", LAUNCHER, str(done), str(math.ceil(seconds))]
    environment = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}
    with subprocess.Popen(command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=said,
                          stderr=subprocess.STDOUT, pass_fds=[done],
                          start_new_session=True) as process:
        try:
            process.communicate(program.encode("utf-8", "replace"), timeout=seconds)
            return ""
        except subprocess.TimeoutExpired:
            return f"not done after {seconds:g} s"
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)


# ---- the loop ------------------------------------------------------------------------------------


@dataclass
class Questions:
    """All that is asked of every stage, and the same for each."""

    texts: dict  # {"train" or "val": (inputs, targets)}
    core: list
    chat: dict

    def fingerprint(self):
        """sha256 of every question."""
        asked = [[name, *(tensor.tolist() for tensor in rows)] for name, rows in self.texts.items()]
        asked += [dataclasses.asdict(task) for task in self.core]
        asked += [[name, [item if isinstance(item, dict) else item[0] for item in task.items]]
                  for name, task in self.chat.items()]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def check_evaluation_settings(cfg):
    """(stages, parts) that are asked for. Raises UserError."""
    stages = [cfg.stage] if cfg.stage else [s.strip() for s in cfg.compare.split(",") if s.strip()]
    parts = [part.strip() for part in cfg.tasks.split(",") if part.strip()]
    if not stages or not parts or not set(parts) <= set(PARTS):
        raise UserError(f"--tasks {cfg.tasks} --compare {cfg.compare}: give one or more of "
                        f"{','.join(PARTS)}, and one stage or more, such as base,sft.")
    if (min(cfg.num_samples, cfg.max_new_tokens, cfg.batch_tokens) < 1 or cfg.code_seconds <= 0
            or min(cfg.temperature, cfg.top_k, cfg.bpb_tokens, cfg.max_per_task,
                   cfg.chat_per_task) < 0):
        raise UserError("counts cannot be negative, and --num-samples, --max-new-tokens, "
                        "--batch-tokens and --code-seconds start above 0.")
    if cfg.num_samples > 1 and cfg.temperature == 0:
        raise UserError(f"--num-samples {cfg.num_samples} at temperature 0 are all the same: add "
                        "--temperature 1.")
    return stages, parts


def gather_questions(cfg, parts, tokenizer, sequence_len):
    """The Questions, and notes on what is left out."""
    texts, notes = {}, []
    if "bpb" in parts:
        texts = {split: spread_rows(list_shards(cfg.data_dir, split), tokenizer, sequence_len,
                                    cfg.bpb_tokens) for split in ("train", "val")}
    chat, absent = chat_tasks(cfg) if "chat" in parts else ({}, [])
    if absent:
        notes.append(f"left out: {', '.join(absent)} not in {cfg.data_dir} (make them: python "
                     "edu/00_tiny_world.py)")
    questions = Questions(texts, core_tasks(cfg) if "core" in parts else [], chat)
    if not (questions.texts or questions.core or questions.chat):
        raise UserError(f"there is nothing to ask: --tasks {cfg.tasks}, and {cfg.data_dir} has no "
                        "question for it.\n  Make some: python edu/00_tiny_world.py")
    return questions, notes


def evaluate_stage(model, tokenizer, questions, cfg, title=""):
    """{name: record} of one model."""
    scores, engine = {}, Engine(model, tokenizer)
    total = len(questions.texts) + len(questions.core) + len(questions.chat)
    bar = tqdm(total=total, desc=title, unit="task", leave=False, disable=None)
    token_bytes = torch.tensor(tokenizer.token_bytes())
    for split, (inputs, targets) in questions.texts.items():
        scores[f"bits per byte, {split}"] = bpb_score(model, inputs, targets, token_bytes,
                                                      cfg.batch_tokens)
        bar.update()
    for task in questions.core:
        right = core_right(model, tokenizer, task, cfg.batch_tokens)
        scores[task.label] = share_score("core", right, task.random_baseline)
        bar.update()
    if questions.core:
        scores["CORE"] = mean_centred("core mean", {task.label: scores[task.label]
                                                    for task in questions.core})
    for name, task in questions.chat.items():
        right = (choice_right(model, tokenizer, task.items, cfg.batch_tokens)
                 if isinstance(task, ChoiceTask) else reply_right(engine, task, cfg))
        scores[name] = share_score("chat", right, task.random_baseline())
        scores[name]["unfit"] = chat_prompts(task, model, tokenizer).count(None)
        bar.update()
    if set(CHAT_CORE) <= set(questions.chat):
        scores["ChatCORE"] = mean_centred("chat mean", {name: scores[name] for name in CHAT_CORE})
    bar.close()
    return scores


# The tasks that ChatCORE is the mean of; with one of them missing it would be another number.
CHAT_CORE = ("multiple choice", "facts", "spelling", "word problems")
# What has no influence on a score.
WITHOUT_INFLUENCE = {"data_dir", "compare", "stage", "fresh", "batch_tokens", "bundle", "gsm8k",
                     "humaneval", "hub", "device_type"}


def evaluation_origin(folder, cfg, questions):
    """What the scores in eval.json are made from: measured again when any of it has changed."""
    settings = {name: value for name, value in dataclasses.asdict(cfg).items()
                if name not in WITHOUT_INFLUENCE}
    answers = [*sorted(cfg.data_dir.glob("tiny_*_test.jsonl")),
               *filter(None, (cfg.gsm8k, cfg.humaneval))]  # the questions alone do not hold them
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in
               (("weights", folder / "model.safetensors"), ("script", Path(__file__)),
                *((path.name, path) for path in answers))}
    return {**digests, "questions": questions, "settings": settings}


def known_evaluation(path, origin):
    """What eval.json says, if it is of this very origin, else None."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return known if known["made_from"] == origin else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# What may differ between the scores of one eval.json: each of them has its own n.
HOW_MANY = {"tasks", "bpb_tokens", "max_per_task", "chat_per_task"}


def scores_of_the_same(path, origin):
    """What eval.json says of these weights: a run of some tasks leaves the other scores there.

    Unless they were found in another way, by another script, temperature or test file.
    """
    def way(made_from):
        settings = made_from["settings"].items()
        return {**made_from, "questions": None,
                "settings": {name: value for name, value in settings if name not in HOW_MANY}}

    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        then, now = way(known["made_from"]), way(origin)
        return dict(known["scores"]) if all(then[k] == now[k] for k in {*then} & {*now}) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def evaluate_or_recall(stage, cfg, tokenizer, questions, device):
    """The contents of <stage>/eval.json, measured now unless they are up to date. UserError."""
    folder = cfg.data_dir / stage
    model, about = load_checkpoint(folder, tokenizer, device)
    origin = evaluation_origin(folder, cfg, questions.fingerprint())
    known = None if cfg.fresh else known_evaluation(folder / "eval.json", origin)
    if known:
        print(f"{stage}: up to date ({known['seconds']:.0f} s when it ran)", flush=True)
        return known
    started = time.perf_counter()
    before = {} if cfg.fresh else scores_of_the_same(folder / "eval.json", origin)
    scores = {**before, **evaluate_stage(model, tokenizer, questions, cfg, stage)}
    found = {"stage": stage, "step": about.get("step"), "made_from": origin, "scores": scores,
             "seconds": round(time.perf_counter() - started, 1)}
    with atomic_write(folder / "eval.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"{stage}: {found['seconds']:.0f} s", flush=True)
    print(f"wrote {folder / 'eval.json'}")
    return found


def print_scores(found):
    """The table: score by stage, each with its 95% interval."""
    print(f"{'score':<22} {'n':>7} {'chance':>7}" + "".join(f"  {stage:>18}" for stage in found))
    for name, first in next(iter(found.values()))["scores"].items():
        # nor is there one n for stages that an earlier run has asked more or less
        if {stage["scores"].get(name, {}).get("n") for stage in found.values()} != {first["n"]}:
            continue
        line = f"{name:<22} {first['n']:>7} {first['chance']:>7.3f}"
        for stage in found.values():
            score = stage["scores"][name]
            interval = f"({score['low']:.2f}..{score['high']:.2f})"
            line += f"  {score['score']:.3f} {interval:>12}"
        print(line)
        if first.get("unfit"):
            print(f"  {first['unfit']} prompts do not fit the context and count as wrong")
    print("chance: what guessing scores; in brackets the 95% interval; CORE and ChatCORE are means "
          "of\ncentred scores, 0 for guessing and 1 for perfect; of bits per byte less is better")


def run(cfg):
    # 1. the stages that there are, and the questions, the same for all
    stages, parts = check_evaluation_settings(cfg)
    _, _, _, _, device = compute_init(cfg.device_type or None, cfg.seed)
    print(f"14 evaluate - {device.type} - float32 - {', '.join(stages)} - seed {cfg.seed}",
          flush=True)
    tokenizer = Tokenizer.from_dir(cfg.data_dir / "tokenizer")
    present = [stage for stage in stages if (cfg.data_dir / stage / "model.safetensors").exists()]
    if not present:
        raise UserError(f"{cfg.data_dir} has none of the stages {', '.join(stages)}.\n"
                        "  Train one: python edu/12_pretrain.py")
    lengths = [load_sequence_len(cfg.data_dir / stage) for stage in present]
    questions, notes = gather_questions(cfg, parts, tokenizer, min(lengths))
    if "HumanEval" in questions.chat:
        notes.append(WARNING + sandbox_report())
    if notes:
        print("\n".join(notes))

    # 2. ask every stage
    found = {}
    for stage in stages:
        if stage not in present:
            print(f"{stage}: not there, left out")
            continue
        try:
            found[stage] = evaluate_or_recall(stage, cfg, tokenizer, questions, device)
        except UserError as error:
            if len(stages) == 1:
                raise
            print(f"{stage}: left out. {error}")
    if not found:
        raise UserError("none of the stages could be evaluated.")

    # 3. side by side
    print_scores(found)
    first, last = next(iter(found.values())), list(found.values())[-1]
    both = [name for name, score in last["scores"].items()
            if first["scores"].get(name, {}).get("n") == score["n"]]
    name = next((name for name in ("ChatCORE", "CORE", "bits per byte, val") if name in both),
                both[0])
    of = f"{first['stage']} against {last['stage']}" if len(found) > 1 else f"{last['stage']}"
    before = f"{first['scores'][name]['score']:.3f}" if len(found) > 1 else "-"
    print(f"result: {name}, {of} {before} -> {last['scores'][name]['score']:.3f} "
          f"(n={last['scores'][name]['n']})")
    print("next: python edu/15_chat.py --stage " + last["stage"])


def load_sequence_len(folder):
    """The context of a stage; a broken config.json is reported where the stage is loaded."""
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return int(about["model"]["sequence_len"])
    except (OSError, ValueError, KeyError, TypeError):
        return GPTConfig.sequence_len


# ---- the command line ----------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    return run_script(run, Config, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
