"""Challenge 08: supervised fine-tuning, where a model that continues text learns to answer.

Goal:
    Show the base model some thousand conversations, trained on the assistant's words only, until it
    has a name, answers what it is asked, stops when it has said it, and can call a calculator. What
    changed is measured on prompts it has never seen.

You will learn:
    - why the loss is a mean over tokens and not over rows, whatever accumulation or ranks there are
    - batches of rows of like length, so that little is padding, in an order that can be resumed
    - that fine-tuning teaches a form: the facts were in the base model, the manner was not
    - what to measure before and after: identity, facts in new phrasings, stopping, word problems

Read beside:
    nanochat/scripts/chat_sft.py. Different here: every target token weighs the same (there, a row
    with few targets weighs as much as a long one), and the run resumes to the same bit.

Run:
    python edu/08_sft.py

Expect:
    08 sft - cpu - float32 - ...M params - seed 1337
    step     loss  val loss       lr    tok/s     eta
    what                          n   before   after
    result: held-out answers right 0.054 -> 0.940 (n=350)

Writes:
    sft/model.safetensors
    sft/config.json
    sft/best/model.safetensors
    sft/best/config.json
    sft/resume.pt
    sft/metrics.jsonl
    sft/loss.png
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

# What may come before a question; the identity conversations are shown with each of them.
LEAD_UPS = ("", "Hello! ", "", "I have a question. ", "", "Please help me. ", "",
            "One more thing. ")
SAMPLE_PROMPTS = ("Who are you?", "What is the capital of France?", "What is 7 plus 5?")


@dataclass
class Config:
    data_dir: Path = field(default_factory=lambda: Path(os.environ.get("EDU_DATA", "data")))
    """Folder with tokenizer/, the model to start from, and the conversations."""
    source: str = "base"
    """Folder under data_dir of the model to start from."""
    stage: str = "sft"
    """Folder under data_dir that the run writes."""
    # the data
    identity_rows: int = 3200
    """Rows of my_identity.jsonl in an epoch: its conversations again and again, each time from
    another of its turns on; at least once each, and 0 leaves them out."""
    calculator_share: float = 0.35
    """Share of the word problems that are shown with the calculator; the others in the head."""
    max_problems: int = 3600
    """Word problems at most: they show the form here; 10_rl.py teaches to solve them."""
    # the horizon
    num_epochs: float = 2.2
    """Times through the data."""
    # the batch
    device_batch_size: int = 32
    """Rows in one forward pass; the only number to lower when memory runs out."""
    rows_per_step: int = 32
    """Conversations in one optimizer step, over all ranks and accumulation steps."""
    # the optimizer
    matrix_lr: float = 0.015
    """Muon, for the matrices inside the blocks: a little less than pretraining took."""
    embedding_lr: float = 0.1
    """AdamW, for the embedding, times sqrt(768 / C)."""
    unembedding_lr: float = 0.002
    """AdamW, for the head, times sqrt(768 / C)."""
    warmup_ratio: float = 0.05
    """Share of the run over which the learning rate rises; from there it falls to 0 in a line."""
    # looking at the run
    eval_every: int = 100
    """Steps between measurements of the validation loss."""
    eval_rows: int = 256
    """Validation conversations."""
    eval_prompts: int = 300
    """Prompts of each kind in the table before and after; 0 leaves the table out."""
    sample_every: int = 200
    """Steps between samples."""
    log_every: int = 25
    """Steps between rows."""
    save_every: int = 100
    """Steps between checkpoints; a killed run goes on from the last one."""
    resume: bool = False
    """Go on from resume.pt."""
    plot: bool = True
    """Write TensorBoard events and the picture of the loss."""
    # the machine
    device_type: str = ""
    """cpu, cuda or mps; empty takes the best there is."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto, float32 or bfloat16; auto takes bfloat16 only where the hardware multiplies it."""
    seed: int = 1337
    """Seed of the order of the conversations, and of which problems show the calculator."""


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


# ---- the idea: every target token weighs the same ------------------------------------------------


