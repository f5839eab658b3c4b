"""Challenge 16: a server that many can talk to at once, and that nobody can knock over.

Goal:
    Put the model behind HTTP, in the protocol that every client knows (OpenAI's chat completions),
    with a page to chat in. All clients are decoded together in one batch which rows join and leave
    between two steps, so sixteen answers take little longer than one. And it is built for a world
    in which requests are malformed, too long, too many, too slow, or sent by a page that has no
    business here.

You will learn:
    - continuous batching: a cache in which every row has its own length, so that a newcomer need
      not wait for the others to finish, and gets the same text as it would get alone
    - the seam between a thread that computes and an event loop that talks, and how the news that a
      client has gone crosses it
    - streaming text from tokens: letters of several bytes, stop strings that may just be beginning
    - what a server on 127.0.0.1 must still check: Host and Origin, or any web page can reach it

Read beside:
    nanochat's scripts/chat_web.py (Nov 2025): a replica of the model for each GPU, one request at
    a time on each, its own protocol, streaming only, all interfaces, any origin. Here: one batch
    for all, OpenAI's protocol, the model off the event loop, this machine only.

Run:
    python edu/16_serve.py
    python edu/16_serve.py --measure 16

Expect:
    16 serve - cpu - float32 - 1.3M params - stage ...
    stages: ...
    result: ...
    next: python edu/17_report.py

Writes:
    nothing
"""

import ast
import asyncio
import base64
import codecs
import contextlib
import hashlib
import hmac
import ipaddress
import json
import math
import operator
import os
import queue
import random
import re
import shutil
import socket
import sys
import sysconfig
import threading
import time
import traceback
import uuid
import warnings
from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import h11
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

# ---- settings ------------------------------------------------------------------------------------

PAGE = Path(__file__).with_suffix(".html")
STAGES = ("rl", "sft", "mid", "base")  # the furthest one that is there is the default


