"""Challenge 13: midtraining, where a model that continues text learns what a conversation is.

Goal:
    Go on with pretraining, with the same loss over every token, but on conversations: who speaks,
    where a turn ends, how the calculator is called, and that a letter can stand for an answer. What
    it changed is measured on questions that no training file has. In the tiny world the same steps
    are worth more in fine-tuning (goals.md has the numbers), so the pipeline leaves it out.

You will learn:
    - why this is still pretraining: rows packed without a gap, no mask, the same optimizers
    - a mixture: each source has a weight, how often an epoch shows it
    - multiple choice with the letter after the choice, and why a small model stays at guessing
    - to ask of a stage whether it pays for its time, and to leave it out when it does not

Read beside:
    nanochat/scripts/mid_train.py, tasks/common.py::TaskMixture, render_mc, tasks/spellingbee.py
    (Nov 2025; today's nanochat has no midtraining any more). Different here: the words that are
    spelled in training are never asked for in a test, and a run resumes to the same bit.

Run:
    python edu/13_midtrain.py

Expect:
    13 midtrain - cpu - float32 - ...M params - seed 1337
    step     loss       lr    tok/s     eta
    what                          n   before   after    95% interval
    result: chat loss, nats per token of the assistant 4.698 -> 0.616 (n=3546)

Writes:
    mid/model.safetensors
    mid/config.json
    mid/resume.pt
    mid/metrics.jsonl
"""

import ast
import base64
import contextlib
import dataclasses
import hashlib
import json
import math
import operator
import os
import random
import re
import shutil
import signal
import sys
import sysconfig
import time
import warnings
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

# ---- settings ------------------------------------------------------------------------------------


@dataclass
class Config:
    data_dir: Path = field(default_factory=lambda: Path(os.environ.get("EDU_DATA", "data")))
    """Folder with tokenizer/, the model to start from, and the conversations."""
    source: str = "base"
    """Folder under data_dir of the model to start from."""
    stage: str = "mid"
    """Folder under data_dir that the run writes."""
    # the mixture: how often an epoch shows each source; 2 is twice, 0.5 half of it, 0 not at all
    chats: float = 1.0
    """tiny_chat_train.jsonl"""
    problems: float = 0.5
    """tiny_gsm_train.jsonl, with the calculator"""
    choices: float = 1.0
    """Multiple-choice questions about the facts in the chats."""
    spelling: float = 1.0
    """Words to spell, and letters to count with the calculator."""
    mix: tuple[str, ...] | None = None
    """More conversations: --mix NAME=PATH.jsonl:WEIGHT (the weight is 1 when left out)."""
    # the horizon
    num_iterations: int = 200
    """Optimizer steps at most; 0: as many as num_epochs asks for."""
    num_epochs: float = 1.0
    """Times through the mixture at most."""
    # the batch
    device_batch_size: int = 8
    """Rows in one forward pass; the only number to lower when memory runs out."""
    total_batch_size: int = 2048
    """Tokens in one optimizer step, over all ranks and accumulation steps."""
    # the optimizer, as in pretraining
    matrix_lr: float = 0.02
    """Muon, for the matrices inside the blocks."""
    embedding_lr: float = 0.2
    """AdamW, for the embedding, times sqrt(768 / C)."""
    unembedding_lr: float = 0.004
    """AdamW, for the head, times sqrt(768 / C)."""
    warmdown_ratio: float = 0.2
    """Share of the run, at its end, over which the learning rates fall to 0."""
    # looking at the run
    eval_questions: int = 200
    """Held-out questions of each kind, asked before and after; 0 leaves the table out."""
    log_every: int = 25
    """Steps between rows."""
    save_every: int = 100
    """Steps between checkpoints; a killed run goes on from the last one."""
    resume: bool = False
    """Go on from resume.pt."""
    plot: bool = True
    """Write TensorBoard events."""
    # the machine
    device_type: str = ""
    """cpu, cuda or mps; empty takes the best there is."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto, float32 or bfloat16; auto takes bfloat16 only where the hardware multiplies it."""
    seed: int = 1337
    """Seed of the order of the conversations, and of the questions made from them."""


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


# ---- the idea: a mixture -------------------------------------------------------------------------


def spelling_words(conversations, held_out):
    """Words of 3 to 10 small letters in the conversations, sorted, but none that held_out names."""
    def words(rows):
        texts = (message["content"] for row in rows for message in row["messages"])
        return {word for text in texts if isinstance(text, str)
                for word in re.findall(r"(?<![\w-])[a-z]{3,10}(?![\w-])", text)}

    asked = words([row for row in held_out if row.get("kind") in ("spell", "count")])
    return sorted(words(conversations) - asked)


def spelling_conversations(words, seed):
    """Two conversations for each word: its letters, and one of them counted by the calculator.

    A model sees a word as one or two tokens and never sees its letters, unless it is taught them.
    Source: nanochat/tasks/spellingbee.py.
    """
    rng, conversations = random.Random(seed), []
    for word in words:
        spelled = f"The word {word} is spelled {'-'.join(word)}."
        # a letter of the word, mostly; any letter, or the answer would never be 0
        letter = rng.choice(word if rng.random() < 0.8 else "abcdefghijklmnopqrstuvwxyz")
        count = str(word.count(letter))
        counted = [{"type": "text", "text": f"{spelled} The letter {letter} comes up "},
                   {"type": "python", "text": f"'{word}'.count('{letter}')"},
                   {"type": "python_output", "text": count},
                   {"type": "text", "text": f"{count} time{'' if count == '1' else 's'}."}]
        for question, answer in ((f"Spell the word: {word}", spelled),
                                 (f"Count the letter {letter} in the word: {word}", counted)):
            conversations.append({"messages": [{"role": "user", "content": question},
                                               {"role": "assistant", "content": answer}]})
    return conversations


def choice_conversations(questions):
    """Multiple-choice questions as conversations; the answer is a letter and nothing else."""
    return [{"messages": [{"role": "user",
                           "content": render_choices(item["question"], item["choices"])},
                          {"role": "assistant", "content": LETTERS[item["gold"]]}]}
            for item in questions]


def parse_mix(text):
    """NAME=PATH:WEIGHT -> (name, Path, weight). Raises UserError."""
    found = re.fullmatch(r"([\w-]+)=(.+?)(?::(\d+(?:\.\d*)?|\.\d+))?", text)
    if not found:
        raise UserError(f"--mix {text}: write it as NAME=PATH:WEIGHT, for example\n"
                        "  --mix mine=my_chats.jsonl:2")
    return found[1], Path(found[2]), float(found[3] or 1)


def load_sources(cfg):
    """{name: (conversations, weight)} of all that is to be mixed. Raises UserError."""
    def from_file(name):
        path = cfg.data_dir / name
        return read_conversations(path) if path.exists() else []

    chats, held_out = from_file("tiny_chat_train.jsonl"), from_file("tiny_chat_test.jsonl")
    words = spelling_words(chats, held_out)
    sources = {"chats": (chats, cfg.chats),
               "problems": (from_file("tiny_gsm_train.jsonl"), cfg.problems),
               "choices": (choice_conversations(choices_from_chats(chats, cfg.seed)), cfg.choices),
               "spelling": (spelling_conversations(words, cfg.seed), cfg.spelling)}
    for name, path, weight in map(parse_mix, cfg.mix or ()):
        if name in sources:
            raise UserError(f"--mix {name}={path}: there is a source called {name}; take another "
                            "name.")
        sources[name] = (read_conversations(path), weight)
    sources = {name: (rows, weight) for name, (rows, weight) in sources.items() if rows and weight}
    if not sources:
        raise UserError(f"no conversations in {cfg.data_dir}, or all weights are 0. Make some: "
                        "python edu/00_tiny_world.py (or bring your own: --mix NAME=PATH.jsonl:1)")
    return sources


def mix_sources(sources, seed):
    """All conversations of an epoch in random order; a weight of 2.5 is twice, and half of it."""
    rng, mixed = random.Random(seed), []
    for rows, weight in sources.values():
        whole, part = divmod(weight, 1)
        mixed += rows * int(whole) + rng.sample(rows, round(part * len(rows)))
    rng.shuffle(mixed)
    return mixed


# ---- the idea: conversations as plain text -------------------------------------------------------


def pack_conversations(conversations, tokenizer):
    """One stream of ids, (N,) LongTensor: conversation after conversation, nothing left out.

    No mask and no padding: the model learns the user's part, too, as it learned any other text. A
    conversation may begin in one row and end in the next. Source: nanochat/scripts/mid_train.py.
    """
    ids = []
    for conversation in conversations:
        ids += render_conversation(conversation["messages"], tokenizer, max_tokens=None)[0]
    return torch.tensor(ids)


def batch_of_step(stream, step, rows, T, rank=0, world_size=1):
    """Inputs and targets (rows / world_size, T) of a step: this rank's rows of its piece.

    As a batch follows from the number of its step, a resumed run has no cursor to restore. Past the
    end the stream begins again.
    """
    places = torch.arange(step * rows * T, (step + 1) * rows * T) % (len(stream) - 1)
    places = places.view(rows, T)[rank::world_size]
    return stream[places], stream[places + 1]


def falling_at_the_end(progress, warmdown_ratio):
    """1, and over the last share of the run down in a line to 0. progress: 0 to 1."""
    return min(1.0, (1.0 - progress) / warmdown_ratio) if warmdown_ratio else 1.0


# ---- the idea: what it changed -------------------------------------------------------------------

CALL = re.compile(r"<\|python_start\|>([^<]*)<\|python_end\|>"
                  r"(?:<\|output_start\|>[^<]*<\|output_end\|>)?")


def is_well_formed(reply, ended):
    """Did the reply say something, stop by itself, and use special tokens only for whole calls?"""
    rest = CALL.sub("", reply)
    return ended and bool(reply.strip()) and "<|" not in rest


@dataclass
class HeldOut:
    """What no training file has: chats, word problems, and multiple-choice questions."""

    chats: list
    problems: list
    questions: list


def held_out_data(data_dir, limit, seed):
    """The HeldOut of the test files that are there, limit of each kind at most."""
    def from_file(name):
        path = data_dir / name
        return read_conversations(path) if path.exists() else []

    chats = from_file("tiny_chat_test.jsonl")
    return HeldOut(chats[:limit], from_file("tiny_gsm_test.jsonl")[:limit],
                   choices_from_chats(chats, seed)[:limit])


@torch.no_grad()
def chat_loss(model, chats, tokenizer, batch_size=32):
    """(nats per token of the assistant, tokens) of held-out conversations: what SFT trains on."""
    rows, _ = render_rows(chats, tokenizer, model.config.sequence_len + 1)
    rows.sort(key=lambda row: len(row[0]))
    device, nats = model.lm_head.weight.device, 0.0
    for i in range(0, len(rows), batch_size):
        inputs, targets = (tensor.to(device) for tensor in collate(rows[i : i + batch_size]))
        nats += model(inputs, targets, loss_reduction="sum").item()
    count = sum(sum(mask[1:]) for _, mask in rows)
    return nats / count, count


def measure_form(engine, held_out):
    """{what: (n, score)} on held-out data; a share, but for the chat loss."""
    model, tokenizer, table = engine.model, engine.tokenizer, {}

    def replies_to(conversations):
        prompts = [render_for_completion(row["messages"], tokenizer) for row in conversations]
        prompts = [ids if len(ids) < model.config.sequence_len else None for ids in prompts]
        return [some[0] if some else ("", False) for some in sample_replies(engine, prompts)]

    def share(what, right):
        table[what] = (len(right), sum(right) / len(right))

    if held_out.chats:
        loss, count = chat_loss(model, held_out.chats, tokenizer)
        table["chat loss"] = (count, loss)
    chats, problems = replies_to(held_out.chats), replies_to(held_out.problems)
    if chats or problems:
        share("replies well formed", [is_well_formed(*reply) for reply in chats + problems])
    if problems:
        share("problems: calculator used", [bool(CALL.search(reply)) for reply, _ in problems])
    if held_out.questions:
        share("multiple choice right", choice_right(model, tokenizer, held_out.questions))
    return table


# ---- the loop ------------------------------------------------------------------------------------


def check_mid_settings(cfg, sequence_len, world_size):
    """Refuse what cannot work; return the accumulation steps."""
    tokens = cfg.device_batch_size * sequence_len * world_size
    if cfg.device_batch_size < 1 or cfg.total_batch_size < 1 or cfg.total_batch_size % tokens:
        raise UserError(
            f"--total-batch-size {cfg.total_batch_size} is not a multiple of {tokens} = "
            f"{cfg.device_batch_size} rows x {sequence_len} tokens x {world_size} ranks: try "
            f"--total-batch-size {max(tokens, 1)}.")
    if (min(cfg.log_every, cfg.save_every) < 1 or cfg.num_iterations < 0
            or not 0 < cfg.num_epochs < math.inf):
        raise UserError("--log-every and --save-every count from 1, --num-iterations from 0, and "
                        "--num-epochs must be a number above 0.")
    weights = (cfg.chats, cfg.problems, cfg.choices, cfg.spelling)
    if cfg.eval_questions < 0 or not all(0 <= weight < math.inf for weight in weights):
        raise UserError("weights and counts cannot be negative, and weights must be numbers.")
    if not 0 <= cfg.warmdown_ratio <= 1:
        raise UserError(f"--warmdown-ratio {cfg.warmdown_ratio} is a share: 0 to 1.")
    if (cfg.data_dir / cfg.stage).resolve() == (cfg.data_dir / cfg.source).resolve():
        raise UserError(f"--stage {cfg.stage} is the model to start from, and would be "
                        "overwritten: give --stage another name.")
    return cfg.total_batch_size // tokens


# What a resumed run may change without becoming another run. Not the questions: those before and
# after must be the same.
FREE_IN_MID = {"data_dir", "resume", "log_every", "save_every", "plot", "device_type"}


def train(cfg):
    """Midtrain as cfg says; returns {"step", "table", "rows"}.

    table: {what: (n, before, after)}; rows: what metrics.jsonl holds.
    """
    ddp, rank, _, world_size, device = compute_init(cfg.device_type or None, cfg.seed)
    started, folder = time.perf_counter(), cfg.data_dir / cfg.stage

    # 1. the model to start from, and the mixture as one stream
    tokenizer = Tokenizer.from_dir(cfg.data_dir / "tokenizer")
    model, _ = load_checkpoint(cfg.data_dir / cfg.source, tokenizer, device)
    T = model.config.sequence_len
    accumulation = check_mid_settings(cfg, T, world_size)
    dtype, why_dtype = pick_dtype(device)
    if cfg.dtype != "auto":
        dtype, why_dtype = getattr(torch, cfg.dtype), "asked for by --dtype"
    params = sum(p.numel() for p in model.parameters())
    print0(f"13 midtrain - {device.type} - {str(dtype)[6:]} - {params / 1e6:.1f}M params - "
           f"seed {cfg.seed}")
    print0(f"precision: {why_dtype}; from {cfg.source}, tokenizer {tokenizer.sha256[:12]}")
    sources = load_sources(cfg)
    stream = pack_conversations(mix_sources(sources, cfg.seed), tokenizer)
    steps = max(1, int(cfg.num_epochs * len(stream)) // cfg.total_batch_size)
    steps = min(steps, cfg.num_iterations or steps)
    print0("mixture: " + ", ".join(f"{name} {len(rows)} x {weight:g}" for name, (rows, weight) in
                                   sources.items()) + f"; {len(stream)} tokens an epoch, "
           f"{steps} steps take {steps * cfg.total_batch_size / len(stream):.0%} of it")
    optimizers, engine = build_optimizers(model, cfg, dtype), Engine(model, tokenizer)
    train_step = TrainStep(model, optimizers, dtype, world_size=world_size)

    # 2. what it can do before, and where an interrupted run had come to
    held_out = held_out_data(cfg.data_dir, cfg.eval_questions, cfg.seed)
    origin = {"tokenizer": tokenizer.sha256[:12], "mixture": fingerprint(stream.numpy().tobytes()),
              "held_out": fingerprint(json.dumps(dataclasses.asdict(held_out)).encode()),
              "source_model": fingerprint(
                  (cfg.data_dir / cfg.source / "model.safetensors").read_bytes())}
    resumed = load_resume(folder, cfg, origin, FREE_IN_MID)
    measuring = rank == 0 and cfg.eval_questions > 0
    before, first = {}, 0
    if resumed:
        model.load_state_dict(resumed["model"])
        for optimizer, states in zip(optimizers, resumed["optimizers"]):
            optimizer.load_state_dict(states)
        first = resumed["step"]
        before = {what: tuple(row) for what, row in resumed["before"].items()}
        print0(f"resumed at step {first} of {steps}")
    elif measuring:
        before = measure_form(engine, held_out)

    def save(step):
        if rank == 0:
            save_resume(folder, cfg, origin, step=step, model=model.state_dict(),
                        optimizers=[o.state_dict() for o in optimizers],
                        before={what: list(row) for what, row in before.items()})
            save_checkpoint(folder, model, tokenizer, step, {}, cfg)

    log = MetricsLog(folder, first, cfg.plot) if rank == 0 else None
    print0(f"{'step':>6} {'loss':>8} {'lr':>8} {'tok/s':>8} {'eta':>7}")
    step, loop_started, asked = first, time.perf_counter(), False
    bar = tqdm(total=steps, initial=first, unit="step", leave=False, disable=True if rank else None)
    with StopRequest() as stop:
        while step < steps and not asked:
            # 3. learn, as in pretraining: every token of the stream is a target
            x, y = batch_of_step(stream, step, cfg.total_batch_size // T, T, rank, world_size)
            micro_batches = [(inputs.to(device), targets.to(device)) for inputs, targets in
                             zip(x.chunk(accumulation), y.chunk(accumulation))]
            lr_scale = falling_at_the_end(step / steps, cfg.warmdown_ratio)
            loss, grad_norm = train_step(micro_batches, lr_scale)
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                bar.close()
                compute_cleanup()
                raise TrainingFailed(
                    f"loss {loss} and gradient norm {grad_norm} at step {step}: the run has "
                    f"diverged.\n  The last checkpoint stays in {folder}. Lower the learning rate, "
                    f"for example --matrix-lr {cfg.matrix_lr / 3:g}.")
            step += 1
            bar.update()

            # 4. report and save
            asked = agree(float(stop.asked), device, ddp) > 0
            if rank == 0 and (step % cfg.log_every == 0 or step in (first + 1, steps) or asked):
                seconds = time.perf_counter() - loop_started
                speed = (step - first) * cfg.total_batch_size / seconds
                eta = (steps - step) * seconds / (step - first)
                bar.write(f"{step - 1:>6} {loss:>8.4f} {lr_scale:>8.3f} {speed:>8.0f} "
                          f"{eta // 60:>4.0f}:{eta % 60:02.0f}")
                log.write(step=step - 1, loss=loss, lr=lr_scale, grad_norm=grad_norm,
                          tok_per_s=round(speed, 1))
            if step % cfg.save_every == 0 and step < steps and not asked:
                save(step)
    bar.close()
    save(step)
    done = {"step": step, "table": {}, "rows": log.rows if rank == 0 else []}
    if rank == 0:
        log.close()
    if step < steps:
        print0(f"stopped at step {step} of {steps}; --resume goes on, with the same flags")
    elif rank == 0:
        # 5. what it can do now
        after = measure_form(engine, held_out) if measuring else {}
        done["table"] = {what: (n, before[what][1], now) for what, (n, now) in after.items()}
        save_checkpoint(folder, model, tokenizer, step, {
            what: {"n": n, "before": was, "after": now}
            for what, (n, was, now) in done["table"].items()}, cfg)
        report_mid(folder, cfg, engine, done, time.perf_counter() - started)
    compute_cleanup()
    return done


SAMPLE_QUESTIONS = ("What is the capital of France?", "Spell the word: garden",
                    "There are 46 rows of trees, and 13 trees in each row. How many trees are "
                    "there?")


def report_mid(folder, cfg, engine, done, seconds):
    """The table before and after, samples, what was written and the result line."""
    if done["table"]:
        print(f"{'what':<26} {'n':>5} {'before':>8} {'after':>7}    95% interval")
    for what, (n, was, now) in done["table"].items():
        if what == "chat loss":
            print(f"{what:<26} {n:>5} {was:>8.3f} {now:>7.3f}    nats per token of the assistant")
        else:
            low, high = wilson_interval(now, n)
            print(f"{what:<26} {n:>5} {was:>8.1%} {now:>7.1%}    {low:.1%} to {high:.1%}"
                  + ("; guessing is 25%" if "choice" in what else ""))
    prompts = [render_for_completion([{"role": "user", "content": text}], engine.tokenizer)
               for text in SAMPLE_QUESTIONS]
    fit = [ids if len(ids) < engine.model.config.sequence_len else None for ids in prompts]
    for text, some in zip(SAMPLE_QUESTIONS, sample_replies(engine, fit)):
        print(f"  {text}|{some[0][0] if some else ''}")
    for name in ("model.safetensors", "config.json", "resume.pt", "metrics.jsonl"):
        print(f"wrote {folder / name}")
    print(f"trained {done['step']} steps, {seconds:.0f} s in all")
    if "chat loss" in done["table"]:
        n, was, now = done["table"]["chat loss"]
        print(f"result: chat loss, nats per token of the assistant {was:.3f} -> {now:.3f} (n={n})")
    else:
        losses = [row["loss"] for row in done["rows"]]
        print(f"result: training loss {losses[0]:.3f} -> {losses[-1]:.3f} (n={done['step']})")
    print(f"next: python edu/08_sft.py --source {cfg.stage}")


# ---- the command line ----------------------------------------------------------------------------


def run_midtraining(cfg):
    try:
        train(cfg)
    except TrainingFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_script(run_midtraining, Config, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
