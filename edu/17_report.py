"""Challenge 17: one page that says what a run was, what it cost and what came of it.

Goal:
    A run leaves its traces in a dozen files: settings, losses, scores, times, weights. This script
    gathers them into one page that opens anywhere, with no network and no script in it, and sets
    two runs side by side. What is missing or damaged is named there; it never stops the report.

You will learn:
    - what belongs beside a number for it to mean something later: settings, versions, machine, n
    - to read files that other programs write: any of them may be absent, cut short or nonsense
    - that text which a model wrote must be escaped for the page it lands on: in HTML it could be a
      tag, in a Markdown table a new column
    - to draw a curve with nothing but a few lines of SVG

Read beside:
    nanochat/report.py. Different here: times, memory and scores are read from what the stages
    wrote, and not from the text they printed; reinforcement learning counts in the total; there are
    pictures, samples of every stage to the same prompts, and a second run to compare with.

Run:
    python edu/17_report.py
    python edu/17_report.py --compare data/report/report.json

Expect:
    17 report - cpu - float32 - base, mid, sft, rl
    wrote data/report/report.md
    wrote data/report/report.html
    result: stages with a model in the report 0 -> 3 (n=4)
    next: python edu/15_chat.py

Writes:
    report/report.md
    report/report.html
    report/report.json, which --compare reads
    report/curve_base_loss.svg, and the other pictures of report.md
"""

import ast
import base64
import contextlib
import datetime
import hashlib
import html
import json
import math
import operator
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file

# ---- settings ------------------------------------------------------------------------------------

SCRIPTS = {"base": "12_pretrain.py", "mid": "13_midtrain.py", "sft": "08_sft.py", "rl": "10_rl.py"}
# The stages of my_pipeline.sh, and midtraining where it would stand, in the order of the table.
PIPELINE = ("check", "world", "download", "tokenizer", "pretrain", "engine", "midtrain", "identity",
            "sft", "rl", "evaluate", "compare", "report")
HEADLINES = ("pretrain", "midtrain", "sft", "rl")  # whose results stand at the top of the page
# What is drawn of metrics.jsonl: (name, title, unit, {key: label}).
CURVES = (
    ("loss", "loss", "nats per token", {"loss": "training", "val_loss": "validation"}),
    ("bpb", "bits per byte", "bits", {"val_bpb": "validation", "ladder_bigram": "counted pairs"}),
    ("reward", "reward", "mean", {"reward": "samples", "accuracy": "held-out, greedy"}),
    ("tools", "calculator use", "share of samples", {"tool_use": "samples that call it"}),
)


@dataclass
class Config:
    data_dir: Path = field(default_factory=lambda: Path(os.environ.get("EDU_DATA", "data")))
    """The run: a folder with tokenizer/ and a folder for each stage."""
    stages: tuple[str, ...] = ("base", "mid", "sft", "rl")
    """Folders of models, in the order of training."""
    compare: Path | None = None
    """A second run beside this one: another data folder, or an earlier report's report.json."""
    ask: tuple[str, ...] = (
        "Who are you?", "What is the capital of France?",
        "A farmer plants 46 rows of trees. There are 13 trees in each row. How many trees is that?",
        "Tell me a story about a cat.")
    """Questions that every stage answers, as in a chat; the likeliest token each time."""
    go_on: tuple[str, ...] = ("The capital of France is", "Once there was a dog")
    """Texts that every stage continues, with nothing around them."""
    max_tokens: int = 64
    """Length of each answer at most."""
    device_type: str = ""
    """cpu, cuda or mps; empty takes the best there is."""


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


# ---- the idea: what a run has left behind --------------------------------------------------------


