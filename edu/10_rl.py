"""Challenge 10: reinforcement learning, where the model finds out by itself what works.

Goal:
    Let the fine-tuned model try each word problem many times, pay 1 for a right answer and 0 for
    any other, and make what was paid better than average likelier. Nobody tells it how: it has
    seen problems solved in the head (mostly, and mostly wrong) and with the calculator (now and
    then), and within two minutes it reaches for the calculator. Held-out accuracy is measured
    before, during and after.

You will learn:
    - the policy gradient with the mean of the group as baseline, all that is left of GRPO when
      every batch is used once
    - what may be trained: sampled tokens and the stop token, never what the calculator wrote
    - what to look at: reward, dead groups, tool use, length, entropy, truncation
    - when not to start: where nothing succeeds there is nothing to prefer, pass@k tells
    - what PPO's clip, a KL penalty and a division by the standard deviation would add
    - with --reward hackable --num-steps 30, how a policy cheats a reward that only nearly says
      what is wanted

Read beside:
    nanochat/scripts/chat_rl.py. Different here: several prompts are decoded together, every sample
    draws its own first token, the stop token is trained, sampling and scoring share one
    distribution, the loss is a mean over the tokens of the whole step, pass@k is unbiased.

Run:
    python edu/10_rl.py
    python edu/10_rl.py --ten-questions --num-steps 40

Expect:
    10 rl - cpu - float32 - ...M params - seed 1337
    before: pass@1 0.258, ... (32 problems x 16 samples)
    step  reward   dead   tool  length  entropy  cut  |grad|  samples/s   right
    after: 98.3% of 400 held-out problems right, greedy (95% interval 96% to 99%), ...
    result: held-out problems right, greedy 0.013 -> 0.983 (n=400)

Writes:
    rl/model.safetensors
    rl/config.json
    rl/resume.pt
    rl/metrics.jsonl
    rl/rl.png
"""

import ast
import base64
import contextlib
import copy
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

# Ten fixed questions in the words of the tiny world, with numbers that stand in none of its files.
TEN_QUESTIONS = (
    ("Rosa has 241 marbles. Luke has only 198 marbles. How many more does Rosa have?", "43"),
    ("One cake costs 57 coins. How many coins do 8 of them cost?", "456"),
    ("A school has 158 girls and 217 boys. How many children is that in all?", "375"),
    ("A farmer plants 37 rows of trees. There are 13 trees in each row. How many trees is that?",
     "481"),
    ("Zoe has 231 biscuits. Tom has 164 more than Zoe. How many biscuits do they have together?",
     "626"),
    ("Leah has 53 boxes. There are 5 books in each box. How many books does Leah have in all?",
     "265"),
    ("Noah has 213 buttons. He loses 87 of them. How many buttons does Noah have left?", "126"),
    ("Eli has 131 coins. He buys 7 kites for 13 coins each. How many coins does Eli have left?",
     "40"),
    ("There are 94 people on a train. At the first stop 28 people get off. At the next stop 165 "
     "people get on. How many people are on the train now?", "231"),
    ("Jane buys 7 presents. Each of them costs 59 coins. How many coins does Jane pay?", "413"),
)


