"""Challenge 10: advantages, the loss and its traps, what is sampled, and a reward that rises."""

import json
import math
import random
import shutil
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import load, running, wait_for
from safetensors.torch import load_file, save_file

rl = load("10_rl")
engine = load("05_engine")
sft = load("08_sft")


# ---- advantages ----------------------------------------------------------------------------------


def test_advantages_are_worked_by_hand():
    """Silent bug 5, 2 groups x 4 samples: (1 0 0 1) has mean 1/2, (1 1 1 0) has mean 3/4."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0]])
    torch.testing.assert_close(rl.compute_advantages(rewards), torch.tensor(
        [[0.5, -0.5, -0.5, 0.5], [0.25, 0.25, 0.25, -0.75]]))
    # population std: 1/2 and sqrt(3)/4
    torch.testing.assert_close(rl.compute_advantages(rewards, normalize_std=True), torch.tensor(
        [[1.0, -1.0, -1.0, 1.0], [3**-0.5, 3**-0.5, 3**-0.5, -(3**0.5)]]))


def test_to_permute_groups_or_samples_permutes_the_advantages():
    rewards = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    for normalize in (False, True):
        base = rl.compute_advantages(rewards, normalize)
        torch.testing.assert_close(rl.compute_advantages(rewards[[2, 0, 1]], normalize),
                                   base[[2, 0, 1]])
        torch.testing.assert_close(rl.compute_advantages(rewards[:, [4, 2, 0, 1, 3]], normalize),
                                   base[:, [4, 2, 0, 1, 3]])
        torch.testing.assert_close(base.sum(1), torch.zeros(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_dead_group_and_a_group_of_one_have_advantages_of_zero(normalize):
    for rewards in (torch.ones(2, 4), torch.zeros(2, 4), torch.tensor([[0.3], [1.0]])):
        assert torch.equal(rl.compute_advantages(rewards, normalize), torch.zeros_like(rewards))


# ---- the loss ------------------------------------------------------------------------------------


def test_the_loss_is_worked_by_hand():
    """Two rows with 2 and 1 tokens of the policy: -(1*(-1) + 1*(-2) - 2*(-3)) / 3 = -1."""
    logprobs = torch.tensor([[-1.0, -2.0, -9.0], [-9.0, -3.0, -9.0]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]])
    loss = rl.policy_gradient_loss(logprobs, torch.tensor([1.0, -2.0]), mask)
    assert loss.item() == pytest.approx(-1.0)
    assert rl.policy_gradient_loss(logprobs, torch.tensor([1.0, -2.0]), mask,
                                   total=6).item() == pytest.approx(-0.5)


def rows(seed=0, N=3, T=5):
    rng = torch.Generator().manual_seed(seed)
    logprobs = -3 * torch.rand(N, T, generator=rng)
    mask = (torch.rand(N, T, generator=rng) < 0.6).long()
    mask[:, 0] = 1
    return logprobs, torch.randn(N, generator=rng), mask


OPTIONS = {"plain": {}, "clip": {"clip": 0.2}, "kl": {"kl": 0.3}, "both": {"clip": 0.2, "kl": 0.3}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_is_masked_has_no_influence_even_where_it_is_not_a_number(options):
    """Silent bug 6: to mask after exp gives inf * 0 = nan."""
    logprobs, advantages, mask = rows()
    old, ref = logprobs - 0.1, logprobs + 0.2
    results = []
    for junk in (0.0, 5.0, math.inf, -math.inf, math.nan):
        p, o, r = (torch.where(mask.bool(), x, junk).requires_grad_() for x in (logprobs, old, ref))
        loss = rl.policy_gradient_loss(p, advantages, mask, o, ref_logprobs=r, **options)
        loss.backward()
        assert not p.grad[mask == 0].any() and p.grad.isfinite().all()
        results.append((loss.item(), p.grad))
    for loss, grad in results[1:]:
        assert loss == results[0][0] and torch.equal(grad, results[0][1])


def test_at_the_sampling_policy_clipping_has_the_gradient_of_the_plain_loss():
    """The ratio is 1 before the first update, and its gradient that of the log probability."""
    logprobs, advantages, mask = rows()
    grads = []
    for clip in (0.0, 0.2):
        p = logprobs.clone().requires_grad_()
        rl.policy_gradient_loss(p, advantages, mask, logprobs, clip=clip).backward()
        grads.append(p.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("advantage, shift, moves", [
    (1.0, 0.5, False), (1.0, -0.5, True), (-1.0, -0.5, False), (-1.0, 0.5, True)])
def test_a_ratio_that_went_far_enough_the_right_way_gets_no_gradient(advantage, shift, moves):
    """Clip 0.2: exp(0.5) = 1.65 is beyond 1.2, and more of the same is not paid."""
    p = torch.tensor([[-1.0]], requires_grad=True)
    rl.policy_gradient_loss(p, torch.tensor([advantage]), torch.ones(1, 1), p.detach() - shift,
                            clip=0.2).backward()
    assert bool(p.grad.any()) is moves


def test_the_kl_penalty_is_zero_at_the_reference_positive_elsewhere_and_pulls_back():
    mask, no_gain = torch.ones(1, 1), torch.zeros(1)
    for distance in (-0.7, 0.0, 0.7):
        p = torch.tensor([[-1.0]], requires_grad=True)
        loss = rl.policy_gradient_loss(p, no_gain, mask, ref_logprobs=p.detach() - distance, kl=1.0)
        loss.backward()
        # d = ref - p = -distance: e^d - d - 1
        assert loss.item() == pytest.approx(math.exp(-distance) + distance - 1)
        assert torch.sign(p.grad).item() == torch.sign(torch.tensor(distance)).item()


def small_model(seed=0, V=40, T=24):
    torch.manual_seed(seed)
    model = rl.GPT(rl.GPTConfig(T, V, 2, 4, 2, 24))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scoring_gives_the_probabilities_that_sampling_used(temperature):
    """The trap of two distributions: sampled at a temperature, trained at another."""
    model, ids = small_model(), torch.randint(40, (2, 9))
    mask = torch.zeros(2, 9, dtype=torch.long)
    mask[0, 4:8], mask[1, 2:9] = 1, 1
    logprobs, entropy = rl.score_rows(model, ids, mask, temperature)
    p = torch.softmax(model(ids) / temperature, -1)  # what sample_next_token draws from
    for n in range(2):
        for t in range(9):
            expected = p[n, t - 1, ids[n, t]].log().item() if mask[n, t] else 0.0
            assert logprobs[n, t].item() == pytest.approx(expected, abs=1e-5)
    H = -(p * p.log()).sum(-1)[:, :-1][mask[:, 1:].bool()].mean()
    assert entropy == pytest.approx(H.item(), abs=1e-5)


def test_the_samples_of_a_temperature_follow_the_scored_probabilities():
    """4000 draws of one token: each frequency within 4.5 standard errors of p (odds 1 in 10^5)."""
    logits = torch.tensor([[2.0, 0.0, -1.0, 1.0]])
    p = torch.softmax(logits[0] / 0.8, -1)
    u = torch.rand(4000, generator=torch.Generator().manual_seed(1))
    drawn = rl.sample_next_token(logits.expand(4000, -1), u, temperature=0.8)
    seen = torch.bincount(drawn, minlength=4) / 4000
    assert ((seen - p).abs() < 4.5 * (p * (1 - p) / 4000).sqrt()).all()


def test_padding_does_not_change_a_score():
    model, row, marks = small_model(), [5, 6, 7, 8], [0, 0, 1, 1]
    alone, _ = rl.score_rows(model, *rl.pad_rows([row], [marks], "cpu"))
    ids, mask = rl.pad_rows([row, [1] * 9], [marks, [1] * 9], "cpu")
    ids[0, 4:] = 33  # whatever stands there
    together, _ = rl.score_rows(model, ids, mask)
    torch.testing.assert_close(together[0, :4], alone[0], atol=1e-5, rtol=0)
    assert not together[0, 4:].any()


# ---- statistics ----------------------------------------------------------------------------------


def test_pass_at_k_is_unbiased_where_the_first_k_tries_are_not_all():
    """Over all ways to pick k of n samples: the share of picks that hold a right one."""
    from itertools import combinations

    for n, c, k in ((5, 2, 1), (6, 1, 3), (7, 3, 4), (4, 0, 2), (4, 4, 4)):
        picks = list(combinations([1] * c + [0] * (n - c), k))
        assert rl.pass_at_k(n, c, k) == pytest.approx(sum(any(p) for p in picks) / len(picks))


def test_the_interval_is_wilsons():
    """0 of 10 gives 0 to 0.2775, 5 of 10 gives 0.2366 to 0.7634 (textbook values, z = 1.96)."""
    assert rl.wilson_interval(0.0, 10) == (pytest.approx(0.0, abs=1e-9),
                                           pytest.approx(0.2775, abs=1e-4))
    assert rl.wilson_interval(0.5, 10) == (pytest.approx(0.2366, abs=1e-4),
                                           pytest.approx(0.7634, abs=1e-4))


def test_the_walk_through_the_problems_takes_each_once_an_epoch():
    taken = [i for step in range(7) for i in rl.prompts_of_step(step, list(range(14)), 4, seed=3)]
    assert sorted(taken[:14]) == sorted(taken[14:]) == list(range(14))
    assert taken[:14] != taken[14:]


def test_the_hackable_reward_pays_a_list_of_digits_and_the_exact_one_does_not():
    assert rl.hackable_reward("#### 495") == 0.3 and rl.hackable_reward("0123456789") == 1.0
    assert rl.hackable_reward("no working at all") == 0.0
    assert rl.TenQuestions().reward(1, "0123456789") == 0.0
    assert rl.TenQuestions().reward(1, "#### 456") == 1.0


def test_the_ten_questions_are_ten_and_have_the_answers_they_say():
    """The arithmetic again, by other means: the expression each question asks for."""
    work = [241 - 198, 57 * 8, 158 + 217, 37 * 13, 231 + 231 + 164, 53 * 5, 213 - 87, 131 - 7 * 13,
            94 - 28 + 165, 7 * 59]
    assert [str(value) for value in work] == [answer for _, answer in rl.TEN_QUESTIONS]


# ---- the run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model that answers any problem with 5, 6, 7 or 8 by chance; 7 is right, always."""
    folder, rng = tmp_path_factory.mktemp("rl"), random.Random(0)
    texts = [f"Problem {i}: what is it?\n#### {i % 10}" for i in range(200)]
    for index in range(2):
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{index:05d}.parquet")
    assert load("11_tokenizer").main(
        ["--data-dir", str(folder), "--vocab-size", "280", "--no-gpt2"]) == 0
    chats = [{"messages": [{"role": "user", "content": f"Problem {rng.randrange(100)}"},
                           {"role": "assistant", "content": f"#### {rng.choice('5678')}"}]}
             for _ in range(300)]
    (folder / "tiny_chat_train.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats))
    for split, count in (("train", 40), ("test", 12)):
        problems = [{"question": f"Problem {i}", "answer": "It is seven.\n#### 7"}
                    for i in range(count)]
        (folder / f"tiny_gsm_{split}.jsonl").write_text(
            "".join(json.dumps(p) + "\n" for p in problems))
    tokenizer = sft.Tokenizer.from_dir(folder / "tokenizer")
    torch.manual_seed(0)
    model = sft.GPT(sft.GPTConfig(48, tokenizer.get_vocab_size(), 1, 2, 2, 32))
    config = sft.Config(data_dir=folder, num_epochs=4, rows_per_step=16, plot=False, eval_prompts=0,
                        max_problems=0, sample_every=10**6, eval_every=10**6, save_every=10**6)
    load("12_pretrain").save_checkpoint(folder / "base", model, tokenizer, 0, {}, config)
    (folder / "hidden").mkdir()
    for split in ("train", "test"):  # their format is not what fine-tuning reads
        (folder / f"tiny_gsm_{split}.jsonl").rename(folder / "hidden" / f"tiny_gsm_{split}.jsonl")
    sft.train(config)
    for split in ("train", "test"):
        (folder / "hidden" / f"tiny_gsm_{split}.jsonl").rename(folder / f"tiny_gsm_{split}.jsonl")
    return folder


def settings(world, stage, **changes):
    small = {"num_samples": 8, "prompts_per_step": 4, "max_new_tokens": 8, "num_steps": 6,
             "eval_problems": 12, "probe_prompts": 4, "save_every": 2, "eval_every": 100,
             "plot": False, "lr": 3e-3, "warmup_steps": 1}
    return rl.Config(data_dir=world, stage=stage, **{**small, **changes})


@pytest.mark.parametrize("changes", [
    {}, {"normalize_std": True}, {"clip": 0.2, "epochs": 2}, {"kl": 0.01},
    {"device_batch_size": 5}], ids=["plain", "std", "ppo", "kl", "small passes"])
def test_the_reward_rises_from_chance_to_nearly_always(world, changes):
    """One of four answers is right: 25% by chance, above 90% after 60 steps."""
    result = rl.train(settings(world, "rises", num_steps=60, **changes))
    rewards = [row["reward"] for row in result["rows"] if row.get("reward") is not None]
    assert sum(rewards[:3]) / 3 < 0.6 and sum(rewards[-3:]) / 3 > 0.9
    assert result["after"] == 1.0 and result["n"] == 12


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_it_rises_with_every_seed(world, seed):
    result = rl.train(settings(world, "seeds", num_steps=60, seed=seed))
    assert result["rows"][-2]["reward"] > 0.8 and result["after"] == 1.0


def test_every_row_of_a_run_has_the_numbers_to_look_at(world):
    rows = [r for r in rl.train(settings(world, "logged"))["rows"] if r.get("reward") is not None]
    assert len(rows) == 6
    for row in rows:
        assert {"reward", "dead_groups", "tool_use", "length", "entropy", "truncated", "grad_norm",
                "samples_per_s"} <= set(row)
        assert 0 <= row["dead_groups"] <= 1 and row["length"] > 0 and row["tool_use"] == 0


def test_the_numbers_of_a_row_are_those_of_the_rollouts(world, monkeypatch):
    """Worked out again from what was sampled; the pass rates by counting."""
    seen, real = [], rl.sample_rollouts

    def spy(*args, **options):
        seen.append(real(*args, **options))
        return seen[-1]

    monkeypatch.setattr(rl, "sample_rollouts", spy)
    rows = rl.train(settings(world, "counted", max_new_tokens=4))["rows"]
    steps = [taken for taken in seen if taken.rewards.shape == (4, 8)][1:]  # the first is the probe
    rows = [row for row in rows if row.get("reward") is not None]
    assert len(steps) == len(rows) == 6
    for taken, row in zip(steps, rows):
        groups = taken.rewards.tolist()
        assert row["dead_groups"] == sum(len(set(group)) == 1 for group in groups) / 4
        assert row["reward"] == pytest.approx(sum(map(sum, groups)) / 32)
        assert row["truncated"] == sum(taken.truncated) / 32
        assert row["length"] == sum(taken.lengths) / 32
        assert row["pass_at_1"] == pytest.approx(sum(map(sum, groups)) / 32)
        assert row["pass_at_8"] == sum(any(group) for group in groups) / 4
    assert any(0 < row["truncated"] < 1 for row in rows)


class Scripted:
    """An engine that always says the same: a row with the calculator, and one cut off."""

    def __init__(self, engine):
        self.tokenizer, self.model, self.stops = engine.tokenizer, engine.model, engine.stops

    def generate_batch(self, prompts, num_samples, *_, **__):
        code = self.tokenizer.encode_special
        call = [code("<|python_start|>"), *self.tokenizer.encode("3+4"), code("<|python_end|>")]
        output = [code("<|output_start|>"), *self.tokenizer.encode("7"), code("<|output_end|>")]
        end = [*self.tokenizer.encode("#### 7"), code("<|assistant_end|>")]
        said = ([*call, *output, *end], self.tokenizer.encode("#### 8"))
        marks = ([1] * len(call) + [0] * len(output) + [1] * len(end), [1] * len(said[1]))
        rows = [(p, said[n % 2], marks[n % 2]) for p in prompts for n in range(num_samples)]
        return [[*p, *s] for p, s, _ in rows], [[0] * len(p) + m for p, _, m in rows]


def test_what_the_calculator_wrote_is_seen_and_not_trained(world):
    tokenizer = rl.Tokenizer.from_dir(world / "tokenizer")
    model, _ = rl.load_checkpoint(world / "sft", tokenizer, torch.device("cpu"))
    talker, task = Scripted(rl.Engine(model, tokenizer)), rl.GSM8K("train", data_dir=world)
    taken = rl.sample_rollouts(talker, task, [0], settings(world, "x"), seed=0, num_samples=2)
    assert taken.used_tool == [True, False] and taken.truncated == [False, True]
    assert taken.rewards.tolist() == [[1.0, 0.0]]
    trained = [t for t, chosen in zip(taken.ids[0], taken.mask[0]) if chosen]
    assert tokenizer.decode(trained) == "<|python_start|>3+4<|python_end|>#### 7<|assistant_end|>"


def recorder(real, calls):
    def call(*args):
        calls.append(args)
        return real(*args)
    return call


def one_update(world, monkeypatch, **changes):
    """update_policy on a first step's rollouts: the calls of score_rows, the loss, the clipping."""
    tokenizer = rl.Tokenizer.from_dir(world / "tokenizer")
    model, _ = rl.load_checkpoint(world / "sft", tokenizer, torch.device("cpu"))
    cfg, task = settings(world, "x", **changes), rl.GSM8K("train", data_dir=world)
    taken = rl.sample_rollouts(rl.Engine(model, tokenizer), task, [0, 1], cfg, seed=1)
    calls = {"score_rows": [], "policy_gradient_loss": [], "clip_grad_norm_": []}
    for owner, name in ((rl, "score_rows"), (rl, "policy_gradient_loss"),
                        (torch.nn.utils, "clip_grad_norm_")):
        monkeypatch.setattr(owner, name, recorder(getattr(owner, name), calls[name]))
    optimizer = rl.AdamW([{"params": model.parameters(), "lr": cfg.lr}])
    rl.update_policy(model, optimizer, None, taken, cfg, cfg.lr)
    return calls


def test_the_update_scores_at_the_temperature_of_the_sampling(world, monkeypatch):
    calls = one_update(world, monkeypatch, temperature=0.7, max_grad_norm=0.125)
    assert calls["score_rows"] and {args[3] for args in calls["score_rows"]} == {0.7}
    assert {args[1] for args in calls["clip_grad_norm_"]} == {0.125}


def test_the_ratio_is_one_before_the_first_update_and_another_after_it(world, monkeypatch):
    """Silent bug 6: a ratio of the policy with itself would be one for ever."""
    calls = one_update(world, monkeypatch, clip=0.2, epochs=2, device_batch_size=64)
    ratios = [(args[0] - args[3])[args[2].bool()].exp() for args in calls["policy_gradient_loss"]]
    assert len(ratios) == 2
    torch.testing.assert_close(ratios[0], torch.ones_like(ratios[0]), atol=1e-4, rtol=0)
    assert (ratios[1] - 1).abs().max() > 1e-3


def test_the_reference_of_the_kl_penalty_stays_where_the_run_began(world, monkeypatch):
    seen, real = [], rl.update_policy
    monkeypatch.setattr(rl, "update_policy", lambda model, optimizer, reference, *rest: (
        seen.append(reference), real(model, optimizer, reference, *rest))[1])
    rl.train(settings(world, "leashed", kl=0.01))
    began = load_file(world / "sft" / "model.safetensors")
    assert all(torch.equal(weight, began[name]) for name, weight in seen[-1].state_dict().items()
               if name in began)


def test_held_out_problems_are_not_those_to_train_on(world, tmp_path):
    train, numbers, test, test_numbers = rl.load_tasks(settings(world, "x"))
    assert (len(numbers), len(test_numbers)) == (40, 12) and test is not train
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"question": f"Q {i}", "answer": f"#### {i}"}) + "\n"
                            for i in range(30)), encoding="utf-8")
    _, numbers, _, held_out = rl.load_tasks(settings(world, "x", path=path, eval_problems=10))
    assert sorted(numbers + held_out) == list(range(30)) and len(held_out) == 10


