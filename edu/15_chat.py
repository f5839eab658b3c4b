"""Challenge 15: talk to the model in a terminal.

Goal:
    Everything so far has measured the model; this script lets you meet it. A conversation of many
    turns with any stage, streamed as it is written, in a context that it outgrows, with its
    calculator calls in sight, and without one keystroke that loses the conversation.

You will learn:
    - why a stream of tokens is no stream of characters, and what an incremental decoder is for
    - that a chat model has no memory: each turn sends the conversation again, and what no longer
      fits the context is simply not there
    - what an interrupted answer leaves behind, and why no half-written call may stay in it
    - that what a model writes is input like any other: it may hold the bytes that drive a terminal

Read beside:
    nanochat/scripts/chat_cli.py. Different here: bytes are decoded across tokens (there, each token
    alone, which breaks every character that spans two), the oldest turns leave when the context is
    full (there, the positions run out), Ctrl-C stops an answer, and -p prints the answer alone.

Run:
    python edu/15_chat.py
    python edu/15_chat.py -p "What is the capital of France?"

Expect:
    15 chat - cpu - float32 - ...M params - stage rl - seed 1337
    context 256 tokens, temperature 0.6, top-k 50
    /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends
    result: messages answered 0 -> 0 (n=0)
    next: python edu/16_serve.py

Writes:
    nothing, but for chat_history, the lines you typed at a terminal, and the file that /save names
"""

import ast
import base64
import codecs
import contextlib
import hashlib
import io
import json
import math
import operator
import os
import re
import select
import shutil
import signal
import sys
import sysconfig
import warnings
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file

try:
    import readline  # line editing and history for input(); a console of Windows has its own
except ImportError:
    readline = None

# ---- settings ------------------------------------------------------------------------------------

STAGES = ("rl", "sft", "mid", "base")  # without --stage the first of them that is there
LEAST_ROOM = 16  # tokens that must be left for an answer
HISTORY_LINES = 1000  # what chat_history keeps


@dataclass
class Config:
    data_dir: Path = field(default_factory=lambda: Path(os.environ.get("EDU_DATA", "data")))
    """Folder with tokenizer/ and the models."""
    stage: str = ""
    """Which model: a folder under data_dir; empty takes the last stage that has been trained."""
    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None
    """Ask this once, print the answer and nothing else; - reads the question from stdin."""
    temperature: Annotated[float, tyro.conf.arg(aliases=["-t"])] = 0.6
    """0 takes the likeliest token; 1 samples from the model's own distribution."""
    top_k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 50
    """Sample among the k likeliest tokens only; 0 means all."""
    max_tokens: int = 128
    """Longest answer, in tokens; older turns leave when the context has not that much room."""
    device_type: str = ""
    """cpu, cuda or mps; empty takes the best there is."""
    seed: int = 1337
    """Seed of the sampling; each answer of a conversation adds one."""


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


# ---- the idea: tokens are not characters ---------------------------------------------------------


class AnswerParts:
    """An answer as it is written: tokens go in, whole characters come out, sorted into parts.

    A byte-level token may end in the middle of a character. The decoder keeps such bytes back until
    the rest has come; what is still missing where a part ends becomes U+FFFD.
    """

    def __init__(self, tokenizer):
        special = tokenizer.encode_special
        self.tokenizer, self.specials = tokenizer, {special(name) for name in SPECIAL_TOKENS}
        self.starts = {special("<|python_start|>"): "python",
                       special("<|output_start|>"): "python_output"}
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.parts, self.kind = [], None  # kind None: the next character begins a part of text

    def begin(self, kind):
        self.kind = kind
        self.parts.append({"type": kind, "text": ""})
        return kind, ""

    def add(self, text):
        self.parts[-1]["text"] += text
        return self.kind, text

    def feed(self, token):
        """Yield (type of part, text) for what a token completes; "" says that a part begins."""
        if token in self.specials:
            yield from self.finish()
            if token in self.starts:
                yield self.begin(self.starts[token])
            return
        if self.kind is None:
            yield self.begin("text")
        text = self.decoder.decode(self.tokenizer.decode_bytes([token]))
        if text:
            yield self.add(text)

    def finish(self):
        """The part is over: yield what the decoder still holds."""
        rest = self.decoder.decode(b"", final=True)
        if rest:
            yield self.add(rest)
        self.kind = None

    def content(self):
        """What a message of the assistant has as content: a str, or parts where it used the tool.

        A call that is still open is left out: half an expression would be read as a whole one.
        """
        is_open = self.kind in ("python", "python_output")
        parts = [part for part in (self.parts[:-1] if is_open else self.parts) if part["text"]]
        if all(part["type"] == "text" for part in parts):
            return "".join(part["text"] for part in parts)
        return parts


