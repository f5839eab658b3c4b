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
    GQA with 2 of 6 key/value heads: attention has 24,576 parameters instead of 36,864 (-33%),
    causality: outputs before a changed token move by ... ok
    result: promises kept - -> 11 (n=11)
    next: python edu/05_engine.py

Writes:
    nothing
"""
import os
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


# ---- the idea ------------------------------------------------------------------------------------
@dataclass
class BlockConfig:
    """Sizes of a model, named as in nanochat/gpt.py::GPTConfig; one block needs the last three."""

    sequence_len: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768


class CausalSelfAttention(nn.Module):
    """Every token gathers from itself and the tokens before it: (B, T, C) -> (B, T, C).

    H query heads share K key/value heads in groups of H/K (GQA, arXiv:2305.13245). Raises
    ValueError for sizes that do not divide. Source: nanochat/gpt.py::CausalSelfAttention.
    """

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, C = config.n_head, config.n_kv_head, config.n_embd
        if min(self.n_head, self.n_kv_head, C) < 1:
            raise ValueError(f"n_head={self.n_head}, n_kv_head={self.n_kv_head} and n_embd={C} "
                             "must all be at least 1")
        if C % (2 * self.n_head):
            raise ValueError(f"n_embd={C} / n_head={self.n_head} must be a whole, even number: "
                             "each head gets an equal share, and RoPE turns channels in pairs")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} must be a multiple of n_kv_head="
                             f"{self.n_kv_head}: query heads share key/value heads in equal groups")
        self.head_dim = C // self.n_head
        self.c_q = nn.Linear(C, self.n_head * self.head_dim, bias=False)
        self.c_k = nn.Linear(C, self.n_kv_head * self.head_dim, bias=False)
        self.c_v = nn.Linear(C, self.n_kv_head * self.head_dim, bias=False)
        self.c_proj = nn.Linear(C, C, bias=False)

    def forward(self, x, cos_sin=None):
        B, T, C = x.shape
        cos, sin = cos_sin or precompute_rotary(T, self.head_dim, device=x.device)
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        # Values are not rotated: position decides who listens to whom, not what is said.
        q, k = apply_rotary_emb(q, cos, sin), apply_rotary_emb(k, cos, sin)
        # QK-norm: |q| = |k| = sqrt(D), so no score can exceed sqrt(D), however large weights grow.
        q, k = norm(q), norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, D)
        # y_h = softmax(q_h k_g^T / sqrt(D) + causal mask) v_g,  g = h // (H/K)
        # enable_gqa reads each k_g, v_g for a whole group of heads: no repeated copies in memory.
        y = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=self.n_head != self.n_kv_head)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # heads side by side again


class Block(nn.Module):
    """Attention mixes between tokens, the MLP within each: (B, T, C) -> (B, T, C).

    Both add to x and never replace it, so a gradient reaches every layer undiminished. Only their
    input is normalised ("pre-norm"). Source: nanochat/gpt.py::Block.
    """

    def __init__(self, config):
        super().__init__()
        self.attn = CausalSelfAttention(config)
        self.mlp = MLP(config)

    def forward(self, x, cos_sin=None):
        # x <- x + attn(norm(x));  x <- x + mlp(norm(x))
        x = x + self.attn(norm(x), cos_sin)
        return x + self.mlp(norm(x))


# ---- the loop ------------------------------------------------------------------------------------
# Each function below measures one part and yields (promise, number, was it kept?).
def rope_promises(head_dim):
    """RoPE on one query and one key, put at many positions."""
    cos, sin = precompute_rotary(1024, head_dim)
    q, k = torch.randn(2, 1, 1, 1, head_dim).expand(2, 1, 1024, 1, head_dim)  # same at every t
    rotated_q, rotated_k = apply_rotary_emb(q, cos, sin), apply_rotary_emb(k, cos, sin)
    moved = (rotated_q - q)[:, 0].abs().max().item()
    yield "RoPE: position 0 is turned by", moved, moved == 0
    stretch = (rotated_q.norm(dim=-1) / q.norm(dim=-1) - 1).abs().max().item()
    yield "RoPE: lengths change by at most", stretch, stretch < 1e-5
    scores = torch.einsum("btd,bsd->bts", rotated_q[:, :, 0], rotated_k[:, :, 0])[0]  # (T, T)
    near, far, other = scores[9, 2].item(), scores[1009, 1002].item(), scores[10, 2].item()
    yield f"RoPE: score {near:+.4f} at (9, 2) and at (1009, 1002): gap", abs(near - far), (
        abs(near - far) < 1e-4 * head_dim)
    yield "RoPE: score one step further apart, at (10, 2): gap", abs(near - other), near != other
    swapped = (norm(rotated_q) - apply_rotary_emb(norm(q), cos, sin)).abs().max().item()
    yield "RoPE then norm, against norm then RoPE: gap", swapped, swapped < 1e-5


def attention_promises(block, x):
    """Bounded scores, no look into the future, and grouping as mere sharing."""
    attn = block.attn
    D = attn.head_dim
    q, k = norm(1000 * torch.randn(2, 999, D))
    largest = (q @ k.T / D ** 0.5).abs().max().item()
    yield f"QK-norm: inputs x 1000, largest score (bound {D ** 0.5:.2f})", largest, (
        largest <= D ** 0.5 * (1 + 1e-5))
    t = x.size(1) // 2
    changed = x.clone()
    changed[:, t] += 1
    moved = (block(changed) - block(x)).abs().amax(dim=(0, 2))  # (T,)
    before, after = moved[:t].max().item(), moved[t:].min().item()
    yield "causality: outputs before a changed token move by", before, before == 0
    yield "causality: outputs from it on move by at least", after, after > 0
    full = CausalSelfAttention(BlockConfig(
        n_head=attn.n_head, n_kv_head=attn.n_head, n_embd=x.size(-1)))
    state = attn.state_dict()
    for name in ("c_k.weight", "c_v.weight"):  # (K*D, C) -> (H*D, C): one copy per query head
        heads = state[name].view(attn.n_kv_head, D, -1)
        state[name] = heads.repeat_interleave(attn.n_head // attn.n_kv_head, 0).flatten(0, 1)
    full.load_state_dict(state)
    gap = (full(x) - attn(x)).abs().max().item()
    yield "GQA, against every head with its own copy of K and V: gap", gap, gap < 1e-5


def mlp_and_residual_promises(block, x):
    """Hidden units that ReLU^2 switches off, and what a block is before it has learned anything."""
    off = (F.relu(block.mlp.c_fc(norm(x))) == 0).float().mean().item()
    yield "ReLU^2: share of hidden units that are off", off, 0 < off < 1
    fresh = Block(BlockConfig(n_head=block.attn.n_head, n_kv_head=block.attn.n_kv_head,
                              n_embd=x.size(-1)))
    nn.init.zeros_(fresh.attn.c_proj.weight)  # nanochat starts from here: each block a no-op,
    nn.init.zeros_(fresh.mlp.c_proj.weight)  # which training then fills in
    moved = (fresh(x) - x).abs().max().item()
    yield "residual: with both c_proj zero the block changes x by", moved, moved == 0


def print_parameters(block):
    """One row per matrix, then what grouping saved against one K/V head per query head."""
    for name, weight in block.named_parameters():
        print(f"  {name:<18} {tuple(weight.shape)!s:>12} {weight.numel():>9,} parameters")
    attn = block.attn
    ours = sum(weight.numel() for weight in attn.parameters())
    full = 4 * attn.c_q.weight.numel()
    cache, full_cache = (2 * heads * attn.head_dim * 4 for heads in (attn.n_kv_head, attn.n_head))
    print(f"GQA with {attn.n_kv_head} of {attn.n_head} key/value heads: attention has {ours:,} "
          f"parameters instead of {full:,} ({ours / full - 1:+.0%}),\n"
          f"  and keeps {cache:,} bytes per token in the cache instead of {full_cache:,} "
          f"({cache / full_cache - 1:+.0%})")


# ---- the command line ----------------------------------------------------------------------------
@torch.no_grad()
def run(cfg):
    # 1. build  2. one pass  3. count  4. measure every promise
    torch.manual_seed(cfg.seed)
    if cfg.batch_size < 1 or cfg.sequence_len < 2:
        raise UserError(f"--batch-size {cfg.batch_size} --sequence-len {cfg.sequence_len}: there "
                        "must be at least 1 row, and 2 tokens to tell past from future. "
                        "Try: python edu/04_block.py --batch-size 1 --sequence-len 2")
    try:
        block = Block(BlockConfig(sequence_len=cfg.sequence_len, n_head=cfg.n_head,
                                  n_kv_head=cfg.n_kv_head, n_embd=cfg.n_embd))
    except ValueError as error:
        raise UserError(f"{error}. Sizes that fit: python edu/04_block.py --n-embd 96 --n-head 6 "
                        "--n-kv-head 2") from None
    size = sum(weight.numel() for weight in block.parameters())
    print(f"04 block - cpu - float32 - {size / 1e6:.1f}M params - seed {cfg.seed}")
    x = torch.randn(cfg.batch_size, cfg.sequence_len, cfg.n_embd)
    print(f"input {tuple(x.shape)} -> output {tuple(block(x).shape)}")
    print_parameters(block)
    kept = []
    for promises in (rope_promises(block.attn.head_dim), attention_promises(block, x),
                     mlp_and_residual_promises(block, x)):
        for promise, number, ok in promises:
            print(f"{promise:<62} {number:>9.3g}  {'ok' if ok else 'BROKEN'}")
            kept.append(ok)
    print(f"result: promises kept - -> {sum(kept)} (n={len(kept)})")
    print("next: python edu/05_engine.py")
    return 0 if all(kept) else 1


def main(argv: list[str] | None = None) -> int:
    return run_script(run, Config, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