def test_all_samples_of_a_group_draw_their_own_first_token_and_the_stop_token_is_trained(world):
    tokenizer = rl.Tokenizer.from_dir(world / "tokenizer")
    model, _ = rl.load_checkpoint(world / "sft", tokenizer, torch.device("cpu"))
    talker, task = rl.Engine(model, tokenizer), rl.GSM8K("train", data_dir=world)
    taken = rl.sample_rollouts(talker, task, [0, 1], settings(world, "x"), seed=5, num_samples=16)
    assert taken.rewards.shape == (2, 16) and len(taken.ids) == 32
    assert len(set(taken.replies[:16])) > 1
    end = tokenizer.encode_special("<|assistant_end|>")
    for ids, mask, cut in zip(taken.ids, taken.mask, taken.truncated):
        prompt = len(rl.render_for_completion(task.get_example(0)["messages"], tokenizer))
        assert not any(mask[: prompt - 1]), "the prompt is not trained"
        assert cut or (ids[-1] == end and mask[-1] == 1), "or it would never learn to stop"


def test_a_resumed_run_is_the_uninterrupted_run_to_the_bit(world, monkeypatch):
    straight = rl.train(settings(world, "straight"))

    class Killed(BaseException):
        pass

    real, count = rl.update_policy, iter(range(100))

    def dies(*args):
        if next(count) == 5:  # after the checkpoint of step 4
            raise Killed
        return real(*args)

    monkeypatch.setattr(rl, "update_policy", dies)
    with pytest.raises(Killed):
        rl.train(settings(world, "split"))
    monkeypatch.setattr(rl, "update_policy", real)
    split = rl.train(settings(world, "split", resume=True))
    assert_same_weights(world / "straight", world / "split")
    logged = [[{k: v for k, v in row.items() if k != "samples_per_s"} for row in run["rows"]]
              for run in (straight, split)]
    assert logged[0] == logged[1]