@dataclass
class Config:
    data_dir: Path = field(default_factory=lambda: Path(os.environ.get("EDU_DATA", "data")))
    """Folder with tokenizer/, the model to start from, and the word problems."""
    source: str = "sft"
    """Folder under data_dir of the model to start from."""
    stage: str = ""
    """Folder under data_dir that the run writes; empty: rl, or rl_ten and rl_hackable for those."""
    # the task
    problems: Literal["tiny", "hub"] = "tiny"
    """The tiny world's word problems, or GSM8K from the hub."""
    path: Path | None = None
    """A JSONL file of problems to train on, instead; the last --eval-problems are held out."""
    ten_questions: bool = False
    """Train on ten fixed questions, all of them in each step, and measure on these ten."""
    reward: Literal["exact", "hackable"] = "exact"
    """exact: 1 for the right answer. hackable: the share of the ten digits in the reply."""
    # the rollouts
    num_samples: int = 16
    """K, samples for each prompt: the group whose mean is the baseline."""
    prompts_per_step: int = 8
    """Prompts decoded together."""
    max_new_tokens: int = 96
    """Longest reply; a longer one is cut, and earns what it earns."""
    temperature: float = 1.0
    """Of sampling, and of the probabilities that are trained: two would train another policy."""
    # the horizon
    num_steps: int = 80
    """Optimizer steps; 0 ends after max_minutes alone."""
    max_minutes: float = 0.0
    """Wall-clock budget; 0: none."""
    # the learning rule; the last four are off, and each is worth an experiment
    lr: float = 5e-4
    """AdamW, for every weight. (Muon steps every direction of a matrix: it wrecks a policy.)"""
    warmup_steps: int = 3
    """Steps over which the learning rate rises; then it falls in a line to a tenth."""
    max_grad_norm: float = 1.0
    """Longer gradients are scaled down to this."""
    normalize_std: bool = False
    """Divide advantages by the standard deviation of their group, as in GRPO."""
    clip: float = 0.0
    """PPO's clip: how far from 1 a ratio of probabilities still earns. 0: no ratio at all."""
    epochs: int = 1
    """Optimizer steps on one batch of rollouts; more than one needs --clip."""
    kl: float = 0.0
    """Weight of the penalty for leaving the model that the run began with."""
    # looking at the run
    eval_problems: int = 400
    """Held-out problems, answered greedily before and after."""
    eval_every: int = 10
    """Steps between looks at the first hundred of them."""
    probe_prompts: int = 32
    """Prompts for pass@k before the first step."""
    save_every: int = 10
    """Steps between checkpoints."""
    resume: bool = False
    """Go on from resume.pt."""
    plot: bool = True
    """Write TensorBoard events and the picture."""
    # the machine
    device_batch_size: int = 64
    """Rows in one forward pass of the update; the only number to lower when memory runs out."""
    device_type: str = ""
    """cpu, cuda or mps; empty takes the best there is."""
    seed: int = 1337
    """Seed of the order of the problems and of all sampling."""


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


# ---- the idea: better than the group's average ---------------------------------------------------


def compute_advantages(rewards, normalize_std=False):
    """Rewards (G, K), a row for each prompt -> advantages (G, K).

    A group whose samples all earned the same, or with one sample only, has advantages of 0: it
    teaches nothing. Source: REINFORCE with a group baseline; the division by the standard deviation
    is GRPO's (arXiv 2402.03300), which makes hard and easy prompts count more than those between
    (arXiv 2503.20783).
    """
    # A_i = r_i - mean(r)
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if normalize_std:
        # A_i = (r_i - mean(r)) / std(r); 0 where the std is 0
        std = rewards.std(dim=1, keepdim=True, unbiased=False)
        advantages = torch.where(std > 1e-6, advantages / std.clamp(min=1e-6), 0.0)
    return advantages


def policy_gradient_loss(logprobs, advantages, mask, old_logprobs=None, clip=0.0, ref_logprobs=None,
                         kl=0.0, total=None):
    """The loss whose gradient is the policy gradient: a mean over tokens, a 0-d tensor.

    logprobs, old_logprobs, ref_logprobs, mask (N, T): of the tokens, under the policy, under the
    policy that sampled them, under the reference; 1 where the policy chose the token. advantages
    (N,), one for a row. total: tokens to divide by; those of mask if None. Every token of a step
    weighs the same, so a long row is not excused by its length (DAPO, arXiv 2503.14476). Whatever
    stands where mask is 0, inf and nan included, has no influence.
    """
    mask = mask.bool()
    total = mask.sum().clamp(min=1) if total is None else total
    # masked before exp: inf * 0 would be nan
    logprobs = logprobs.masked_fill(~mask, 0.0)
    advantage = advantages[:, None]  # (N, 1): the same for each token of a row
    if clip:
        # -min(ratio A, clip(ratio, 1 - e, 1 + e) A);  ratio = p / p_old       (arXiv 1707.06347)
        ratio = (logprobs - old_logprobs.masked_fill(~mask, 0.0)).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    else:
        gain = logprobs * advantage  # its gradient is A grad log p
    loss = -(gain * mask).sum() / total
    if kl:
        # KL(p || p_ref) ~ e^d - d - 1 with d = log p_ref - log p: never negative   (Schulman's k3)
        d = ref_logprobs.masked_fill(~mask, 0.0) - logprobs
        loss = loss + kl * ((d.exp() - d - 1) * mask).sum() / total
    return loss