def sft_loss(model, inputs, targets, total, dtype=torch.float32):
    """Cross-entropy of (B, T) rows, summed over their targets and divided by `total`; 0-d tensor.

    total: the targets of the whole optimizer step, over all passes and ranks. Their gradients then
    add up to the gradient of one large batch, which a mean over each pass does not: a pass with
    three targets would weigh as much as one with three hundred. Only places with a target go
    through the head. No target at all: 0, and gradients of 0.
    """
    wanted = targets != -1
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model.lm_head(model.hidden_states(inputs)[wanted]).float()  # (targets, V)
    logits = 15.0 * torch.tanh(logits / 15.0)
    # L = -sum log p(target) / total
    return F.cross_entropy(logits, targets[wanted], reduction="sum") / total


def accumulate_gradients(model, rows, total, batch_size, dtype=torch.float32):
    """Add the gradient of the mean loss over `total` targets for rows; return their loss share.

    batch_size rows at a time, so that memory is bounded and the sum is the same.
    """
    device, loss = model.lm_head.weight.device, 0.0
    for i in range(0, len(rows), batch_size):
        inputs, targets = (tensor.to(device) for tensor in collate(rows[i : i + batch_size]))
        share = sft_loss(model, inputs, targets, total, dtype)
        share.backward()
        loss += share.item()
    return loss


def sum_gradients(model, loss):
    """Add up gradients and loss over the ranks; the divisor `total` is that of all of them."""
    for p in model.parameters():
        if p.grad is None:  # a rank for which a short step had no row left
            p.grad = torch.zeros_like(p)
    grads = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in grads] + [torch.tensor([loss]).to(grads[0])])
    dist.all_reduce(flat)
    *pieces, loss = flat.split([g.numel() for g in grads] + [1])
    torch._foreach_copy_(grads, [piece.view_as(g) for piece, g in zip(pieces, grads)])
    return loss.item()


def plan_steps(lengths, rows_per_step, num_epochs, seed):
    """The whole run beforehand: for each optimizer step the numbers of its rows.

    lengths: ids in each row. A step takes rows of like length, out of a window of 16 steps' worth
    of shuffled rows; the steps of a window come in random order, or the model would see the short
    ones first. As it follows from the seed alone, a resumed run only has to skip what is done.
    """
    generator, steps = torch.Generator().manual_seed(seed), []
    left = max(1, round(num_epochs * len(lengths)))  # rows to show; an epoch may end in a few
    while left > 0:
        order = torch.randperm(len(lengths), generator=generator).tolist()
        window = 16 * rows_per_step
        for i in range(0, len(order), window):
            rows = sorted(order[i : i + window], key=lambda row: lengths[row])
            groups = [rows[j : j + rows_per_step] for j in range(0, len(rows), rows_per_step)]
            for j in torch.randperm(len(groups), generator=generator):
                if left > 0:
                    steps.append(groups[j])
                    left -= len(groups[j])
    return steps


def lr_scale_at(progress, warmup_ratio):
    """Up in a line, down in a line to 0. progress: 0 to 1."""
    return min(progress / warmup_ratio if warmup_ratio else 1.0,
               (1.0 - progress) / (1.0 - warmup_ratio))


# ---- the idea: what an answer is worth -----------------------------------------------------------


def in_the_head(messages):
    """The same conversation without the calculator, and with words that say so.

    Those first words are one clear choice between two ways, which 10_rl.py can weigh.
    """
    def plain(content):
        return content if isinstance(content, str) else "In my head: " + "".join(
            part["text"] for part in content if part["type"] == "text")

    return [{**message, "content": plain(message["content"])} for message in messages]


def plain_words(text):
    """Lower-case words, no marks: what counts when texts are compared."""
    return re.findall(r"\w+", text.lower())


def shown_again(conversation, repeat, held_out=()):
    """The conversation for its next showing: from another of its exchanges on, led up to otherwise.

    What is asked later may be asked first; and whoever has heard a question in one way only takes
    every other way for another question. held_out: the plain_words of prompts that stay unseen.
    """
    messages = conversation["messages"]
    if messages[0]["role"] == "system" or len(messages) < 2:
        return conversation
    turn, exchange = divmod(repeat, len(messages) // 2)
    first, *rest = messages[2 * exchange :]
    content = LEAD_UPS[turn % len(LEAD_UPS)] + first["content"]
    if plain_words(content) in held_out:  # "Hello! What are you called?" is one of them
        content = first["content"]
    return {"messages": [{**first, "content": content}, *rest]}


# --- shared: answers (home: 08_sft.py) ---
def answer_is_right(reply, answers):
    """Does the reply hold one of the answers, whole words and numbers, whatever their case?"""
    return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w|[.,]\d)", reply, re.IGNORECASE)
               for answer in answers)
