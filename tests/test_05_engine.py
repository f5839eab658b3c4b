"""Challenge 05: the cache changes the speed and nothing else, and the engine keeps its promises.

Three kinds of model appear here. `random_model` has weights that make every path matter. In
`chain_model` the next token depends on the last one only, with probabilities written down by the
test, so that what the engine must write is known without running it. `by_hand` and transformers'
NanoChatForCausalLM are oracles: the same weights, somebody else's code.

Legend: B batch, T time, C channels, H heads, D head size, V vocab.
"""

import json
import math
import os
import pickle

import pytest
import torch
from conftest import load

engine = load("05_engine")

SPECIALS = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>",
            "<|assistant_end|>", "<|python_start|>", "<|python_end|>", "<|output_start|>",
            "<|output_end|>"]  # fmt: skip
BOS, END, PYTHON_START, PYTHON_END, OUTPUT_START, OUTPUT_END = (256, 260, 261, 262, 263, 264)


class ByteTokenizer:
    """256 bytes and nine special tokens: all that an engine asks of a tokenizer."""

    def encode(self, text, prepend=None):
        before = [] if prepend is None else [self.encode_special(prepend)]
        return before + list(text.encode())

    def decode(self, ids):
        parts = (bytes([i]) if i < 256 else SPECIALS[i - 256].encode() for i in ids)
        return b"".join(parts).decode("utf-8", errors="replace")

    def encode_special(self, token):
        return 256 + SPECIALS.index(token)

    def get_bos_token_id(self):
        return BOS

    def get_vocab_size(self):
        return 265


# ---- models --------------------------------------------------------------------------------------

# All sizes different, so that a swapped axis cannot hide: 6 heads of 8 channels, 2 for the keys.
SIZES = dict(sequence_len=24, vocab_size=265, n_layer=3, n_head=6, n_kv_head=2, n_embd=48)


def random_model(seed=1, **changes):
    """A GPT whose every weight is random and large enough for every part of it to show."""
    torch.manual_seed(seed)
    model = engine.GPT(engine.GPTConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0.0, 1.0 if "wte" in name else 1.5 / weight.shape[1] ** 0.5)
    return model


def chain_model(transitions, sequence_len=64):
    """A GPT that is a Markov chain: {token: {next token: probability}}; others go to themselves.

    Each block adds nothing (its last matrices are zero), each embedding has one channel of its own,
    and the head turns that channel into log-probabilities, through the softcap.
    """
    V, C = 265, 268  # 2 heads of 134 channels
    model = engine.GPT(engine.GPTConfig(sequence_len=sequence_len, vocab_size=V, n_layer=1,
                                        n_head=2, n_kv_head=2, n_embd=C)).eval()
    logits = torch.full((V, V), -14.9)  # [last, next]; 265 e^-29.8 is 3e-11: never drawn
    for token in range(V):
        for following, p in transitions.get(token, {token: 1.0}).items():
            logits[token, following] = 14.9 + math.log(p)
    with torch.no_grad():
        model.transformer.wte.weight.copy_(torch.eye(V, C))
        # hidden = sqrt(C) e_token, and logit = 15 tanh(hidden . w / 15)
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, :V] = 15.0 * torch.atanh(logits.T / 15.0) / C**0.5
        for block in model.transformer.h:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
    return model


def script_of(*texts):
    """Transitions that write each text (str or ids), every token going to the one after it."""
    table = {}
    for text in texts:
        ids = list(text.encode()) if isinstance(text, str) else text
        for last, following in zip(ids, ids[1:]):
            assert table.get(last, {following: 1.0}) == {following: 1.0}, "a chain has no memory"
            table[last] = {following: 1.0}
    return table


def chain_engine(transitions, **options):
    return engine.Engine(chain_model(transitions, **options), ByteTokenizer())


def random_prompts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


def greedy_by_recomputing(model, tokens, count):
    """What the engine must write at temperature 0, by the dumbest loop there is."""
    ids = list(tokens)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids


class RowCounter:
    """Counts the tokens that enter the model: a list of (rows, columns), one for each pass."""

    def __init__(self, model):
        self.passes = []
        model.transformer.wte.register_forward_hook(self.note)

    def note(self, module, args, output):
        shape = tuple(args[0].shape)
        self.passes.append(shape if len(shape) == 2 else (*shape, 1))