# ---- the idea: what fits the context -------------------------------------------------------------


def fit_turns(messages, tokenizer, context, reserve):
    """(ids, forgotten): the newest turns that leave `reserve` tokens free, and how many do not fit.

    messages end with one of the user. That one and a system message are always kept, fit or not.
    A turn is a question with its answer: an answer without its question would be nobody's.
    """
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    first = len(turns) - 1
    ids = render_for_completion(system + turns[first:], tokenizer)
    while first >= 2:
        longer = render_for_completion(system + turns[first - 2 :], tokenizer)
        if len(longer) + reserve > context:
            break
        first, ids = first - 2, longer
    return ids, first // 2


# ---- the idea: what the screen shows -------------------------------------------------------------

# A terminal obeys control characters, and a model can write every byte there is.
HARMLESS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
COLORS = {"you": "\x1b[1;32m", "model": "\x1b[1;34m", "call": "\x1b[36m", "note": "\x1b[2m",
          "mistake": "\x1b[33m"}


class Screen:
    """Where a conversation is shown; a calculator call as [6*7 = 42], in colour on a terminal.

    With only_answers nothing else goes to `stream`: no names, and notes go to standard error.
    """

    def __init__(self, stream, only_answers=False):
        self.stream, self.only_answers, self.is_terminal = stream, only_answers, stream.isatty()
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self.has_color = self.is_terminal and not plain
        self.kind, self.after_call = None, False  # the type of the part being written

    def paint(self, color, text):
        return f"{COLORS[color]}{text}\x1b[0m" if self.has_color and text else text

    def write(self, text):
        self.stream.write(text)
        self.stream.flush()

    def name(self, who, name):
        if not self.only_answers:
            self.write(self.paint(who, f"{name}> "))

    def note(self, text, color="note"):
        if self.only_answers:
            print(f"({text})", file=sys.stderr)
        else:
            self.write(self.paint(color, f"({text})") + "\n")

    def show(self, kind, text):
        """Write an event of AnswerParts."""
        if text:
            safe = text.translate(HARMLESS) if self.is_terminal else text
            gap = " " if self.after_call and text[0].isalnum() else ""  # 608]608 reads as one word
            self.write(gap + safe if kind == "text" else self.paint("call", safe))
            self.after_call = False
        elif self.kind == "python" and kind == "python_output":
            self.kind = kind
            self.write(self.paint("call", " = "))
        else:
            self.close_call()
            self.kind = kind
            self.write(self.paint("call", {"python": "[", "python_output": "[= "}.get(kind, "")))

    def close_call(self):
        """Close the bracket of a call; = ? where the calculator gave no result."""
        ends = {"python": " = ?]", "python_output": "]"}
        self.write(self.paint("call", ends.get(self.kind, "")))
        self.kind, self.after_call = None, self.kind in ends

    def replay(self, message, stage):
        """Write a message that is there already."""
        self.name("model" if message["role"] == "assistant" else "you",
                  {"assistant": stage, "user": "you"}.get(message["role"], message["role"]))
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            self.show(part["type"], "")
            self.show(part["type"], part["text"])
        self.close_call()
        self.write("\n")


class StopAnswer:
    """While an answer is written, Ctrl-C asks it to stop between two tokens; a second one insists.

    As an exception it could strike anywhere, in the middle of a character on its way out too.
    """

    def __enter__(self):
        self.asked, self.before = False, signal.signal(signal.SIGINT, self.ask)
        return self

    def ask(self, signum, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)


# ---- the idea: what the user types ---------------------------------------------------------------


