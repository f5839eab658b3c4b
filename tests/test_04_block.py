"""Challenge 4: RoPE, QK-norm, GQA, ReLU^2 and the block they make.

Oracles: complex numbers for RoPE, loops over rows, heads and positions for attention, the layer of
transformers' NanoChatForCausalLM for the whole block, and the properties that each part promises.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import load

block04 = load("04_block")
# B rows, T tokens, K key/value heads, H query heads, D head size, C channels: no two equal.
B, T, K, H, D = 7, 5, 3, 6, 8
C = H * D
SIZES = SimpleNamespace(
    sequence_len=T, vocab_size=11, n_layer=1, n_head=H, n_kv_head=K, n_embd=C
)  # fmt: skip
NAMES = {
    "attn.c_q.weight": (H * D, C),
    "attn.c_k.weight": (K * D, C),
    "attn.c_v.weight": (K * D, C),
    "attn.c_proj.weight": (C, C),
    "mlp.c_fc.weight": (4 * C, C),
    "mlp.c_proj.weight": (C, 4 * C),
}


def ours_only(name):
    """The helper of ours called `name`; a learner's version need not have it."""
    if not hasattr(block04, name):
        pytest.skip(f"this version has no {name}")
    return getattr(block04, name)


@pytest.fixture
def block():
    torch.manual_seed(1)
    block = block04.Block(SIZES)
    for weight in block.parameters():  # unlike a fresh block, far from uniform attention
        torch.nn.init.normal_(weight, std=0.15)
    return block


@pytest.fixture
def x():
    return torch.randn(B, T, C, generator=torch.Generator().manual_seed(2))