@dataclass
class Config:
    data_dir: Path = field(default_factory=lambda: Path(os.environ.get("EDU_DATA", "data")))
    """Folder with tokenizer/ and the stages (base/, sft/, rl/, ...)."""
    stage: str = ""
    """The model for requests that name none; empty takes rl, sft, mid or base, whichever is there
    first. All others in the folder can be asked for too, and are loaded when they are."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything else than this machine needs --allow-host as well."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    allow_host: tuple[str, ...] = ()
    """Further names under which browsers may reach this server."""
    api_key: str = field(default_factory=lambda: os.environ.get("EDU_API_KEY", ""))
    """Key that clients must give; also $EDU_API_KEY, which no list of processes shows."""
    max_batch: int = 16
    """Rows decoded together, for each stage."""
    max_queue: int = 64
    """Rows that may wait for a place; one more is answered with 429."""
    prefill_tokens: int = 512
    """Prompt tokens read between two steps: more lets newcomers in sooner, and all others wait."""
    beat: float = 0.05
    """Seconds between two pieces of a streamed answer, its first and last ones aside."""
    max_connections: int = 256
    """Open connections."""
    patience: float = 10.0
    """Seconds that a client may take to send a request, or to take an answer."""
    max_messages: int = 500
    """Messages in a request."""
    max_chars: int = 8000
    """Characters in a message; four times as many in all."""
    log_requests: bool = True
    """One line for each request: never a word of what was said."""
    log_text: bool = False
    """Print what is asked as well."""
    measure: int = 0
    """Instead of serving: tokens per second with 1, 2, 4, ... and this many clients."""
    measure_tokens: int = 64
    """Tokens that each of these clients asks for."""
    device_type: str = ""
    """cpu, cuda or mps; empty takes the best there is."""


MAX_BODY = 1_000_000  # bytes

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


# ---- the idea: a cache that rows join and leave --------------------------------------------------


class SlotCache:
    """Challenge 05's cache for rows that come and go: each has a length of its own.

    data: (slots, n_layer, 2, n_kv_head, max_seq_len, head_dim); the B rows in it stand at 0..B-1,
    row b fills the columns before lengths[b], and a mask hides what lies behind. It offers what
    DecodeStep asks of a KVCache, so the fast path works on it unchanged, one token for each row.
    """

    def __init__(self, slots, model):
        config, weight = model.config, model.lm_head.weight
        shape = (slots, config.n_layer, 2, config.n_kv_head, config.sequence_len,
                 config.n_embd // config.n_head)
        self.data = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.lengths = torch.zeros(0, dtype=torch.long, device=weight.device)  # (B,)

    def join(self, cache, count):
        """Add count rows, each with what the one row of a filled KVCache holds."""
        first, end = len(self.lengths), len(self.lengths) + count
        assert end <= len(self.data), f"{end} rows, and {len(self.data)} slots"
        self.data[first:end, ..., : cache.pos, :] = cache.data[..., : cache.pos, :]
        self.lengths = torch.cat((self.lengths, self.lengths.new_full((count,), cache.pos)))

    def leave(self, rows):
        """Keep only `rows` (list, rising); return the order in which they stand now.

        A gap is filled with a row from the end: to move a few costs less than to copy them all.
        """
        gaps = sorted(set(range(len(rows))) - set(rows))
        moved = rows[len(rows) - len(gaps) :]
        filled = int(self.lengths.max())
        self.data[gaps, ..., :filled, :] = self.data[moved, ..., :filled, :]
        order = list(range(len(rows)))
        for gap, row in zip(gaps, moved):
            order[gap] = row
        self.lengths = self.lengths[order]
        return order

    def positions(self, T):
        assert T == 1, f"rows of different lengths grow by one token at a time, not by {T}"
        return self.lengths[:, None]  # (B, 1)

    def attention_mask(self, T):
        """Who may be seen by the next token of each row, (B, 1, 1, longest + 1) bool."""
        self.rows = torch.arange(len(self.lengths), device=self.data.device)
        self.width = int(self.lengths.max()) + 1
        columns = torch.arange(self.width, device=self.data.device)
        return (columns <= self.lengths[:, None])[:, None, None]

    def insert_kv(self, layer_idx, k, v):
        """Store k, v (B, n_kv_head, 1, D), each row at its own column; return all, as KVCache does.

        What a former tenant of the slot has left behind the column is masked: softmax gives it the
        weight 0, and finite numbers times 0 are nothing.
        """
        layer = self.data[: len(self.rows), layer_idx]  # (B, 2, n_kv_head, max_seq_len, D)
        layer[self.rows, 0, :, self.lengths] = k[:, :, 0]
        layer[self.rows, 1, :, self.lengths] = v[:, :, 0]
        if layer_idx == self.data.size(1) - 1:
            self.lengths = self.lengths + 1
        return layer[:, 0, :, : self.width], layer[:, 1, :, : self.width]


def sample_rows(logits, u, temperature, top_k, top_p):
    """A token for each row, each by its own rules: logits (B, V), all others (B,) -> (B,) long.

    In the order of the transformers library: temperature (0: the likeliest token), then the top_k
    likeliest (0: all), then the fewest likeliest whose probabilities reach top_p. Rows without
    top_k and top_p need no sorting, the dearest part by far; each is drawn as it would be alone.
    """
    tokens = logits.argmax(dim=-1)
    cut = ((top_k > 0) & (top_k < logits.size(-1))) | (top_p < 1)
    ranked = (temperature > 0) & cut
    plain = (temperature > 0) & ~cut
    logits = logits / temperature.clamp(min=1e-4)[:, None]
    if plain.any():
        tokens[plain] = sample_next_token(logits[plain], u[plain])
    if ranked.any():
        tokens[ranked] = sample_ranked(*(x[ranked] for x in (logits, u, top_k, top_p)))
    return tokens


def sample_ranked(logits, u, top_k, top_p):
    """Inverse-transform sampling over the likeliest tokens, the first of them first."""
    top_k = torch.where(top_k == 0, logits.size(-1), top_k.clamp(max=logits.size(-1)))
    logits, tokens = logits.topk(int(top_k.max()), dim=-1)  # (B, k), (B, k), falling
    rank = torch.arange(logits.size(-1), device=logits.device)
    p = torch.softmax(logits.masked_fill(rank >= top_k[:, None], -torch.inf), dim=-1)
    likelier = p.cumsum(dim=-1) - p  # probability of all that come before; 0 for the first
    p = p.masked_fill((likelier >= top_p[:, None]) & (rank > 0), 0.0)
    cdf = p.cumsum(dim=-1)
    # cdf[i-1] <= u * cdf[-1] < cdf[i]: a token of probability 0 has no slice and is never drawn.
    choice = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)
    choice = torch.minimum(choice, (p > 0).sum(dim=-1, keepdim=True) - 1)
    return tokens.gather(1, choice)[:, 0]


# ---- the idea: text from tokens ------------------------------------------------------------------

CALL = re.compile(r"<<([^<>\n]*)>>")


class TextWriter:
    """The text of one answer, piece by piece, so that no piece has to be taken back.

    A letter of several bytes is held until it is whole, and what may be the beginning of a stop
    string until it is known. A call of the calculator becomes <<17+25=42>>, the form in which word
    problems spell it; <<17/0=>> has no result. All other special tokens are left out.
    """

    def __init__(self, engine, stops=()):
        self.engine, self.stops, self.held, self.stopped = engine, stops, "", False
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token, forced, state):
        """The text that this token lets go; state: the row's RowState, after the token.

        forced: the token is part of what the calculator answers, which is shown already.
        """
        engine = self.engine
        if token == engine.python_start:
            return self.release(self.utf8.decode(b"", True) + "<<")
        if token == engine.python_end and not forced:
            answer = engine.tokenizer.decode(list(state.forced)[1:-1])
            return self.release(self.utf8.decode(b"", True) + f"={answer}>>")
        if forced or engine.tokenizer.encoding.is_special_token(token):
            return ""
        return self.release(self.utf8.decode(engine.tokenizer.decode_bytes([token])))

    def finish(self):
        """Whatever is still held: the answer is over."""
        text = self.release(self.utf8.decode(b"", True))
        return text if self.stopped else text + self.held

    def release(self, text):
        """What of the text so far is certain; a stop string ends it and is not part of it."""
        text = self.held + text
        found = [place for place in (text.find(stop) for stop in self.stops) if place >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        keep = max((n for stop in self.stops for n in range(1, len(stop))
                    if text.endswith(stop[:n])), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def parts_of(text):
    """What an assistant has said, as parts: <<17+25=42>> becomes the call that it was.

    So that a model which is shown its own answer sees the tokens that it wrote. Only for messages
    of the assistant: what a user writes stays text, whatever it spells.
    """
    parts = []
    for i, piece in enumerate(CALL.split(text)):
        expression, equals, result = piece.rpartition("=")
        if i % 2 and equals and expression:
            parts.append({"type": "python", "text": expression})
            parts += [{"type": "python_output", "text": result}] if result else []
        elif i % 2 or piece:
            parts.append({"type": "text", "text": f"<<{piece}>>" if i % 2 else piece})
    return parts or [{"type": "text", "text": ""}]


# ---- the idea: one batch for all -----------------------------------------------------------------


@dataclass
class Piece:
    """News of one answer: some text, how many tokens it took, and why it is over, if it is."""

    index: int
    text: str
    tokens: int = 1
    finish_reason: str | None = None


class Answer:
    """One row of the batch. Its random numbers are its own, whoever else is being decoded."""

    def __init__(self, job, index, engine):
        self.job, self.index, self.count = job, index, 0
        self.state, self.writer = RowState(), TextWriter(engine, job.stops)
        self.random = random.Random(job.seed if index == 0 else f"{job.seed} {index}")

    def take(self, sampled, engine, limit):
        """(the token that really comes next, Piece): the calculator's own go before the sampled."""
        forced = bool(self.state.forced)
        token = self.state.forced.popleft() if forced else sampled
        engine.advance_tool(self.state, token)
        piece = Piece(self.index, self.writer.add(token, forced, self.state))
        self.count += 1
        if token in engine.stops or self.writer.stopped:
            piece.finish_reason = "stop"
        elif self.count >= limit:
            piece.finish_reason = "length"
        if piece.finish_reason:
            piece.text += "" if self.writer.stopped else self.writer.finish()
        return token, piece