class Keyboard:
    """Reads messages: from a terminal with line editing and a history, else one from each line."""

    def __init__(self, screen, history):
        self.screen, self.history = screen, history
        self.is_terminal = sys.stdin.isatty() and screen.is_terminal
        self.has_editing = self.is_terminal and readline is not None
        if self.has_editing:
            readline.set_auto_history(False)  # a pasted text is one message, not many lines
            for line in self.read_history():
                readline.add_history(line)

    def read_history(self):
        """The messages in chat_history, one JSON string a line; a damaged line is left out."""
        lines = []
        with contextlib.suppress(OSError):
            for line in self.history.read_text(encoding="utf-8", errors="replace").split("\n"):
                with contextlib.suppress(ValueError):
                    lines.append(json.loads(line))
        return [line for line in lines if isinstance(line, str)][-HISTORY_LINES:]

    def remember(self, text):
        """Add a message to the history; a folder that cannot be written to costs only that."""
        if not (self.has_editing and text.strip()):
            return
        readline.add_history(text)
        with contextlib.suppress(OSError), atomic_write(self.history) as temporary:
            lines = [*self.read_history(), text][-HISTORY_LINES:]
            temporary.touch(mode=0o600)  # what you say to a model is nobody else's business
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines),
                                 encoding="utf-8")

    def ask(self, prompt):
        """The next message, or None at the end of the input. Raises KeyboardInterrupt."""
        if self.has_editing and self.screen.has_color:
            # readline counts columns, so it must know which characters take none: \1 ... \2
            prompt = f"\1{COLORS['you']}\2{prompt}\1\x1b[0m\2"
        try:
            text = input(prompt)
        except EOFError:
            self.screen.write("\n")
            return None
        with contextlib.suppress(EOFError):
            while self.is_terminal and more_is_waiting():
                text += "\n" + input()
        if not self.is_terminal:
            self.screen.write(text + "\n")  # nobody has typed it, so nobody has seen it
        self.remember(text)
        return text


def more_is_waiting():
    """Is the next line there already? Then it was pasted with this one: nobody types so fast."""
    if os.name != "posix":
        return False  # select() knows only sockets there
    return bool(select.select([sys.stdin], [], [], 0.03)[0])


# ---- the loop ------------------------------------------------------------------------------------


def stages_present(data_dir):
    """Names of the folders that hold a model, those of STAGES first."""
    found = sorted(path.parent.name for path in data_dir.glob("*/model.safetensors"))
    return sorted(found, key=lambda name: STAGES.index(name) if name in STAGES else len(STAGES))


def check_sampling(temperature, top_k):
    """Raise UserError for numbers that cannot be sampled with; nan is not between 0 and 2."""
    if not 0 <= temperature <= 2:
        raise UserError(f"temperature {temperature} is not between 0, which always takes the "
                        "likeliest token, and 2, which takes nearly any: try 0.6")
    if top_k < 0:
        raise UserError(f"top-k {top_k} is below 0: give the number of tokens to choose among, or "
                        "0 for all of them")


