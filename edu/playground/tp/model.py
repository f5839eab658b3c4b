"""A decoder-only transformer whose every part can be exchanged or left out from the config.

B batch, T time, C channels (n_embd), H query heads, K key/value heads, D head size, V vocabulary.

Read beside: nanoGPT/model.py and nanochat/gpt.py. All linear layers are without bias, as in
nanochat; the defaults are otherwise GPT-2's. There is no KV cache: a phrase is so short that one
would cost more lines than it saves seconds.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from tp.data import IGNORED

# ---- positions -----------------------------------------------------------------------------------


def sinusoidal_table(length, width):
    """(length, width): sin and cos of t / 10000^(i/width) for even i, in turns.

    Source: Vaswani et al. 2017, section 3.5.
    """
    # angle[t, i] = t / 10000^(2i / C)
    rate = 10000.0 ** (-torch.arange(0, width, 2) / width)
    angle = torch.outer(torch.arange(length).float(), rate)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


def rotary_table(length, head_size):
    """cos and sin, each (length, D/2). Source: Su et al. 2021 (RoFormer), base 10,000."""
    rate = 10000.0 ** (-torch.arange(0, head_size, 2) / head_size)
    angle = torch.outer(torch.arange(length).float(), rate)
    return angle.cos(), angle.sin()


def apply_rotary(x, cos, sin):
    """Turn each pair (x_i, x_{i + D/2}) of x (B, heads, T, D) by its position's angle.

    The score q.k then depends on the distance of the two alone. Pairs are half a head apart, as in
    Llama and nanochat; the paper pairs neighbours.
    """
    a, b = x.chunk(2, dim=-1)  # (B, heads, T, D/2) each
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def alibi_slopes(n_head):
    """(H,): 2^(-8/H), 2^(-16/H), ..., 2^-8.

    H not a power of two: the slopes of the power below, then every other one of the power above.
    Source: Press et al. 2022, section 3 and the authors' code.
    """
    below = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * (i + 1) / below) for i in range(below)]
    slopes += [2 ** (-4 * (i + 1) / below) for i in range(0, 2 * (n_head - below), 2)]
    return torch.tensor(slopes)


def attention_bias(config):
    """What is added to the scores, (1 or H, block_size, block_size); None: plainly causal.

    -inf where query t must not see key s: s > t, or s <= t - window. With ALiBi, -slope * (t - s).
    """
    if config.window is None and config.positional_encoding != "alibi":
        return None  # scaled_dot_product_attention knows this mask, and is fastest without ours
    t = torch.arange(config.block_size)
    distance = t[:, None] - t[None, :]  # (T, T): query minus key
    bias = torch.zeros(1, *distance.shape)
    if config.positional_encoding == "alibi":
        bias = -alibi_slopes(config.n_head)[:, None, None] * distance
    hidden = (distance < 0) | (distance >= (config.window or config.block_size))
    return bias.masked_fill(hidden, -math.inf)


# ---- layers --------------------------------------------------------------------------------------


def make_norm(config):
    """A norm over C: LayerNorm (Ba et al. 2016), RMSNorm (Zhang & Sennrich 2019), or nothing."""
    kinds = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}
    return kinds[config.norm](config.n_embd, eps=1e-5) if config.norm != "none" else nn.Identity()


class Attention(nn.Module):
    """Causal self-attention, (B, T, C) -> (B, T, C), with H query heads on K key/value heads."""

    def __init__(self, config):
        super().__init__()
        C, H, K = config.n_embd, config.n_head, config.n_kv_head or config.n_head
        self.n_head, self.n_kv_head, self.head_size = H, K, C // H
        self.qk_norm = config.qk_norm
        self.c_q = nn.Linear(C, H * self.head_size, bias=False)
        self.c_k = nn.Linear(C, K * self.head_size, bias=False)
        self.c_v = nn.Linear(C, K * self.head_size, bias=False)
        self.c_proj = nn.Linear(C, C, bias=False)

    def forward(self, x, rotary, bias):
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, self.n_head, self.head_size).transpose(1, 2)  # (B, H, T, D)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_size).transpose(1, 2)  # (B, K, T, D)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_size).transpose(1, 2)
        if rotary is not None:
            q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        if self.qk_norm:
            q, k = (F.rms_norm(z, (self.head_size,)) for z in (q, k))
        # y = softmax(q k^T / sqrt(D) + bias) v
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None,
                                           enable_gqa=self.n_kv_head != self.n_head)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # heads side by side again


class MLP(nn.Module):
    """(B, T, C) -> (B, T, C), each token for itself.

    gelu and relu2 (So et al. 2021): f(x W1) W2. swiglu (Shazeer 2020): (silu(x Wg) * (x W1)) W2,
    three matrices, hence 2/3 of the width: the same number of parameters, to within rounding.
    """

    def __init__(self, config):
        super().__init__()
        self.kind = config.mlp_kind
        share = 2 / 3 if self.kind == "swiglu" else 1
        hidden = max(1, round(share * config.mlp_ratio * config.n_embd))
        self.c_fc = nn.Linear(config.n_embd, hidden, bias=False)
        if self.kind == "swiglu":
            self.c_gate = nn.Linear(config.n_embd, hidden, bias=False)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=False)

    def forward(self, x):
        h = self.c_fc(x)  # (B, T, hidden)
        if self.kind == "gelu":
            h = F.gelu(h)
        elif self.kind == "relu2":
            h = F.relu(h).square()
        else:
            h = F.silu(self.c_gate(x)) * h
        return self.c_proj(h)


class Block(nn.Module):
    """Attention, then MLP, each with its norm and its way around it; either may be left out."""

    def __init__(self, config):
        super().__init__()
        self.norm_first, self.residual = config.norm_position == "pre", config.residual
        self.dropout = nn.Dropout(config.dropout)
        self.attn = Attention(config) if config.attention_enabled else None
        self.attn_norm = make_norm(config) if config.attention_enabled else None
        self.mlp = MLP(config) if config.mlp_enabled else None
        self.mlp_norm = make_norm(config) if config.mlp_enabled else None

    def around(self, x, norm, layer):
        """pre: x + layer(norm(x)); post: norm(x + layer(x)); without residual, no `x +`."""
        y = self.dropout(layer(norm(x) if self.norm_first else x))
        y = x + y if self.residual else y
        return y if self.norm_first else norm(y)

    def forward(self, x, rotary, bias):
        if self.attn is not None:
            x = self.around(x, self.attn_norm, lambda z: self.attn(z, rotary, bias))
        if self.mlp is not None:
            x = self.around(x, self.mlp_norm, self.mlp)
        return x


# ---- the whole model -----------------------------------------------------------------------------


class Transformer(nn.Module):
    """forward(idx) -> logits (B, T, V); forward(idx, targets) -> loss in nats.

    config: ModelConfig, already checked (tp.config.check). Targets of -1 are left out of the loss.
    """

    def __init__(self, config, vocab_size):
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        C, T = config.n_embd, config.block_size
        self.wte = nn.Embedding(vocab_size, C)
        self.wpe = nn.Embedding(T, C) if config.positional_encoding == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        # After post-norm the stream is already normalised.
        self.norm = make_norm(config) if config.norm_position == "pre" else nn.Identity()
        self.lm_head = nn.Linear(C, vocab_size, bias=False)
        if config.tied_embeddings:
            self.lm_head.weight = self.wte.weight
        # Tables, not weights: they follow from the config, and no checkpoint holds them.
        bias = attention_bias(config) if config.attention_enabled else None
        self.register_buffer("bias", bias, persistent=False)
        if config.positional_encoding == "sinusoidal":
            self.register_buffer("sinusoid", sinusoidal_table(T, C), persistent=False)
        if config.positional_encoding == "rope":
            cos, sin = rotary_table(T, C // config.n_head)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    def init_weights(self):
        """model.init: see ModelConfig. Draws from torch's global generator."""
        std, kind = self.config.init_std, self.config.init
        # One block adds twice to the residual stream: attention and MLP.
        added = std / math.sqrt(2 * self.config.n_layer) if kind == "scaled" else std
        for name, weight in self.named_parameters():
            if weight.ndim < 2:
                continue  # norms begin as ones and zeros
            if name.endswith("c_proj.weight") and kind == "zero_projection":
                nn.init.zeros_(weight)
            else:
                nn.init.normal_(weight, std=added if name.endswith("c_proj.weight") else std)

    def features(self, idx):
        """(B, T) ids -> (B, T, C), what the head reads. T must not exceed block_size."""
        T = idx.shape[1]
        assert T <= self.config.block_size, (T, self.config.block_size)
        x = self.wte(idx)
        if self.wpe is not None:
            x = x + self.wpe.weight[:T]
        if self.config.positional_encoding == "sinusoidal":
            # Its entries are around 1 and the embeddings far smaller; sqrt(C) as in Vaswani et al.
            x = x * math.sqrt(x.shape[-1]) + self.sinusoid[:T]
        rope = self.config.positional_encoding == "rope"
        rotary = (self.cos[:T], self.sin[:T]) if rope else None  # (T, D/2) each
        bias = self.bias[:, :T, :T] if self.bias is not None else None
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rotary, bias)
        return self.norm(x)

    def head(self, features):
        """(..., C) -> logits (..., V)."""
        logits, cap = self.lm_head(features), self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap is not None else logits

    def forward(self, idx, targets=None, reduction="mean"):
        """reduction: mean over the trained tokens, sum, or none -> (B, T) with 0 on padding."""
        logits = self.head(self.features(idx))  # (B, T, V)
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(),
                               ignore_index=IGNORED, reduction=reduction)
        return loss.view_as(targets) if reduction == "none" else loss

    def count_parameters(self):
        """A tied matrix counts once."""
        return sum(weight.numel() for weight in self.parameters())
