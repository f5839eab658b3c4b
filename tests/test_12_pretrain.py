"""Challenge 12: the optimizer, the loss, the yardsticks and the run that survives a kill."""

import json
import math
import os
import random
import shutil
import signal
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import flags_of, load, run_process, running, wait_for
from safetensors.torch import load_file

pretrain = load("12_pretrain")

ANIMALS = {"cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "sheep": "baa"}
VERBS = "laughs smiles nods waves claps sings jumps listens answers whispers".split()
PLACES = "garden kitchen field forest village market river bridge".split()


def documents(count, seed):
    rng = random.Random(seed)
    for _ in range(count):
        names = rng.sample(sorted(ANIMALS), 3)
        yield " ".join(f"The {n} in the {rng.choice(PLACES)} says {ANIMALS[n]}, and "
                       f"{rng.choice(['Tom', 'Ann', 'Peter'])} {rng.choice(VERBS)}." for n in names)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A data folder of three little shards and a tokenizer; runs write other stages beside it."""
    folder = tmp_path_factory.mktemp("world")
    for index, count in enumerate((400, 400, 60)):
        table = pa.table({"text": list(documents(count, seed=index))})
        pq.write_table(table, folder / f"shard_{index:05d}.parquet", row_group_size=100)
    assert load("11_tokenizer").main(
        ["--data-dir", str(folder), "--vocab-size", "320", "--no-gpt2"]) == 0
    return folder


def settings(world, stage, **changes):
    """A run of a second: 1 layer of 32, 6 steps of 4 x 16 tokens."""
    small = {"depth": 1, "n_embd": 32, "n_head": 2, "sequence_len": 16, "device_batch_size": 4,
             "total_batch_size": 64, "num_iterations": 6, "log_every": 1, "save_every": 2,
             "eval_every": 4, "eval_tokens": 64, "plot": False, "compile": "off"}
    return pretrain.Config(data_dir=world, stage=stage, **{**small, **changes})


def small_model(seed=0, vocab_size=37, n_layer=2):
    torch.manual_seed(seed)
    model = pretrain.GPT(pretrain.GPTConfig(11, vocab_size, n_layer, 4, 2, 24))
    for p in model.parameters():  # no zero matrices: every gradient must be in play
        torch.nn.init.normal_(p, std=0.2)
    return model


def small_batch(seed, B=3, T=11, vocab_size=37):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (B, T), generator=rng) for _ in range(2)]


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


# ---- the optimizer -------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, cols", [(12, 12), (24, 6), (6, 24)])
def test_orthogonalize_brings_every_singular_value_near_one(rows, cols):
    G = torch.randn(3, rows, cols, generator=torch.Generator().manual_seed(1))
    singular = torch.linalg.svdvals(pretrain.orthogonalize(G))
    assert 0.5 < singular.min() and singular.max() < 1.4  # the quintic oscillates about 1


def test_orthogonalize_treats_each_matrix_of_a_stack_alone():
    G = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(2))
    alone = torch.cat([pretrain.orthogonalize(g[None]) for g in G])
    torch.testing.assert_close(pretrain.orthogonalize(G), alone, atol=1e-5, rtol=0)


def test_orthogonalize_keeps_the_singular_vectors():
    """U S V^T -> about U V^T: the product with V U^T is symmetric positive, its trace near rank."""
    G = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(3))
    U, _, Vh = torch.linalg.svd(G)
    inner = (U.mT @ pretrain.orthogonalize(G) @ Vh.mT)[0]
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-4
    assert inner.diagonal().min() > 0.2  # the smallest directions need more than five steps


@pytest.mark.parametrize("shape", [(16, 16), (32, 8), (8, 32)])
def test_muon_equals_torchs_own_muon_in_its_bfloat16(shape):
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    mine = pretrain.Muon([ours], lr=0.1, momentum=0.9, dtype=torch.bfloat16)
    peer = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.0, nesterov=True)
    for step in range(3):
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        mine.step(), peer.step()
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0)  # 3 bfloat16 steps of 0.1
    assert (ours - 1).abs().max() > 0.1, "the parameters must have moved"


def test_muon_steps_equal_shapes_together_as_it_steps_them_alone():
    grads = [torch.randn(6, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    together = [torch.nn.Parameter(torch.zeros(6, 4)) for _ in grads]
    optimizer = pretrain.Muon(together, lr=0.1)
    alone = [torch.nn.Parameter(torch.zeros(6, 4)) for _ in grads]
    for p, q, grad in zip(together, alone, grads):
        p.grad, q.grad = grad.clone(), grad.clone()
        pretrain.Muon([q], lr=0.1).step()
    optimizer.step()
    for p, q in zip(together, alone):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_equals_torchs_own_adamw(weight_decay):
    ours, theirs = (torch.nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    mine = pretrain.AdamW([{"params": [ours], "lr": 0.1}], weight_decay=weight_decay)
    peer = torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.95), eps=1e-10,
                             weight_decay=weight_decay)
    for step in range(5):
        grad = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        mine.step(), peer.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["Muon", "AdamW"])
def test_an_optimizer_goes_on_from_its_saved_state_as_if_never_stopped(kind, tmp_path):
    def make(p):
        return (pretrain.Muon([p]) if kind == "Muon" else
                pretrain.AdamW([{"params": [p], "lr": 0.1}]))

    def steps(p, optimizer, count):
        for step in range(count):
            p.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
            optimizer.step()

    straight, stopped = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    optimizer = make(straight)
    steps(straight, optimizer, 2), steps(straight, optimizer, 3)
    optimizer = make(stopped)
    steps(stopped, optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed = make(stopped)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    steps(stopped, resumed, 3)
    assert torch.equal(straight, stopped)


def test_every_parameter_has_exactly_one_optimizer():
    model = small_model()
    held = [id(p) for o in pretrain.build_optimizers(model, pretrain.Config())
            for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("progress, expected", [(0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (0.6, 1.0),
                                                (0.8, 0.6), (1.0, 0.2)])
def test_the_learning_rate_is_a_trapezoid(progress, expected):
    """Warmup 0.1, warmdown 0.4 to a final 0.2: at 0.8 half of the way down, (1 + 0.2) / 2."""
    cfg = pretrain.Config(warmup_ratio=0.1, warmdown_ratio=0.4, final_lr_frac=0.2)
    assert pretrain.lr_multiplier(progress, cfg) == pytest.approx(expected)


# ---- the model -----------------------------------------------------------------------------------


def test_the_depth_dial_gives_nanochats_d20():
    """nanochat's d20 with 65,536 tokens has 560,988,160 parameters (its README)."""
    config = pretrain.model_config(
        pretrain.Config(depth=20, n_embd=0, n_head=0, sequence_len=2048), 65_536)
    with torch.device("meta"):
        model = pretrain.GPT(config)
    assert sum(p.numel() for p in model.parameters()) == 560_988_160
    assert (config.n_embd, config.n_head) == (1280, 10)


def test_the_first_loss_is_ln_v_so_scale_and_init_are_right():
    """Silent bug 9 (attention scale, init, tying): the untrained model must know nothing."""
    torch.manual_seed(0)
    model = pretrain.GPT(pretrain.GPTConfig(11, 37, 2, 4, 2, 24))
    x, y = small_batch(0)
    assert model(x, y).item() == pytest.approx(math.log(37), rel=1e-6)


def test_flops_are_counted_by_hand():
    """L=2, C=24, V=37, T=11, 2 of 4 heads for k and v: a block has q 576, k 288, v 288, proj 576
    and the MLP 4608, so N = 2 * 6336 + 37 * 24 = 13,560; 6 N + 12 * 2 * 24 * 11 = 87,696."""
    assert pretrain.flops_per_token(small_model()) == 87_696


# ---- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignored", ["none", "some", "a whole row", "all"])
def test_the_sliced_loss_equals_the_plain_one_in_value_and_gradient(ignored):
    model, (x, y) = small_model(), small_batch(5)
    if ignored == "some":
        y[0, 3], y[2, 7] = -1, -1
    if ignored == "a whole row":
        y[1] = -1
    if ignored == "all":  # silent bug 4: a batch with no target gives loss 0, not nan
        y[:] = -1
    plain = model(x, y)
    plain.backward()
    expected = gradients(model)
    model.zero_grad()
    sliced = pretrain.TrainStep(model, []).backward(x, y)
    assert sliced.item() == pytest.approx(plain.item(), abs=1e-6)
    for got, want in zip(gradients(model), expected):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


def test_the_sliced_loss_is_the_same_over_many_slices():
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(150, 8, generator=rng)  # 150 rows: slices of 64, 64 and 22
    weight = torch.randn(50_000, 8, generator=rng) * 0.1
    targets = torch.randint(50_000, (150,), generator=rng)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    plain = torch.nn.functional.cross_entropy(15 * torch.tanh(h @ w.T / 15), targets)
    plain.backward()
    h2, w2 = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = pretrain.SlicedCrossEntropy.apply(h2, w2, targets, torch.float32)
    loss.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    torch.testing.assert_close(h2.grad, h.grad, atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(w2.grad, w.grad, atol=1e-7, rtol=1e-4)


def test_bfloat16_gives_nearly_the_same_loss_and_gradient():
    model, (x, y) = small_model(), small_batch(5)
    step = pretrain.TrainStep(model, [])
    expected = step.backward(x, y).item()
    reference = torch.cat([g.flatten() for g in gradients(model)])
    model.zero_grad()
    step.dtype = torch.bfloat16
    assert step.backward(x, y).item() == pytest.approx(expected, rel=0.02)
    got = torch.cat([g.flatten() for g in gradients(model)])
    assert torch.cosine_similarity(got, reference, dim=0) > 0.99


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_gives_the_gradient_of_one_large_batch(parts):
    """Silent bug 7: x1 = x4 to 1e-6."""
    model, (x, y) = small_model(), small_batch(7, B=8)
    step = pretrain.TrainStep(model, [])
    step.backward(x, y)
    expected = gradients(model)
    model.zero_grad()
    for piece in zip(x.chunk(parts), y.chunk(parts)):
        step.backward(*piece, share=1 / parts)
    for got, want in zip(gradients(model), expected):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


RANK_PROGRAM = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_12_pretrain import pretrain, small_batch, small_model
ddp, rank, _, world_size, device = pretrain.compute_init("cpu")
model = small_model()
step = pretrain.TrainStep(model, pretrain.build_optimizers(model, pretrain.Config()),
                          world_size=world_size)
for i in range(3):
    x, y = small_batch(i, B=4)
    batches = [(x[rank * 2 : rank * 2 + 2], y[rank * 2 : rank * 2 + 2])] if world_size == 2 else [
        (x[:2], y[:2]), (x[2:], y[2:])]
    loss, norm = step(batches)
if rank == 0:
    torch.save({{"loss": loss, "norm": norm, "model": model.state_dict()}}, sys.argv[1])
pretrain.compute_cleanup()
"""


def test_two_ranks_train_as_one_rank_with_twice_the_batch(tmp_path):
    program = tmp_path / "ranks.py"
    program.write_text(RANK_PROGRAM.format(tests=os.path.dirname(__file__)), encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, extra in (("one", []), ("two", launch)):
        done = run_process([sys.executable, *extra, program, tmp_path / name], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-5)
    for name, weight in one["model"].items():
        torch.testing.assert_close(two["model"][name], weight, atol=1e-5, rtol=0, msg=name)


@pytest.mark.skipif(not pretrain.has_compiler(), reason="no C++ compiler")
def test_the_compiled_model_trains_as_the_eager_one():
    weights = []
    for compiled in (False, True):
        model = small_model(n_layer=1)
        step = pretrain.TrainStep(model, pretrain.build_optimizers(model, pretrain.Config()),
                                  compiled=compiled)
        for i in range(2):
            step([small_batch(i)])
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], atol=2e-4, rtol=0)


# ---- bits per byte -------------------------------------------------------------------------------


def test_bits_per_byte_of_a_model_that_knows_nothing_is_counted_by_hand():
    """Token lengths 1, 2, 3 and a special of 0; targets 0, 1, 2, special, ignored, 1.

    Each of the four that count costs log2(4) = 2 bits; bytes 1 + 2 + 3 + 2 = 8: 4 * 2 / 8 = 1.
    """
    model = pretrain.GPT(pretrain.GPTConfig(6, 4, 1, 2, 2, 8))
    targets = torch.tensor([[0, 1, 2, 3, -1, 1]])
    bpb, num_bytes = pretrain.evaluate_bpb(model, targets.clamp(min=0), targets,
                                           torch.tensor([1, 2, 3, 0]), torch.float32)
    assert (bpb, num_bytes) == (pytest.approx(1.0, rel=1e-6), 8)


def test_bits_per_byte_does_not_depend_on_the_batch_size_or_on_padding(world):
    tokenizer = pretrain.Tokenizer.from_dir(world / "tokenizer")
    lengths = torch.tensor(tokenizer.token_bytes())
    texts = list(documents(9, seed=5))
    torch.manual_seed(0)
    model = pretrain.GPT(pretrain.GPTConfig(16, tokenizer.get_vocab_size(), 1, 2, 2, 16))
    torch.nn.init.normal_(model.lm_head.weight)
    rows = pretrain.validation_rows(texts, tokenizer, 16)
    got = [pretrain.evaluate_bpb(model, *rows, lengths, torch.float32, batch_size=b)
           for b in (1, 7, 64)]
    assert got[0][0] == pytest.approx(got[1][0], rel=1e-6) == got[2][0]
    assert {n for _, n in got} == {sum(len(t.encode()) for t in texts)}, "every byte counts once"


def test_validation_rows_make_every_token_a_target_once(world):
    tokenizer = pretrain.Tokenizer.from_dir(world / "tokenizer")
    texts = list(documents(4, seed=9))
    stream = [i for t in texts for i in tokenizer.encode(t, prepend="<|bos|>")]
    inputs, targets = pretrain.validation_rows(texts, tokenizer, 7)
    kept = targets.flatten() != -1
    assert targets.flatten()[kept].tolist() == stream[1:]
    assert inputs.flatten()[kept].tolist() == stream[:-1]


def test_the_ladder_is_worked_by_hand():
    """Train 0 1 0 1 0 2, V = 4, one byte a token; held out: 0 -> 1 and 2 -> 0.

    Unigram (n + 1) / (6 + 4): p(1) = 0.3, p(0) = 0.4. Bigram with k = 10:
    p(1|0) = (2 + 3) / (3 + 10), p(0|2) = (0 + 4) / (1 + 10).
    """
    ladder = pretrain.count_ladder(np.array([0, 1, 0, 1, 0, 2]), torch.tensor([[0, 2]]),
                                   torch.tensor([[1, 0]]), torch.ones(4, dtype=torch.long))
    assert ladder["uniform"] == pytest.approx(2.0)
    assert ladder["unigram"] == pytest.approx(-(math.log2(0.3) + math.log2(0.4)) / 2)
    assert ladder["bigram"] == pytest.approx(-(math.log2(5 / 13) + math.log2(4 / 11)) / 2)


# ---- the run -------------------------------------------------------------------------------------


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def assert_same_run(a, b):
    first, second = weights_of(a), weights_of(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs"
    timeless = [[{k: v for k, v in row.items() if k not in ("tok_per_s", "mfu")}
                 for row in pretrain.read_metrics(folder / "metrics.jsonl")] for folder in (a, b)]
    assert timeless[0] == timeless[1]


def test_a_short_run_learns_more_than_which_word_follows_which(world):
    """Beats the bigram on held-out documents, and writes what it promises."""
    cfg = settings(world, "learns", n_embd=64, sequence_len=64, device_batch_size=8,
                   total_batch_size=512, num_iterations=150, eval_every=50, save_every=1000,
                   plot=True)
    result = pretrain.train(cfg)
    ladder = result["ladder"]
    assert ladder["uniform"] > ladder["unigram"] > ladder["bigram"] > result["val_bpb"]
    folder = world / "learns"
    for name in ("model.safetensors", "config.json", "resume.pt", "metrics.jsonl", "loss.png"):
        assert (folder / name).stat().st_size > 0, name
    assert list((folder / "tb").iterdir()), "TensorBoard events"
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert about["step"] == 150 and about["metrics"]["val_bpb"] == result["val_bpb"]
    rows = pretrain.read_metrics(folder / "metrics.jsonl")
    assert rows[0]["loss"] > 2 * rows[-2]["loss"]


@pytest.mark.parametrize("changes", [{}, {"device_batch_size": 2}], ids=["plain", "accumulating"])
def test_a_resumed_run_is_the_uninterrupted_run_to_the_bit(world, changes, monkeypatch):
    """Silent bug 10: optimizer, schedule, random numbers and data cursor, all of it."""
    straight, split = f"straight{len(changes)}", f"split{len(changes)}"
    pretrain.train(settings(world, straight, **changes))

    class Killed(BaseException):
        pass

    real, count = pretrain.TrainStep.__call__, iter(range(100))

    def dies(self, *args):
        if next(count) == 5:  # after the checkpoint of step 4
            raise Killed
        return real(self, *args)

    monkeypatch.setattr(pretrain.TrainStep, "__call__", dies)
    with pytest.raises(Killed):
        pretrain.train(settings(world, split, **changes))
    monkeypatch.setattr(pretrain.TrainStep, "__call__", real)
    pretrain.train(settings(world, split, resume=True, **changes))
    assert_same_run(world / straight, world / split)


def test_a_resumed_run_crosses_the_end_of_an_epoch(tmp_path, world):
    """Few documents, so that the loader begins again before the checkpoint and after it."""
    for index, count in enumerate((12, 6)):
        pq.write_table(pa.table({"text": list(documents(count, seed=index))}),
                       tmp_path / f"shard_{index:05d}.parquet", row_group_size=5)
    os.symlink(world / "tokenizer", tmp_path / "tokenizer")
    common = {"num_iterations": 24, "save_every": 12, "log_every": 6}
    pretrain.train(settings(tmp_path, "straight", **common))
    stopper = settings(tmp_path, "split", **common)
    real, count = pretrain.TrainStep.__call__, iter(range(100))
    try:
        pretrain.TrainStep.__call__ = lambda self, *a: real(self, *a) if next(count) < 13 else 1 / 0
        with pytest.raises(ZeroDivisionError):
            pretrain.train(stopper)
    finally:
        pretrain.TrainStep.__call__ = real
    pretrain.train(settings(tmp_path, "split", resume=True, **common))
    assert_same_run(tmp_path / "straight", tmp_path / "split")


def test_kill_9_costs_only_the_steps_since_the_last_checkpoint(world, tmp_path):
    long = {"num_iterations": 400, "save_every": 20, "eval_every": 1000, "log_every": 50}
    with running("12_pretrain", settings(world, "killed", **long), tmp_path / "log") as process:
        wait_for((world / "killed" / "resume.pt").exists, process)
        process.send_signal(signal.SIGKILL)
    left = torch.load(world / "killed" / "resume.pt", weights_only=True)
    assert 0 < left["step"] < 400
    pretrain.train(settings(world, "killed", resume=True, **long))
    pretrain.train(settings(world, "whole", **long))
    assert_same_run(world / "whole", world / "killed")


def test_ctrl_c_saves_and_says_how_to_go_on(world, tmp_path):
    cfg = settings(world, "stopped", num_iterations=100_000, save_every=90_000, log_every=10)
    metrics, log = world / "stopped" / "metrics.jsonl", tmp_path / "log"
    with running("12_pretrain", cfg, log) as process:
        wait_for(lambda: metrics.exists() and len(pretrain.read_metrics(metrics)) > 2, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    text = log.read_text(encoding="utf-8")
    assert "stopped at step" in text and "--resume" in text
    assert torch.load(world / "stopped" / "resume.pt", weights_only=True)["step"] > 2


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(
        world, monkeypatch, capsys):
    """Silent bug 6 of the users' list: nan weights must never be saved."""
    real, count = pretrain.TrainStep.backward, iter(range(100))

    def poisoned(self, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        return loss * math.nan if next(count) == 3 else loss

    monkeypatch.setattr(pretrain.TrainStep, "backward", poisoned)
    assert pretrain.main(flags_of(settings(world, "diverged"))) == 1
    error = capsys.readouterr().err
    assert "at step 3" in error and "--matrix-lr" in error and "Traceback" not in error
    assert all(torch.isfinite(w).all() for w in weights_of(world / "diverged").values())
    assert torch.load(world / "diverged" / "resume.pt", weights_only=True)["step"] == 2


def test_two_ranks_run_save_once_and_resume(world, tmp_path, run_script):
    cfg = settings(world, "ranks", total_batch_size=128, num_iterations=4)
    done = run_script("12_pretrain", *flags_of(cfg), nproc=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("12 pretrain") == 1, "only rank 0 speaks"
    state = torch.load(world / "ranks" / "resume.pt", weights_only=True)
    assert state["step"] == 4 and len(state["loader"]) == 2


def test_target_bpb_stops_at_the_first_evaluation_that_reaches_it(world, capsys):
    cfg = settings(world, "target", num_iterations=50, eval_every=2, target_bpb=20.0)
    assert pretrain.train(cfg)["step"] == 2
    assert "--target-bpb 20 is reached at step 2" in capsys.readouterr().out


def test_max_minutes_ends_with_a_usable_checkpoint(world, capsys):
    cfg = settings(world, "minutes", num_iterations=10**6, max_minutes=0.02, save_every=10**6,
                   eval_every=10**6, log_every=100)
    result = pretrain.train(cfg)
    assert 0 < result["step"] < 10**6
    assert "--max-minutes 0.02 is over" in capsys.readouterr().out
    assert weights_of(world / "minutes")


@pytest.mark.parametrize("changes, words", [
    ({"total_batch_size": 100}, ["100", "multiple of 64", "--total-batch-size 64"]),
    ({"n_head": 3}, ["--n-embd 32", "3 heads"]),
    ({"n_kv_head": 3, "n_head": 4}, ["--n-kv-head 3", "--n-head 4"]),
    ({"depth": 0}, ["at least 1"]),
    ({"dtype": "float8"}, ["float8", "bfloat16"]),
    ({"compile": "maybe"}, ["maybe", "auto"]),
    ({"save_every": 0}, ["count from 1"]),
    ({"num_iterations": -1}, ["-1"]),
    ({"target_param_data_ratio": 40.0}, ["--num-iterations 6", "ratio 40", "--num-iterations 0"]),
    ({"num_iterations": 0, "target_param_data_ratio": math.nan}, ["nan"]),
    ({"warmdown_ratio": 50.0}, ["--warmdown-ratio 50", "between 0 and 1"]),
    ({"stage": "../refused"}, ["--stage '../refused'", "plain name"]),
    ({"stage": "."}, ["--stage '.'"]),
])
def test_a_setting_that_cannot_work_is_refused_with_the_way_out(world, changes, words, capsys):
    assert pretrain.main(flags_of(settings(world, **{"stage": "refused", **changes}))) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and all(word in error for word in words), error
    assert not (world / "refused").exists(), "nothing may be written"


def test_resuming_with_other_settings_is_refused_naming_them(world, capsys):
    pretrain.train(settings(world, "mine", num_iterations=2))
    before = (world / "mine" / "resume.pt").read_bytes()
    cfg = settings(world, "mine", num_iterations=2, matrix_lr=0.5, resume=True)
    assert pretrain.main(flags_of(cfg)) == 2
    assert "matrix_lr 0.5 -> 0.02" in capsys.readouterr().err
    assert (world / "mine" / "resume.pt").read_bytes() == before


def test_resuming_with_another_tokenizer_is_refused_naming_both(world, tmp_path, capsys):
    pretrain.train(settings(world, "words", num_iterations=2))
    for path in world.glob("shard_*"):
        os.symlink(path, tmp_path / path.name)
    load("11_tokenizer").main(["--data-dir", str(tmp_path), "--vocab-size", "300", "--no-gpt2"])
    os.symlink(world / "words", tmp_path / "words")
    cfg = settings(tmp_path, "words", num_iterations=2, resume=True)
    capsys.readouterr()
    assert pretrain.main(flags_of(cfg)) == 2
    error = capsys.readouterr().err
    for folder in (world, tmp_path):
        assert pretrain.Tokenizer.from_dir(folder / "tokenizer").sha256[:12] in error


def test_resuming_on_other_shards_is_refused_since_it_would_be_neither_run(
        world, tmp_path, capsys):
    shutil.copytree(world / "tokenizer", tmp_path / "tokenizer")
    for path in world.glob("shard_*"):
        shutil.copy(path, tmp_path)
    pretrain.train(settings(tmp_path, "mine"))
    cfg = settings(tmp_path, "mine", resume=True)
    assert pretrain.main(flags_of(cfg)) == 0  # the same shards: nothing to say
    shutil.copy(tmp_path / "shard_00002.parquet", tmp_path / "shard_00000.parquet")
    assert pretrain.main(flags_of(cfg)) == 2
    assert "belongs to another run (now -> then): shards " in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["tokenizer", "sft"])
def test_what_another_script_made_is_not_overwritten(world, stage, capsys):
    config = world / stage / "config.json"
    if stage == "sft":
        config.parent.mkdir()
        config.write_text('{"model": {}, "script": {"source": "base"}}', "utf-8")
    before = config.read_bytes()
    assert pretrain.main(flags_of(settings(world, stage))) == 2
    assert "another script's work" in capsys.readouterr().err and config.read_bytes() == before


def test_a_damaged_resume_file_is_refused_and_kept(world, capsys):
    pretrain.train(settings(world, "damaged", num_iterations=2))
    path = world / "damaged" / "resume.pt"
    path.write_bytes(path.read_bytes()[:1000])
    assert pretrain.main(flags_of(settings(world, "damaged", num_iterations=2, resume=True))) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert path.stat().st_size == 1000


def test_missing_shards_and_missing_tokenizer_name_the_command_that_makes_them(tmp_path, capsys):
    assert pretrain.main(["--data-dir", str(tmp_path)]) == 2
    assert "python edu/11_tokenizer.py" in capsys.readouterr().err


def test_a_metrics_file_with_a_half_written_line_is_read_without_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 2.0}\n{"step": 1, "lo', encoding="utf-8")
    assert pretrain.read_metrics(path) == [{"step": 0, "loss": 2.0}]
