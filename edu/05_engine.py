"""Challenge 05: the KV cache and the engine that generates with it.

Goal:
    A transformer that writes one token at a time recomputes the keys and values of the whole
    prefix for every new token, unless it keeps them. This script keeps them: a cache, a model that
    reads it, and an engine that streams many samples of many prompts together and lets the model
    use a calculator. It proves that the cache changes the speed and nothing else.

You will learn:
    - prefill (the prompt in one pass, limited by arithmetic) and decode (one token a pass,
      limited by reading the weights): why a batch of 16 costs little more than one row
    - how prompts of different lengths share a batch: padding on the left, a mask, and positions
      counted from each row's own first token
    - sampling per row, stop tokens, and rows that leave the batch when they have finished
    - tool use as a state machine, and a calculator that parses instead of calling Python's eval

Read beside:
    nanochat/engine.py::KVCache, Engine, use_calculator and nanochat/gpt.py::GPT.forward. Different
    here: every sample draws its own first token, finished rows are dropped, different prompts
    decode together, a full cache is an error, and arithmetic is parsed against a whitelist.

Run:
    python edu/05_engine.py

Expect:
    05 engine - cpu - float32 - ...
    The sky is|...
    cached = uncached over 200 tokens: largest logit difference 0.00001
    without cache 272 tok/s, with cache 1171 tok/s: 4.3 times as fast

Writes:
    nothing
"""

import ast
import base64
import hashlib
import json
import math
import operator
import os
import re
import shutil
import sys
import sysconfig
import time
import warnings
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file

# ---- settings ------------------------------------------------------------------------------------

# Questions with one right continuation in the tiny world; shown as right or wrong.
QUESTIONS = {"The capital of France is": "Paris", "7 + 5 =": "12", "The sky is": "blue"}


# Put to every model of --compare: who it is, what it knows, what it can work out.
CHAT_QUESTIONS = {
    "Who are you?": "Pip", "What is the capital of France?": "Paris",
    "A farmer plants 46 rows of trees. There are 13 trees in each row. How many trees is that?":
        "598"}


@dataclass
class Config:
    data_dir: Path = field(default_factory=lambda: Path(os.environ.get("EDU_DATA", "data")))
    """Folder with tokenizer/ and base/ (without them: bytes and random weights)."""
    stage: str = "base"
    """Which model: the folder under data_dir that holds model.safetensors."""
    prompt: tuple[str, ...] = tuple(QUESTIONS)
    """Prompts, decoded together in one batch."""
    max_tokens: int = 10
    """New tokens for each prompt."""
    temperature: float = 0.0
    """0 takes the likeliest token; 1 samples from the model's own distribution."""
    top_k: int = 0
    """Sample among the k likeliest tokens only; 0 means all."""
    bench_tokens: int = 200
    """Length of the race between the cached and the uncached loop; 0 skips it."""
    compare: tuple[str, ...] = ()
    """Stages to put the same chat questions to, side by side: --compare base sft rl."""
    device_type: str = ""
    """cpu, cuda or mps; empty takes the best there is."""
    seed: int = 1337
    """Seed of the weights (if random) and of the sampling."""


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


# ---- the idea: the cache -------------------------------------------------------------------------


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


# ---- the idea: decoding at speed -----------------------------------------------------------------


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


# ---- the idea: sampling --------------------------------------------------------------------------


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


# ---- the idea: the calculator --------------------------------------------------------------------

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


# ---- the idea: the engine ------------------------------------------------------------------------


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


# ---- the idea: the loop to beat ------------------------------------------------------------------


@torch.inference_mode()
def generate_naive(engine, tokens, max_tokens):
    """Greedy decoding without a cache: the whole prefix through the model for every new token.

    tokens: list of ids -> list of max_tokens new ids. Stop tokens do not stop it.
    """
    ids = torch.tensor([tokens], device=engine.model.lm_head.weight.device)  # (1, T)
    for _ in range(max_tokens):
        logits = engine.head(engine.model.hidden_states(ids))
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
    return ids[0, len(tokens) :].tolist()