def finite(value):
    """value as a number, or None: JSON holds whatever the program that wrote it put there."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and abs(value) < 1e30 else None  # neither nan nor infinity is


def as_dict(value):
    return value if isinstance(value, dict) else {}


def read_json_file(path, missing, kind=dict):
    """The JSON in a file if it is a `kind`, else an empty one, and a word in `missing` on why."""
    name = f"{path.parent.name}/{path.name}"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        missing.append(f"{name} is not there")
    except OSError as error:
        missing.append(f"{name} cannot be read ({error.strerror})")
    except (ValueError, RecursionError) as error:
        missing.append(f"{name} is damaged ({type(error).__name__}: {str(error)[:80]})")
    else:
        if isinstance(found, kind):
            return found
        missing.append(f"{name} is damaged (a {type(found).__name__}, not a {kind.__name__})")
    return kind()


def read_curves(path, missing):
    """{key: [[step, value], ...]} of a metrics.jsonl, for the keys in CURVES."""
    name, curves, bad, steps = f"{path.parent.name}/{path.name}", {}, 0, set()
    keys = [key for *_, labels in CURVES for key in labels]
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        missing.append(f"{name} is not there" if isinstance(error, FileNotFoundError) else
                       f"{name} cannot be read ({error.strerror})")
        return curves
    lines = [line for line in text.split("\n") if line.strip()]
    for line in lines:
        try:
            row = as_dict(json.loads(line))
        except (ValueError, RecursionError):
            row = {}
        step = finite(row.get("step"))
        if step is None:
            bad += 1
            continue
        steps.add(step)
        for key in keys:
            if finite(row.get(key)) is not None:
                curves.setdefault(key, []).append([step, row[key]])
    if bad:
        missing.append(f"{name}: {bad} of {len(lines)} lines cannot be read")
    if not steps - {0}:
        missing.append(f"{name} has no step in it")
    return curves


def read_scores(folder, missing):
    """{score: {"score", "n", "chance", "low", "high"}} of 14_evaluate.py's eval.json."""
    about = read_json_file(folder / "eval.json", missing)
    scores = {}
    for name, score in as_dict(about.get("scores")).items():
        score = {key: finite(as_dict(score).get(key)) for key in
                 ("score", "n", "chance", "low", "high")}
        if score["score"] is not None:
            scores[name] = score
    if about and not scores:
        missing.append(f"{folder.name}/eval.json holds no score")
    weights = as_dict(about.get("made_from")).get("weights")
    model = folder / "model.safetensors"
    if weights and model.is_file() and hashlib.sha256(model.read_bytes()).hexdigest() != weights:
        missing.append(f"{folder.name}/eval.json is of other weights than model.safetensors: "
                       "measure again with python edu/14_evaluate.py")
    return scores


def read_stage(folder, missing):
    """All that is known of a stage without running its model; None where there is no folder."""
    if not folder.is_dir():
        script = SCRIPTS.get(folder.name)
        missing.append(f"{folder.name}: there is no such folder"
                       + (f"; python edu/{script} makes it" if script else ""))
        return None
    about = read_json_file(folder / "config.json", missing)
    if not (folder / "model.safetensors").is_file():
        missing.append(f"{folder.name}/model.safetensors is not there: the stage has not finished")
    elif about and finite(about.get("step")) == 0:
        missing.append(f"{folder.name} has been saved before its first step")
    return {"step": finite(about.get("step")), "model": as_dict(about.get("model")),
            "script": as_dict(about.get("script")), "versions": as_dict(about.get("versions")),
            "curves": read_curves(folder / "metrics.jsonl", missing),
            "scores": read_scores(folder, missing), "samples": [], "params": None}


def read_pipeline(data_dir, missing):
    """Rows {"stage", "seconds", "peak_mb", "metric", "before", "after", "n"} of every stage's last
    run, from what my_pipeline.sh remembers of each, and from its closing table.
    """
    rows, memory = {}, data_dir / ".pipeline"
    if (data_dir / "pipeline.json").exists():
        for row in read_json_file(data_dir / "pipeline.json", missing, list):
            if isinstance(as_dict(row).get("stage"), str):
                rows[row["stage"]] = row
    # That table is written when all is done: of a run under way only these files know.
    for path in sorted(memory.glob("*.json")):
        row = as_dict(read_json_file(path, missing).get("row"))
        if isinstance(row.get("stage"), str):
            rows[row["stage"]] = row
    for path in sorted(memory.glob("*.begun")):
        if path.stem != "report" and not path.with_suffix(".json").exists():
            missing.append(f"the stage {path.stem} of my_pipeline.sh was begun and has not ended")
            rows.pop(path.stem, None)
    if not rows:
        missing.append("no times and no memory: bash my_pipeline.sh measures them")
    rows.pop("report", None)  # this very script, the last time
    order = {name: i for i, name in enumerate(PIPELINE)}
    return sorted(rows.values(), key=lambda row: order.get(row["stage"], len(order)))


def git_commit(folder):
    """The commit that the scripts are of, and whether they were changed since; None without git."""
    def git(*words):
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, timeout=10,
                              encoding="utf-8", errors="replace")
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit and commit + (", changed since" if git("status", "--porcelain", "-uno", ".")
                                    else "")
    except (OSError, subprocess.SubprocessError):
        return None


def describe_environment(device):
    """{what: value}, of this machine; no name of it, and no path on it."""
    name = platform.processor()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        name = re.search(r"model name\s*: (.+)", text)[1]
    memory = "unknown"
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB"
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "none used"
    return {"machine": f"{platform.system()} {platform.machine()}", "CPU": name or "unknown",
            "cores": str(os.cpu_count()), "memory": memory, "GPU": card,
            "Python": platform.python_version(), "torch": torch.__version__,
            "tiktoken": tiktoken.__version__, "safetensors": safetensors.__version__,
            "git commit": git_commit(Path(__file__).parent) or "none"}