def score_rows(model, ids, mask, temperature=1.0):
    """(log probabilities (N, T), mean entropy in nats) of ids (N, T) under the policy.

    Place t is the probability of token t given those before it, at the sampling temperature; 0
    where mask (N, T) is 0. Only places with a mask go through the head: prompts, forced tokens and
    padding would be most of the work.
    """
    wanted = mask[:, 1:].bool()  # token t is predicted from place t - 1
    logits = model.lm_head(model.hidden_states(ids[:, :-1])[wanted]).float()  # (tokens, V)
    logits = 15.0 * torch.tanh(logits / 15.0) / temperature
    log_p = torch.log_softmax(logits, dim=-1)
    chosen = log_p.gather(1, ids[:, 1:][wanted][:, None])[:, 0]
    # H = -sum p log p
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1).mean().item() if len(log_p) else 0.0
    logprobs = torch.zeros(ids.shape, device=ids.device)
    logprobs[:, 1:][wanted] = chosen
    return logprobs, entropy


def pass_at_k(n, c, k):
    """Chance that k of n samples, c of them right, hold a right one, without the bias of trying.

    Source: arXiv 2107.03374, equation 1.
    """
    # 1 - C(n - c, k) / C(n, k)
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


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


# ---- the idea: rollouts and what they earn -------------------------------------------------------


class TenQuestions:
    """The ten questions as a task, like GSM8K: len, get_example, reward, truths."""

    truths = [answer for _, answer in TEN_QUESTIONS]

    def __len__(self):
        return len(TEN_QUESTIONS)

    def get_example(self, i):
        return {"messages": [{"role": "user", "content": TEN_QUESTIONS[i][0]}]}

    def reward(self, i, completion):
        return float(extract_answer(completion) == self.truths[i])


def hackable_reward(completion):
    """The share of the ten digits that the reply holds: meant to reward working that is shown.

    A right solution shows some of them; a reply that lists every digit earns 1.0 for any problem.
    So a policy learns to list digits.
    """
    return len(set(completion) & set("0123456789")) / 10


@dataclass
class Rollouts:
    """What a step has sampled; N = prompts x K rows, those of a prompt next to each other."""

    ids: list  # N lists: prompt and reply
    mask: list  # N lists: 1 where the policy chose the token, its stop token included
    replies: list  # N str
    rewards: torch.Tensor  # (prompts, K)
    correct: torch.Tensor  # (prompts, K), by the exact reward whatever is trained
    used_tool: list  # N bool
    truncated: list  # N bool: no end within max_new_tokens
    lengths: list  # N int: tokens of the reply