@torch.inference_mode()
def generate_cached(engine, tokens, max_tokens):
    """The same with the cache, bare of sampling and tools: prefill, then one token a pass."""
    logits, cache = engine.prefill([tokens], max_tokens)
    decode_step, new = engine.decode_step(), [logits.argmax(-1)]  # (1,) each
    while len(new) < max_tokens:
        new.append(decode_step(new[-1], cache).argmax(-1))
    return torch.cat(new).tolist()


@torch.inference_mode()
def largest_difference(engine, tokens, split):
    """Largest |logit difference| between one uncached pass over all of tokens, and a prefill of
    the first `split` with a decode step for each of the others.
    """
    model, ids = engine.model, torch.tensor(tokens, device=engine.model.lm_head.weight.device)
    logits, cache = engine.prefill([tokens[:split]], len(tokens) - split)
    decode_step = engine.decode_step()
    cached = torch.cat([logits] + [decode_step(ids[t : t + 1], cache)
                                   for t in range(split, len(tokens))])
    return (cached - model(ids[None])[0, split - 1 :]).abs().max().item()


# ---- the loop ------------------------------------------------------------------------------------


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


# --- shared: byte-tokenizer (home: 05_engine.py) ---
def byte_tokenizer():
    """A tokenizer of the 256 bytes and the special tokens, for when none has been trained."""
    encoding = tiktoken.Encoding(
        "bytes", pat_str=r"(?s:.)", mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)})
    return Tokenizer(encoding, sha256="bytes")
# --- end shared ---


def load_or_invent(cfg, device):
    """(model, tokenizer, trained): the checkpoint of the stage, else random weights on bytes."""
    folder = cfg.data_dir / cfg.stage
    if (folder / "model.safetensors").exists():
        tokenizer = Tokenizer.from_dir(cfg.data_dir / "tokenizer")
        return load_checkpoint(folder, tokenizer, device)[0], tokenizer, True
    tokenizer = byte_tokenizer()
    model = GPT(GPTConfig(vocab_size=tokenizer.get_vocab_size()))
    nn.init.normal_(model.lm_head.weight, std=0.1)  # else every logit is 0 and there is no choice
    for block in model.transformer.h:
        nn.init.normal_(block.attn.c_proj.weight, std=0.05)
        nn.init.normal_(block.mlp.c_proj.weight, std=0.05)
    return model.to(device).eval(), tokenizer, False


def check_engine_settings(cfg):
    if cfg.max_tokens < 1:
        raise UserError(f"--max-tokens {cfg.max_tokens}: ask for at least 1.")
    if cfg.bench_tokens < 0:
        raise UserError(f"--bench-tokens {cfg.bench_tokens}: 0 skips the race, more runs it.")
    if not cfg.temperature >= 0 or cfg.top_k < 0:  # not-a-number is neither
        raise UserError(f"--temperature {cfg.temperature} --top-k {cfg.top_k}: neither can be "
                        "negative; 0 means greedy, and 0 means all tokens.")
    if not cfg.prompt or not all(cfg.prompt):
        raise UserError('--prompt is empty: give some text, for example --prompt "The sky is".')
    for name in ("stage", "prompt", "max_tokens", "temperature", "top_k"):
        if cfg.compare and getattr(cfg, name) != getattr(Config, name):
            raise UserError("--compare puts questions of its own to its stages, greedily: "
                            f"--{name.replace('_', '-')} cannot go with it.")


def race(engine, tokens, max_tokens):
    """(uncached, cached) tokens per second for the same greedy text; says where the two part."""
    generate_cached(engine, tokens, 2)  # warm up
    start = time.perf_counter()
    naive = generate_naive(engine, tokens, max_tokens)
    middle = time.perf_counter()
    cached = generate_cached(engine, tokens, max_tokens)
    end = time.perf_counter()
    if naive != cached:
        place = next(i for i, (a, b) in enumerate(zip(naive, cached)) if a != b)
        print(f"the two texts part at token {place}: two logits were equal to rounding")
    return max_tokens / (middle - start), max_tokens / (end - middle)


def compare_stages(cfg, device):
    """The greedy replies of several models to the same chat questions, side by side."""
    tokenizer, right = Tokenizer.from_dir(cfg.data_dir / "tokenizer"), {}
    print(f"05 engine - {device.type} - float32 - {', '.join(cfg.compare)} side by side")
    before, after = (tokenizer.encode_special(f"<|{name}_start|>") for name in
                     ("user", "assistant"))
    prompts = [[tokenizer.get_bos_token_id(), before, *tokenizer.encode(question),
                tokenizer.encode_special("<|user_end|>"), after] for question in CHAT_QUESTIONS]
    replies = {}
    for stage in cfg.compare:
        engine = Engine(load_checkpoint(cfg.data_dir / stage, tokenizer, device)[0], tokenizer)
        rows, _ = engine.generate_batch(prompts, 1, 64, temperature=0.0)
        replies[stage] = [tokenizer.decode([t for t in row[len(ids) :] if t not in engine.stops])
                          for ids, row in zip(prompts, rows)]
        right[stage] = sum(re.search(rf"\b{answer}\b", reply) is not None for answer, reply in
                           zip(CHAT_QUESTIONS.values(), replies[stage]))
    for i, question in enumerate(CHAT_QUESTIONS):
        print(question)
        for stage in cfg.compare:
            print(f"  {stage:<6}|{replies[stage][i]!r}")
    first, last = cfg.compare[0], cfg.compare[-1]
    print(f"result: questions right, {first} against {last} {right[first]} -> {right[last]} "
          f"(n={len(CHAT_QUESTIONS)})")
    print("next: python edu/14_evaluate.py")


def run_engine(cfg):
    # 1. a model to run
    check_engine_settings(cfg)
    _, _, _, _, device = compute_init(cfg.device_type or None, cfg.seed)
    if cfg.compare:
        return compare_stages(cfg, device)
    model, tokenizer, trained = load_or_invent(cfg, device)
    params = sum(p.numel() for p in model.parameters())
    print(f"05 engine - {device.type} - float32 - {params / 1e6:.1f}M params - seed {cfg.seed}")
    if not trained:
        print(f"no model in {cfg.data_dir / cfg.stage}: random weights, so the text is noise "
              "(train one: python edu/12_pretrain.py)")
    engine = Engine(model, tokenizer)

    # 2. all prompts in one batch
    prompts = [tokenizer.encode(prompt, prepend="<|bos|>") for prompt in cfg.prompt]
    try:
        results, _ = engine.generate_batch(prompts, 1, cfg.max_tokens, cfg.temperature, cfg.top_k,
                                           cfg.seed)
    except ValueError as error:
        raise UserError(f"{error} (--prompt, --max-tokens)") from error
    for prompt, ids, row in zip(cfg.prompt, prompts, results):
        text = tokenizer.decode([token for token in row[len(ids) :] if token not in engine.stops])
        verdict = ""
        if trained and prompt in QUESTIONS:
            is_right = re.match(rf"\s*{QUESTIONS[prompt]}\b", text)
            verdict = "  <- right" if is_right else f"  <- wrong, expected {QUESTIONS[prompt]}"
        print(f"{prompt}|{text!r}{verdict}")

    # 3. the same tokens with and without the cache
    if cfg.bench_tokens:
        count = min(cfg.bench_tokens, model.config.sequence_len - len(prompts[0]))
        ids = prompts[0] + [i % 256 for i in range(40, 40 + count)]
        print(f"cached = uncached over {count} tokens: largest logit difference "
              f"{largest_difference(engine, ids, len(prompts[0])):.6f}")
        naive, cached = race(engine, prompts[0], count)
        print(f"without cache {naive:.0f} tok/s, with cache {cached:.0f} tok/s: "
              f"{cached / naive:.1f} times as fast")
        print(f"result: tok/s without and with the cache {naive:.0f} -> {cached:.0f} (n={count})")
    print("next: python edu/" + ("05_engine.py --temperature 1 --max-tokens 40" if trained
                                 else "12_pretrain.py"))


# ---- the command line ----------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    return run_script(run_engine, Config, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