# --- end shared ---


def held_out_prompts(data_dir, limit):
    """{what: [(messages, answers)]}: prompts whose phrasing, or numbers, no training file has."""
    kinds, identity = {}, data_dir / "my_identity_test.jsonl"
    if identity.exists():
        kinds["identity"] = [(row["messages"], row["answer"])
                             for row in read_conversations(identity)]
    if (data_dir / "tiny_chat_test.jsonl").exists():
        for row in read_conversations(data_dir / "tiny_chat_test.jsonl"):
            if row.get("answer") and row.get("kind") in ("fact", "sum", "spell"):
                # what follows the sign: 6 stands in the question of 6 + 0 already
                answer = "= " * (row["kind"] == "sum") + row["answer"]
                kinds.setdefault(row["kind"] + "s", []).append((row["messages"], [answer]))
    if (data_dir / "tiny_gsm_test.jsonl").exists():
        kinds["word problems"] = [
            (row["messages"], [row["answer"][row["answer"].rindex("####"):]])
            for row in read_conversations(data_dir / "tiny_gsm_test.jsonl")]
    return {what: prompts[:limit] for what, prompts in kinds.items() if prompts[:limit]}


def ask_all(engine, prompts, max_tokens=80, batch_size=64):
    """Greedy replies to [(messages, answers)]: list of (reply without end token, it stopped).

    A prompt that fills the context has no reply: ("", False).
    """
    tokenizer, context = engine.tokenizer, engine.model.config.sequence_len
    ids = [render_for_completion(messages, tokenizer) for messages, _ in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # like lengths: little padding
    fit = [i for i in order if len(ids[i]) < context]
    replies, end = [], tokenizer.encode_special("<|assistant_end|>")
    for i in range(0, len(fit), batch_size):
        batch = [ids[j] for j in fit[i : i + batch_size]]
        room = context - max(map(len, batch))
        results, _ = engine.generate_batch(batch, 1, min(max_tokens, room), temperature=0.0)
        for prompt, row in zip(batch, results):
            new = row[len(prompt) :]
            replies.append((tokenizer.decode([t for t in new if t not in engine.stops]),
                            new[-1] == end))
    replies += [("", False)] * (len(order) - len(fit))
    return [reply for _, reply in sorted(zip(order, replies))]


def measure_answers(engine, kinds):
    """{what: (n, share right)} for {what: [(messages, answers)]}, and "replies that stop"."""
    table, stopped = {}, []
    for what, prompts in kinds.items():
        replies = ask_all(engine, prompts)
        right = [answer_is_right(reply, answers)
                 for (reply, _), (_, answers) in zip(replies, prompts)]
        table[what] = (len(right), sum(right) / len(right))
        stopped += [stop for _, stop in replies]
    table["replies that stop"] = (len(stopped), sum(stopped) / len(stopped))
    return table


# ---- the loop ------------------------------------------------------------------------------------


def check_sft_settings(cfg, world_size):
    if min(cfg.device_batch_size, cfg.rows_per_step, cfg.eval_every, cfg.eval_rows, cfg.log_every,
           cfg.save_every, cfg.sample_every) < 1 or not 0 < cfg.num_epochs < math.inf:
        raise UserError("batch sizes, --num-epochs and all that is done every N steps start at 1.")
    if cfg.rows_per_step % world_size:
        raise UserError(f"--rows-per-step {cfg.rows_per_step} cannot be shared by {world_size} "
                        f"ranks: try {cfg.rows_per_step + -cfg.rows_per_step % world_size}.")
    if min(cfg.identity_rows, cfg.max_problems, cfg.eval_prompts) < 0:
        raise UserError("--identity-rows, --max-problems and --eval-prompts count from 0.")
    if not 0 <= cfg.calculator_share <= 1 or not 0 <= cfg.warmup_ratio < 1:
        raise UserError(f"--calculator-share {cfg.calculator_share} and --warmup-ratio "
                        f"{cfg.warmup_ratio} are shares: 0 to 1.")
    if (cfg.data_dir / cfg.stage).resolve() == (cfg.data_dir / cfg.source).resolve():
        raise UserError(f"--stage {cfg.stage} is the model to start from, and would be "
                        "overwritten: give --stage another name.")


def training_rows(cfg, tokenizer, max_tokens):
    """All rows of an epoch, and one line about each file. Raises UserError when there are none."""
    generator, rows, lines = torch.Generator().manual_seed(cfg.seed), [], []
    test = cfg.data_dir / "my_identity_test.jsonl"
    held_out = [plain_words(conversation["messages"][0]["content"])
                for conversation in (read_conversations(test) if test.exists() else [])]
    for name, wanted in (("my_identity.jsonl", cfg.identity_rows), ("tiny_chat_train.jsonl", 1),
                         ("tiny_gsm_train.jsonl", 1)):
        if not wanted or not (cfg.data_dir / name).exists():
            continue
        conversations = read_conversations(cfg.data_dir / name)
        repeats = max(1, round(wanted / len(conversations)))
        if "gsm" in name:
            conversations = conversations[: cfg.max_problems]
            shown = torch.rand(len(conversations), generator=generator) < cfg.calculator_share
            conversations = [row if with_tool else {"messages": in_the_head(row["messages"])}
                             for row, with_tool in zip(conversations, shown)]
        new, counts = render_rows([shown_again(conversation, repeat, held_out)
                                   for repeat in range(repeats) for conversation in conversations],
                                  tokenizer, max_tokens)
        rows += new
        lines.append(f"{name}: {len(conversations)} conversations x {repeats}, {len(new)} rows, "
                     f"{counts['cut']} cut, {counts['dropped']} dropped")
    if not rows:
        raise UserError(f"no conversations in {cfg.data_dir}. Make some: python "
                        "edu/06_identity.py (and edu/00_tiny_world.py for chats and problems)")
    return rows, lines


@torch.no_grad()
def validation_loss(model, rows, batch_size, dtype):
    """Mean loss in nats per target token over rows."""
    total = sum(sum(mask[1:]) for _, mask in rows)
    device, loss = model.lm_head.weight.device, 0.0
    for i in range(0, len(rows), batch_size):
        inputs, targets = (tensor.to(device) for tensor in collate(rows[i : i + batch_size]))
        loss += sft_loss(model, inputs, targets, total, dtype).item()
    return loss


# What a resumed run may change without becoming another run. Not what it is measured with: the best
# loss and the table would compare two things.
FREE_IN_SFT = {"data_dir", "resume", "eval_every", "sample_every", "log_every", "save_every",
               "plot", "device_type", "device_batch_size"}


def sft_origin(rows, held_out, tokenizer, source):
    """What the run is made from and measured with, besides its settings: {what: fingerprint}."""
    return {"tokenizer": tokenizer.sha256[:12],
            "conversations": fingerprint(json.dumps(rows).encode()),
            "held_out": fingerprint(json.dumps(held_out).encode()),
            "source_model": fingerprint((source / "model.safetensors").read_bytes())}


def plot_sft(rows, path):
    """A picture: training and validation loss by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
        seen = [row for row in rows if row.get(key) is not None]
        axes.plot([row["step"] for row in seen], [row[key] for row in seen], style, ms=3, lw=1,
                  label=label)
    axes.set(xlabel="step", ylabel="loss (nats per target token)", title="fine-tuning",
             ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def train(cfg):
    """Fine-tune as cfg says; returns {"step", "val_loss", "best", "table", "rows"}.

    best: (validation loss, step) of the best checkpoint; table: {what: (n, before, after)};
    rows: what metrics.jsonl holds.
    """
    ddp, rank, _, world_size, device = compute_init(cfg.device_type or None, cfg.seed)
    started = time.perf_counter()
    check_sft_settings(cfg, world_size)
    folder = cfg.data_dir / cfg.stage

    # 1. the model to start from, and the conversations
    tokenizer = Tokenizer.from_dir(cfg.data_dir / "tokenizer")
    model, _ = load_checkpoint(cfg.data_dir / cfg.source, tokenizer, device)
    dtype, why_dtype = pick_dtype(device)
    if cfg.dtype != "auto":
        dtype, why_dtype = getattr(torch, cfg.dtype), "asked for by --dtype"
    params = sum(p.numel() for p in model.parameters())
    print0(f"08 sft - {device.type} - {str(dtype)[6:]} - {params / 1e6:.1f}M params - "
           f"seed {cfg.seed}")
    print0(f"precision: {why_dtype}; from {cfg.source}, tokenizer {tokenizer.sha256[:12]}")
    max_tokens = model.config.sequence_len + 1
    rows, lines = training_rows(cfg, tokenizer, max_tokens)
    print0("\n".join(lines))
    val_path = cfg.data_dir / "tiny_chat_test.jsonl"
    val = read_conversations(val_path) if val_path.exists() else []
    val_rows, _ = render_rows(val[: cfg.eval_rows], tokenizer, max_tokens)
    steps = plan_steps([len(ids) for ids, _ in rows], cfg.rows_per_step, cfg.num_epochs, cfg.seed)
    optimizers, engine = build_optimizers(model, cfg, dtype), Engine(model, tokenizer)

    # 2. what it can do before, and where an interrupted run had come to
    kinds = held_out_prompts(cfg.data_dir, cfg.eval_prompts)
    origin = sft_origin(rows, [val_rows, kinds], tokenizer, cfg.data_dir / cfg.source)
    resumed = load_resume(folder, cfg, origin, FREE_IN_SFT)
    before, first, best = {}, 0, (math.inf, 0)
    if resumed:
        model.load_state_dict(resumed["model"])
        for optimizer, states in zip(optimizers, resumed["optimizers"]):
            optimizer.load_state_dict(states)
        first, best = resumed["step"], tuple(resumed["best"])
        before = {what: tuple(row) for what, row in resumed["before"].items()}
        print0(f"resumed at step {first} of {len(steps)}")
    else:
        if rank == 0:
            before = measure_answers(engine, kinds) if kinds else {}
            shutil.rmtree(folder / "best", ignore_errors=True)  # of another run

    def save(step, val_loss):
        if rank:
            return
        save_resume(folder, cfg, origin, step=step, model=model.state_dict(), best=list(best),
                    optimizers=[o.state_dict() for o in optimizers],
                    before={what: list(row) for what, row in before.items()})
        save_checkpoint(folder, model, tokenizer, step, {"val_loss": val_loss}, cfg)

    log = MetricsLog(folder, first, cfg.plot) if rank == 0 else None
    print0(f"{'step':>6} {'loss':>8} {'val loss':>9} {'lr':>8} {'tok/s':>8} {'eta':>7}")
    step, val_loss, timer, tokens = first, None, time.perf_counter(), 0
    loop_started = timer
    bar = tqdm(total=len(steps), initial=first, unit="step", leave=False,
               disable=True if rank else None)
    with StopRequest() as stop:
        while step < len(steps):
            # 3. learn from the rows of this step: this rank's share of them, some at a time
            chosen = [rows[i] for i in steps[step]]
            total = sum(sum(mask[1:]) for _, mask in chosen)
            loss = accumulate_gradients(model, chosen[rank::world_size], total,
                                        cfg.device_batch_size, dtype)
            if ddp:
                loss = sum_gradients(model, loss)
            norm_of_all = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
            if not (math.isfinite(loss) and math.isfinite(norm_of_all)):
                bar.close()
                compute_cleanup()
                raise TrainingFailed(
                    f"loss {loss} and gradient norm {norm_of_all} at step {step}: the run has "
                    f"diverged.\n  The last checkpoint stays in {folder}. Lower the learning rate, "
                    f"for example --matrix-lr {cfg.matrix_lr / 3:g}.")
            lr_scale = lr_scale_at((step + 1) / (len(steps) + 1), cfg.warmup_ratio)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * lr_scale
                optimizer.step()
                optimizer.zero_grad()
            step, tokens = step + 1, tokens + sum(len(ids) for ids, _ in chosen)
            bar.update()

            # 4. look: validation loss, the best checkpoint, a row, samples
            asked = agree(float(stop.asked), device, ddp) > 0
            last, val_loss = step == len(steps) or asked, None
            if val_rows and (step % cfg.eval_every == 0 or last):
                val_loss = validation_loss(model, val_rows, cfg.device_batch_size, dtype)
                if val_loss < best[0]:
                    best = (val_loss, step)
                    if rank == 0:
                        save_checkpoint(folder / "best", model, tokenizer, step,
                                        {"val_loss": val_loss}, cfg)
            if step % cfg.log_every == 0 or val_loss is not None or last or step == first + 1:
                now = time.perf_counter()
                speed, timer, tokens = tokens / (now - timer), now, 0
                eta = (len(steps) - step) * (now - loop_started) / (step - first)
                if rank == 0:
                    shown = "" if val_loss is None else f"{val_loss:.4f}"
                    bar.write(f"{step - 1:>6} {loss:>8.4f} {shown:>9} {lr_scale:>8.3f} "
                              f"{speed:>8.0f} {eta // 60:>4.0f}:{eta % 60:02.0f}")
                    log.write(step=step - 1, loss=loss, val_loss=val_loss, lr=lr_scale,
                              grad_norm=norm_of_all, tok_per_s=round(speed, 1))
            if step % cfg.sample_every == 0 and rank == 0:
                asks = [([{"role": "user", "content": text}], []) for text in SAMPLE_PROMPTS]
                for text, (reply, _) in zip(SAMPLE_PROMPTS, ask_all(engine, asks, 40)):
                    bar.write(f"       {text}|{reply}")
            if step % cfg.save_every == 0 and not last:
                save(step, val_loss)
            if asked:
                break
    bar.close()
    if step > first:
        save(step, val_loss)
    done = {"step": step, "val_loss": val_loss, "best": best, "table": {},
            "rows": log.rows if rank == 0 else []}
    if rank == 0:
        log.close()
    if step < len(steps):
        print0(f"stopped at step {step} of {len(steps)}; --resume goes on, with the same flags")
        compute_cleanup()
        return done

    # 5. what it can do now
    if rank == 0:
        if cfg.plot:
            plot_sft(log.rows, folder / "loss.png")
        report_sft(folder, cfg, engine, kinds, before, best, done, started)
    compute_cleanup()
    return done


def report_sft(folder, cfg, engine, kinds, before, best, done, started):
    """The table before and after, samples, what was written and the result line."""
    after = measure_answers(engine, kinds) if kinds else {}
    done["table"] = {what: (n, before[what][1], share) for what, (n, share) in after.items()}
    if after:
        print(f"{'what':<24} {'n':>6} {'before':>8} {'after':>7}")
    for what, (n, was, now) in done["table"].items():
        print(f"{what:<24} {n:>6} {was:>8.1%} {now:>7.1%}")
    asks = [([{"role": "user", "content": text}], []) for text in SAMPLE_PROMPTS]
    for text, (reply, _) in zip(SAMPLE_PROMPTS, ask_all(engine, asks, 40)):
        print(f"  {text}|{reply}")
    if math.isfinite(best[0]):
        print(f"best validation loss {best[0]:.4f}, at step {best[1]} of {done['step']}")
    pair = ("model.safetensors", "config.json")
    for name in (*pair, *(f"best/{name}" for name in pair if math.isfinite(best[0])), "resume.pt",
                 "metrics.jsonl", *(["loss.png"] if cfg.plot else [])):
        print(f"wrote {folder / name}")
    print(f"trained {done['step']} steps, {time.perf_counter() - started:.0f} s in all")
    told = [row for what, row in done["table"].items() if what in ("identity", "facts")]
    n = sum(row[0] for row in told)
    if told:
        was, now = (sum(row[0] * row[i] for row in told) / n for i in (1, 2))
        print(f"result: held-out answers right {was:.3f} -> {now:.3f} (n={n})")
    else:
        losses = [row["loss"] for row in done["rows"] if row["loss"] is not None]
        print(f"result: training loss {losses[0]:.3f} -> {losses[-1]:.3f} (n={done['step']})")
    print("next: python edu/10_rl.py" + f" --source {cfg.stage}" * (cfg.stage != "sft"))


# ---- the command line ----------------------------------------------------------------------------


def run_sft(cfg):
    try:
        train(cfg)
    except TrainingFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_script(run_sft, Config, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