def assert_same_weights(first, second):
    first, second = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_a_run_that_was_stopped_from_outside_goes_on_to_the_same_end(world, tmp_path, how):
    long, log = {"num_steps": 60, "save_every": 2}, tmp_path / "log"
    with running("10_rl", settings(world, how.name, **long), log) as process:
        wait_for((world / how.name / "resume.pt").exists, process)
        process.send_signal(how)
        code = process.wait(60)
    if how is signal.SIGINT:
        assert code == 0 and "stopped at step" in log.read_text(encoding="utf-8")
    assert torch.load(world / how.name / "resume.pt", weights_only=True)["step"] < 60
    rl.train(settings(world, how.name, resume=True, **long))
    rl.train(settings(world, "all_60", **long))
    assert_same_weights(world / how.name, world / "all_60")


@pytest.mark.parametrize("changes, words", [
    ({"lr": 0.5}, "lr 0.5 -> "), ({"num_steps": 9}, "num_steps 9 -> 2"),
    ({"eval_problems": 5}, "eval_problems 5 -> 12"),
    ({"source": "other"}, "source_model [0-9a-f]{12} -> [0-9a-f]{12}"),
    ({"path": "few.jsonl"}, "problems [0-9a-f]{12} -> [0-9a-f]{12}")])
def test_another_run_is_not_resumed_by_mistake(world, changes, words, tmp_path):
    """The learning rate follows num_steps; model and problems stand in no setting's value."""
    rl.train(settings(world, "mine", num_steps=2))
    if "source" in changes:
        shutil.copytree(world / "sft", world / "other", dirs_exist_ok=True)
        save_file({name: weight * 1.001 for name, weight in
                   load_file(world / "sft" / "model.safetensors").items()},
                  world / "other" / "model.safetensors")
    if "path" in changes:
        changes = {"path": tmp_path / "few.jsonl", "eval_problems": 2}
        lines = (world / "tiny_gsm_train.jsonl").read_text(encoding="utf-8").splitlines(True)
        changes["path"].write_text("".join(lines[:20]), encoding="utf-8")
    with pytest.raises(rl.UserError, match=words):
        rl.train(settings(world, "mine", **{"num_steps": 2, "resume": True, **changes}))