class Chat:
    """A conversation, and the model that it is held with."""

    def __init__(self, cfg, device, screen):
        self.cfg, self.device, self.screen = cfg, device, screen
        self.messages, self.forgotten, self.answered = [], 0, 0
        self.temperature, self.top_k = round(cfg.temperature, 2), cfg.top_k
        present = stages_present(cfg.data_dir)
        if not present and not cfg.stage:
            raise UserError(f"no model in {cfg.data_dir}: there is nobody to talk to.\n"
                            "  Train one: bash my_pipeline.sh, or name a folder: --data-dir DIR")
        self.tokenizer = Tokenizer.from_dir(cfg.data_dir / "tokenizer")
        self.load_stage(cfg.stage or present[0])

    def load_stage(self, name):
        """Put another model behind the conversation; the old one stays if this one fails."""
        if not os.path.exists(self.cfg.data_dir / name / "model.safetensors"):
            present = ", ".join(stages_present(self.cfg.data_dir)) or "none"
            raise UserError(f"there is no model {name!r} in {self.cfg.data_dir}, only: {present}")
        model, _ = load_checkpoint(self.cfg.data_dir / name, self.tokenizer, self.device)
        self.engine, self.stage = Engine(model, self.tokenizer), name
        self.context, self.forgotten = model.config.sequence_len, 0

    def ask(self, text):
        """Put a message of the user to the model; returns what `answer` does."""
        self.messages.append({"role": "user", "content": text})
        return self.answer()

    def prompt_ids(self):
        """(ids, new tokens at most) for the next answer; says so when older turns are left out."""
        reserve = min(self.cfg.max_tokens, self.context // 2)
        ids, forgotten = fit_turns(self.messages, self.tokenizer, self.context, reserve)
        room = self.context - len(ids)
        if room < LEAST_ROOM:
            raise UserError(f"that message is too long by {LEAST_ROOM - room} tokens: the model "
                            f"reads {self.context} at once, its answer included")
        if forgotten > self.forgotten:
            turns = "turn is" if forgotten == 1 else f"{forgotten} turns are"
            self.screen.note(f"a context of {self.context} tokens holds no more: the oldest "
                             f"{turns} left out")
        self.forgotten = forgotten
        return ids, min(self.cfg.max_tokens, room)

    def answer(self):
        """Stream the answer to the last message; True unless Ctrl-C stopped it.

        An answer broken off is kept, as that is what was said. A message without any is taken back,
        whatever the reason: two in a row are no conversation.
        """
        try:
            # 1. the conversation again, as much of it as fits
            ids, max_tokens = self.prompt_ids()
            parts, ended = AnswerParts(self.tokenizer), False
            self.screen.name("model", self.stage)
            # 2. show what comes, until the model ends, or the room does, or the user
            with StopAnswer() as stop:
                for (token,), _ in self.engine.generate(
                        ids, 1, max_tokens, self.temperature, self.top_k,
                        self.cfg.seed + self.answered):
                    for event in parts.feed(token):
                        self.screen.show(*event)
                    ended = token in self.engine.stops
                    if stop.asked:
                        break
            # 3. keep it
            content = parts.content()
            for event in parts.finish():
                self.screen.show(*event)
            self.screen.close_call()
            self.screen.write("\n")
            if content or not stop.asked:
                self.messages.append({"role": "assistant", "content": content})
                self.answered += 1
            self.explain(content, ended, stop.asked, max_tokens)
            return not stop.asked
        finally:
            if self.messages[-1]["role"] == "user":
                self.messages.pop()

    def explain(self, content, ended, stopped, max_tokens):
        """Say why an answer is no whole one."""
        if not ended and stopped:
            self.screen.note("stopped" if content else "stopped; the question is taken back")
        elif not ended and max_tokens < self.cfg.max_tokens:
            self.screen.note(f"cut: the context of {self.context} tokens is full")
        elif not ended:
            self.screen.note(f"cut after {max_tokens} tokens: --max-tokens allows more")
        elif not content:
            self.screen.note("an empty answer")


def read_number(kind, text, example):
    """int or float of what stands after a command. Raises UserError."""
    try:
        return kind(text)
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise UserError(f"{text!r} is no {what}; like this: {example}") from None


def command_clear(chat, rest):
    chat.messages, chat.forgotten = [], 0
    return "a new conversation"


def command_temp(chat, rest):
    if rest:
        temperature = read_number(float, rest, "/temp 0.6")
        check_sampling(temperature, chat.top_k)
        chat.temperature = round(temperature, 2)  # 15 / 1e-38 is more than a float32 holds
    return f"temperature {chat.temperature:g}"


def command_topk(chat, rest):
    if rest:
        top_k = read_number(int, rest, "/topk 50")
        check_sampling(chat.temperature, top_k)
        chat.top_k = top_k
    return f"top-k {chat.top_k}"


def command_stage(chat, rest):
    if rest:
        chat.load_stage(rest)
        return f"stage {chat.stage}; the conversation goes on{note_on_stage(chat.stage)}"
    return f"stage {chat.stage}; there are: {', '.join(stages_present(chat.cfg.data_dir))}"


def note_on_stage(stage):
    """What to know of a model that was never shown a conversation."""
    return "; it has learned to continue text, not to answer" if stage == "base" else ""


def command_save(chat, rest):
    """Add the conversation to a JSONL file as a line; saved again, that line grows with it."""
    if not any(message["role"] == "assistant" for message in chat.messages):
        raise UserError("there is nothing to save yet")
    if not rest:
        raise UserError("give a file: /save talk.jsonl")
    path, lines = Path(os.path.expanduser(rest)), []
    if os.path.exists(path):  # unlike Path.exists, no exception for any name that one can type
        last = read_conversations(path)[-1]  # refuses a file that holds anything else
        # not splitlines, as in there; and by the same count, so that /load finds the line
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        if last == {"messages": chat.messages[: len(last["messages"])]}:
            lines.pop()
    lines.append(json.dumps({"messages": chat.messages}))
    try:
        with atomic_write(path) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror})") from None
    return f"{len(chat.messages)} messages saved as line {len(lines)} of {path}"


def command_load(chat, rest):
    """Go on with a conversation of a JSONL file: the last one, or the line whose number follows."""
    if not rest:
        raise UserError("give a file: /load talk.jsonl, or with a line number: /load talk.jsonl 3")
    name, number = re.fullmatch(r"(.+?)(?:\s+(-?\d+))?", rest).groups()
    path = Path(os.path.expanduser(name))
    conversations = read_conversations(path)
    number = len(conversations) if number is None else int(number)
    if not 1 <= number <= len(conversations):
        raise UserError(f"{path} has the lines 1 to {len(conversations)}, and no line {number}")
    messages = conversations[number - 1]["messages"]
    try:
        render_conversation(messages, chat.tokenizer)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}, line {number}, is no conversation ({error!r})") from None
    chat.messages, chat.forgotten = messages, 0
    for message in messages[-2:]:
        chat.screen.replay(message, chat.stage)
    return f"line {number} of {path}, {len(messages)} messages; the conversation goes on"