def angles(positions, head_dim=D, base=10_000):
    """cos, sin (1, len(positions), 1, head_dim / 2), each worked out by math.cos and math.sin."""
    rows = [[t * base ** (-2 * i / head_dim) for i in range(head_dim // 2)] for t in positions]
    return (
        torch.tensor([[math.cos(a) for a in row] for row in rows])[None, :, None],
        torch.tensor([[math.sin(a) for a in row] for row in rows])[None, :, None],
    )


def complex_rope(x, positions, base=10_000):
    """RoPE as multiplication of x1 + i x2 by e^(-i t theta), in float64."""
    half = x.size(-1) // 2
    z = torch.complex(x[..., :half].double(), x[..., half:].double())
    theta = base ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.exp(-1j * torch.outer(torch.as_tensor(positions).double(), theta))
    z = z * turn[None, :, None, :]
    return torch.cat((z.real, z.imag), dim=-1)


def rms(x):
    return x / (x.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def naive_attention(attn, x, scale=None):
    """(B, T, C) -> (B, T, C) in float64, one score at a time: nothing shared with the script."""
    weights = {name: w.detach().double() for name, w in attn.named_parameters()}
    rows, length, _ = x.shape
    q = (x @ weights["c_q.weight"].T).reshape(rows, length, H, D)
    k = (x @ weights["c_k.weight"].T).reshape(rows, length, K, D)
    v = (x @ weights["c_v.weight"].T).reshape(rows, length, K, D)
    q, k = rms(complex_rope(q, range(length))), rms(complex_rope(k, range(length)))
    y = torch.zeros(rows, length, H, D, dtype=torch.float64)
    for b in range(rows):
        for h in range(H):
            group = h // (H // K)
            for t in range(length):
                scores = [
                    torch.dot(q[b, t, h], k[b, s, group]) * (scale or 1 / math.sqrt(D))
                    for s in range(t + 1)
                ]
                for p, s in zip(torch.stack(scores).softmax(0), range(t + 1), strict=True):
                    y[b, t, h] += p * v[b, s, group]
    return y.reshape(rows, length, C) @ weights["c_proj.weight"].T


def naive_block(block, x, scale=None):
    x = x.double()
    x = x + naive_attention(block.attn, rms(x), scale)
    up, down = (w.detach().double() for w in block.mlp.parameters())
    hidden = (rms(x) @ up.T).clamp(min=0)
    return x + (hidden * hidden) @ down.T


# ---- RoPE ----------------------------------------------------------------------------------------


def test_rope_turns_a_quarter_as_worked_by_hand():
    """D=2: the pair (1, 2) turned by minus 90 degrees is (2, -1)."""
    x = torch.tensor([[[[1.0, 2.0]]]])
    cos, sin = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    assert block04.apply_rotary_emb(x, cos, sin).flatten().tolist() == [2.0, -1.0]


def test_rope_is_multiplication_by_complex_numbers_of_length_one():
    positions = [0, 1, 2, 50, 1000]
    x = torch.randn(B, T, H, D)
    got = block04.apply_rotary_emb(x, *angles(positions))
    assert got.shape == x.shape
    torch.testing.assert_close(got.double(), complex_rope(x, positions), atol=1e-4, rtol=0)


def test_silent_bug_8_rope_scores_depend_only_on_the_distance():
    q, k = torch.randn(2, 1, 1, H, D)

    def score(t, s):
        at_t = block04.apply_rotary_emb(q[None], *angles([t]))
        at_s = block04.apply_rotary_emb(k[None], *angles([s]))
        return (at_t * at_s).sum(-1).flatten()  # one score per head

    for distance in (0, 1, 7, 300):
        for shift in (1, 13, 500):
            moved = score(distance + shift, shift)
            torch.testing.assert_close(moved, score(distance, 0), atol=1e-3, rtol=0)
    assert (score(1, 0) - score(2, 0)).abs().min() > 1e-3, "the distance itself must count"
    assert (score(3, 0) - score(0, 3)).abs().min() > 1e-3, "before and after must differ"


def test_silent_bug_8_rope_keeps_lengths_and_leaves_position_0_alone():
    x = torch.randn(B, T, H, D)
    y = block04.apply_rotary_emb(x, *angles(range(T)))
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(y[:, 0], x[:, 0])
    assert (y[:, 1:] - x[:, 1:]).abs().amax(-1).min() > 1e-3


def test_silent_bug_8_rope_pairs_channel_i_with_i_plus_half_not_with_its_neighbour():
    """A vector in channel 0 alone may leak into channel D/2 and nowhere else."""
    for channel in range(D // 2):
        x = F.one_hot(torch.tensor(channel), D).float().view(1, 1, 1, D)
        y = block04.apply_rotary_emb(x, *angles([1])).flatten()
        angle = 10_000 ** (-2 * channel / D)
        expected = torch.zeros(D)
        expected[channel], expected[channel + D // 2] = math.cos(angle), -math.sin(angle)
        torch.testing.assert_close(y, expected)


def test_the_rotary_table_holds_the_cosine_and_sine_of_position_times_frequency():
    for got, expected in zip(
        ours_only("precompute_rotary")(T, D), angles(range(T)), strict=True
    ):  # fmt: skip
        assert got.shape == (1, T, 1, D // 2) and got.dtype == torch.float32
        torch.testing.assert_close(got, expected)
    cos, _ = ours_only("precompute_rotary")(T, D, base=50)
    torch.testing.assert_close(cos, angles(range(T), base=50)[0])


def test_a_rotary_table_of_the_wrong_length_is_refused_and_not_broadcast():
    ours_only("precompute_rotary")
    x = torch.randn(B, T, H, D)
    for cos, sin in (angles([3]), angles(range(T + 1)), angles(range(T), head_dim=2)):
        with pytest.raises(AssertionError, match="do not fit"):
            block04.apply_rotary_emb(x, cos, sin)


def test_every_row_may_have_positions_of_its_own():
    starts = [3 * b for b in range(B)]
    x = torch.randn(B, T, H, D)
    tables = [angles(range(start, start + T)) for start in starts]
    cos, sin = (torch.cat([table[i] for table in tables]) for i in range(2))  # (B, T, 1, D/2)
    got = block04.apply_rotary_emb(x, cos, sin)
    for b, start in enumerate(starts):
        alone = complex_rope(x[b : b + 1], range(start, start + T))
        torch.testing.assert_close(got[b : b + 1].double(), alone, atol=1e-5, rtol=0)


def test_rope_gives_back_the_format_it_was_given():
    x = torch.randn(B, T, H, D)
    y = block04.apply_rotary_emb(x.bfloat16(), *angles(range(T)))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), complex_rope(x, range(T)), atol=0.05, rtol=0.02)


# ---- norm and MLP --------------------------------------------------------------------------------


def test_rmsnorm_makes_the_mean_square_one_and_has_no_parameters():
    """(3, 4, 0, 0, 0): mean square 25 / 5 = 5, so 3 becomes 3 / sqrt(5)."""
    norm = ours_only("norm")
    got = norm(torch.tensor([3.0, 4.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(got, torch.tensor([3.0, 4.0, 0.0, 0.0, 0.0]) / math.sqrt(5))
    x = torch.randn(B, T, H, D)
    torch.testing.assert_close(norm(x), rms(x))
    assert torch.isfinite(norm(torch.zeros(2, 3))).all()


def test_the_mlp_squares_what_relu_lets_through_as_worked_by_hand():
    """x = (2, -1), W_fc rows: x1, x2, -x2, x1 + x2, 0...: relu = 2, 0, 1, 1; squares 4, 0, 1, 1."""
    mlp = block04.MLP(SimpleNamespace(n_embd=2))
    up, down = torch.zeros(8, 2), torch.zeros(2, 8)
    up[0, 0] = up[1, 1] = up[3, 0] = up[3, 1] = 1.0
    up[2, 1] = -1.0
    down[0, :4] = 1.0
    down[1, 0] = 10.0
    mlp.load_state_dict({"c_fc.weight": up, "c_proj.weight": down})
    assert mlp(torch.tensor([[[2.0, -1.0]]])).tolist() == [[[6.0, 40.0]]]


# ---- attention and block -------------------------------------------------------------------------


def test_a_block_returns_the_shape_it_was_given(block, x):
    assert block(x).shape == (B, T, C)
    assert block(x[:1, :1]).shape == (1, 1, C)
    assert block(torch.randn(2, 333, C)).shape == (2, 333, C)


def test_parameters_have_nanochats_names_and_shapes_and_there_are_no_others(block):
    assert {name: tuple(w.shape) for name, w in block.state_dict().items()} == NAMES


def test_the_block_equals_attention_written_out_with_loops(block, x):
    got = block(x)
    torch.testing.assert_close(got.double(), naive_block(block, x), atol=1e-5, rtol=1e-5)


def test_silent_bug_9_scores_are_divided_by_the_root_of_the_head_size_not_the_width(block, x):
    got = block(x).double()
    right, wrong = naive_block(block, x), naive_block(block, x, scale=1 / math.sqrt(C))
    assert (got - right).abs().max() < 1e-4 < 1e-2 < (got - wrong).abs().max()


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_grouped_heads_equal_full_heads_that_hold_copies(x, kv_heads):
    torch.manual_seed(3)
    grouped = block04.Block(SimpleNamespace(**{**vars(SIZES), "n_kv_head": kv_heads}))
    full = block04.Block(SimpleNamespace(**{**vars(SIZES), "n_kv_head": H}))
    state = grouped.state_dict()
    for name in ("attn.c_k.weight", "attn.c_v.weight"):
        heads = state[name].view(kv_heads, D, C)
        state[name] = torch.cat([heads[h // (H // kv_heads)] for h in range(H)])
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(x), full(x), atol=1e-6, rtol=1e-5)


def test_no_future_token_changes_a_past_output(block, x):
    before = block(x)
    for t in range(T):
        changed = x.clone()
        changed[:, t] = torch.randn(B, C)
        after = block(changed)
        assert torch.equal(after[:, :t], before[:, :t]), f"token {t} leaks into the past"
        assert (after[:, t:] - before[:, t:]).abs().amax((0, 2)).min() > 1e-3


def test_no_gradient_flows_from_an_output_to_a_later_input(block, x):
    x.requires_grad_()
    for t in range(T):
        (grad,) = torch.autograd.grad(block(x)[:, t].sum(), x)
        reach = grad.abs().amax((0, 2))  # (T,)
        assert (reach[: t + 1] > 0).all() and (reach[t + 1 :] == 0).all()


def test_rows_of_a_batch_do_not_see_each_other(block, x):
    order = torch.randperm(B)
    torch.testing.assert_close(block(x[order]), block(x)[order], atol=1e-5, rtol=1e-5)


def test_a_block_only_knows_distances_so_a_shift_of_all_positions_changes_nothing(block, x):
    ours_only("precompute_rotary")
    here, there = angles(range(T)), angles(range(200, 200 + T))
    torch.testing.assert_close(block(x, here), block(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(block(x, there), block(x), atol=1e-4, rtol=1e-4)


def test_order_matters_to_a_block(block, x):
    """Without RoPE the last token would see its past as a bag: swapping two would do nothing."""
    swapped = x[:, [1, 0, 2, 3, 4]]
    assert (block(swapped)[:, -1] - block(x)[:, -1]).abs().max() > 1e-2


def test_qk_norm_makes_the_scale_of_query_and_key_weights_irrelevant(block, x):
    before = block(x)
    with torch.no_grad():
        block.attn.c_q.weight.mul_(50)
        block.attn.c_k.weight.mul_(7)
    torch.testing.assert_close(block(x), before, atol=1e-4, rtol=1e-4)


def test_with_both_output_matrices_zero_a_block_passes_its_input_through(block, x):
    with torch.no_grad():
        block.attn.c_proj.weight.zero_()
        block.mlp.c_proj.weight.zero_()
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("kv_heads", [K, H])
def test_the_block_is_the_layer_of_transformers_nanochat_in_outputs_and_gradients(x, kv_heads):
    from transformers.models.nanochat import modeling_nanochat as peer
    from transformers.models.nanochat.configuration_nanochat import NanoChatConfig

    config = NanoChatConfig(
        hidden_size=C, intermediate_size=4 * C, num_attention_heads=H, num_key_value_heads=kv_heads,
        num_hidden_layers=1, max_position_embeddings=64, vocab_size=11,
        rms_norm_eps=torch.finfo(torch.float32).eps, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(4)
    ours = block04.Block(SimpleNamespace(**{**vars(SIZES), "n_kv_head": kv_heads}))
    for weight in ours.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    layer = peer.NanoChatDecoderLayer(config, layer_idx=0)
    names = {
        "attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj",
        "attn.c_v": "self_attn.v_proj", "attn.c_proj": "self_attn.o_proj",
        "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    }  # fmt: skip
    layer.load_state_dict({f"{names[n[:-7]]}.weight": w for n, w in ours.state_dict().items()})
    rotary = peer.NanoChatRotaryEmbedding(config)(x, torch.arange(T)[None])
    mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    got = ours(mine)
    expected = layer(theirs, attention_mask=mask, position_embeddings=rotary)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)

    pull = torch.randn(B, T, C)  # any direction; all gradients at once
    (got * pull).sum().backward()
    (expected * pull).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4)
    for name, weight in ours.named_parameters():
        peer_grad = layer.get_parameter(f"{names[name[:-7]]}.weight").grad
        torch.testing.assert_close(weight.grad, peer_grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"n_embd": 50}, "whole, even number"),  # 50 / 6 is not whole
        ({"n_embd": 54}, "whole, even number"),  # 9 channels per head cannot be paired
        ({"n_kv_head": 4}, "multiple of n_kv_head"),
        ({"n_kv_head": 0}, "at least 1"),
    ],
)
def test_sizes_that_cannot_work_are_refused_with_their_values(sizes, complaint):
    ours_only("BlockConfig")
    with pytest.raises(ValueError, match=complaint) as caught:
        block04.Block(SimpleNamespace(**{**vars(SIZES), **sizes}))
    ((name, value),) = sizes.items()
    assert f"{name}={value}" in str(caught.value)


def test_the_config_names_are_nanochats():
    fields = list(ours_only("BlockConfig").__dataclass_fields__)
    assert fields == ["sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"]


# ---- the command line ----------------------------------------------------------------------------


def test_run_alone_it_keeps_every_promise(capsys):
    ours_only("rope_promises")
    assert block04.main([]) == 0
    out = capsys.readouterr().out
    assert out.startswith("04 block - cpu - float32 - ") and "BROKEN" not in out
    assert out.count("  ok\n") == 11 and "result: promises kept - -> 11 (n=11)\n" in out
    assert "24,576 parameters instead of 36,864 (-33%)" in out  # 2 C C + 2 C C / 3, C = 96
    assert "256 bytes per token in the cache instead of 768 (-67%)" in out  # 2 K D 4 bytes


@pytest.mark.parametrize(
    "argv",
    [
        ["--n-head", "8", "--n-kv-head", "1", "--n-embd", "256"],
        ["--n-head", "1", "--n-kv-head", "1", "--n-embd", "2", "--sequence-len", "2"],
        ["--n-head", "4", "--n-kv-head", "4", "--batch-size", "1", "--seed", "0"],
    ],
)
def test_the_promises_hold_at_other_sizes(argv):
    ours_only("rope_promises")
    assert block04.main(argv) == 0


def test_a_broken_promise_ends_with_exit_code_1(monkeypatch, capsys):
    ours_only("rope_promises")
    right = block04.apply_rotary_emb
    monkeypatch.setattr(block04, "apply_rotary_emb", lambda x, c, s: right(x, c, s) * 1.01)
    assert block04.main([]) == 1
    out = capsys.readouterr().out
    assert "BROKEN" in out and "(n=11)" in out


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--n-head", "5"], "n_embd=96 / n_head=5"),
        (["--n-kv-head", "4"], "n_head=6 must be a multiple of n_kv_head=4"),
        (["--n-embd", "0"], "n_embd=0"),
        (["--sequence-len", "1"], "--sequence-len 1"),
        (["--batch-size", "0"], "--batch-size 0"),
    ],
)
def test_a_mistake_in_the_flags_is_one_message_and_exit_code_2(argv, complaint, capsys):
    ours_only("rope_promises")
    assert block04.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and complaint in err and "python edu/04_block.py" in err