def test_a_run_is_not_resumed_with_other_problems_held_out(world, tmp_path):
    """Its accuracy before was that on the first ones."""
    for name in ("tokenizer", "sft", "tiny_gsm_train.jsonl"):
        (tmp_path / name).symlink_to(world / name)
    held_out = (world / "tiny_gsm_test.jsonl").read_text(encoding="utf-8").splitlines(True)
    (tmp_path / "tiny_gsm_test.jsonl").write_text("".join(held_out), encoding="utf-8")
    rl.train(settings(tmp_path, "mine", num_steps=1))
    (tmp_path / "tiny_gsm_test.jsonl").write_text("".join(held_out[::-1]), encoding="utf-8")
    with pytest.raises(rl.UserError, match=r"then\): held_out [0-9a-f]{12} -> [0-9a-f]{12}"):
        rl.train(settings(tmp_path, "mine", num_steps=1, resume=True))


def test_a_budget_in_minutes_counts_what_ran_before_the_resume(world, capsys):
    cfg = settings(world, "clock", num_steps=4)
    rl.train(cfg)
    state = torch.load(world / "clock" / "resume.pt", weights_only=True)
    assert 0 < state["minutes"] < 2
    state.update(step=1, minutes=60.0)
    torch.save(state, world / "clock" / "resume.pt")
    rl.train(settings(world, "clock", num_steps=4, max_minutes=59.0, resume=True))
    assert "--max-minutes 59 is over at step 1" in capsys.readouterr().out