# ---- the idea: the same prompts for every stage --------------------------------------------------


def sample_parts(ids, tokenizer, stops):
    """An answer as [["text" or "call", str], ...]; a call of the calculator reads 6*7 = 42."""
    special = tokenizer.encode_special
    inside = {special("<|python_start|>"): "", special("<|output_start|>"): " = "}
    outside = {special("<|python_end|>"), special("<|output_end|>")}
    parts, waiting, kind = [], [], "text"

    def close(begins=""):
        text = begins + tokenizer.decode(waiting)
        waiting.clear()
        if kind == "call" and parts and parts[-1][0] == "call" and text.startswith(" = "):
            parts[-1][1] += text
        elif text:
            glued = kind == "text" and parts and text[0].isalnum()  # [...= 608]608 is one word
            parts.append([kind, " " * bool(glued) + text])

    begins = ""
    for token in ids:
        if token in inside or token in outside or token in stops:
            close(begins)
            kind, begins = ("call", inside[token]) if token in inside else ("text", "")
        else:
            waiting.append(token)
    close(begins)
    if not ids or ids[-1] not in stops:
        parts.append(["text", " ..."])
    return parts


def sample_stage(folder, cfg, device):
    """(parameters, answers in parts to cfg.ask and then cfg.go_on), all decoded in one batch.

    An answer is None where the prompt leaves no room in the context.
    """
    tokenizer = Tokenizer.from_dir(folder.parent / "tokenizer")
    model, _ = load_checkpoint(folder, tokenizer, device)
    special, engine = tokenizer.encode_special, Engine(model, tokenizer)
    asked = [[tokenizer.get_bos_token_id(), special("<|user_start|>"), *tokenizer.encode(text),
              special("<|user_end|>"), special("<|assistant_start|>")] for text in cfg.ask]
    prompts = asked + [tokenizer.encode(text, prepend="<|bos|>") for text in cfg.go_on]
    params = sum(p.numel() for p in model.parameters())
    answers, room = [None] * len(prompts), model.config.sequence_len - cfg.max_tokens
    fitting = [i for i, ids in enumerate(prompts) if len(ids) <= room]
    if fitting:
        rows, _ = engine.generate_batch([prompts[i] for i in fitting], 1, cfg.max_tokens,
                                        temperature=0.0)
        for i, row in zip(fitting, rows):
            answers[i] = sample_parts(row[len(prompts[i]) :], tokenizer, engine.stops)
    return params, answers


def collect_run(cfg, data_dir, device):
    """Everything about a run, as plain JSON: what report.json holds."""
    missing, stages = [], {}
    for name in cfg.stages:
        stage = read_stage(data_dir / name, missing)
        if stage is None:
            continue
        stages[name] = stage
        if not (data_dir / name / "model.safetensors").is_file():
            continue  # said already
        try:
            stage["params"], stage["samples"] = sample_stage(data_dir / name, cfg, device)
        except UserError as error:
            missing.append(f"no samples of {name}: " + str(error).split("\n")[0])
        without = stage["samples"].count(None)
        if without:
            missing.append(f"no samples of {name} for {without} prompts: with {cfg.max_tokens} "
                           "tokens of answer they do not fit its context")
    models = [data_dir / name / "model.safetensors" for name in cfg.stages]
    ended = max((path.stat().st_mtime for path in models if path.is_file()), default=None)
    date = datetime.datetime.fromtimestamp(ended).isoformat(" ", "minutes") if ended else "unknown"
    return {"report": 1, "date": date, "environment": describe_environment(device),
            "prompts": [*cfg.ask, *cfg.go_on], "asked": len(cfg.ask),
            "pipeline": read_pipeline(data_dir, missing), "stages": stages, "missing": missing}


def other_run(cfg, device):
    """The run to compare with. A folder is read anew; what machine it ran on, only its own report
    knows. Raises UserError.
    """
    path = cfg.compare
    if path.is_dir():
        found = collect_run(cfg, path, device)
        saved = read_json_file(path / "report" / "report.json", [])
        found["environment"] = as_dict(saved.get("environment"))
        return found
    missing = []
    found = read_json_file(path, missing)
    if missing or found.get("report") != 1:
        why = missing[0] if missing else f"{path.name} is no report"
        raise UserError(f"--compare {path}: {why}. Give a data folder, or the report.json that an "
                        "earlier report has left (copy it, as the next report replaces it).")
    return mended_report(found)