@dataclass(eq=False)
class Job:
    """What one request wants of the model, and the mailbox for what it gets.

    news: a queue of lists of pieces; an Exception in one says that there will be nothing more.
    """

    stage: str
    prompt: list[int]
    news: object
    n: int = 1
    max_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stops: tuple[str, ...] = ()
    cancelled: bool = False
    began: float = field(default_factory=time.perf_counter)
    first: float | None = None
    """Seconds until its first token."""
    tokens: int = 0


class RollingBatch:
    """The rows of one stage that are being decoded; others join between two steps."""

    def __init__(self, engine, slots):
        self.engine, self.slots, self.rows = engine, slots, []
        self.cache, self.logits = SlotCache(slots, engine.model), None  # (B, V)
        self.decode, self.rules = engine.decode_step(), None

    def join(self, job):
        """Read the prompt once, and give each of the n answers its own copy of the cache."""
        logits, cache = self.engine.prefill([job.prompt], 0)
        self.cache.join(cache, job.n)
        logits = logits.expand(job.n, -1)
        self.logits = logits if not self.rows else torch.cat((self.logits, logits))
        self.rows += [Answer(job, index, self.engine) for index in range(job.n)]
        self.rules = None

    def row_rules(self):
        """temperature, top_k and top_p, (B,) each: anew only when rows have come or gone."""
        if self.rules is None:
            jobs, device = [row.job for row in self.rows], self.logits.device
            self.rules = [torch.tensor([getattr(job, name) for job in jobs], device=device)
                          for name in ("temperature", "top_k", "top_p")]
        return self.rules

    def step(self):
        """One token for each row: a list of (job, Piece). The same four steps as Engine.stream."""
        # 1. sample
        u = torch.tensor([row.random.random() for row in self.rows], device=self.logits.device)
        sampled = sample_rows(self.logits, u, *self.row_rules()).tolist()
        # 2. write, or let the calculator write
        room, ids, keep, news = self.engine.model.config.sequence_len, [], [], []
        for i, (row, token) in enumerate(zip(self.rows, sampled)):
            limit = min(row.job.max_tokens, room - len(row.job.prompt))
            token, piece = row.take(token, self.engine, limit)
            ids.append(token)
            news.append((row.job, piece))
            if not piece.finish_reason and not row.job.cancelled:
                keep.append(i)
        # 3. rows that have finished, or whose client has gone, leave
        if len(keep) < len(ids):
            order = self.cache.leave(keep)
            self.rows, ids = [self.rows[i] for i in order], [ids[i] for i in order]
            self.rules = None
        # 4. one pass for all that stay
        if self.rows:
            self.logits = self.decode(torch.tensor(ids, device=self.logits.device), self.cache)
        return news


class Courier:
    """Carries pieces from the thread that decodes to the event loop that talks.

    The first and the last pieces of an answer at once, those between in bundles, one each `beat`
    seconds. Two threads of one Python take turns, and each piece that is sent for itself is one
    more turn to wait for: sixteen streams would lose a fifth of their speed to it, for pauses that
    no eye can see.
    """

    def __init__(self, metrics, beat):
        self.metrics, self.beat, self.loop, self.pending, self.sent = metrics, beat, None, {}, 0.0

    def deliver(self, news):  # called by the worker
        """news: list of (job, Piece or Exception), all of one step."""
        now, urgent = time.perf_counter(), set()
        for job, piece in news:
            self.pending.setdefault(job, []).append(piece)
            if isinstance(piece, Exception):
                traceback.print_exception(piece)
            if job.first is None or not isinstance(piece, Piece) or piece.finish_reason:
                urgent.add(job)
            job.first = now - job.began if job.first is None else job.first
        if now - self.sent >= self.beat:
            urgent, self.sent = set(self.pending), now
        if urgent:
            ready = [(job, self.pending.pop(job)) for job in urgent]
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                self.loop.call_soon_threadsafe(self.post, ready)

    def post(self, ready):  # called in the event loop
        for job, pieces in ready:
            if job.tokens == 0:
                self.metrics.observe("first_token_seconds", job.first)
            tokens = sum(piece.tokens for piece in pieces if isinstance(piece, Piece))
            job.tokens += tokens
            self.metrics.counts["completion_tokens", ""] += tokens
            job.news.put_nowait(pieces)


class Busy(Exception):
    """The queue is full; .seconds is a guess when it will not be."""

    def __init__(self, seconds):
        super().__init__(f"the queue is full, come back in {seconds} s")
        self.seconds = seconds


class Worker(threading.Thread):
    """The one thread that owns models and caches: it takes jobs in, and sends pieces out.

    load(stage) -> Engine, called here when a stage is first asked for. deliver(news) is called with
    a list of (job, Piece or Exception) after every step, in this thread.
    """

    def __init__(self, load, deliver, max_batch, max_queue, prefill_tokens):
        super().__init__(name="decoder", daemon=True)
        self.load, self.deliver, self.max_batch = load, deliver, max_batch
        self.max_queue, self.prefill_tokens = max_queue, prefill_tokens
        self.batches, self.waiting = {}, deque()
        self.awake, self.stopping, self.steps, self.seconds = threading.Condition(), False, 0, 1.0

    def submit(self, job):
        """Queue a job. Raises Busy when its rows find no place among those that may wait."""
        with self.awake:
            ahead = self.queue_depth()
            if ahead + job.n > self.max_queue:
                wait = math.ceil(self.seconds * (ahead + job.n) / self.max_batch)
                raise Busy(min(max(wait, 1), 60))
            self.waiting.append(job)
            self.awake.notify()

    def cancel(self, job):
        """Nobody waits for this job any more: out of the queue, or out of the batch."""
        with self.awake:
            job.cancelled = True
            if job in self.waiting:
                self.waiting.remove(job)

    def queue_depth(self):
        return sum(job.n for job in list(self.waiting))

    def active_rows(self):
        return sum(len(batch.rows) for batch in list(self.batches.values()))

    def stop(self):
        """End after the present step, and wait for that: Python must not go away beneath torch."""
        with self.awake:
            self.stopping = True
            self.awake.notify()
        self.join(timeout=10)

    def run(self):
        with torch.inference_mode():
            while self.wait_for_work():
                self.admit()
                for stage, batch in list(self.batches.items()):
                    if batch.rows:
                        self.advance(stage, batch)

    def wait_for_work(self):
        """Sleep until there is something to do; False when it is to stop."""
        with self.awake:
            self.awake.wait_for(lambda: self.stopping or self.waiting or self.active_rows())
            return not self.stopping

    def next_job(self):
        """Who has waited longest among those whose stage has room; a full stage holds up no other.

        Behind a job that does not fit, none of its stage goes first: a large one would starve.
        """
        full = set()
        for job in self.waiting:
            batch = self.batches.get(job.stage)
            if batch is not None and len(batch.rows) + job.n > self.max_batch:
                full.add(job.stage)
            elif job.stage not in full:
                return job
        return None

    def admit(self):
        """Let in those who have waited longest, as many as find room, and not too many at once."""
        budget = self.prefill_tokens
        while budget > 0:
            with self.awake:
                job = self.next_job()
                if job is None:
                    return
                batch = self.batches.get(job.stage)
                self.waiting.remove(job)
            budget -= len(job.prompt)
            try:
                if batch is None:
                    batch = self.batches[job.stage] = RollingBatch(self.load(job.stage),
                                                                   self.max_batch)
                batch.join(job)
            except Exception as error:  # whatever went wrong, only this job is to suffer from it
                self.deliver([(job, error)])

    def advance(self, stage, batch):
        try:
            news = batch.step()
        except Exception as error:  # the rows of this stage are lost, the server is not
            del self.batches[stage]  # made anew by the next job
            news = [(row.job, error) for row in batch.rows]
        self.steps += 1
        for job, piece in news:
            if isinstance(piece, Piece) and piece.finish_reason:
                # a running mean, for Retry-After
                self.seconds += 0.1 * (time.perf_counter() - job.began - self.seconds)
        self.deliver(news)