def test_ctrl_c_in_the_last_look_costs_no_step(world, monkeypatch):
    looks = iter([(0.5, 0.0)])

    def look(*_):
        try:
            return next(looks)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(rl, "greedy_accuracy", look)
    with pytest.raises(KeyboardInterrupt):
        rl.train(settings(world, "looked", num_steps=3))
    assert torch.load(world / "looked" / "resume.pt", weights_only=True)["step"] == 3


def test_it_refuses_to_start_where_nothing_succeeds_and_says_why(world, capsys):
    path = world / "impossible.jsonl"
    path.write_text("".join(json.dumps({"question": f"Problem {i}", "answer": "#### 99"}) + "\n"
                            for i in range(20)))
    with pytest.raises(rl.TrainingFailed, match="not one of 32 samples is right"):
        rl.train(settings(world, "never", path=path))
    assert "pass@8 0.000" in capsys.readouterr().out
    assert not (world / "never" / "model.safetensors").exists()


def test_it_refuses_to_start_where_each_problem_always_or_never_succeeds(capsys):
    """Half of them right, and yet no sample is better than another to the same prompt."""
    rewards = torch.tensor([[1.0] * 6, [0.0] * 6])
    taken = rl.Rollouts([], [], [], rewards, rewards, [], [], [])
    with pytest.raises(rl.TrainingFailed, match="every group is dead"):
        rl.refuse_hopeless(taken, 6)
    assert "pass@1 0.500, pass@2 0.500, pass@4 0.500, pass@6 0.500" in capsys.readouterr().out