def small_cache(model, batch, room=None):
    config = model.config
    return engine.KVCache(batch, config.n_layer, config.n_kv_head, room or config.sequence_len,
                          config.n_embd // config.n_head)


@torch.no_grad()
def logits_in_pieces(model, ids, pieces):
    """Logits (B, T, V) of ids (B, T) fed through one cache, `pieces` tokens at a time."""
    cache, parts, begin = small_cache(model, len(ids)), [], 0
    for length in pieces:
        parts.append(model(ids[:, begin : begin + length], kv_cache=cache))
        begin += length
    assert begin == ids.size(1) == cache.get_pos()
    return torch.cat(parts, dim=1)


@torch.no_grad()
def by_hand(model, ids):
    """Logits (B, T, V) in float64, written out: complex rotations, a softmax for each query."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    config = model.config
    D, group = config.n_embd // config.n_head, config.n_head // config.n_kv_head

    def unit_rms(x):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def rotate(x):  # (B, T, H, D): channel i and i + D/2 are one complex number
        number = torch.complex(x[..., : D // 2], x[..., D // 2 :])
        angle = torch.arange(ids.size(1))[:, None] * 10_000.0 ** (-torch.arange(D // 2) * 2.0 / D)
        turn = torch.polar(torch.ones_like(angle), -angle).to(number.dtype)[:, None]
        return torch.cat(((number * turn).real, (number * turn).imag), dim=-1)

    x = unit_rms(weights["transformer.wte.weight"][ids])
    B, T, C = x.shape
    for layer in range(config.n_layer):
        attn, mlp = f"transformer.h.{layer}.attn.", f"transformer.h.{layer}.mlp."
        inside = unit_rms(x)
        q, k, v = (
            (inside @ weights[f"{attn}c_{letter}.weight"].T).view(B, T, -1, D) for letter in "qkv"
        )
        q, k, y = unit_rms(rotate(q)), unit_rms(rotate(k)), torch.zeros(B, T, C).double()
        for b in range(B):
            for h in range(config.n_head):
                for t in range(T):
                    seen = slice(0, t + 1)
                    weight = (k[b, seen, h // group] @ q[b, t, h] / D**0.5).softmax(-1)
                    y[b, t, h * D : (h + 1) * D] = weight @ v[b, seen, h // group]
        x = x + y @ weights[attn + "c_proj.weight"].T
        inside = (unit_rms(x) @ weights[mlp + "c_fc.weight"].T).clamp(min=0.0) ** 2
        x = x + inside @ weights[mlp + "c_proj.weight"].T
    return 15.0 * torch.tanh(unit_rms(x) @ weights["lm_head.weight"].T / 15.0)


# ---- the model -----------------------------------------------------------------------------------


def test_the_model_is_the_one_written_out_by_hand():
    """Silent bugs 8 and 9: rotation layout and sign, attention scale 1/sqrt(D), softcap, GQA."""
    model, ids = random_model(), torch.tensor(random_prompts(7, 7))
    with torch.no_grad():
        assert (model(ids) - by_hand(model, ids)).abs().max() < 1e-4


def test_silent_bug_8_attention_sees_only_differences_of_positions():
    """Every position moved by 5: the same logits. The order of the tokens, however, matters."""
    model, longer = random_model(sequence_len=11), random_model(sequence_len=24)
    ids = torch.tensor(random_prompts(11))
    with torch.no_grad():
        here = model(ids)
        model.cos, model.sin = longer.cos[:, 5:16], longer.sin[:, 5:16]
        assert (model(ids) - here).abs().max() < 1e-4
        swapped = model(ids[:, [1, 0, *range(2, 11)]])
    assert (swapped[:, -1] - here[:, -1]).abs().max() > 1e-2


def test_silent_bug_9_a_fresh_model_knows_nothing_and_its_head_is_its_own():
    """All logits are 0, so the loss is ln 265 = 5.5797; wte and lm_head are two tensors."""
    model = engine.GPT(engine.GPTConfig(**SIZES))
    ids = torch.tensor(random_prompts(9, 9))
    assert model(ids, targets=ids).item() == pytest.approx(math.log(265), abs=1e-5)
    assert model.lm_head.weight.data_ptr() != model.transformer.wte.weight.data_ptr()


def test_the_loss_is_the_mean_over_the_targets_that_count():
    """-1 is ignored; sum and none agree with the mean; nothing to learn is 0, not nan."""
    model, ids = random_model(), torch.tensor(random_prompts(6, 6))
    targets = torch.tensor([[-1, 3, -1, 5, 7, -1], [9, -1, -1, -1, -1, 2]])
    logp = torch.log_softmax(model(ids), dim=-1)
    wanted = [-logp[i, t, targets[i, t]] for i in range(2) for t in range(6) if targets[i, t] >= 0]
    wanted = torch.stack(wanted)
    assert model(ids, targets).item() == pytest.approx(wanted.mean().item(), rel=1e-5)
    total = model(ids, targets, loss_reduction="sum")
    assert total.item() == pytest.approx(wanted.sum().item(), rel=1e-5)
    each = model(ids, targets, loss_reduction="none")
    assert torch.allclose(each[each != 0], wanted, atol=1e-5) and each.numel() == 12
    nothing = model(ids, torch.full_like(ids, -1))
    nothing.backward()
    assert nothing.item() == 0.0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("n_kv_head", [1, 2, 6])
def test_a_state_dict_of_nanochat_loads_strictly(n_kv_head):
    """Names and shapes as nanochat has them, listed by hand: all are there and no other."""
    C, shapes = 48, {"transformer.wte.weight": (265, 48), "lm_head.weight": (265, 48)}
    for layer in range(3):
        block = f"transformer.h.{layer}."
        shapes[block + "attn.c_q.weight"] = (C, C)
        shapes[block + "attn.c_k.weight"] = (8 * n_kv_head, C)
        shapes[block + "attn.c_v.weight"] = (8 * n_kv_head, C)
        shapes[block + "attn.c_proj.weight"] = (C, C)
        shapes[block + "mlp.c_fc.weight"] = (4 * C, C)
        shapes[block + "mlp.c_proj.weight"] = (C, 4 * C)
    model = random_model(n_kv_head=n_kv_head)
    model.load_state_dict({name: torch.randn(shape) for name, shape in shapes.items()}, strict=True)
    assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == shapes


@torch.no_grad()
def test_more_tokens_than_the_context_are_refused():
    model = random_model(n_layer=1)
    assert model(torch.zeros(1, 24, dtype=torch.long)).shape == (1, 24, 265)
    with pytest.raises(ValueError, match="25"):
        model(torch.zeros(1, 25, dtype=torch.long))
    cache = small_cache(model, 1, room=100)
    model(torch.zeros(1, 24, dtype=torch.long), kv_cache=cache)
    with pytest.raises(ValueError, match="25"):
        model(torch.zeros(1, 1, dtype=torch.long), kv_cache=cache)


# ---- the cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [dict(), dict(n_kv_head=6), dict(n_kv_head=1, n_layer=1)])
@pytest.mark.parametrize(
    "pieces",
    [(24,), (1, 23), (9, 15), (23, 1), (4, 7, 2, 11), (1,) * 24, (10,) + (1,) * 14],
    ids=lambda pieces: "+".join(map(str, pieces)) if len(pieces) < 9 else f"{pieces[0]}+1+1...",
)
def test_silent_bug_2_cached_logits_are_uncached_logits(pieces, heads):
    """However the 24 tokens that fill the context are cut, and with shared keys: to 1e-5."""
    model, ids = random_model(**heads), torch.tensor(random_prompts(24, 24, 24))
    with torch.no_grad():
        assert (logits_in_pieces(model, ids, pieces) - model(ids)).abs().max() <= 1e-5


@pytest.mark.parametrize("pieces", [(12,), (5, 7), (1,) * 12])
def test_silent_bug_2_a_token_never_changes_the_logits_before_it(pieces):
    model, (first, other) = random_model(), random_prompts(12, 12)
    before = logits_in_pieces(model, torch.tensor([first]), pieces)
    for t in range(12):
        changed = torch.tensor([first[:t] + [other[t]] + first[t + 1 :]])
        after = logits_in_pieces(model, changed, pieces)
        assert (after[:, :t] - before[:, :t]).abs().max() <= 1e-6 if t else True
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3
        assert t == 11 or (after[:, -1] - before[:, -1]).abs().max() > 1e-5


def test_a_cache_is_one_tensor_and_gives_back_what_was_put_in():
    """(B, n_layer, 2, n_kv_head, max_seq_len, head_dim) = (2, 3, 2, 5, 7, 4)."""
    cache = engine.KVCache(2, 3, 5, 7, 4)
    put = torch.randn(2, 3, 2, 5, 7, 4)
    for begin, end in ((0, 3), (3, 4), (4, 7)):
        for layer in range(3):
            assert cache.get_pos() == begin  # it moves when the last layer has written
            k_all, v_all = cache.insert_kv(layer, put[:, layer, 0, :, begin:end],
                                           put[:, layer, 1, :, begin:end])
            assert torch.equal(k_all, put[:, layer, 0, :, :end])
            assert torch.equal(v_all, put[:, layer, 1, :, :end])
    assert cache.get_pos() == 7


def test_a_full_cache_raises_and_says_how_full():
    cache = engine.KVCache(1, 1, 1, 4, 2)
    cache.insert_kv(0, torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
    with pytest.raises(ValueError, match="full.*5.*4"):
        cache.insert_kv(0, torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    assert cache.get_pos() == 3


# ---- greedy decoding -----------------------------------------------------------------------------


@pytest.mark.parametrize("n_kv_head", [1, 2, 6])
def test_the_engine_writes_what_recomputing_everything_writes(n_kv_head):
    model = random_model(n_kv_head=n_kv_head)
    for prompt in random_prompts(1, 5, 13):
        (row,), _ = engine.Engine(model, ByteTokenizer()).generate_batch(
            [prompt], max_tokens=24 - len(prompt), temperature=0.0)
        wanted = greedy_by_recomputing(model, prompt, 24 - len(prompt))
        stop = next((i + 1 for i, t in enumerate(wanted) if i >= len(prompt) and t in (BOS, END)),
                    len(wanted))  # fmt: skip
        assert row == wanted[:stop]


def test_prompts_of_different_lengths_are_decoded_as_if_each_were_alone():
    model, prompts = random_model(), random_prompts(1, 9, 4, 9, 2)
    rows, masks = engine.Engine(model, ByteTokenizer()).generate_batch(
        prompts, num_samples=2, max_tokens=12, temperature=0.0)
    assert len(rows) == len(masks) == 10
    for i, (row, mask) in enumerate(zip(rows, masks)):
        prompt = prompts[i // 2]
        assert row[: len(prompt)] == prompt and len(row) > len(prompt)
        assert row == greedy_by_recomputing(model, prompt, 12)[: len(row)]
        assert len(row) == len(prompt) + 12 or row[-1] in (BOS, END)
        assert mask == [0] * len(prompt) + [1] * (len(row) - len(prompt))


@torch.inference_mode()
def test_logits_of_a_ragged_batch_are_those_of_each_row_alone():
    """To 1e-5, after the prefill and after each of six decode steps."""
    if not hasattr(engine, "DecodeStep"):
        pytest.skip("looks inside our engine")
    for heads in (dict(), dict(n_kv_head=6)):
        model, rows = random_model(**heads), random_prompts(3, 8, 1, 8)
        logits, cache = engine.Engine(model, ByteTokenizer()).prefill(rows, 6)
        decode_step = engine.DecodeStep(model)
        for column in random_prompts(4, 4, 4, 4, 4, 4, seed=5):
            for i, row in enumerate(rows):
                assert (logits[i] - model(torch.tensor([row]))[0, -1]).abs().max() <= 1e-5
            logits = decode_step(torch.tensor(column), cache)
            rows = [row + [token] for row, token in zip(rows, column)]


def test_an_engine_sees_what_training_has_changed():
    """The same engine, other weights in the same model: the text of the new weights."""
    model, other, prompt = random_model(1), random_model(2), random_prompts(5)[0]
    talker = engine.Engine(model, ByteTokenizer())
    before = talker.generate_batch([prompt], max_tokens=10, temperature=0.0)[0][0]
    model.load_state_dict(other.state_dict())
    after = talker.generate_batch([prompt], max_tokens=10, temperature=0.0)[0][0]
    assert before != after == greedy_by_recomputing(other, prompt, 10)[: len(after)]


def test_generation_streams_a_column_at_a_time():
    """One pass over the prompt before the first column, one more for each column after it."""
    model = random_model()
    counter = RowCounter(model)
    stream = engine.Engine(model, ByteTokenizer()).generate([1, 2, 3, 4, 5], 3, 9)
    assert counter.passes == []
    tokens, masks = next(stream)
    assert len(tokens) == len(masks) == 3 and counter.passes == [(1, 5)]
    next(stream)
    assert counter.passes == [(1, 5), (3, 1)]


def test_max_tokens_is_what_fits_when_it_is_not_given():
    (row,), _ = chain_engine({}, sequence_len=12).generate_batch([[1, 2, 3]], temperature=0.0)
    assert row == [1, 2] + [3] * 10


# ---- the oracle ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers_model():
    """random_model(n_kv_head=2) as NanoChatForCausalLM with the same weights."""
    pytest.importorskip("transformers")
    from transformers import NanoChatConfig, NanoChatForCausalLM

    model = random_model()
    theirs = NanoChatForCausalLM(
        NanoChatConfig(vocab_size=265, hidden_size=48, intermediate_size=192, num_hidden_layers=3,
                       num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=24,
                       eos_token_id=END, pad_token_id=0, bos_token_id=BOS)).eval()  # fmt: skip
    names = {"transformer.wte": "model.embed_tokens", "transformer.h.": "model.layers.",
             "attn.c_proj": "self_attn.o_proj", "attn.c_": "self_attn.", "mlp.c_fc": "mlp.fc1",
             "mlp.c_proj": "mlp.fc2"}  # fmt: skip
    weights = {}
    for name, weight in model.state_dict().items():
        for ours, their in names.items():
            name = name.replace(ours, their)
        for letter in "qkv":
            name = name.replace(f"self_attn.{letter}.", f"self_attn.{letter}_proj.")
        weights[name] = weight
    theirs.load_state_dict(weights, strict=True)
    return model, theirs


@torch.no_grad()
def test_the_same_weights_give_the_same_logits_in_transformers(transformers_model):
    ours, theirs = transformers_model
    ids = torch.tensor(random_prompts(24, 24))
    assert (ours(ids) - theirs(ids).logits).abs().max() <= 1e-4


@torch.no_grad()
def test_the_same_weights_write_the_same_text_in_transformers(transformers_model):
    ours, theirs = transformers_model
    prompts = random_prompts(6, 6, 6, seed=3)
    rows, _ = engine.Engine(ours, ByteTokenizer()).generate_batch(
        prompts, max_tokens=18, temperature=0.0)
    ids = torch.tensor(prompts)
    wanted = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=18,
                             do_sample=False)
    for row, their_row in zip(rows, wanted.tolist()):
        assert row == their_row[: len(row)]
        assert len(row) == 24 or row[-1] in (BOS, END)


# ---- sampling ------------------------------------------------------------------------------------


def chi_square(counts, probabilities, n):
    return sum((counts.get(token, 0) - n * p) ** 2 / (n * p) for token, p in probabilities.items())


def first_tokens(talker, prompt, n, **options):
    """{token: how often it came first} among n samples of one prompt."""
    ((tokens, _),) = talker.generate(prompt, n, 1, **options)
    return {token: tokens.count(token) for token in set(tokens)}


FIVE = {65: 0.5, 66: 0.25, 67: 0.125, 68: 0.0625, 69: 0.0625}


def test_every_sample_draws_its_own_first_token():
    """A fair coin thrown by 400 samples: 200 +- 10 heads. 5 sigma is 150..250, by chance 6e-7.

    An engine that draws the first token once for all samples gives 0 or 400.
    """
    counts = first_tokens(chain_engine({1: {65: 0.5, 66: 0.5}}), [1], 400)
    assert set(counts) == {65, 66} and 150 <= counts[65] <= 250


@pytest.mark.parametrize("prompts", [[[1]], [[7, 7, 1], [1]]], ids=["one prompt", "ragged batch"])
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (dict(), FIVE),
        # T = 2 takes the square root: 0.7071, 0.5, 0.3536, 0.25, 0.25 over their sum 2.0607
        (dict(temperature=2.0), {t: p**0.5 / 2.0607 for t, p in FIVE.items()}),
        # T = 1/2 squares: 0.25, 0.0625, 0.015625, 0.00390625 twice, over their sum 0.3359375
        (dict(temperature=0.5), {t: p**2 / 0.3359375 for t, p in FIVE.items()}),
        (dict(top_k=3), {65: 4 / 7, 66: 2 / 7, 67: 1 / 7}),
        (dict(top_k=1), {65: 1.0}),
        (dict(top_k=1000), FIVE),
        (dict(temperature=0.0), {65: 1.0}),
    ],
    ids=["T=1", "T=2", "T=0.5", "top 3", "top 1", "top 1000", "T=0"],
)
def test_samples_come_as_often_as_the_model_says(options, wanted, prompts):
    """Chi-square of 3000 draws: with 4 degrees of freedom it exceeds 33.4 once in a million."""
    talker, n = chain_engine({1: FIVE}), 3000 // len(prompts)
    rows, _ = talker.generate_batch(prompts, n, 1, **options)
    counts = {}
    for row in rows:
        counts[row[-1]] = counts.get(row[-1], 0) + 1
    assert set(counts) <= set(wanted), "a token was drawn that has no chance"
    assert chi_square(counts, wanted, len(rows)) < 33.4


def test_every_step_is_sampled_as_often_as_the_model_says():
    """Two tokens each go to either: 3000 rows of 4 steps give 16 equally likely texts of 4.

    Chi-square with 15 degrees of freedom exceeds 57.5 less than once in a million. This fails when
    rows share their random numbers, or steps do.
    """
    both = {65: 0.5, 66: 0.5}
    rows, _ = chain_engine({1: both, 65: both, 66: both}).generate_batch([[1]], 3000, 4)
    counts = {}
    for row in rows:
        counts[tuple(row[1:])] = counts.get(tuple(row[1:]), 0) + 1
    texts = [(a, b, c, d) for a in both for b in both for c in both for d in both]
    assert chi_square(counts, {text: 1 / 16 for text in texts}, 3000) < 57.5


def test_a_seed_gives_the_same_text_again_and_another_seed_another():
    talker, (prompt,) = engine.Engine(random_model(), ByteTokenizer()), random_prompts(4)
    once = talker.generate_batch([prompt], 3, 12, seed=1)
    assert talker.generate_batch([prompt], 3, 12, seed=1) == once
    assert talker.generate_batch([prompt], 3, 12, seed=2) != once


def test_a_text_does_not_depend_on_who_else_is_in_the_batch():
    talker = engine.Engine(random_model(), ByteTokenizer())
    a, b, c, d, e = random_prompts(5, 5, 5, 7, 2)
    for seed in range(8):

        def first_row(*prompts, num_samples=1):
            return talker.generate_batch(prompts, num_samples, 12, seed=seed)[0][0]

        alone = first_row(a)
        assert alone == first_row(a, b) == first_row(a, c, b) == first_row(a, d, e)
        assert alone == first_row(a, num_samples=4)


def test_a_text_does_not_depend_on_when_the_others_finish():
    """Row 0 stops at once, later, or never; rows 1 and 2 write the same five random letters."""
    letters = {t: FIVE for t in [2, *FIVE]}
    talker = chain_engine({**letters, 3: {END: 1.0}, 4: {5: 1.0}, 5: {6: 1.0}, 6: {END: 1.0}})
    texts = [talker.generate_batch([[first], [2], [7, 2]], 1, 20)[0] for first in (3, 4, 8)]
    assert [len(rows[0]) for rows in texts] == [2, 4, 21]
    assert texts[0][1:] == texts[1][1:] == texts[2][1:]


def test_a_token_without_a_chance_is_never_drawn_at_the_ends_of_the_interval():
    """u = 0 and the largest float32 below 1, with impossible tokens first and last."""
    if engine.sample_next_token.__code__.co_varnames[1] != "u":
        pytest.skip("your sampler takes no uniform number")
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]]).expand(3, -1)
    u = torch.tensor([0.0, 1 - 2.0**-24, 0.1])
    assert engine.sample_next_token(logits, u).tolist() == [1, 2, 1]  # p = 0, 0.269, 0.731, 0


# ---- stopping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [END, BOS])
def test_silent_bug_3_a_stop_token_ends_a_row_and_is_part_of_it(stop):
    """65 66 stop: the stop token is written, with mask 1 because the model chose it."""
    talker = chain_engine({1: {65: 1.0}, 65: {66: 1.0}, 66: {stop: 1.0}})
    rows, masks = talker.generate_batch([[9, 1]], 1, 30)
    assert rows == [[9, 1, 65, 66, stop]] and masks == [[0, 0, 1, 1, 1]]


def test_the_other_special_tokens_end_nothing():
    specials = [257, 258, 259, PYTHON_END, OUTPUT_START, OUTPUT_END]
    rows, _ = chain_engine(script_of([1, *specials, 65])).generate_batch([[1]], 1, 10)
    assert rows == [[1, *specials, 65, 65, 65, 65]]


def test_a_finished_row_yields_none_and_costs_nothing():
    """Prompts 3, 4, 8 stop after 1, 3 and never; the model sees 3, then 2, 2, then 1 row."""
    talker = chain_engine({3: {END: 1.0}, 4: {5: 1.0}, 5: {6: 1.0}, 6: {END: 1.0}})
    counter = RowCounter(talker.model)
    columns = list(talker.stream([[3], [4], [8]], max_tokens=6))
    assert [tokens for tokens, _ in columns] == [
        [END, 5, 8], [None, 6, 8], [None, END, 8], *[[None, None, 8]] * 3]  # fmt: skip
    assert [masks for _, masks in columns] == [
        [1, 1, 1], [None, 1, 1], [None, 1, 1], *[[None, None, 1]] * 3]  # fmt: skip
    # the prefill and five decode steps; none after the last column
    assert counter.passes == [(3, 1), (2, 1), (2, 1), (1, 1), (1, 1), (1, 1)]


def test_generation_ends_when_every_row_has():
    talker = chain_engine({1: {END: 0.5, 1: 0.5}}, sequence_len=64)
    counter = RowCounter(talker.model)
    columns = list(talker.generate([1], 8, 60, seed=3))
    lengths = [sum(tokens[row] is not None for tokens, _ in columns) for row in range(8)]
    assert len(columns) == max(lengths) < 60
    decoded = sum(rows for rows, _ in counter.passes[1:])
    assert decoded == sum(lengths) - 8  # one pass for each token but the eight stop tokens


# ---- limits --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[1] * 8], dict(max_tokens=5), "12.*4"),
        ([[1], [1] * 11], dict(max_tokens=2), "12.*1"),
        ([[1] * 12], dict(max_tokens=1), "12"),
        ([[1] * 12], dict(), "12"),
        ([[1] * 40], dict(), "40.*12"),
        ([[1], []], dict(max_tokens=1), "token"),
        ([], dict(max_tokens=1), "prompt"),
        ([[1]], dict(max_tokens=0), "max_tokens"),
        ([[1]], dict(max_tokens=-3), "max_tokens"),
        ([[1]], dict(max_tokens=1, num_samples=0), "num_samples"),
        ([[1]], dict(max_tokens=1, temperature=-1.0), "temperature"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_computed(prompts, options, words):
    talker = chain_engine({}, sequence_len=12)
    counter = RowCounter(talker.model)
    with pytest.raises(ValueError, match=words):
        talker.generate_batch(prompts, **options)
    assert counter.passes == []


def test_the_context_can_be_filled_to_its_last_token():
    model, (prompt, short) = random_model(), random_prompts(20, 3)
    talker = engine.Engine(model, ByteTokenizer())
    rows, _ = talker.generate_batch([prompt, short], max_tokens=4, temperature=0.0)
    assert rows[0] == greedy_by_recomputing(model, prompt, 4) and len(rows[0]) == 24
    assert rows[1] == greedy_by_recomputing(model, short, 4)


# ---- the calculator ------------------------------------------------------------------------------

CALCULATOR = {
    "12+30": "42", "7 + 5": "12", " 2*3 ": "6", "10-12": "-2", "9/3": "3", "10/4": "2.5",
    "1/3": "0.333333", "2/3": "0.666667", "0.1+0.2": "0.3", "7//2": "3", "1+2*3": "7",
    "(1+2)*3": "9", "((((1))))": "1", "-5+3": "-2", "--5": "5", "+4": "4", "-(2+3)*2": "-10",
    "3.0": "3", "2.50": "2.5", ".5+.5": "1", "1,234+1": "1235", "1,000,000*2": "2000000",
    "1e3+1": "1001", "1_000+1": "1001", "0x10+1": "17", "-1/10000000": "0", "\t8 *\t2": "16",
    "99999999999*99999999999": "9999999999800000000001",
    "'strawberry'.count('r')": "3", '"strawberry".count("r")': "3", "'banana'.count('an')": "2",
    "'a,b,c'.count(',')": "2", "'abc'.count('z') + 1": "1", "-'aa'.count('a')": "-2",
}  # fmt: skip

REFUSED = [
    # nothing, or no arithmetic
    "", "   ", "hello", "1 2", "1+", "*3", "(1+2", "1)+(2", "3 apples", "#", "$5+1", "=1+2",
    "<|output_start|>", "\x00", "1+\ufffd", "1\n2", "x = 1", "1; 2",
    # no value
    "1/0", "1//0", "0/0", "1/(2-2)", "1e400", "1e308*10", "1e400-1e400", "-1e999",
    # too costly, or too long
    "9**9**9", "9**9", "2**2", "1<<99", "9<<9<<9", "9" * 101, "(" * 200 + "1" + ")" * 200,
    "-" * 5000 + "1", "'a'*99999999", "1+" * 60 + "1",
    # other operators and literals
    "7%4", "1|2", "1^2", "~1", "1<2", "1==1", "not 1", "1 and 2", "1 if 1 else 2", "True", "True+1",
    "None", "1j", "1j*1j", "[1]", "(1,2)", "2,5+1", "1,2345", "{1}", "'abc'", "'a'+'b'",
    "f'{1+1}'", "b'a'.count(b'a')",
    # names, calls and attributes
    "x", "abs(-1)", "max(1,2)", "pow(9,9)", "round(2.5)", "int('5')", "print(1)", "exit()",
    "__import__('os').system('true')", "eval('1+1')", "open('f')", "(1).__class__", "''.__class__",
    "().__class__.__bases__[0].__subclasses__()", "'a'.upper()", "'abc'.index('b')", "'a'.count",
    "'a'.count()", "'a'.count('a', 0)", "'a'.count('a', *[0])", "'a'.count(sub='a')",
    "'a'.count(1)", "'a'.__class__.count('a')", "('a'*99).count('a')", "(lambda: 1)()",
    "[i for i in (1,)]", "(y:=1)",
    # numbers that Python does not write so
    "007", "05+3", "\u0663+\u0664", "\uff11+\uff12", "2\u00b2", "\u00bd", "1 000", "1.2.3",
]  # fmt: skip


@pytest.mark.parametrize(("expression", "result"), CALCULATOR.items())
def test_the_calculator_knows(expression, result):
    assert engine.use_calculator(expression) == result


@pytest.mark.parametrize("expression", REFUSED, ids=lambda text: ascii(text)[:40])
def test_the_calculator_refuses(expression):
    assert engine.use_calculator(expression) is None


def write_call(expression):
    return [PYTHON_START, *expression.encode(), PYTHON_END]


def test_a_call_forces_its_result_into_the_row():
    """1 writes <|python_start|>12+30<|python_end|>; then 42 is forced, and the text goes on."""
    call, forced = write_call("12+30"), [OUTPUT_START, *b"42", OUTPUT_END]
    talker = chain_engine(script_of([1, *call, 66], [OUTPUT_END, 67, END]))
    rows, masks = talker.generate_batch([[1]], 1, 40)
    assert rows == [[1, *call, *forced, 67, END]]
    assert masks == [[0] + [1] * len(call) + [0] * len(forced) + [1, 1]]


@pytest.mark.parametrize("expression", ["", "12+", "1/0", "9%8", "abc", "0123"])
def test_a_call_without_a_result_forces_nothing(expression):
    call = write_call(expression)
    rows, masks = chain_engine(script_of([1, *call, 66, END])).generate_batch([[1]], 1, 40)
    assert rows == [[1, *call, 66, END]] and set(masks[0][1:]) == {1}


def test_python_end_without_python_start_is_only_a_token():
    rows, masks = chain_engine(script_of([1, 49, PYTHON_END, 66, END])).generate_batch([[1]], 1, 9)
    assert rows == [[1, 49, PYTHON_END, 66, END]] and masks == [[0, 1, 1, 1, 1]]


def test_a_second_python_start_begins_the_expression_again():
    """start 1 start 2 + 3 end gives 5, not 12 + 3 and not nothing."""
    talker = chain_engine(
        {1: {PYTHON_START: 1.0}, PYTHON_START: {49: 0.5, 50: 0.5}, 49: {PYTHON_START: 1.0},
         **script_of([50, 43, 51, PYTHON_END, END], [OUTPUT_END, END])})  # fmt: skip
    restarted = 0
    for row in talker.generate_batch([[1]], 20, 40)[0]:
        restarted += row.count(PYTHON_START) > 1
        assert row[row.index(OUTPUT_START) :] == [OUTPUT_START, 53, OUTPUT_END, END]
    assert restarted > 0  # all 20 going straight to 2: 1 in 2^20


def test_each_row_has_a_calculator_of_its_own():
    """2 or 3 digits, then +, then a digit: the result in a row is that of the row's expression.

    Calls end at different steps, so rows that calculate stand beside rows that write.
    """
    digits = {ord(c): 0.25 for c in "2345"}
    talker = chain_engine(
        {1: {PYTHON_START: 0.5, 1: 0.5}, PYTHON_START: digits, PYTHON_END: {END: 1.0},
         **{d: {43: 0.3, **{e: 0.1 for e in digits}, PYTHON_END: 0.3} for d in digits},
         43: digits, OUTPUT_END: {1: 0.5, END: 0.5}}, sequence_len=64)  # fmt: skip
    rows, masks = talker.generate_batch([[1], [9, 1]], 30, 60, seed=4)
    calls = 0
    for row, mask in zip(rows, masks):
        text = ByteTokenizer().decode(row)
        for part in text.split("<|python_start|>")[1:]:
            if "<|output_end|>" not in part:
                continue  # cut by max_tokens, or still open
            expression, rest = part.split("<|python_end|>", 1)
            result = rest.split("<|output_start|>", 1)[1].split("<|output_end|>")[0]
            assert result == str(sum(map(int, expression.split("+"))))
            calls += 1
        inside = False
        for token, chosen in zip(row, mask):
            inside |= token == OUTPUT_START
            assert not (inside and chosen), "forced tokens have mask 0"
            inside &= token != OUTPUT_END
    assert calls > 30


def test_a_forced_result_is_cut_at_max_tokens():
    call = write_call("12+30")
    talker = chain_engine(script_of([1, *call, 66], [OUTPUT_END, 67, END]))
    (row,), (mask,) = talker.generate_batch([[1]], 1, len(call) + 2)
    assert row == [1, *call, OUTPUT_START, 52] and mask[-2:] == [0, 0]


# ---- the command line ----------------------------------------------------------------------------


def run_main(capsys, *argv):
    """(exit code, stdout, stderr) of main(argv) in this process."""
    try:
        code = engine.main([str(part) for part in argv])
    except SystemExit as leaving:
        code = leaving.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def write_tokenizer(folder, letters=b""):
    """A tokenizer of bytes, as 11_tokenizer.py writes it; `letters` change its identity."""
    import base64

    folder.mkdir(parents=True, exist_ok=True)
    order = bytes(letters) + bytes(i for i in range(256) if i not in letters)
    lines = b"".join(base64.b64encode(bytes([b])) + b" %d\n" % i for i, b in enumerate(order))
    specials = {token: 256 + i for i, token in enumerate(SPECIALS)}
    sha256 = engine.Tokenizer.identity(lines, r"(?s:.)", specials)
    (folder / "tokenizer.tiktoken").write_bytes(lines)
    (folder / "config.json").write_text(
        json.dumps({"pattern": r"(?s:.)", "special_tokens": specials, "sha256": sha256}))
    return sha256


@pytest.fixture
def trained(tmp_path):
    """A data folder with a tokenizer and a "base" model: whatever ends in s is followed by blue."""
    from safetensors.torch import save_file

    sha256 = write_tokenizer(tmp_path / "tokenizer")
    model = chain_model(script_of([*b"s blue.", END]))
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    config = {key: getattr(model.config, key) for key in SIZES}
    (tmp_path / "base" / "config.json").write_text(
        json.dumps({"model": config, "tokenizer_sha256": sha256, "step": 7}))
    return tmp_path


def test_without_a_model_it_runs_on_random_weights_and_says_so(run_script, tmp_path):
    done = run_script("05_engine", "--bench-tokens", 40, "--max-tokens", 5)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("05 engine - ") and lines[0].endswith("seed 1337")
    assert "random weights" in done.stdout and "The sky is|" in done.stdout
    difference = done.stdout.split("largest logit difference ")[1].split()[0]
    assert float(difference) <= 1e-4
    assert lines[-2].startswith("result: ") and "(n=40)" in lines[-2]
    assert lines[-1] == "next: python edu/12_pretrain.py"
    assert not (tmp_path / "data").exists(), "it writes nothing"


def test_with_a_model_it_answers_and_marks_right_and_wrong(trained, capsys):
    code, out, err = run_main(capsys, "--data-dir", trained, "--bench-tokens", 0)
    assert code == 0, err
    assert "The sky is|' blue.'  <- right" in out
    assert "France is|' blue.'  <- wrong, expected Paris" in out
    assert "random weights" not in out


def test_prompts_of_ones_own_are_answered(trained, capsys):
    code, out, _ = run_main(capsys, "--data-dir", trained, "--bench-tokens", 0, "--max-tokens", 3,
                            "--temperature", 1, "--prompt", "Jays", "xs")  # fmt: skip
    assert code == 0
    assert "Jays|' bl'" in out and "xs|' bl'" in out and "<-" not in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-tokens", 0], "--max-tokens 0"),
        (["--max-tokens", 1000], "1000"),
        (["--temperature", -1], "--temperature -1"),
        (["--temperature", "nan"], "--temperature nan"),
        (["--compare", "base", "--prompt", "hi"], "--prompt cannot go with it"),
        (["--compare", "base", "--temperature", 1], "--temperature cannot go with it"),
        (["--top-k", -2], "--top-k -2"),
        (["--bench-tokens", -2], "--bench-tokens -2"),
        (["--prompt", ""], "--prompt"),
        (["--prompt", "s" * 90], "context of 64"),
        (["--device-type", "abacus"], "abacus"),
        (["--no-such-flag"], "no-such-flag"),
        (["--max-tokens", "many"], "many"),
    ],
)
def test_a_bad_flag_ends_in_one_message_and_exit_code_2(trained, capsys, flags, words):
    code, out, err = run_main(capsys, "--data-dir", trained, *flags)
    assert code == 2
    assert words in err and "Traceback" not in err


def test_a_checkpoint_of_another_tokenizer_is_refused_with_both_hashes(trained, capsys):
    there = json.loads((trained / "base" / "config.json").read_text())["tokenizer_sha256"]
    here = write_tokenizer(trained / "tokenizer", b"zyx")
    code, out, err = run_main(capsys, "--data-dir", trained)
    assert code == 2 and here != there
    assert there[:12] in err and here[:12] in err and "12_pretrain.py" in err


@pytest.mark.parametrize("stage, script", [
    ("base", "12_pretrain.py"), ("mid", "13_midtrain.py"), ("sft", "08_sft.py"),
    ("rl", "10_rl.py"), ("mine", "12_pretrain.py")])
def test_a_stage_that_is_not_there_names_the_script_that_makes_it(tmp_path, stage, script):
    with pytest.raises(engine.UserError, match=f"python edu/{script}"):
        engine.load_checkpoint(tmp_path / stage, engine.byte_tokenizer(), "cpu")


def test_a_model_without_a_tokenizer_is_refused(trained, capsys):
    (trained / "tokenizer" / "tokenizer.tiktoken").unlink()
    code, _, err = run_main(capsys, "--data-dir", trained)
    assert code == 2 and "11_tokenizer.py" in err


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("damage", ["pickle", "empty", "cut", "noise", "other shapes", "no config",
                                    "config is a list", "config lacks the model", "half a config"])
def test_a_damaged_checkpoint_is_refused_and_nothing_in_it_is_run(trained, capsys, damage):
    from safetensors.torch import save_file

    weights, config = trained / "base" / "model.safetensors", trained / "base" / "config.json"
    if damage == "pickle":
        weights.write_bytes(pickle.dumps(Bomb(trained / "boom")))
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "noise":
        weights.write_bytes(b"\xff" * 4096)
    elif damage == "other shapes":
        save_file({"lm_head.weight": torch.zeros(2, 3)}, weights)
    elif damage == "no config":
        config.unlink()
    else:
        config.write_text({"config is a list": "[1]", "half a config": '{"model": {"n_la',
                           "config lacks the model": '{"tokenizer_sha256": "x"}'}[damage])
    code, _, err = run_main(capsys, "--data-dir", trained)
    assert code == 2 and not (trained / "boom").exists()
    assert err.startswith("error: ") and "base" in err and "12_pretrain.py" in err