def mended_report(found):
    """A report.json as `collect_run` would make it, whatever has become of it since."""
    stages = {}
    for name, stage in as_dict(found.get("stages")).items():
        stage = as_dict(stage)
        curves = {key: [[finite(x), finite(y)] for x, y in as_pairs(points)
                        if None not in (finite(x), finite(y))]
                  for key, points in as_dict(stage.get("curves")).items()}
        scores = {key: {part: finite(as_dict(score).get(part)) for part in
                        ("score", "n", "chance", "low", "high")}
                  for key, score in as_dict(stage.get("scores")).items()}
        samples = [sample and [[str(kind), str(text)] for kind, text in as_pairs(sample)]
                   for sample in as_list(stage.get("samples"))]
        stages[name] = {
            **{key: as_dict(stage.get(key)) for key in ("model", "script", "versions")},
            "step": finite(stage.get("step")), "params": finite(stage.get("params")),
            "samples": samples, "curves": {key: points for key, points in curves.items() if points},
            "scores": {key: s for key, s in scores.items() if s["score"] is not None}}
    rows = [row for row in as_list(found.get("pipeline"))
            if isinstance(as_dict(row).get("stage"), str)]
    return {"date": str(found.get("date")), "environment": as_dict(found.get("environment")),
            "prompts": [str(prompt) for prompt in as_list(found.get("prompts"))],
            "pipeline": rows, "stages": stages,
            "missing": [str(line) for line in as_list(found.get("missing"))]}


def as_list(value):
    return value if isinstance(value, list) else []


def as_pairs(value):
    return [pair for pair in as_list(value) if isinstance(pair, list) and len(pair) == 2]


# ---- the idea: a curve is a few lines of SVG -----------------------------------------------------

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 250, 46, 14, 48, 34
PICTURE_STYLE = """
svg { color: #1c2430; font: 12px system-ui, sans-serif; }
svg text { fill: currentColor; }
svg .grid { stroke: currentColor; stroke-opacity: .15; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .c0 { stroke: #2467d1; } svg .c1 { stroke: #c2610c; }
svg .dot.c0 { fill: #2467d1; } svg .dot.c1 { fill: #c2610c; }
svg .other { stroke-dasharray: 4 3; stroke-opacity: .6; }
@media (prefers-color-scheme: dark) {
  svg { color: #d5dbe5; }
  svg .c0 { stroke: #7db0ff; } svg .c1 { stroke: #f3a65a; }
  svg .dot.c0 { fill: #7db0ff; } svg .dot.c1 { fill: #f3a65a; }
}
"""


def nice_ticks(low, high, count=4):
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten) that enclose low..high."""
    span = high - low if high - low > 1e-9 else 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if span / (power * m) <= count)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def draw_chart(title, unit, series):
    """An SVG picture of series [(label, points [[x, y], ...], css classes)]; both axes hold 0.

    A series of the class "other" is known by its dashes and needs no line in the legend.
    """
    xs = [x for _, points, _ in series for x, _ in points]
    ys = [y for _, points, _ in series for _, y in points]
    x_low, x_high = min(0, *xs), max(1, *xs)
    x_ticks, y_ticks = nice_ticks(x_low, x_high, 5), nice_ticks(min(0, *ys), max(0, *ys), 4)

    def at(x, y):
        return (LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
                * (HEIGHT - TOP - BOTTOM))

    said = "; ".join(f"{label} {points[0][1]:.3g} to {points[-1][1]:.3g}"
                     for label, points, _ in series)
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
             f'width="{WIDTH}" height="{HEIGHT}" role="img" '
             f'aria-label="{html.escape(title)}: {html.escape(said)}">',
             f'<text x="{LEFT}" y="16" font-weight="600">{html.escape(title)}'
             f'<tspan font-weight="400" opacity=".7"> ({html.escape(unit)})</tspan></text>']
    for y in y_ticks:
        _, v = at(x_low, y)
        lines.append(f'<path class="grid" d="M{LEFT} {v:.1f}H{WIDTH - RIGHT}"/>'
                     f'<text x="{LEFT - 6}" y="{v + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        if x_low <= x <= x_high:
            h, _ = at(x, y_ticks[0])
            lines.append(f'<text x="{h:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}'
                         '</text>')
    right = LEFT
    for label, points, classes in series:
        path = "L".join("{:.1f} {:.1f}".format(*at(x, y)) for x, y in points)
        lines.append(f'<path class="line {classes}" d="M{path}"/>')
        if "other" in classes:
            continue
        if len(points) <= 12 and len(points) != 2:  # two ends of a line need no marks
            lines += ['<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="2.5"/>'.format(
                classes, *at(x, y)) for x, y in points]
        lines.append(f'<path class="line {classes}" d="M{right} 30h16"/>'
                     f'<text x="{right + 20}" y="34">{html.escape(label)}</text>')
        right += 36 + round(6.4 * len(label))
    return "\n".join([*lines, f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end" '
                      'opacity=".7">step</text>', "</svg>"])


def draw_curves(run, other):
    """{name of the picture: (what it shows, SVG)}: every curve of every stage; other's dashed."""
    pictures = {}
    for stage, about in run["stages"].items():
        theirs = as_dict(as_dict(other and other["stages"].get(stage)).get("curves"))
        for name, title, unit, labels in CURVES:
            series = []
            for i, (key, label) in enumerate(labels.items()):
                mine = with_reach(key, about["curves"])
                if mine:
                    series.append((label, mine, f"c{i}"))
                if mine and with_reach(key, theirs):
                    series.append((label + ", other", with_reach(key, theirs), f"c{i} other"))
            if series:
                pictures[f"curve_{stage}_{name}"] = (
                    f"{stage}: {title}", draw_chart(f"{stage}: {title}", unit, series))
    return pictures


def with_reach(key, curves):
    """The points of a curve; a mark that is measured once becomes a line over the whole run."""
    points = curves.get(key, [])
    steps = [x for points in curves.values() for x, _ in points]
    if key == "ladder_bigram" and points:
        return [[min(steps), points[-1][1]], [max(steps), points[-1][1]]]
    return sorted(points)


# ---- the idea: one page, written in two languages ------------------------------------------------


@dataclass
class Section:
    """A piece of the report that knows neither HTML nor Markdown.

    tables: [(header, rows)]. A cell is a str, None for nothing, or parts [[kind, text], ...] with
    kind text, call (of the calculator) or strong.
    """

    title: str
    note: str = ""
    lines: list = field(default_factory=list)
    tables: list = field(default_factory=list)
    pictures: dict = field(default_factory=dict)
    folded: bool = False


def plain(text):
    """text without what no page can hold: control characters, and halves of UTF-16 pairs."""
    text = str(text).encode("utf-8", "replace").decode()
    return "".join("\ufffd" if ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160 else c
                   for c in text)


def shown_number(value, sign=""):
    """A number or text of a result row, as people write it; sign "+" for a difference."""
    number = finite(value)
    if number is None:
        return "-" if value is None else plain(value)
    if float(number).is_integer() and abs(number) >= 10:
        return f"{number:{sign},.0f}"
    return f"{number:{sign}.4g}" if abs(number) < 1000 else f"{number:{sign},.0f}"


def duration(seconds):
    seconds = round(seconds)
    parts = [f"{seconds // 3600} h"] * (seconds >= 3600) + [f"{seconds // 60 % 60} min"] * (
        seconds >= 60) + [f"{seconds % 60} s"]
    return " ".join(parts)


def total_seconds(run):
    """Wall-clock time of all stages together, or None where no stage was timed."""
    found = [finite(row.get("seconds")) for row in run["pipeline"]]
    return sum(filter(None, found)) if any(s is not None for s in found) else None


def headline_section(run, other):
    rows = []
    for name, each in (("this run", run), ("the other run", other)):
        total = total_seconds(each) if each else None
        if total is not None:
            rows.append(("wall-clock time of all stages" + (f", {name}" if other else ""),
                         duration(total)))
    by_name = {row["stage"]: row for row in run["pipeline"]}
    for row in (by_name[name] for name in HEADLINES if name in by_name):
        if row.get("metric") is not None:
            before, after = shown_number(row.get("before")), shown_number(row.get("after"))
            theirs = [each for each in (other["pipeline"] if other else ())
                      if each["stage"] == row["stage"] and each.get("metric") == row["metric"]]
            rows.append((f"{row['stage']}: {row['metric']}", f"{before} \u2192 {after}" + "".join(
                f" (other {shown_number(each.get('after'))})" for each in theirs)))
    return Section("", lines=rows)


def pipeline_section(run, other):
    """The table of my_pipeline.sh; beside another run: its times, memory and results."""
    if not run["pipeline"]:
        return None
    theirs = {row["stage"]: row for row in other["pipeline"]} if other else {}
    rows = []
    for row in run["pipeline"]:
        seconds, peak_mb, after = (
            beside(row.get(key), theirs.get(row["stage"], {}).get(key), other)
            for key in ("seconds", "peak_mb", "after"))
        rows.append([row["stage"], seconds, peak_mb, plain(row.get("metric") or "-"),
                     shown_number(row.get("before")), after, shown_number(row.get("n"))])
    total = total_seconds(run)
    if total is not None:
        rows.append([[["strong", "all"]], beside(total, other and total_seconds(other), other),
                     *[None] * 5])
    return Section(
        "What each stage did", "Each row is of the stage's last run; a stage that was up to date "
        "kept it." + (" This run / the other (difference)." if other else ""),
        tables=[(["stage", "seconds", "peak MB", "what shows that it worked", "before", "after",
                  "n"], rows)])


def beside(mine, theirs, other):
    """A number as text, and with another run: this one's / that one's (difference)."""
    if not other:
        return shown_number(mine)
    both = f"{shown_number(mine)} / {shown_number(theirs)}"
    if finite(mine) is None or finite(theirs) is None:
        return both
    return f"{both} ({shown_number(round(mine - theirs, 6), '+')})"


def shown_score(score):
    """A score in parts, with its interval."""
    text = f"{score['score']:.3f}"
    if score["low"] is not None and score["high"] is not None:
        text += f" ({score['low']:.2f}..{score['high']:.2f})"
    return text


def score_cell(mine, theirs):
    """One cell of the table metric x stage; strong where the intervals do not even touch."""
    if theirs is None or mine is None:
        return shown_score(mine) if mine else "-"
    text = f"{mine['score']:.3f} / {theirs['score']:.3f} ({mine['score'] - theirs['score']:+.3f})"
    known = None not in (mine["low"], mine["high"], theirs["low"], theirs["high"])
    apart = known and (mine["low"] > theirs["high"] or mine["high"] < theirs["low"])
    return [["strong" if apart else "text", text]]


def scores_section(run, other):
    """The table metric x stage."""
    stages = [name for name, stage in run["stages"].items() if stage["scores"]]
    names = list(dict.fromkeys(name for stage in stages for name in run["stages"][stage]["scores"]))
    if not names:
        return None
    rows = []
    for name in names:
        of = [run["stages"][stage]["scores"].get(name) for stage in stages]
        beside = [as_dict(as_dict(as_dict(other and other["stages"].get(stage)).get("scores"))
                          .get(name)) or None for stage in stages]
        first = next(score for score in of if score)
        rows.append([plain(name), shown_number(first["n"]), shown_number(first["chance"]),
                     *map(score_cell, of, beside)])
    note = ("This run / the other (difference); strong where the 95% intervals do not meet. "
            if other else "In brackets the 95% interval. ")
    note += ("Chance is what guessing scores. CORE and ChatCORE are means of centred scores: 0 is "
             "guessing, 1 is perfect. Of bits per byte, less is better.")
    return Section("Scores", note, tables=[(["score", "n", "chance", *stages], rows)])


def samples_section(run, other):
    """One table for each prompt: what every stage makes of it."""
    tables = []
    for i, prompt in enumerate(run["prompts"]):
        rows = []
        for name, stage in run["stages"].items():
            mine = stage["samples"][i] if i < len(stage["samples"]) else None
            theirs = None
            if other and other["prompts"][i : i + 1] == [prompt]:
                samples = as_dict(other["stages"].get(name)).get("samples") or []
                theirs = samples[i] if i < len(samples) else None
            if mine is not None and mine == theirs:
                rows.append([f"{name}, both", mine])
                continue
            rows += [[name, mine]] if mine is not None else []
            rows += [[f"{name}, other", theirs]] if theirs is not None else []
        if rows:
            how = "asked" if i < run["asked"] else "continued"
            tables.append(([how, prompt], rows))
    return Section("Samples", "The same prompts for every stage, always the likeliest token; "
                   "calls of the calculator in brackets.", tables=tables) if tables else None


def setting_rows(stage):
    """{setting: value as text} of a stage: sizes of the model, then the script's flags."""
    rows = {"steps taken": shown_number(stage["step"]), "parameters": shown_number(stage["params"])}
    rows |= {f"model: {key}": plain(value) for key, value in stage["model"].items()}
    rows |= {"--" + key.replace("_", "-"): plain(value) for key, value in stage["script"].items()
             if key != "data_dir"}
    return rows | {f"trained with {key}": plain(value) for key, value in stage["versions"].items()}


def settings_section(run, other):
    """Setting x stage; beside another run only what differs."""
    settings = {name: setting_rows(stage) for name, stage in run["stages"].items()}
    if not settings:
        return None
    names = list(dict.fromkeys(key for rows in settings.values() for key in rows))
    names.sort(key=lambda name: name.startswith("--") + 2 * name.startswith("trained with"))
    if not other:
        rows = [[name, *(rows.get(name) for rows in settings.values())] for name in names]
        return Section("Settings", tables=[(["setting", *settings], rows)], folded=True)
    rows = []
    for stage, mine in settings.items():
        known = as_dict(other["stages"].get(stage))
        theirs = setting_rows(known) if known else {}
        rows += [[stage, key, mine.get(key), theirs.get(key)] for key in {**mine, **theirs}
                 if mine.get(key) != theirs.get(key)]
    note = "" if rows else "No stage was set differently."
    return Section("Settings that differ", note,
                   tables=[(["stage", "setting", "this run", "other"], rows)] if rows else [])


def environment_section(run, other):
    mine, theirs = run["environment"], other["environment"] if other else {}
    if not other:
        return Section("Environment", tables=[(["what", "this machine"], list(mine.items()))])
    rows = [[plain(key), mine.get(key), plain(theirs[key]) if key in theirs else "not recorded"]
            for key in {**mine, **theirs}]
    return Section("Environment", tables=[(["what", "this run", "other"], rows)])