def test_it_refuses_to_start_where_everything_succeeds():
    ones = torch.ones(4, 8)
    with pytest.raises(rl.TrainingFailed, match="all of 32 samples are right"):
        rl.refuse_hopeless(rl.Rollouts([], [], [], ones, ones, [], [], []), 8)


def test_the_hackable_run_says_what_it_shows(world, capsys):
    rl.train(settings(world, "hacked", reward="hackable", num_steps=2))
    assert "the reward went from" in capsys.readouterr().out


@pytest.mark.parametrize("paid, after, hacks", [(0.9, 0.1, True), (0.9, 0.85, False),
                                                (0.2, 0.1, False)])
def test_reward_hacking_is_named_only_where_the_reward_rose_and_the_answers_did_not(
        paid, after, hacks, capsys):
    rl.report_hacking([{"reward": 0.3, "length": 30}, {"reward": paid, "length": 70}], 0.1, after)
    out = capsys.readouterr().out
    assert ("This is reward hacking" in out) is hacks and "from 30 to 70 tokens" in out


def test_the_model_that_a_run_starts_from_is_never_overwritten(world):
    with pytest.raises(rl.UserError, match="would be overwritten"):
        rl.train(settings(world, "./sft"))


@pytest.mark.parametrize("flags, words", [
    (("--num-samples", "1"), "at least 2"), (("--temperature", "0"), "nothing can be learned"),
    (("--epochs", "2"), "--clip"), (("--source", "absent"), "no checkpoint"),
    (("--kl", "-1"), "not below"), (("--ten-questions", "--path", "x.jsonl"), "leave out --path")])
def test_a_mistake_is_one_message_and_exit_code_2(world, run_script, flags, words):
    done = run_script("10_rl", *flags, data_dir=world)
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr
