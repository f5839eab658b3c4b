"""The model: a small GPT that reads characters and guesses the next one.

GPT-2's architecture (Radford et al. 2019) at the size of a notebook: learned positions, layer
normalisation before each part, causal self-attention over several heads, a feed-forward part with
GELU, and one table for reading and writing characters. nanoGPT's names, so read them side by side:
nanoGPT model.py::GPT, CausalSelfAttention (here SelfAttention), MLP (FeedForward), Block
(TransformerBlock). Different here: a key/value cache while the text fits into the context, decoding
that a reward steers, and a model file that comes with the vocabulary it was trained with.

    model, stoi, itos = load_gpt("gpt.pth")

Shapes: B rows in a batch, T time, C channels (n_embd), H heads, D = C / H, V different characters.
"""

import io
import json
import math
import os
import pickle
import tempfile
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


class UserError(Exception):
    """A mistake the user can mend: what is wrong, why it matters, the command that fixes it."""


# ---- the architecture ----------------------------------------------------------------------------


class Cache:
    """Keys and values of the text so far, so that a new character costs one position, not all."""

    def __init__(self, n_layer, shape, device):
        self.k = torch.empty(n_layer, *shape, device=device)  # (n_layer, B, H, block_size, D)
        self.v = torch.empty_like(self.k)
        self.length = 0  # positions filled; GPT.forward moves it on once all layers have written

    def insert(self, layer, k, v):
        """Store k, v (B, H, T, D) of new positions; returns those of all positions so far."""
        end = self.length + k.size(2)
        self.k[layer, :, :, self.length : end] = k
        self.v[layer, :, :, self.length : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class SelfAttention(nn.Module):
    """Every position looks back over those before it, H times in parallel: (B, T, C), same out."""

    def __init__(self, n_embd, n_head, dropout):
        super().__init__()
        self.n_head = n_head
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)  # query, key and value in one product
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, cache=None, layer=0):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, H, T, D)
                   for part in self.c_attn(x).split(C, dim=2))
        if cache is not None:
            # The fused kernel's causal mask is aligned to the first key: right for a whole prompt
            # or for one new position (which may see all), wrong for anything between.
            assert T == 1 or cache.length == 0, f"{T} positions onto a cache of {cache.length}"
            k, v = cache.insert(layer, k, v)
        # y = softmax(q k^T / sqrt(D)) v, later keys left out. No dropout in here: on a CPU it would
        # switch the fused kernel off, and cost more than it is worth at this size.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        return self.dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class FeedForward(nn.Module):
    """Each position thinks by itself: (B, T, C) -> (B, T, 4C) -> (B, T, C)."""

    def __init__(self, n_embd, dropout):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each added to what was there: (B, T, C), same out."""

    def __init__(self, n_embd, n_head, dropout):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.attn = SelfAttention(n_embd, n_head, dropout)
        self.mlp = FeedForward(n_embd, dropout)

    def forward(self, x, cache=None, layer=0):
        x = x + self.attn(self.ln_1(x), cache, layer)
        return x + self.mlp(self.ln_2(x))


def sinusoids(block_size, n_embd):
    """(T, C): each pair of channels turns with the position, the first pair fastest."""
    # angle[t, i] = t * 10000^(-2i/C)
    i, t = torch.arange((n_embd + 1) // 2), torch.arange(block_size)
    angle = torch.outer(t, 10_000.0 ** (-2 * i / n_embd))
    return torch.cat((angle.sin(), angle.cos()), dim=1)[:, :n_embd]


class GPT(nn.Module):
    """idx (B, T) of character numbers -> logits (B, T, V) for the character after each.

    vocab_size: V. block_size: the longest context, in characters. Raises ValueError for sizes that
    make no model and for a text longer than block_size.
    """

    def __init__(self, vocab_size, block_size, n_embd=128, n_layer=3, n_head=4, dropout=0.0):
        super().__init__()
        sizes = {"vocab_size": vocab_size, "block_size": block_size, "n_embd": n_embd,
                 "n_layer": n_layer, "n_head": n_head}
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if n_embd % n_head:
            raise ValueError(f"n_embd {n_embd} cannot be shared out to {n_head} heads without "
                             f"a remainder; n_embd {n_head * max(1, n_embd // n_head)} could")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it must be at least 0 and less than 1")
        self.hyperparameters = {**sizes, "dropout": dropout}
        self.block_size = block_size
        self.wte = nn.Embedding(vocab_size, n_embd)  # what a character is
        self.wpe = nn.Embedding(block_size, n_embd)  # where it stands
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TransformerBlock(n_embd, n_head, dropout)
                                    for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # reading and writing share one table
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """For few updates on little text: each linear layer keeps the scale of what it reads.

        GPT-2's std of 0.02 is for thousands of channels; with a hundred of them attention starts
        near uniform, and a short run ends there. Positions are learned, but begin as sinusoids
        (Vaswani et al. 2017), in which "one to the left" is the same rotation everywhere.
        """
        C, L = self.hyperparameters["n_embd"], self.hyperparameters["n_layer"]
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith("c_proj.weight"):  # 2L of them add up in the residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * L))
            elif p.dim() == 2:
                nn.init.normal_(p, std=C**-0.5)
        self.wpe.weight.copy_(sinusoids(self.block_size, C) * C**-0.5)

    def forward(self, idx, cache=None):
        B, T = idx.shape
        start = cache.length if cache is not None else 0
        if start + T > self.block_size:
            raise ValueError(f"{start + T} characters do not fit a block_size of {self.block_size}")
        x = self.wte(idx) + self.wpe.weight[start : start + T]  # (B, T, C)
        x = self.drop(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, cache, layer)
        if cache is not None:
            cache.length += T
        return self.lm_head(self.ln_f(x))

    # ---- writing ---------------------------------------------------------------------------------

    def generate(self, idx, max_new_tokens, temperature=1.0):
        """idx (B, T) -> (B, T + max_new_tokens): draw the next character, append it, repeat.

        temperature 0 takes the likeliest character; 1 draws from the model's own distribution. Only
        the last block_size characters are seen. Raises ValueError for an empty idx or a negative
        temperature. Source: nanoGPT model.py::GPT.generate.
        """
        return self.generate_reward_augmented(idx, max_new_tokens, None, 0.0, temperature)

    @torch.no_grad()
    def generate_reward_augmented(self, idx, max_new_tokens, reward_fn, beta, temperature=1.0):
        """generate(), with each next character drawn from q(c) ~ p(c) exp(beta r(c)).

        reward_fn(idx) gives r, the reward of each candidate after idx (B, T): a tensor that
        broadcasts to (B, V). Of all distributions q this one has the greatest
        E_q[r] - KL(q || p) / beta: beta 0 is the model itself, a large one forgets it, a negative
        one avoids what is rewarded. temperature divides both terms.
        Raises ValueError as generate(), and for a beta or a reward that is not finite.
        """
        check_decoding(idx, max_new_tokens, temperature, beta)
        was_training = self.training
        self.eval()  # dropout would disturb every step
        cache = self.new_cache(idx.size(0))
        for _ in range(max_new_tokens):
            scores = self.next_logits(idx, cache)  # (B, V)
            if beta:
                # log q(c) = log p(c) + beta r(c) + constant; the logits are log p + constant
                scores = scores + beta * finite_reward(reward_fn(idx), scores)
            idx = torch.cat((idx, choose(scores, temperature)), dim=1)
        self.train(was_training)
        return idx

    def new_cache(self, batch_size):
        h = self.hyperparameters
        shape = (batch_size, h["n_head"], self.block_size, h["n_embd"] // h["n_head"])
        return Cache(h["n_layer"], shape, self.wte.weight.device)

    def next_logits(self, idx, cache):
        """(B, V) after idx (B, T), with the cache for as long as the text fits into the context.

        After that the window slides: every character gets a new position, so what the cache holds
        is no longer true, and the last block_size characters are read again each time.
        """
        if idx.size(1) > self.block_size:
            return self(idx[:, -self.block_size :])[:, -1]
        return self(idx[:, cache.length :], cache)[:, -1]


def check_decoding(idx, max_new_tokens, temperature, beta):
    if idx.dim() != 2 or idx.size(1) == 0:
        raise ValueError(f"idx has the shape {tuple(idx.shape)}; (B, T) with T > 0 is needed: "
                         "there must be something to continue, if only a line break")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it cannot be negative")
    if not 0 <= temperature < math.inf:  # not-a-number neither
        raise ValueError(f"temperature is {temperature}; it must be 0 (the likeliest character) or "
                         "more, and finite")
    if not math.isfinite(beta):
        raise ValueError(f"beta is {beta}; it must be finite")


def finite_reward(reward, scores):
    """reward as a tensor beside scores (B, V). Raises ValueError if it is not finite."""
    reward = torch.as_tensor(reward, dtype=scores.dtype, device=scores.device)
    if not reward.isfinite().all():
        raise ValueError("reward_fn gave a reward that is not finite; use a large number instead")
    return reward


def choose(scores, temperature):
    """One character for each row of scores (B, V): (B, 1)."""
    if temperature == 0:
        return scores.argmax(-1, keepdim=True)
    # minus the largest first: scores / temperature would overflow at tiny temperatures, the tiniest
    # of which are 0 in float32
    scores = (scores - scores.amax(-1, keepdim=True)) / max(temperature, 1e-30)
    return torch.multinomial(scores.softmax(-1), 1)


# ---- a model on disk: gpt.pth and, beside it, gpt.json -------------------------------------------

FORMAT = "personal_gpt"


def write_whole(path, write):
    """write(file) into a temporary file beside path, then give it the name: never half a file."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~current_umask())  # mkstemp's own are for the owner alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def settings_path(path):
    """gpt.pth -> gpt.json"""
    return Path(path).with_suffix(".json")