# ---- the idea: a request, checked ----------------------------------------------------------------


class ApiError(Exception):
    """An answer that is no answer, in OpenAI's shape: every client library can read it."""

    def __init__(self, status, message, param=None, code=None, headers=None):
        super().__init__(message)
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.status, self.headers = status, headers or {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self):
        return JSONResponse(self.body, self.status, self.headers)


class Strict(BaseModel):
    """Nothing is taken for what it is not: no "1" for 1, no true for 1, no NaN."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]


class StreamOptions(Strict):
    include_usage: bool = False


class ResponseFormat(Strict):
    type: str


class ChatRequest(Strict):
    """The fields of POST /v1/chat/completions that are understood; unknown ones are ignored, but
    for those that would change what the answer means (see `unsupported`).
    """

    model: str | None = None
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1_000_000)  # not OpenAI's; vLLM has it too
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: (Annotated[str, Field(min_length=1, max_length=100)] | Annotated[
        list[Annotated[str, Field(min_length=1, max_length=100)]], Field(max_length=4)] | None
        ) = None
    truncation: Literal["auto", "disabled"] | None = None  # as in OpenAI's Responses API
    response_format: ResponseFormat | None = None
    tools: list | None = None
    functions: list | None = None
    logprobs: bool | None = None
    logit_bias: dict | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)

    def unsupported(self):
        """The name of a field that asks for what this server cannot do, or None.

        To ignore it would be a lie: who asks for JSON reads the answer as JSON.
        """
        if self.response_format is not None and self.response_format.type != "text":
            return "response_format"
        names = ("tools", "functions", "logprobs", "logit_bias", "frequency_penalty",
                 "presence_penalty")
        return next((name for name in names if getattr(self, name)), None)


def parse_request(body, cfg):
    """The bytes of a body -> ChatRequest. Raises ApiError 400, naming the field."""
    try:
        wanted = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        # ("messages", 0, "content", "str") -> messages.0.content: the last is a branch of a union
        place = [str(part) for part in first["loc"]]
        place = place[: 3 if place[:1] == ["messages"] else 1]
        raise ApiError(400, f"{'.'.join(place) or 'body'}: {first['msg']}",
                       ".".join(place) or None) from None
    name = wanted.unsupported()
    if name:
        raise ApiError(400, f"{name}: this server cannot do that; leave it out", name,
                       "unsupported_parameter")
    if (wanted.n or 1) > min(cfg.max_batch, cfg.max_queue):
        raise ApiError(400, f"n: {min(cfg.max_batch, cfg.max_queue)} answers at most", "n")
    return wanted


def drop_what_cannot_be_read(wanted, cfg):
    """How many old messages of a request with truncation "auto" were left out, two by two, until
    the rest may be looked at. That is far more than a context holds: the model would see none.
    """
    messages = wanted.messages
    if wanted.truncation != "auto" or not messages:
        return 0
    asked = len(messages)
    first = int(messages[0].role in ("system", "developer"))

    def length(message):
        parts = message.content if isinstance(message.content, list) else [message.content]
        return sum(len(part if isinstance(part, str) else part.text) for part in parts)

    total = sum(map(length, messages))
    while len(messages) > first + 2 and (len(messages) > cfg.max_messages
                                         or total > 4 * cfg.max_chars
                                         or max(map(length, messages[first:-1])) > cfg.max_chars):
        total -= sum(map(length, messages[first : first + 2]))
        del messages[first : first + 2]
    return asked - len(messages)


def plain_messages(wanted, cfg):
    """The messages as challenge 07 renders them: system first, then user and assistant in turns.

    Messages of one role in a row are joined by a blank line. Raises ApiError 400 for a conversation
    that does not end with the user, and for one that is too long to be looked at.
    """
    if len(wanted.messages) > cfg.max_messages:
        raise ApiError(400, f"messages: {len(wanted.messages)}, and at most {cfg.max_messages} are "
                            "read", "messages")
    turns, total = [], 0
    for i, message in enumerate(wanted.messages):
        parts = message.content if isinstance(message.content, list) else [message.content]
        text = "".join(part if isinstance(part, str) else part.text for part in parts)
        role, place = message.role.replace("developer", "system"), f"messages.{i}"
        total += len(text)
        if len(text) > cfg.max_chars or total > 4 * cfg.max_chars:
            raise ApiError(400, f"{place}.content: more than {cfg.max_chars} characters, or more "
                                f"than {4 * cfg.max_chars} in all", f"{place}.content")
        if role == "user" and not text.strip():
            raise ApiError(400, f"{place}.content: the user says nothing", f"{place}.content")
        if role == "system" and turns and turns[-1]["role"] != "system":
            raise ApiError(400, f"{place}.role: a system message stands first", f"{place}.role")
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + text
        else:
            turns.append({"role": role, "content": text})
    if turns[-1]["role"] != "user":
        raise ApiError(400, "messages: the last one must be of the user", "messages")
    if (turns[1:] if turns[0]["role"] == "system" else turns)[0]["role"] != "user":
        raise ApiError(400, "messages: the user must speak first", "messages")
    return turns


def render_prompt(messages, tokenizer, context, reserve, truncation):
    """(ids, how many messages were dropped): what the model is shown before it speaks.

    A conversation that leaves no room for a token of the answer is refused, as OpenAI refuses it.
    With truncation "auto" the oldest question and answer go, two by two, until there is room for
    `reserve` tokens; the system message and the last question stay.
    """
    messages = [{**message, "content": parts_of(message["content"])}
                if message["role"] == "assistant" else message for message in messages]
    first = int(messages[0]["role"] == "system")
    need = reserve if truncation == "auto" else 1

    def rendered(pairs):
        rest = messages[:first] + messages[first + 2 * pairs :]
        return render_for_completion(rest, tokenizer)

    # Fewer messages are never longer, so that a few trials find the first number that will do.
    last = (len(messages) - first - 1) // 2 if truncation == "auto" else 0
    pairs = bisect_left(range(last), True, key=lambda n: len(rendered(n)) + need <= context)
    ids = rendered(pairs)
    if len(ids) < context:  # one question alone may leave less room than hoped for
        return ids, 2 * pairs
    raise ApiError(400, f"This model's context is {context} tokens, and the conversation takes "
                        f"{len(ids)}, the answer not counted. Shorten it, or let the oldest turns "
                        'go: "truncation": "auto".', "messages", "context_length_exceeded")


# ---- the idea: answers in OpenAI's form ----------------------------------------------------------


class Completion(Response):
    """The response to one job: whole, or streamed as it is written. A client that goes away ends
    the job, which the worker notices before its next step.
    """

    def __init__(self, job, wanted, worker, dropped):
        self.job, self.worker, self.dropped = job, worker, dropped
        self.streamed = bool(wanted.stream)
        self.with_usage = bool(wanted.stream_options and wanted.stream_options.include_usage)
        self.name, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.status_code, self.background = 200, None

    async def __call__(self, scope, receive, send):
        watcher = asyncio.ensure_future(self.watch(scope, receive))
        try:
            await (self.stream(send) if self.streamed else self.whole(scope, receive, send))
        finally:
            watcher.cancel()
            self.worker.cancel(self.job)

    async def watch(self, scope, receive):
        while (await receive())["type"] != "http.disconnect":
            pass
        scope["client_left"] = True
        self.worker.cancel(self.job)
        self.job.news.put_nowait([ClientDisconnect()])

    async def pieces(self):
        """Lists of pieces as they come, all that wait at a time, until each answer is finished."""
        running = self.job.n
        while running:
            news = await self.job.news.get()
            while not self.job.news.empty():
                news += self.job.news.get_nowait()
            for piece in news:
                if isinstance(piece, Exception):
                    raise piece
                running -= piece.finish_reason is not None
            yield news

    def usage(self):
        prompt, written = len(self.job.prompt), self.job.tokens
        return {"prompt_tokens": prompt, "completion_tokens": written,
                "total_tokens": prompt + written}

    def head(self, kind):
        about = {"id": self.name, "object": kind, "created": self.created, "model": self.job.stage}
        return {**about, "dropped_messages": self.dropped} if self.dropped else about

    async def whole(self, scope, receive, send):
        texts, reasons = [""] * self.job.n, [None] * self.job.n
        try:
            async for news in self.pieces():
                for piece in news:
                    texts[piece.index] += piece.text
                    reasons[piece.index] = piece.finish_reason
        except ClientDisconnect:
            return
        choices = [{"index": i, "message": {"role": "assistant", "content": text, "refusal": None},
                    "logprobs": None, "finish_reason": reason}
                   for i, (text, reason) in enumerate(zip(texts, reasons))]
        body = {**self.head("chat.completion"), "choices": choices, "usage": self.usage()}
        await JSONResponse(body)(scope, receive, send)

    async def stream(self, send):
        """Server-sent events: `data: {...}`, a blank line, and so on; [DONE] is the last."""
        await send({"type": "http.response.start", "status": 200,
                    "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]})
        head = self.head("chat.completion.chunk")

        async def emit(*chunks):
            text = "".join(f"data: {json.dumps({**head, **chunk})}\n\n" for chunk in chunks)
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

        def chunk(index, delta, reason=None):
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
            return {"choices": [choice], **({"usage": None} if self.with_usage else {})}

        await emit(*(chunk(i, {"role": "assistant", "content": ""}) for i in range(self.job.n)))
        try:
            async for news in self.pieces():
                texts = dict.fromkeys((piece.index for piece in news), "")
                for piece in news:
                    texts[piece.index] += piece.text
                chunks = [chunk(i, {"content": text}) for i, text in texts.items() if text]
                chunks += [chunk(piece.index, {}, piece.finish_reason) for piece in news
                           if piece.finish_reason]
                if chunks:
                    await emit(*chunks)
        except ClientDisconnect:
            return
        except Exception as error:  # the head has gone out, so the status can no longer say it
            await emit(worker_error(error).body)
        else:
            if self.with_usage:
                await emit({"choices": [], "usage": self.usage()})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def worker_error(error):
    """What a client is told of a failure in the worker."""
    if isinstance(error, UserError):  # a stage that is there, and cannot be read
        return ApiError(503, str(error), "model", "model_not_loaded")
    return ApiError(500, "the model failed on this request; the log says how")


# ---- the idea: counting --------------------------------------------------------------------------


class ServerMetrics:
    """Counters and histograms in Prometheus' text format."""

    BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

    def __init__(self):
        self.counts, self.histograms = Counter(), {}

    def observe(self, name, value):
        """Put value into the histogram `name`."""
        buckets = self.histograms.setdefault(name, [[0] * (len(self.BOUNDS) + 1), 0.0])
        buckets[0][bisect_left(self.BOUNDS, value)] += 1
        buckets[1] += value

    def render(self, gauges):
        """gauges: {name: value now} -> the whole page."""
        lines = ["# TYPE edu_requests_total counter"]
        lines += [f'edu_requests_total{{path="{path}",status="{status}"}} {count}'
                  for (path, status), count in sorted(self.counts.items()) if status]
        for name in ("prompt_tokens", "completion_tokens", "decode_steps"):
            lines += [f"# TYPE edu_{name}_total counter",
                      f'edu_{name}_total {self.counts[name, ""]}']
        for name, value in gauges.items():
            lines += [f"# TYPE edu_{name} gauge", f"edu_{name} {value}"]
        for name, (buckets, total) in self.histograms.items():
            lines.append(f"# TYPE edu_{name} histogram")
            for i, bound in enumerate((*self.BOUNDS, "+Inf")):
                lines.append(f'edu_{name}_bucket{{le="{bound}"}} {sum(buckets[: i + 1])}')
            lines += [f"edu_{name}_sum {total}", f"edu_{name}_count {sum(buckets)}"]
        return "\n".join(lines) + "\n"