def command_help(chat, rest):
    for name, (_, arguments, meaning) in COMMANDS.items():
        chat.screen.write(f"  {f'{name} {arguments}':<19} {meaning}\n")
    return "Ctrl-C stops an answer; a line that begins with a space is never a command"


def command_quit(chat, rest):
    raise EOFError


COMMANDS = {
    "/clear": (command_clear, "", "forget the conversation"),
    "/temp": (command_temp, "[0..2]", "how freely to choose; 0: always the likeliest token"),
    "/topk": (command_topk, "[K]", "choose among the K likeliest tokens; 0: among all"),
    "/stage": (command_stage, "[NAME]", "talk to another model"),
    "/save": (command_save, "FILE", "add the conversation to a JSONL file, as one line"),
    "/load": (command_load, "FILE [LINE]", "go on with a conversation of a JSONL file"),
    "/help": (command_help, "", "show this list"),
    "/quit": (command_quit, "", "end, as Ctrl-D does"),
}


def obey(chat, line):
    """Do what a line that begins with / asks for."""
    name, _, rest = line.strip().replace("\0", "\ufffd").partition(" ")  # no path holds a NUL
    if name not in COMMANDS:
        raise UserError(f"there is no {name}, only {' '.join(COMMANDS)}; a message that begins "
                        "with / needs a space before it")
    chat.screen.note(COMMANDS[name][0](chat, rest.strip()))
    if chat.messages and chat.messages[-1]["role"] == "user":
        chat.answer()  # what was loaded waits for an answer


def converse(chat, keyboard):
    """Messages and commands until the input ends. A mistake costs a sentence, never the talk."""
    while True:
        try:
            line = keyboard.ask("you> ")
            if line is None:
                return
            if line.startswith("/"):
                obey(chat, line)
            elif line.strip():
                chat.ask(line.strip())
        except UserError as error:
            chat.screen.note(str(error), "mistake")
        except KeyboardInterrupt:
            chat.screen.write("\n")
            chat.screen.note("Ctrl-D ends the program, /help lists the commands")
        except EOFError:
            return


def answer_once(cfg, device):
    """-p: the answer to standard output, and nothing but the answer. Returns the exit code."""
    question = sys.stdin.read() if cfg.prompt == "-" else cfg.prompt
    if not question.strip():
        raise UserError('the question is empty: give one, for example -p "Who are you?"')
    screen = Screen(sys.stdout, only_answers=True)
    return 0 if Chat(cfg, device, screen).ask(question.strip()) else 130


def hold_conversation(cfg, device):
    # 1. a model to talk to
    screen = Screen(sys.stdout)
    chat = Chat(cfg, device, screen)
    params = sum(p.numel() for p in chat.engine.model.parameters())
    screen.write(
        f"15 chat - {device.type} - float32 - {params / 1e6:.1f}M params - stage {chat.stage} - "
        f"seed {cfg.seed}\n"
        f"context {chat.context} tokens, temperature {chat.temperature:g}, top-k {chat.top_k}"
        f"{note_on_stage(chat.stage)}\n"
        "/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends\n")

    # 2. the conversation
    converse(chat, Keyboard(screen, cfg.data_dir / "chat_history"))

    # 3. report
    screen.write(f"result: messages answered 0 -> {chat.answered} (n={chat.answered})\n"
                 "next: python edu/16_serve.py\n")


def run_chat(cfg):
    check_sampling(cfg.temperature, cfg.top_k)
    if cfg.max_tokens < 1:
        raise UserError(f"--max-tokens {cfg.max_tokens}: an answer needs at least 1")
    for stream in (sys.stdin, sys.stdout):  # a character that one of them lacks is no reason to end
        with contextlib.suppress(AttributeError, io.UnsupportedOperation):
            stream.reconfigure(errors="replace")
    _, _, _, _, device = compute_init(cfg.device_type or None, cfg.seed)
    try:
        return (hold_conversation if cfg.prompt is None else answer_once)(cfg, device)
    except BrokenPipeError:  # the reader has enough, as `head` has after its lines
        return 0  # every write was flushed, so nothing is left that would fail at exit


# ---- the command line ----------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    return run_script(run_chat, Config, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