def report_sections(run, other=None):
    """The whole report, in the order of reading."""
    missing = [plain(line) for line in run["missing"]]
    missing += [f"other run: {plain(line)}" for line in other["missing"]] if other else []
    found = [
        headline_section(run, other),
        Section("Missing or unfinished", lines=missing) if missing else None,
        Section("Curves", "Dashed: the other run." if other else "",
                pictures=draw_curves(run, other)),
        scores_section(run, other), samples_section(run, other), pipeline_section(run, other),
        settings_section(run, other), environment_section(run, other)]
    return [section for section in found if section and
            (section.lines or section.tables or section.pictures or section.note)]


# What Markdown would take for its own, as entities; a line's end would end the row of a table.
MARKDOWN = {ord(c): f"&#{ord(c)};" for c in "&<>|`*[]\\$~"} | {10: "<br>", 9: " "}


def markdown_cell(cell):
    if cell is None:
        return ""
    if isinstance(cell, str):
        text = plain(cell).translate(MARKDOWN)
        return re.sub(r"(?<![^\W_])_|_(?![^\W_])", "&#95;", text)  # n_head may stay as it is
    marks = {"call": ("[", "]"), "strong": ("**", "**")}
    parts = [(marks.get(kind, ("", "")), markdown_cell(text)) for kind, text in cell]
    return "".join(f"{before}{text}{after}" for (before, after), text in parts)


def markdown_table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(markdown_cell, line)) + " |" for line in lines)


def markdown_report(run, other=None):
    """The report as Markdown; its pictures are files beside it."""
    blocks = [f"# A run of Zero to RLHF\n\ntrained until {markdown_cell(run['date'])}"
              + (f", beside a run of {markdown_cell(other['date'])}" if other else "")]
    for section in report_sections(run, other):
        if section.title:
            blocks.append(f"## {section.title}")
        if section.note:
            blocks.append(section.note)
        if section.lines:
            blocks.append("\n".join(
                "- " + (markdown_cell(line) if isinstance(line, str) else
                        f"{markdown_cell(line[0])}: **{markdown_cell(line[1])}**")
                for line in section.lines))
        if section.pictures:
            blocks.append("\n".join(f"![{markdown_cell(title)}]({name}.svg)"
                                    for name, (title, _) in section.pictures.items()))
        blocks += [markdown_table(header, rows) for header, rows in section.tables]
    return "\n\n".join(blocks) + "\n"


PAGE_STYLE = """
:root { color-scheme: light dark; --back: #fbfbfa; --card: #fff; --ink: #1c2430; --soft: #5c6675;
  --rule: #e1e4e8; --call: #0b6b8a; --warn: #8a5300; --warnback: #fff6e3; }
@media (prefers-color-scheme: dark) { :root { --back: #14171c; --card: #1c2027; --ink: #d5dbe5;
  --soft: #98a3b3; --rule: #313742; --call: #6fd0ee; --warn: #f0c070; --warnback: #2a2415; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--back);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; } h2 { margin: 2.5rem 0 .5rem; font-size: 1.2rem; }
.soft { margin: .2rem 0 1rem; color: var(--soft); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .8rem;
  margin: 1.2rem 0 0; }
.facts div, figure { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: .8rem 1rem; margin: 0; }
.facts dt { color: var(--soft); font-size: .85rem; line-height: 1.3; }
.facts dd { margin: .2rem 0 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.missing { background: var(--warnback); border-left: 4px solid var(--warn); border-radius: 4px;
  margin: 0; padding: .6rem 1rem .6rem 2rem; overflow-wrap: anywhere; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: .8rem; }
.curves svg { display: block; width: 100%; height: auto; }
.wide { overflow-x: auto; margin-bottom: 1rem; border: 1px solid var(--rule); border-radius: 8px;
  background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { padding: .35rem .75rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--rule); }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; } td:first-child { white-space: nowrap; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.samples td:first-child, .samples th:first-child { width: 8.5rem; color: var(--soft);
  font-weight: 400; } .samples th { color: var(--ink); }
.samples td:last-child { white-space: pre-wrap; overflow-wrap: anywhere; }
.call { color: var(--call); font-family: ui-monospace, monospace; }
summary { cursor: pointer; font-size: 1.2rem; font-weight: 700; margin: 2.5rem 0 .5rem; }
@media (max-width: 40rem) { .samples td:first-child, .samples th:first-child { width: 4.5rem;
  white-space: normal; } th, td { padding: .35rem .5rem; } }
"""