# ---- the idea: who may come in -------------------------------------------------------------------

SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"), (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"), (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
]


def host_of(authority):
    """The name in a Host header or an origin, without port: "[::1]:80" -> "::1"."""
    found = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^\[\]:/@]+))(?::\d{1,5})?", authority.strip())
    return (found[1] or found[2]).lower().rstrip(".") if found else None


class Gate:
    """What every request passes: Host, Origin and key are checked, the response is counted.

    A browser lets any page send requests to 127.0.0.1, and a page whose name has been pointed
    there (DNS rebinding) even read the answers. The first brings a foreign Origin, the second a
    foreign Host; no browser lets a page forge either.
    """

    def __init__(self, app, cfg, metrics, routes):
        self.app, self.cfg, self.metrics, self.routes = app, cfg, metrics, routes
        own = () if cfg.host in ("", "0.0.0.0", "::") else (cfg.host,)
        self.hosts = {"127.0.0.1", "localhost", "::1",
                      *(host.lower() for host in (*own, *cfg.allow_host))}

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status = time.perf_counter(), []

        async def counting_send(message):
            if message["type"] == "http.response.start":
                status.append(message["status"])
                message = {**message, "headers": [*message["headers"], *SECURITY_HEADERS]}
            await send(message)

        try:
            self.check(scope)
            await self.app(scope, receive, counting_send)
        except ApiError as error:
            await error.response()(scope, receive, counting_send)
        finally:
            left = scope.get("client_left") or not status
            self.note(scope, 499 if left else status[0], time.perf_counter() - began)

    def check(self, scope):
        """Raise ApiError for a request that must not be looked at any further."""
        headers = dict(scope["headers"])  # of a repeated header the last; h11 takes one Host only
        host = headers.get(b"host", b"").decode("latin-1")
        if host_of(host) not in self.hosts:
            raise ApiError(403, "this server does not go by that name (Host); start it with "
                                "--allow-host NAME if it should", code="host_not_allowed")
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").lower() not in (
                f"http://{host.lower()}", f"https://{host.lower()}"):
            raise ApiError(403, "another site's page must not use this server (Origin)",
                           code="origin_not_allowed")
        guarded = scope["path"].startswith("/v1") or scope["path"] == "/metrics"
        if self.cfg.api_key and guarded:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self.cfg.api_key.encode()):
                raise ApiError(401, "the key is missing or wrong (Authorization: Bearer KEY)",
                               code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def note(self, scope, status, seconds):
        """Count a request and log a line; status 499: the client left before the end."""
        # Paths are not repeated as they come: a foreign one may hold anything, and without end.
        path = scope["path"] if scope["path"] in self.routes else "other"
        self.metrics.counts[path, status] += 1
        self.metrics.observe("request_seconds", seconds)
        if self.cfg.log_requests:
            print(f"{time.strftime('%H:%M:%S')} {scope['method'][:8]:<4} {path:<20} {status} "
                  f"{seconds:7.3f} s  {scope.get('note', '')}", flush=True)


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, with an end to its patience.

    A client that sends a byte now and then (slowloris), that never sends the end of its body, or
    that never takes its answer would hold a connection for ever; uvicorn times idle ones only.
    """

    patience, max_connections = 10.0, 256

    def connection_made(self, transport):
        super().connection_made(transport)
        self.seen, self.since, self.watch = None, self.loop.time(), None
        if len(self.connections) > self.max_connections:
            self.answer(ApiError(429, "too many connections", headers={"Retry-After": "1"}))
        self.look()

    def waiting_for(self):
        """What this connection waits for its client to do, and in which request; or None."""
        if self.transport.is_closing():
            return "take the rest", None
        if self.cycle is None or self.cycle.response_complete:
            return "ask", id(self.cycle)
        if self.cycle.more_body:
            return "send the body", id(self.cycle)
        return ("read", id(self.cycle)) if self.flow.write_paused else None

    def look(self):
        """A few times within its patience: is it still waiting for the same thing?"""
        now, waiting = self.loop.time(), self.waiting_for()
        if waiting is None or waiting != self.seen:
            self.seen, self.since = waiting, now
        elif now - self.since > self.patience:
            if waiting[0] in ("read", "take the rest"):
                return self.transport.abort()  # close() would wait until it has all been taken
            self.answer(ApiError(408, "the request took too long to arrive"))
        self.watch = self.loop.call_later(self.patience / 4, self.look)

    def connection_lost(self, exc):
        super().connection_lost(exc)
        if self.watch is not None:
            self.watch.cancel()

    def send_400_response(self, msg):
        self.answer(ApiError(400, msg))

    def answer(self, error):
        """Say it, if nothing has been said yet in this cycle, and hang up."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            body = json.dumps(error.body).encode()
            headers = {"content-type": "application/json", "connection": "close",
                       "content-length": str(len(body)), **error.headers}
            for event in (h11.Response(status_code=error.status, headers=list(headers.items())),
                          h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event))
        self.transport.close()