def save_settings(path, settings):
    text = json.dumps({"format": FORMAT, **settings}, indent=1, ensure_ascii=False) + "\n"
    write_whole(settings_path(path), lambda file: file.write(text.encode()))


def save_gpt(path, model, vocabulary, **about):
    """Write the state dict to path, and vocabulary, hyperparameters and `about` to the JSON."""
    whole = io.BytesIO()  # on a full disk, torch.save on a file would hide the reason
    torch.save(model.state_dict(), whole)
    write_whole(path, lambda file: file.write(whole.getbuffer()))
    save_settings(path, {"vocabulary": vocabulary, **model.hyperparameters, **about})


def read_settings(path):
    """The JSON beside a model: vocabulary, hyperparameters, what it was trained on.

    Raises UserError if it is missing, damaged or not of this program.
    """
    beside = settings_path(path)
    try:
        settings = json.loads(beside.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{beside} is missing: it belongs to {path} and holds the vocabulary, "
                        "without which its numbers mean nothing; copy it along, or train again:\n"
                        f"  python train.py --text data.txt --output {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{beside} cannot be read ({error}); train again:\n"
                        f"  python train.py --text data.txt --output {path}") from None
    if not isinstance(settings, dict) or settings.get("format") != FORMAT:
        raise UserError(f"{beside} was not written by train.py: it lacks \"format\": \"{FORMAT}\"")
    return settings