def html_cell(cell):
    if cell is None:
        return ""
    if isinstance(cell, str):
        return html.escape(plain(cell))
    marks = {"call": ('<span class="call">[', "]</span>"), "strong": ("<strong>", "</strong>")}
    parts = [(marks.get(kind, ("", "")), html.escape(plain(text))) for kind, text in cell]
    return "".join(f"{before}{text}{after}" for (before, after), text in parts)


def html_table(header, rows, kind):
    """A table whose columns of numbers stand at the right."""
    def is_number(cell):
        text = "".join(text for _, text in cell) if isinstance(cell, list) else cell
        return text is None or re.match(r"[-+]?\d|-$", text) is not None

    columns = [kind != "samples" and i > 0 and all(is_number(row[i]) for row in rows)
               for i in range(len(header))]

    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}{' class=n' * number}>{html_cell(cell)}</{tag}>"
                                for cell, number in zip(cells, columns)) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return (f'<div class="wide"><table class="{kind}"><thead>{line(header, "th")}</thead>\n'
            f"<tbody>{body}</tbody></table></div>")


def html_section(section):
    name = section.title.split(" ")[0].lower()
    blocks = []
    if section.note:
        blocks.append(f'<p class="soft">{html.escape(section.note)}</p>')
    if section.lines and section.title:
        blocks.append('<ul class="missing">' + "".join(f"<li>{html_cell(line)}</li>"
                                                       for line in section.lines) + "</ul>")
    elif section.lines:
        facts = (f"<div><dt>{html_cell(what)}</dt><dd>{html_cell(value)}</dd></div>"
                 for what, value in section.lines)
        blocks.append('<dl class="facts">' + "".join(facts) + "</dl>")
    if section.pictures:
        blocks.append('<div class="curves">' + "\n".join(
            f"<figure>{svg}</figure>" for _, svg in section.pictures.values()) + "</div>")
    blocks += [html_table(header, rows, name) for header, rows in section.tables]
    if section.folded:
        return "\n".join([f"<details><summary>{section.title}</summary>", *blocks, "</details>"])
    return "\n".join(([f"<h2>{section.title}</h2>"] if section.title else []) + blocks)


def html_report(run, other=None):
    """The report as one HTML file: no script, nothing from outside, and a policy that says so."""
    date = f"trained until {html_cell(run['date'])}" + (
        f", beside a run of {html_cell(other['date'])}" if other else "")
    has = run["environment"]
    machine = html_cell(f"{has['CPU']}, {has['cores']} cores, {has['machine']}")
    return "\n".join([
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        'style-src \'unsafe-inline\'">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>A run of Zero to RLHF</title>\n<style>{PAGE_STYLE}{PICTURE_STYLE}</style>",
        f'</head>\n<body>\n<h1>A run of Zero to RLHF</h1>\n<p class="soft">{date}<br>{machine}</p>',
        *map(html_section, report_sections(run, other)), "</body>\n</html>\n"])


# ---- the loop ------------------------------------------------------------------------------------


def write_report(folder, run, other=None):
    """Write report.json, .md, .html and the pictures; pictures of an earlier report go."""
    pictures = {f"{name}.svg": svg.replace(">", f"><style>{PICTURE_STYLE}</style>", 1)
                for name, (_, svg) in draw_curves(run, other).items()}
    for old in folder.glob("curve_*.svg"):
        if old.name not in pictures:
            old.unlink()
    files = {"report.json": json.dumps(run, indent=1), "report.md": markdown_report(run, other),
             "report.html": html_report(run, other), **pictures}
    for name, text in files.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [folder / name for name in files]


def run_report(cfg):
    if not cfg.data_dir.is_dir():
        raise UserError(f"there is no folder {cfg.data_dir}: a report needs a run.\n"
                        "  Make one: bash my_pipeline.sh, or name another: --data-dir DIR")
    if cfg.max_tokens < 1:
        raise UserError(f"--max-tokens {cfg.max_tokens}: a sample needs at least 1")
    _, _, _, _, device = compute_init(cfg.device_type or None)
    print(f"17 report - {device.type} - float32 - {', '.join(cfg.stages)}", flush=True)

    # 1. gather what there is of this run, and of the other
    other = other_run(cfg, device) if cfg.compare else None
    run = collect_run(cfg, cfg.data_dir, device)
    for line in run["missing"]:
        print(f"missing: {plain(line)}")

    # 2. write
    for path in write_report(cfg.data_dir / "report", run, other):
        print(f"wrote {path}")

    # 3. report
    total = total_seconds(run)
    if total is not None:
        print(f"all stages together took {duration(total)}")
    complete = sum(stage["params"] is not None for stage in run["stages"].values())
    print(f"result: stages with a model in the report 0 -> {complete} (n={len(cfg.stages)})")
    print("next: python edu/15_chat.py")


# ---- the command line ----------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    return run_script(run_report, Config, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