# ---- the loop ------------------------------------------------------------------------------------


class Stages:
    """The checkpoints in the data folder: which there are, and their engines when asked for."""

    def __init__(self, cfg, device):
        self.cfg, self.device = cfg, device
        self.tokenizer = Tokenizer.from_dir(cfg.data_dir / "tokenizer")
        self.engines = {}

    def names(self):
        """Folders with a model, and what is loaded already; the furthest stage first."""
        found = {path.parent.name for path in self.cfg.data_dir.glob("*/model.safetensors")
                 if (path.parent / "config.json").exists()} | set(self.engines)
        rank = {name: i for i, name in enumerate((self.cfg.stage, *STAGES))}
        return sorted(found, key=lambda name: (rank.get(name, len(rank)), name))

    def default(self):
        """The stage to serve; UserError when there is none, or not the one that was asked for."""
        names = self.names()
        if self.cfg.stage and self.cfg.stage not in names:
            raise UserError(f"--stage {self.cfg.stage}: {self.cfg.data_dir / self.cfg.stage} holds "
                            f"no model.safetensors; there are: {', '.join(names) or 'none'}.\n"
                            "  Make one: bash my_pipeline.sh")
        if not names:
            raise UserError(f"there is no model in {self.cfg.data_dir}, so nobody to serve.\n"
                            "  Make one: bash my_pipeline.sh")
        return names[0]

    def load(self, name):
        if name not in self.engines:
            model, _ = load_checkpoint(self.cfg.data_dir / name, self.tokenizer, self.device)
            self.engines[name] = Engine(model, self.tokenizer)
        return self.engines[name]

    def context(self, name):
        """Its context, without loading it. Raises ApiError 503 where config.json is unreadable."""
        if name in self.engines:
            return self.engines[name].model.config.sequence_len
        try:
            about = json.loads((self.cfg.data_dir / name / "config.json").read_text("utf-8"))
            return int(about["model"]["sequence_len"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ApiError(503, f"stage {name} cannot be read", "model", "model_not_loaded"
                           ) from error


def read_page():
    """(the page, its Content-Security-Policy): only these very scripts and styles may run."""
    try:
        page = PAGE.read_text("utf-8")
    except OSError as error:
        raise UserError(f"the chat page {PAGE} cannot be read ({error.strerror}); it belongs "
                        f"beside {Path(__file__).name}: copy both.") from None

    def hashes(tag):
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in texts)
        return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)

    return page, ("default-src 'none'; connect-src 'self'; img-src data:; "
                  f"script-src {hashes('script')}; style-src {hashes('style')}; base-uri 'none'; "
                  "form-action 'none'; frame-ancestors 'none'; "
                  "require-trusted-types-for 'script'; trusted-types 'none'")


