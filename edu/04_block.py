"""Build one modern transformer block, and check by numbers what each of its parts promises.

Goal:
    A `Block(config)` that takes a tensor (B, T, C) and returns one of the same shape, made of the
    parts that today's models share: RoPE, QK-norm, grouped-query attention, ReLU^2. Every
    promise of those parts (scores know only distances, no token sees the future) is measured.

You will learn:
    - how a rotation turns "where am I" into "how far apart are we"
    - why queries and keys are normalised, and why it does not matter whether before or after RoPE
    - what grouped-query attention saves: parameters a little, cache a lot
    - why a block adds to its input instead of replacing it

Read beside:
    nanochat/gpt.py::apply_rotary_emb, CausalSelfAttention, MLP, Block - same names and same signs.
    Simpler here: no KV cache (05_engine.py adds it) and cos/sin in float32, since bfloat16 keeps
    only 8 bits of an angle. Better here: a cos/sin table of the wrong length is refused, where
    broadcasting would silently give every token the same position.
    Papers: RoPE arXiv:2104.09864, GQA arXiv:2305.13245, QK-norm arXiv:2302.05442,
    ReLU^2 arXiv:2109.08668, RMSNorm arXiv:1910.07467.

Run:
    python edu/04_block.py
    python edu/04_block.py --n-head 8 --n-kv-head 1 --n-embd 256

Expect:
    04 block - cpu - float32 - 0.1M params - seed 1337
    input (2, 16, 96) -> output (2, 16, 96)
    causality: outputs before a changed token move by        0       ...  ok
    result: promises kept - -> 10 (n=10)
    next: python edu/05_engine.py

Writes:
    nothing
"""
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

# Shapes: B batch, T time, C channels (n_embd), H query heads, K key/value heads, D head size.


# ---- settings ------------------------------------------------------------------------------------
@dataclass
class Config:
    batch_size: int = 2
    """rows of the random input (B)"""
    sequence_len: int = 16
    """tokens per row (T)"""
    n_embd: int = 96
    """channels (C); n_embd / n_head must be a whole, even number"""
    n_head: int = 6
    """query heads (H)"""
    n_kv_head: int = 2
    """key/value heads (K); must divide n_head; equal to n_head = no grouping"""
    seed: int = 1337
    """for the weights and the random input"""


# ---- shared blocks -------------------------------------------------------------------------------
# --- shared: cli (home: 00_tiny_world.py) ---
class UserError(Exception):
    """A mistake the user can mend: what is wrong, why it matters, the command that fixes it."""


def run_script(run, config_class, argv, description):
    """Turn argv into a config_class, call run(config), and return the exit code.

    0 or whatever run returns; 2 for a UserError, shown as one message without a traceback;
    130 for Ctrl-C. tyro itself exits with 2 on a flag it does not know.
    """
    config = tyro.cli(config_class, args=argv, description=description)
    try:
        return run(config) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
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