def load_gpt(path, device="cpu"):
    """(model, stoi, itos) of a file that train.py, advanced.py or explore.py wrote.

    stoi maps a character to its number, itos (a list) a number to its character. Nothing in the
    file is executed (weights_only). Raises UserError for a file that is missing, damaged or of
    another kind, and for a JSON beside it that does not fit.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such model; train one first:\n"
                        f"  python train.py --text data.txt --output {path}")
    settings = read_settings(path)
    try:
        vocabulary = "".join(settings["vocabulary"])
        names = ("vocab_size", "block_size", "n_embd", "n_layer", "n_head", "dropout")
        model = GPT(**{name: settings[name] for name in names})
        if not len(vocabulary) == len(set(vocabulary)) == settings["vocab_size"]:
            raise ValueError(f"{len(set(vocabulary))} different characters for a vocab_size of "
                             f"{settings['vocab_size']}")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # the last: too large to make
        raise UserError(f"{settings_path(path)} does not describe a model ({error})") from None
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, EOFError, RuntimeError, TypeError, ValueError, AttributeError, KeyError,
            pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} does not fit {settings_path(path)}, or is damaged: "
                        f"{reason}") from None
    stoi = {character: i for i, character in enumerate(vocabulary)}
    return model.to(device).eval(), stoi, list(vocabulary)