async def read_body(request):
    """The body, at most MAX_BODY bytes of it, whether its length was announced or not."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":  # a form, which any page may send anywhere, is none
        raise ApiError(415, "Content-Type must be application/json")
    too_long = ApiError(413, f"the body has more than {MAX_BODY} bytes")
    if int(request.headers.get("content-length", 0)) > MAX_BODY:
        raise too_long
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise too_long
    return bytes(body)


def make_job(wanted, cfg, stages):
    """(Job, dropped messages) of a checked request. Raises ApiError."""
    names = stages.names()
    stage = wanted.model or next(iter(names), "")
    if stage not in names:
        raise ApiError(404, f"there is no model {stage[:100]!r}; there are: {', '.join(names)}",
                       "model", "model_not_found")
    context = stages.context(stage)
    # As in the protocol, a bound and no promise: an answer also ends where the context does.
    limit = wanted.max_completion_tokens or wanted.max_tokens or context
    unread = drop_what_cannot_be_read(wanted, cfg)
    prompt, dropped = render_prompt(plain_messages(wanted, cfg), stages.tokenizer, context,
                                    min(limit, context // 4), wanted.truncation)
    stops = wanted.stop or ()
    seed = wanted.seed if wanted.seed is not None else random.SystemRandom().getrandbits(63)
    return Job(
        stage, prompt, asyncio.Queue(), wanted.n or 1, limit,
        1.0 if wanted.temperature is None else wanted.temperature, wanted.top_k or 0,
        1.0 if wanted.top_p is None else wanted.top_p, seed,
        (stops,) if isinstance(stops, str) else tuple(stops)), unread + dropped


def make_app(cfg, stages, worker, metrics, lifespan=None):
    """The ASGI application, gate included."""
    page, policy = read_page()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False,
                  lifespan=lifespan)
    began = time.time()

    @app.get("/")
    async def chat_page():
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @app.get("/health")
    async def health():
        if not worker.is_alive():
            raise ApiError(503, "the thread that decodes has stopped: start the server again")
        return {"status": "ok", "stage": next(iter(stages.names()), None),
                "active_rows": worker.active_rows(), "queue_depth": worker.queue_depth(),
                "uptime_seconds": round(time.time() - began)}

    @app.get("/metrics")
    async def prometheus():
        gauges = {"queue_depth": worker.queue_depth(), "active_rows": worker.active_rows(),
                  "stages_loaded": len(stages.engines)}
        metrics.counts["decode_steps", ""] = worker.steps
        return PlainTextResponse(metrics.render(gauges), media_type="text/plain; version=0.0.4")

    def describe(name):
        about = {"id": name, "object": "model", "created": 0, "owned_by": "zero-to-rlhf"}
        with contextlib.suppress(OSError, ApiError):  # half-written: listed all the same
            about["created"] = int((cfg.data_dir / name / "config.json").stat().st_mtime)
            about["context_length"] = stages.context(name)
        return about

    @app.get("/v1/models")
    async def models():
        return {"object": "list", "data": [describe(name) for name in stages.names()]}

    @app.get("/v1/models/{name}")
    async def model(name: str):
        if name not in stages.names():
            raise ApiError(404, f"there is no model {name[:100]!r}", "model", "model_not_found")
        return describe(name)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        # 1. read  2. check  3. render  4. queue; Completion does the rest
        wanted = parse_request(await read_body(request), cfg)
        # a long conversation takes its time to be encoded, in which others' tokens are sent
        job, dropped = await asyncio.to_thread(make_job, wanted, cfg, stages)
        try:
            worker.submit(job)
        except Busy as error:
            raise ApiError(429, str(error), code="queue_full",
                           headers={"Retry-After": str(error.seconds)}) from None
        metrics.counts["prompt_tokens", ""] += len(job.prompt)
        request.scope["note"] = f"{job.stage} {len(job.prompt)} prompt tokens, {job.n} answers"
        if cfg.log_text:
            print(stages.tokenizer.decode(job.prompt), flush=True)
        return Completion(job, wanted, worker, dropped)

    @app.exception_handler(ApiError)
    async def api_error(request, error):
        return error.response()

    @app.exception_handler(StarletteHTTPException)
    async def http_error(request, error):
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()

    @app.exception_handler(ClientDisconnect)
    async def client_gone(request, error):
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def any_error(request, error):
        return worker_error(error).response()

    return Gate(app, cfg, metrics, {route.path for route in app.routes})


def check_serve_settings(cfg):
    for name in ("max_batch", "max_queue", "prefill_tokens", "max_connections", "max_messages",
                 "max_chars", "measure_tokens"):
        if getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: at least 1.")
    if not 0 <= cfg.port <= 65535 or cfg.patience <= 0 or cfg.measure < 0:
        raise UserError(f"--port {cfg.port} must be 0 to 65535, --patience {cfg.patience} above 0, "
                        f"--measure {cfg.measure} not negative.")


def open_socket(cfg):
    """A listening socket. Raises UserError where the address is not to be had."""
    family = socket.AF_INET6 if ":" in cfg.host else socket.AF_INET
    try:
        return socket.create_server((cfg.host, cfg.port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(f"cannot listen on {cfg.host} port {cfg.port} ({error.strerror or error})."
                        f"\n  Perhaps another server runs there; take another port: python "
                        f"edu/16_serve.py --port {cfg.port + 1 if cfg.port < 65535 else 0}"
                        ) from None


def make_server(cfg, stages):
    """(uvicorn.Server, Worker, ServerMetrics): all wired up, nothing running yet."""
    metrics = ServerMetrics()
    courier = Courier(metrics, cfg.beat)
    worker = Worker(stages.load, courier.deliver, cfg.max_batch, cfg.max_queue, cfg.prefill_tokens)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        courier.loop = asyncio.get_running_loop()
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    protocol = type("Protocol", (PatientProtocol,), {
        "patience": cfg.patience, "max_connections": cfg.max_connections})
    server = uvicorn.Server(uvicorn.Config(
        make_app(cfg, stages, worker, metrics, lifespan), http=protocol, ws="none", lifespan="on",
        loop="asyncio", log_config=None, log_level="error", access_log=False, proxy_headers=False,
        server_header=False, timeout_keep_alive=max(1, int(cfg.patience)),
        timeout_graceful_shutdown=5))
    return server, worker, metrics


def serve(cfg, stages):
    """Serve until Ctrl-C: answers that are being written are finished, for five seconds."""
    server, _, metrics = make_server(cfg, stages)
    listener = open_socket(cfg)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"chat at http://{shown}:{port}  API at http://{shown}:{port}/v1  (Ctrl-C ends)",
          flush=True)
    if not ipaddress.ip_address(host).is_loopback and not cfg.api_key:
        print("warning: other machines can reach this, and no --api-key is set", flush=True)
    # The thread that decodes gives way to the one that talks within 1 ms, instead of 5.
    sys.setswitchinterval(0.001)
    with contextlib.suppress(KeyboardInterrupt):  # the usual way to end a server
        server.run(sockets=[listener])
    answered = metrics.counts["/v1/chat/completions", 200]
    asked = sum(count for (path, _), count in metrics.counts.items()
                if path == "/v1/chat/completions")
    print(f"result: requests answered {0} -> {answered} (n={asked})")


def measure(cfg, stages):
    """What a batch is good for: tokens per second with 1, 2, 4, ... clients, without HTTP."""
    news, stage = queue.SimpleQueue(), stages.default()
    worker = Worker(stages.load, lambda pieces: [news.put(piece) for piece in pieces],
                    cfg.max_batch, max(cfg.max_queue, cfg.measure), cfg.prefill_tokens)
    prompt = render_for_completion([{"role": "user", "content": "Tell me a story."}],
                                   stages.tokenizer)
    stages.load(stage).stops = set()  # all answers equally long: rows that leave would blur it
    limit = min(cfg.measure_tokens, stages.context(stage) - len(prompt))
    worker.start()

    def race(clients):
        """(tokens per second, milliseconds until the last client has its first token)."""
        began, first, running, tokens = time.perf_counter(), {}, clients, 0
        for seed in range(clients):
            worker.submit(Job(stage, prompt, None, 1, limit, seed=seed))
        while running:
            job, piece = news.get()
            if isinstance(piece, Exception):
                raise piece
            tokens += 1
            first.setdefault(job.seed, time.perf_counter() - began)
            running -= piece.finish_reason is not None
        return tokens / (time.perf_counter() - began), 1000 * max(first.values())

    race(1)  # warm up
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n < cfg.measure] + [cfg.measure]
    print("clients   tok/s  each  times  first token ms")
    speeds = {}
    for clients in counts:
        speeds[clients], first = race(clients)
        print(f"{clients:7d} {speeds[clients]:7.0f} {speeds[clients] / clients:5.0f} "
              f"{speeds[clients] / speeds[counts[0]]:6.1f} {first:15.0f}")
    worker.stop()
    print(f"result: tokens per second, {counts[0]} client against {counts[-1]} "
          f"{speeds[counts[0]]:.0f} -> {speeds[counts[-1]]:.0f} (n={limit * counts[-1]})")


def run_serve(cfg):
    # 1. settings, and a model to serve
    check_serve_settings(cfg)
    _, _, _, _, device = compute_init(cfg.device_type or None)
    # One core is for the thread that talks: where all of them decode, both wait for each other.
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    stages = Stages(cfg, device)
    engine = stages.load(stages.default())
    params = sum(p.numel() for p in engine.model.parameters())
    print(f"16 serve - {device.type} - float32 - {params / 1e6:.1f}M params - "
          f"stage {stages.default()} - context {engine.model.config.sequence_len}")
    print(f"stages: {', '.join(stages.names())}", flush=True)
    # 2. serve, or race
    if cfg.measure:
        measure(cfg, stages)
    else:
        serve(cfg, stages)
    print("next: python edu/17_report.py")


# ---- the command line ----------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    return run_script(run_serve, Config, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