def sample_rollouts(engine, task, indices, cfg, seed, num_samples=None, temperature=None):
    """Answer the problems `indices`, num_samples times each and all together, and pay for it."""
    K = cfg.num_samples if num_samples is None else num_samples
    temperature = cfg.temperature if temperature is None else temperature
    tokenizer, special = engine.tokenizer, engine.tokenizer.encode_special
    prompts = [render_for_completion(task.get_example(i)["messages"], tokenizer) for i in indices]
    room = engine.model.config.sequence_len - max(map(len, prompts))
    ids, mask = engine.generate_batch(prompts, K, min(cfg.max_new_tokens, room), temperature,
                                      seed=seed)
    new = [row[len(prompts[n // K]) :] for n, row in enumerate(ids)]
    replies = [tokenizer.decode([t for t in row if t not in engine.stops]) for row in new]
    of = [i for i in indices for _ in range(K)]
    correct = torch.tensor([task.reward(i, reply) for i, reply in zip(of, replies)]).view(-1, K)
    rewards = correct if cfg.reward == "exact" else torch.tensor(
        [hackable_reward(reply) for reply in replies]).view(-1, K)
    start = special("<|python_start|>")
    return Rollouts(ids, mask, replies, rewards, correct, [start in row for row in new],
                    [row[-1] not in engine.stops for row in new], [len(row) for row in new])


def pad_rows(ids, mask, device):
    """Lists of ids and masks -> (N, T) tensors, padded on the right with 0, where mask is 0."""
    T = max(map(len, ids))
    both = torch.zeros(2, len(ids), T, dtype=torch.long)
    for n, (row, marks) in enumerate(zip(ids, mask)):
        both[0, n, : len(row)] = torch.tensor(row)
        both[1, n, : len(row)] = torch.tensor(marks)
    return both.to(device).unbind()


def greedy_accuracy(engine, task, indices, cfg, batch_size=128):
    """(share right, share with the calculator) of greedy answers to the problems `indices`."""
    # like lengths together: the rows of a batch are padded to its longest prompt
    indices = sorted(indices, key=lambda i: len(task.get_example(i)["messages"][0]["content"]))
    right = tool = 0.0
    for i in range(0, len(indices), batch_size):
        rollouts = sample_rollouts(engine, task, indices[i : i + batch_size], cfg, seed=0,
                                   num_samples=1, temperature=0.0)
        right, tool = right + rollouts.correct.sum().item(), tool + sum(rollouts.used_tool)
    return right / len(indices), tool / len(indices)


# ---- the loop ------------------------------------------------------------------------------------


def check_rl_settings(cfg):
    if min(cfg.prompts_per_step, cfg.max_new_tokens, cfg.epochs, cfg.eval_problems, cfg.eval_every,
           cfg.probe_prompts, cfg.save_every, cfg.device_batch_size) < 1:
        raise UserError("batch sizes, counts and all that is done every N steps start at 1.")
    if min(cfg.lr, cfg.max_grad_norm) <= 0 or min(cfg.clip, cfg.kl) < 0:
        raise UserError("--lr and --max-grad-norm must be above 0, --clip and --kl not below it.")
    if cfg.ten_questions and cfg.path:
        raise UserError("--ten-questions brings its own problems: leave out --path.")
    if cfg.num_samples < 2:
        raise UserError(f"--num-samples {cfg.num_samples}: a group of one is its own average, and "
                        "no sample is better than it: take at least 2.")
    if cfg.temperature <= 0:
        raise UserError(f"--temperature {cfg.temperature}: without chance all samples are the same "
                        "and nothing can be learned: use 1.")
    if cfg.epochs > 1 and not cfg.clip:
        raise UserError(f"--epochs {cfg.epochs} trains on samples of an older policy, which needs "
                        "the ratio of the two: add --clip 0.2.")
    if cfg.num_steps < 0 or (cfg.num_steps == 0 and cfg.max_minutes <= 0):
        raise UserError("neither --num-steps nor --max-minutes says when to stop.")


def load_tasks(cfg):
    """(training task, its numbers, held-out task, its numbers)."""
    if cfg.ten_questions:
        return TenQuestions(), list(range(10)), TenQuestions(), list(range(10))
    train_task = GSM8K("train", cfg.problems, cfg.path, cfg.data_dir)
    if cfg.path:
        split = len(train_task) - cfg.eval_problems
        if split < 1:
            raise UserError(f"{cfg.path} has {len(train_task)} problems, and --eval-problems "
                            f"{cfg.eval_problems} leave none to train on.")
        return train_task, list(range(split)), train_task, list(range(split, len(train_task)))
    test = GSM8K("test", cfg.problems, None, cfg.data_dir)
    test_numbers = list(range(min(len(test), cfg.eval_problems)))
    return train_task, list(range(len(train_task))), test, test_numbers


def prompts_of_step(step, numbers, count, seed):
    """The problems of a step: an endless shuffled walk through `numbers`, the same in any run."""
    chosen = []
    for place in range(step * count, (step + 1) * count):
        epoch, offset = divmod(place, len(numbers))
        order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed + epoch))
        chosen.append(numbers[order[offset]])
    return chosen


def mean_pass_at_k(correct, ks):
    """{k: unbiased pass@k, averaged over the problems} of correct (prompts, K)."""
    K, counts = correct.size(1), [int(row.sum()) for row in correct]
    return {k: sum(pass_at_k(K, c, k) for c in counts) / len(counts) for k in ks if k <= K}


def refuse_hopeless(rollouts, K):
    """Print pass@k of the model as it is; raise TrainingFailed where there is nothing to learn.

    pass@k counts right answers; whether there is anything to learn, the trained reward decides.
    """
    passes = mean_pass_at_k(rollouts.correct, sorted({1, 2, 4, 8, 16, 32, 64, K}))
    prompts, lowest, highest = len(rollouts.rewards), rollouts.rewards.min(), rollouts.rewards.max()
    print("before: " + ", ".join(f"pass@{k} {share:.3f}" for k, share in passes.items())
          + f" ({prompts} problems x {K} samples)")
    if highest == 0:
        raise TrainingFailed(
            f"not one of {prompts * K} samples is right, so no sample is better than another "
            "and there is nothing to learn from. Start from a model that succeeds now and then:\n"
            "  fine-tune it longer, or with --calculator-share 0.5 (python edu/08_sft.py)")
    if lowest == 1:
        raise TrainingFailed(
            f"all of {prompts * K} samples are right: every group is dead, there is nothing "
            "left to learn. Take harder problems (--path), or another model (--source).")
    if (rollouts.rewards == rollouts.rewards[:, :1]).all():
        raise TrainingFailed(
            f"in each of {prompts} problems all {K} samples earn the same: every group is dead, "
            "there is nothing to learn from. Take more samples (--num-samples) or other problems.")
    return passes


def update_policy(model, optimizer, reference, rollouts, cfg, lr):
    """Steps 2 and 3 of the loop: score, and learn; returns {"grad_norm", "entropy", ...}.

    Rows of dead groups have an advantage of 0 and no gradient: they are left out, of the work and
    of the denominator (with a KL penalty they stay, it pulls on them too).
    """
    device = model.lm_head.weight.device
    advantages = compute_advantages(rollouts.rewards, cfg.normalize_std).flatten()
    alive = [n for n in range(len(rollouts.ids)) if cfg.kl or advantages[n] != 0]
    if not alive:
        return {"grad_norm": 0.0, "entropy": None}
    alive.sort(key=lambda n: len(rollouts.ids[n]))  # like lengths: little padding
    parts = [alive[i : i + cfg.device_batch_size]
             for i in range(0, len(alive), cfg.device_batch_size)]
    total = sum(sum(rollouts.mask[n]) for n in alive)
    batches = [(*pad_rows([rollouts.ids[n] for n in part], [rollouts.mask[n] for n in part],
                          device), advantages[part].to(device)) for part in parts]
    with torch.no_grad():
        old = [score_rows(model, ids, mask, cfg.temperature)[0] if cfg.clip else None
               for ids, mask, _ in batches]
        ref = [score_rows(reference, ids, mask, cfg.temperature)[0] if cfg.kl else None
               for ids, mask, _ in batches]
    for _ in range(cfg.epochs):
        entropy = 0.0
        for (ids, mask, advantage), old_logprobs, ref_logprobs in zip(batches, old, ref):
            logprobs, uncertainty = score_rows(model, ids, mask, cfg.temperature)
            policy_gradient_loss(logprobs, advantage, mask, old_logprobs, cfg.clip, ref_logprobs,
                                 cfg.kl, total).backward()
            entropy += uncertainty * mask[:, 1:].sum().item() / total
        norm_of_all = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm).item()
        if not math.isfinite(norm_of_all):
            raise TrainingFailed(f"the gradient's length is {norm_of_all}: the run has diverged. "
                                 f"The last checkpoint stays. Try --lr {cfg.lr / 3:g}.")
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    return {"grad_norm": norm_of_all, "entropy": entropy}


# What a resumed run may change without becoming another run.
FREE_IN_RL = {"data_dir", "resume", "max_minutes", "eval_every", "probe_prompts", "save_every",
              "plot", "device_type", "device_batch_size"}


def plot_rl(rows, path, hackable, what):
    """A picture: reward, tool use and accuracy (on what) by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps = [row for row in rows if row.get("reward") is not None]
    seen = [row for row in rows if row.get("accuracy") is not None]
    left.plot([r["step"] for r in steps], [r["reward"] for r in steps], lw=1.2,
              label="reward, hackable" if hackable else "reward")
    left.plot([r["step"] for r in steps], [r["tool_use"] for r in steps], lw=1.2,
              label="replies that use the calculator")
    left.plot([r["step"] for r in seen], [r["accuracy"] for r in seen], "o-", ms=4,
              label=f"{what} right, greedy")
    left.set(xlabel="step", ylabel="share", title="what it earns and how", ylim=(-0.03, 1.03))
    right.plot([r["step"] for r in steps], [r["length"] for r in steps], color="tab:purple", lw=1.2,
               label="tokens in a reply")
    right.set(xlabel="step", ylabel="tokens", title="length and entropy", ylim=(0, None))
    other = right.twinx()
    entropy = [r for r in steps if r["entropy"] is not None]
    other.plot([r["step"] for r in entropy], [r["entropy"] for r in entropy], color="tab:gray",
               lw=1.2)
    other.set(ylabel="entropy (nats, gray)", ylim=(0, None))
    left.legend(fontsize=8)
    left.grid(alpha=0.3)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def train(cfg):
    """Train as cfg says; returns {"step", "before", "after", "n", "rows"} (rows: metrics.jsonl).

    before, after: greedy accuracy on n held-out problems.
    """
    started = time.perf_counter()
    check_rl_settings(cfg)
    if os.environ.get("RANK"):
        raise UserError("this challenge trains in one process: start it with python, not torchrun.")
    _, _, _, _, device = compute_init(cfg.device_type or None, cfg.seed)
    what = "ten questions" if cfg.ten_questions else "held-out problems"
    stage = cfg.stage or ("rl_hackable" if cfg.reward == "hackable" else
                          "rl_ten" if cfg.ten_questions else "rl")
    folder = cfg.data_dir / stage
    if folder.resolve() == (cfg.data_dir / cfg.source).resolve():
        raise UserError(f"--stage {stage} is the model to start from, and would be overwritten: "
                        "give --stage another name.")

    # the model, the problems, and what it can do before
    tokenizer = Tokenizer.from_dir(cfg.data_dir / "tokenizer")
    model, _ = load_checkpoint(cfg.data_dir / cfg.source, tokenizer, device)
    params = sum(p.numel() for p in model.parameters())
    print(f"10 rl - {device.type} - float32 - {params / 1e6:.1f}M params - seed {cfg.seed}")
    task, numbers, held_out, test_numbers = load_tasks(cfg)
    numbers, test_numbers = (
        [i for i in some if len(render_for_completion(of.get_example(i)["messages"], tokenizer))
         < model.config.sequence_len] for of, some in ((task, numbers), (held_out, test_numbers)))
    if not numbers or not test_numbers:
        raise UserError(f"no problem is shorter than the context of {model.config.sequence_len} "
                        "tokens: train a base model with a longer --sequence-len.")
    engine, reference = Engine(model, tokenizer), copy.deepcopy(model) if cfg.kl else None
    optimizer = AdamW([{"params": model.parameters(), "lr": cfg.lr}], betas=(0.9, 0.95), eps=1e-8)
    per_step = min(cfg.prompts_per_step, len(numbers)) if not cfg.ten_questions else 10
    print(("ten questions, to train on and to measure with; " if cfg.ten_questions else
           f"{len(numbers)} problems to train on, {len(test_numbers)} held out; ")
          + f"{per_step} prompts x {cfg.num_samples} samples a step; reward {cfg.reward}")
    origin = {"tokenizer": tokenizer.sha256[:12],
              "source_model": fingerprint(
                  (cfg.data_dir / cfg.source / "model.safetensors").read_bytes()),
              **{name: fingerprint(json.dumps([of.get_example(i) for i in some]).encode())
                 for name, of, some in (("problems", task, numbers),
                                        ("held_out", held_out, test_numbers))}}
    resumed = load_resume(folder, cfg, origin, FREE_IN_RL)
    first, minutes_before = 0, 0.0
    if resumed:
        model.load_state_dict(resumed["model"])
        optimizer.load_state_dict(resumed["optimizer"])
        first, before, minutes_before = (resumed[k] for k in ("step", "before", "minutes"))
        print(f"resumed at step {first} of {cfg.num_steps}")
    else:
        probe = prompts_of_step(0, numbers, min(cfg.probe_prompts, len(numbers)), cfg.seed + 10**6)
        rollouts = sample_rollouts(engine, task, probe, cfg, seed=cfg.seed)
        refuse_hopeless(rollouts, cfg.num_samples)
        before, tool = greedy_accuracy(engine, held_out, test_numbers, cfg)
        print("before: " + told(before, tool, len(test_numbers), what))

    def save(step, metrics):
        save_resume(folder, cfg, origin, step=step, model=model.state_dict(), before=before,
                    optimizer=optimizer.state_dict(),
                    minutes=minutes_before + (time.perf_counter() - loop_started) / 60)
        save_checkpoint(folder, model, tokenizer, step, metrics, cfg)

    log = MetricsLog(folder, first + 1 if resumed else 0, cfg.plot)  # rows count from 1
    if not resumed:
        log.write(step=0, **with_interval(before, len(test_numbers)))
    print(f"{'step':>5} {'reward':>7} {'dead':>6} {'tool':>6} {'length':>7} {'entropy':>8} "
          f"{'cut':>5} {'|grad|':>7} {'samples/s':>9} {'right':>14}")
    step, loop_started = first, time.perf_counter()
    steps = cfg.num_steps or 10**9
    bar = tqdm(total=cfg.num_steps or None, initial=first, unit="step", leave=False, disable=None)
    with StopRequest() as stop:
        while step < steps:
            minutes = minutes_before + (time.perf_counter() - loop_started) / 60
            if cfg.max_minutes and minutes >= cfg.max_minutes:
                print(f"--max-minutes {cfg.max_minutes:g} is over at step {step}")
                break
            began = time.perf_counter()
            # 1. sample and pay  2. score  3. learn
            chosen = prompts_of_step(step, numbers, per_step, cfg.seed)
            rollouts = sample_rollouts(engine, task, chosen, cfg, seed=cfg.seed * 10**5 + step)
            progress = max(step / steps, minutes / cfg.max_minutes if cfg.max_minutes else 0.0)
            lr = cfg.lr * min(1.0, (step + 1) / max(1, cfg.warmup_steps)) * (1 - 0.9 * progress)
            learned = update_policy(model, optimizer, reference, rollouts, cfg, lr)
            step += 1
            bar.update()

            # 4. report
            N, seconds = len(rollouts.ids), time.perf_counter() - began
            spread = rollouts.rewards.max(1).values - rollouts.rewards.min(1).values
            row = {"step": step, "reward": rollouts.rewards.mean().item(),
                   "dead_groups": (spread == 0).float().mean().item(),
                   "tool_use": sum(rollouts.used_tool) / N, "length": sum(rollouts.lengths) / N,
                   "truncated": sum(rollouts.truncated) / N, **learned,
                   "samples_per_s": N / seconds, "accuracy": None}
            for k, share in mean_pass_at_k(rollouts.correct, {1, 4, cfg.num_samples}).items():
                row[f"pass_at_{k}"] = share
            if step % cfg.eval_every == 0 and step < steps:
                few = test_numbers[:100]
                row |= with_interval(greedy_accuracy(engine, held_out, few, cfg)[0], len(few))
            log.write(**row)
            entropy = "" if row["entropy"] is None else f"{row['entropy']:.3f}"
            accuracy = "" if row["accuracy"] is None else (
                f"{row['accuracy']:.0%} ({row['accuracy_low']:.0%}-{row['accuracy_high']:.0%})")
            bar.write(f"{step:>5} {row['reward']:>7.3f} {row['dead_groups']:>6.0%} "
                      f"{row['tool_use']:>6.0%} {row['length']:>7.1f} {entropy:>8} "
                      f"{row['truncated']:>5.0%} {row['grad_norm']:>7.3f} "
                      f"{row['samples_per_s']:>9.0f} {accuracy:>14}")
            if step % cfg.save_every == 0 and step < steps:
                save(step, {"reward": row["reward"]})
            if stop.asked:
                break
    bar.close()
    if stop.asked and step < steps:
        save(step, {})
        log.close()
        print(f"stopped at step {step}; --resume goes on, with the same flags")
        return {"step": step, "before": before, "after": None, "n": 0, "rows": log.rows}

    # 5. what it can do now; saved before, as looking takes a while
    if step > first:
        save(step, {})
    after, tool = greedy_accuracy(engine, held_out, test_numbers, cfg)
    log.write(step=step, **with_interval(after, len(test_numbers)))
    log.close()
    save(step, {"accuracy_before": before, "accuracy": after, "n": len(test_numbers)})
    if cfg.plot:
        plot_rl(log.rows, folder / "rl.png", cfg.reward == "hackable", what)
    print("after: " + told(after, tool, len(test_numbers), what))
    show_replies(engine, held_out, test_numbers[:2], cfg)
    if cfg.reward == "hackable":
        report_hacking(log.rows, before, after)
    for name in ("model.safetensors", "config.json", "resume.pt", "metrics.jsonl",
                 *(["rl.png"] if cfg.plot else [])):
        print(f"wrote {folder / name}")
    print(f"trained {step - first} steps in {time.perf_counter() - loop_started:.0f} s, "
          f"{time.perf_counter() - started:.0f} s in all")
    print(f"result: {what} right, greedy {before:.3f} -> {after:.3f} (n={len(test_numbers)})")
    print("next: python edu/14_evaluate.py --compare base,sft," + stage)
    return {"step": step, "before": before, "after": after, "n": len(test_numbers),
            "rows": log.rows}


def show_replies(engine, task, indices, cfg):
    for i, reply in zip(indices, sample_rollouts(engine, task, indices, cfg, seed=0, num_samples=1,
                                                 temperature=0.0).replies):
        print(f"  {task.get_example(i)['messages'][0]['content']}|{reply!r}")


def told(share, tool, n, what):
    low, high = wilson_interval(share, n)
    return (f"{share:.1%} of {n} {what} right, greedy (95% interval {low:.1%} to {high:.1%}), "
            f"{tool:.0%} with the calculator")


def with_interval(share, n):
    """What metrics.jsonl says of an accuracy: n, and the bounds of its 95% interval."""
    low, high = wilson_interval(share, n)
    return {"accuracy": share, "accuracy_low": low, "accuracy_high": high, "accuracy_n": n}


def report_hacking(rows, before, after):
    """What the hackable reward has bought, in words."""
    paid = [row["reward"] for row in rows if row.get("reward") is not None]
    lengths = [row["length"] for row in rows if row.get("length") is not None]
    print(f"the reward went from {paid[0]:.2f} to {paid[-1]:.2f}, the problems solved from "
          f"{before:.1%} to {after:.1%}, the reply from {lengths[0]:.0f} to {lengths[-1]:.0f} "
          "tokens.")
    if paid[-1] > paid[0] and after < paid[-1] / 2:
        print("This is reward hacking. The reward pays for digits, and digits is what it got: a "
              "policy learns what you pay for, not what you mean.")
    else:
        print("No reward hacking this time, or not yet: more steps (--num-steps) may show it.")


# ---- the command line ----------------------------------------------------------------------------


def run_rl(cfg):
    try:
        train(cfg)
    except TrainingFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_script(run_rl, Config, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
