"""edu/personal_gpt: the model, its four command lines, and every number they claim.

Oracles: GPT-2 of the `transformers` library with the same weights, tables worked out by hand, two
ways that must agree (cached and uncached, tilted and not), and data in which something was planted.
"""

import io
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import EDU, run_process

FOLDER = EDU / "personal_gpt"
sys.path.insert(0, str(FOLDER))  # its modules import each other by name
import advanced  # noqa: E402
import explore  # noqa: E402
import train  # noqa: E402
from model import GPT, UserError, choose, load_gpt  # noqa: E402

sys.path.remove(str(FOLDER))
SMALL = ["--n-embd", "32", "--n-layer", "1", "--n-head", "2", "--lr", "3e-3"]


def lines_of(n, seed=0):
    """n lines of simple sentences."""
    r = random.Random(seed)
    return [f"the {r.choice(['cat', 'dog', 'hen', 'bee'])} "
            f"{r.choice(['sees', 'likes', 'finds'])} the "
            f"{r.choice(['honey', 'garden', 'bread', 'gate'])}" for _ in range(n)]


def small_gpt(seed=0, vocab_size=11, block_size=7, n_embd=12, n_layer=2, n_head=3):
    torch.manual_seed(seed)
    return GPT(vocab_size, block_size, n_embd, n_layer, n_head, dropout=0.2).eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small model on disk, trained on 300 lines: (path, text file)."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "data.txt"
    text.write_text("\n".join(lines_of(300)) + "\n", "utf-8")
    argv = ["--text", text, "--epochs", 6, "--block-size", 48, "--output", folder / "gpt.pth"]
    assert train.main([str(a) for a in argv] + SMALL) == 0
    return folder / "gpt.pth", text


# ---- the model -----------------------------------------------------------------------------------


def test_the_model_is_gpt2_with_the_same_weights_in_the_transformers_library():
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = small_gpt()
    config = GPT2Config(vocab_size=11, n_positions=7, n_embd=12, n_layer=2, n_head=3,
                        activation_function="gelu", attn_implementation="eager")
    theirs = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in ours.parameters():  # biases and gains too, or an unused one would not show
            p.add_(0.1 * torch.randn_like(p))
    state = {}
    for name, tensor in ours.state_dict().items():
        name = name if name == "lm_head.weight" else "transformer." + name.replace("blocks", "h")
        is_linear = ".c_" in name and name.endswith("weight")  # theirs are stored the other way
        state[name] = tensor.t() if is_linear else tensor
    theirs.load_state_dict(state, strict=True)
    idx = torch.randint(11, (2, 5))
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=1e-5, rtol=1e-4)


def test_no_character_changes_what_is_guessed_before_it():
    model, idx = small_gpt(), torch.randint(11, (2, 7))
    before = model(idx)
    for t in range(7):
        other = idx.clone()
        other[:, t] = (idx[:, t] + 1) % 11
        changed = (model(other) - before).abs().amax(dim=(0, 2)) > 1e-7
        assert changed.tolist() == [False] * t + [True] * (7 - t)


def test_greedy_text_is_the_likeliest_character_step_by_step_also_past_the_context():
    """19 new characters with a context of 7: the cache serves the first 4 steps only.

    An untrained model writes one character for ever, and then a wrong window would not show: so
    the last three characters are forbidden, by a reward of -50.
    """
    model = small_gpt()

    def no_repetition(idx):
        return -50.0 * torch.nn.functional.one_hot(idx[:, -3:], 11).amax(dim=1)

    idx = torch.randint(11, (2, 3))
    step_by_step = idx
    for _ in range(19):
        scores = model(step_by_step[:, -7:])[:, -1] + no_repetition(step_by_step)
        step_by_step = torch.cat((step_by_step, scores.argmax(-1, keepdim=True)), dim=1)
    ours = model.generate_reward_augmented(idx, 19, no_repetition, beta=1, temperature=0)
    assert torch.equal(ours, step_by_step)
    assert all(len(set(row[i : i + 4])) == 4 for row in ours.tolist() for i in range(2, 19))
    assert model.generate(idx, 1, temperature=0)[:, -1].equal(model(idx)[:, -1].argmax(-1))


def test_the_cache_changes_no_logit():
    model, idx = small_gpt(), torch.randint(11, (2, 7))
    cache = model.new_cache(2)
    parts = [model(idx[:, :3], cache)] + [model(idx[:, t : t + 1], cache) for t in range(3, 7)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(idx), atol=1e-5, rtol=1e-4)


def test_a_tilted_choice_is_p_times_exp_of_beta_times_reward(monkeypatch):
    model, idx = small_gpt(), torch.randint(11, (2, 4))
    reward, drawn_from = torch.randn(2, 11), []
    monkeypatch.setattr(torch, "multinomial",
                        lambda p, n: drawn_from.append(p) or p.argmax(-1, keepdim=True))
    model.generate_reward_augmented(idx, 1, lambda idx: reward, beta=1.7)
    p = model(idx)[:, -1].softmax(-1)
    tilted = p * (1.7 * reward).exp()
    torch.testing.assert_close(drawn_from[0], tilted / tilted.sum(-1, keepdim=True))


@pytest.mark.parametrize("temperature", [0, 1e-46, 1e-6])
def test_a_temperature_near_zero_takes_the_likeliest(temperature):
    scores = torch.tensor([[0.0, 3.0, 2.9], [80.0, 1.0, 79.9]])
    assert choose(scores, temperature).tolist() == [[1], [0]]


def test_beta_zero_is_the_model_itself():
    model, idx, texts = small_gpt(), torch.randint(11, (3, 4)), []
    for write in (lambda: model.generate(idx, 9, 0.8),
                  lambda: model.generate_reward_augmented(idx, 9, lambda i: 1 / 0, 0.0, 0.8)):
        torch.manual_seed(5)
        texts.append(write())
    assert torch.equal(*texts)


def test_dropout_is_off_while_writing_and_comes_back():
    model = small_gpt().train()
    idx = torch.zeros(1, 1, dtype=torch.long)
    assert torch.equal(model.generate(idx, 6, 0), model.generate(idx, 6, 0)) and model.training


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda m, i: m.generate(i, 3, -0.1), "temperature is -0.1"),
        (lambda m, i: m.generate(i, 3, math.nan), "temperature is nan"),
        (lambda m, i: m.generate(i, -1), "max_new_tokens is -1"),
        (lambda m, i: m.generate(i[:, :0], 3), "something to continue"),
        (lambda m, i: m.generate_reward_augmented(i, 3, lambda i: 0, math.inf), "beta is inf"),
        (lambda m, i: m.generate_reward_augmented(i, 3, lambda i: math.nan, 1), "not finite"),
        (lambda m, i: m(torch.zeros(1, 8, dtype=torch.long)), "8 characters do not fit"),
        (lambda m, i: GPT(11, 7, n_embd=10, n_head=4), "n_embd 10 cannot be shared"),
        (lambda m, i: GPT(0, 7), "vocab_size is 0"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call(small_gpt(), torch.zeros(1, 2, dtype=torch.long))


def test_new_characters_leave_what_the_model_knew_as_it_was():
    old, idx = small_gpt(), torch.randint(11, (2, 5))
    new, stoi, itos = train.grow_vocabulary(old, list("abcdefghijk"), "!?")
    torch.testing.assert_close(new.eval()(idx)[..., :11], old(idx))
    assert new(idx).shape == (2, 5, 13) and stoi["!"] == 11 and itos[12] == "?"
    assert new.lm_head.weight is new.wte.weight


# ---- text to numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 7, 8, 9, 30])
def test_every_character_but_the_first_is_guessed_once(n):
    ids = torch.arange(100, 100 + n)
    inputs, targets = train.windows(ids, 7)
    real = targets != train.IGNORE
    assert targets[real].tolist() == ids[1:].tolist() and inputs[real].tolist() == ids[:-1].tolist()


def test_lines_are_told_between_line_breaks_and_long_ones_in_pieces():
    """Block size 4. "ab": \\n a b -> a b \\n. "vwxyz": \\n v w x -> v w x y, then y z -> z \\n."""
    stoi = {c: i for i, c in enumerate("\nabvwxyz")}
    inputs, targets, line = train.lines_to_rows(["ab", "vwxyz"], stoi, 4)
    assert inputs.tolist() == [[0, 1, 2, 0], [0, 3, 4, 5], [6, 7, 0, 0]]
    assert targets.tolist() == [[1, 2, 0, -1], [3, 4, 5, 6], [7, 0, -1, -1]]
    assert line.tolist() == [0, 1, 1]


def test_the_ladder_is_what_counting_gives():
    """V = 3, training pairs a->b, b->a, a->b, b->c; validation pair b->a.
    p(a) = (1+1)/(4+3) = 2/7. p(a|b) = (1 + 2*2/7) / (2 + 2) = 11/28."""
    rows = (torch.tensor([[0, 1, 0, 1]]), torch.tensor([[1, 0, 1, 2]]))
    steps = train.ladder(rows, (torch.tensor([[1, 2]]), torch.tensor([[0, -1]])), 3)
    expected = {"uniform": math.log(3), "unigram": -math.log(2 / 7), "bigram": -math.log(11 / 28)}
    assert steps == pytest.approx(expected)


def test_an_epoch_of_little_text_has_smaller_batches_down_to_four_and_several_passes():
    assert train.epoch_plan(100_000, 64, updates=120) == (1, 64)
    assert train.epoch_plan(900, 64, updates=120) == (1, 7)
    assert train.epoch_plan(50, 64, updates=120) == (3, 4)
    assert train.epoch_plan(50, 2, updates=120) == (3, 2)
    assert train.epoch_plan(3, 64, updates=120) == (40, 3)


# ---- the commands of the documentation, as processes ---------------------------------------------

SNIPPET = '''
import torch
from model import GPT

# Load model
model = GPT(vocab_size=VOCAB_SIZE, block_size=128)
model.load_state_dict(torch.load('gpt.pth', map_location='cpu'))
model.eval()

# Prepare seed tokens (tensor of shape [1, context_length])
idx = torch.tensor([[stoi[ch] for ch in "the cat"]], dtype=torch.long)

# Generate new tokens
out = model.generate(idx, max_new_tokens=100, temperature=1.0)

# Convert token IDs back to text
generated = ''.join([itos[i.item()] for i in out[0]])
print(generated)

reward_fn = char_reward_fn(['g'], stoi)
out = model.generate_reward_augmented(idx, max_new_tokens=50,
                                      reward_fn=reward_fn, beta=0.5)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the folder with the files that its documentation speaks of."""
    folder = tmp_path_factory.mktemp("personal") / "personal_gpt"
    folder.mkdir()
    for path in FOLDER.glob("*.py"):
        shutil.copy(path, folder)
    (folder / "data.txt").write_text("\n".join(lines_of(60)), "utf-8")
    rows = [f"{line}|{1 if 'honey' in line else -1}" for line in lines_of(30, seed=1)]
    (folder / "reward_data.txt").write_text("\n".join(rows), "utf-8")
    return folder


def command(folder, line):
    done = run_process([sys.executable, *line.split()], cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no bars where there is no terminal, no warnings
    assert done.stdout.splitlines()[-1].startswith("next: python ")
    return done.stdout


def test_train_as_documented_then_the_snippet_as_documented(folder):
    out = command(folder, "train.py --text data.txt --epochs 5 --batch-size 64 --block-size 128 "
                  "--output gpt.pth")
    assert re.match(r"personal_gpt train - \w+ - 0\.6\dM params - seed 1337\n", out)
    uniform, bigram, now = (float(re.search(rf"{step} (\d\.\d+)", out)[1])
                            for step in ("uniform", "bigram", "now"))
    assert now < bigram < uniform  # 0.3 to 0.5, 1.2 and 3.0
    settings = json.loads((folder / "gpt.json").read_text("utf-8"))
    before = "\n".join([
        "import json", "from advanced import char_reward_fn",
        "itos = list(json.load(open('gpt.json', encoding='utf-8'))['vocabulary'])",
        "stoi = {c: i for i, c in enumerate(itos)}"])
    code = before + SNIPPET.replace("VOCAB_SIZE", str(settings["vocab_size"]))
    done = run_process([sys.executable, "-c", code + "print(out.shape)"], cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the cat") and "torch.Size([1, 57])" in done.stdout
    assert len(done.stdout) > 100 and done.stdout.count("the ") >= 3  # it writes such lines


def test_advanced_as_documented(folder):
    command(folder, "advanced.py --offline-data reward_data.txt --epochs 3 "
            "--output gpt_offline.pth")
    assert load_gpt(folder / "gpt_offline.pth")[0].hyperparameters["block_size"] == 128


# ---- offline RL ----------------------------------------------------------------------------------


def test_the_last_bar_separates_text_and_reward():
    texts, rewards = advanced.parse_rewards("a|b|1\n\n x |-2.5\nc|1e-1\n", "f")
    assert texts == ["a|b", "x", "c"] and rewards.tolist() == [1.0, -2.5, 0.1]


@pytest.mark.parametrize("line", ["no bar", "a|", "a|good", "a|nan", "a|inf", "a|-1e300", "|1",
                                  "a|1,5"])
def test_every_line_that_is_not_text_and_reward_is_named(line):
    with pytest.raises(UserError, match=r"1 of 3 lines(.|\n)*line 2: ") as caught:
        advanced.parse_rewards(f"fine|1\n{line}\nfine|0", "f")
    assert "text|reward" in str(caught.value)


def test_weights_are_a_softmax_of_advantages_with_mean_one():
    """Rewards 3, 2, 1, temperature 1: 3 softmax(1, 0, -1); e + 1 + 1/e = 4.0862.
    3e / 4.0862 = 1.9957, 3 / 4.0862 = 0.7342, 3 / e / 4.0862 = 0.2701."""
    weights = advanced.advantage_weights(torch.tensor([3.0, 2.0, 1.0]).double(), 1.0)
    assert weights.tolist() == pytest.approx([1.9957, 0.7342, 0.2701], abs=1e-4)
    lower = advanced.advantage_weights(torch.tensor([-7.0, -8.0, -9.0]).double(), 1.0)
    torch.testing.assert_close(lower, weights)  # all negative: only differences count
    assert advanced.effective_size(torch.tensor([2.0, 2.0, 0.0])) == pytest.approx(2)


def test_equal_rewards_prefer_nothing_whatever_rounding_makes_of_their_mean():
    """Their sum is rounded, and where the mean falls short of them, all would be above it."""
    for n in range(2, 40):
        rewards, texts = torch.full((n,), 0.1, dtype=torch.float64), [str(i) for i in range(n)]
        assert advanced.high_and_low(texts, rewards) == ([], texts)
        assert advanced.reward_temperature(rewards, None) == 1
        same = advanced.advantage_weights(rewards, 1.0)
        torch.testing.assert_close(same, torch.ones(n, dtype=torch.float64))


def test_what_is_rewarded_becomes_likelier_and_the_weights_did_it(tmp_path, capsys):
    """Lines of 7 characters that end in "up", reward 1, or "in", -1, equally often. The weights are
    exp(2) and exp(-2), so the model should come to believe in "up" over "in" by 4 nats a line, 0.57
    a character; without weights by none."""
    r, lines = random.Random(3), []
    for _ in range(200):
        word = "".join(r.choice("abcdefgh") for _ in range(3))
        lines += [f"{word} up|1", f"{word} in|-1"]
    path = tmp_path / "rewards.txt"
    path.write_text("\n".join(lines), "utf-8")
    argv = ["--offline-data", str(path), "--epochs", "3", "--control", "--output",
            str(tmp_path / "gpt.pth"), *SMALL]
    assert advanced.main(argv) == 0
    out = capsys.readouterr().out
    ahead = {name: float(re.search(rf"^{name} .*([+-]\d+\.\d+)$", out, re.MULTILINE)[1])
             for name in ("before", "after", "unweighted")}
    assert abs(ahead["unweighted"]) < 0.2 and 0.37 < ahead["after"] < 0.77, out
    model, stoi, _ = load_gpt(tmp_path / "gpt.pth")  # the weighted one, not its control
    up, down = (advanced.nats_per_character(model, [line[:6] for line in lines if word in line],
                                            stoi) for word in ("up", "in"))
    assert 0.37 < down - up < 0.77


# ---- reward-augmented decoding -------------------------------------------------------------------


def test_a_stronger_beta_gives_more_of_the_wanted_characters(trained, capsys):
    """6,400 characters each: the standard error of a share of 5% is 0.3 points."""
    argv = ["--decode-beta=-2,0,1,2,4", "--wanted", "gb", "--init", str(trained[0]), "--samples",
            "64"]
    assert advanced.main(argv) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^ +(-?\d) +(\d+\.\d\d) ", out, re.MULTILINE)
    shares = [float(share) for _, share in rows]
    assert len(shares) == 5 and all(b > a + 0.5 for a, b in zip(shares, shares[1:])), out


def test_a_wanted_character_that_the_model_cannot_write_is_named():
    with pytest.raises(UserError, match="never seen 'Q'"):
        advanced.char_reward_fn("aQ", {"a": 0})


# ---- self-alignment ------------------------------------------------------------------------------


def test_each_term_pays_once_and_only_as_a_word():
    terms = ["bee", "honey"]
    assert advanced.term_reward("A Bee, a bee and a beehive", terms) == 1
    assert advanced.term_reward("honey, bee!", terms) == 2
    assert advanced.term_reward("been honeyed", terms) == 0


def test_self_alignment_makes_the_wanted_terms_more_frequent(trained, tmp_path, capsys):
    before = trained[0].read_bytes()
    argv = ["--self-align", "--domain-terms", "honey,bee", "--init", str(trained[0]), "--rounds",
            "3", "--samples", "64", "--sample-chars", "40", "--lr", "8e-3", "--output",
            str(tmp_path / "aligned.pth")]
    assert advanced.main(argv) == 0
    out = capsys.readouterr().out
    first, last = map(float, re.search(r"term (\S+) -> (\S+) %", out).groups())
    assert last > first + 15, out  # the standard error of such a share is 6 points
    assert trained[0].read_bytes() == before and load_gpt(tmp_path / "aligned.pth")


# ---- calibration ---------------------------------------------------------------------------------


def test_the_calibration_error_worked_by_hand():
    """Ten bins. 0.95: right, off by 0.05, a quarter of all. 0.85 twice, one right: off by 0.35,
    half of all. 0.35: wrong, off by 0.35, a quarter. 0.0125 + 0.175 + 0.0875 = 0.275."""
    confidence = torch.tensor([0.95, 0.85, 0.85, 0.35], dtype=torch.float64)
    correct = torch.tensor([True, True, False, False])
    ece, table = advanced.calibration_error(confidence, correct)
    assert ece == pytest.approx(0.275)
    assert [n for *_, n in table] == [1, 2, 1]
    assert advanced.calibration_error(torch.ones(3), torch.ones(3).bool())[0] == 0


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_a_temperature_undoes_the_factor_that_logits_were_multiplied_by(factor):
    """Targets are drawn from softmax(z), so T = factor makes factor * z honest again."""
    generator = torch.Generator().manual_seed(1)
    z = 1.5 * torch.randn(20_000, 7, generator=generator).double()
    targets = torch.multinomial(z.softmax(-1), 1, generator=generator)[:, 0]
    fitted, measured = slice(0, 10_000), slice(10_000, None)
    T = advanced.fit_temperature(factor * z[fitted], targets[fitted])
    before = advanced.scores_at(factor * z[measured], targets[measured], 1.0)
    after = advanced.scores_at(factor * z[measured], targets[measured], T)
    assert T == pytest.approx(factor, rel=0.05)
    assert after["ece"] < 0.02 < 0.1 < before["ece"] and after["nll"] < before["nll"]


def test_calibration_lowers_the_error_on_text_that_is_neither_trained_nor_fitted_on(
        trained, tmp_path, capsys):
    """Lines of another kind: the model is far too sure of itself."""
    for ending in (".pth", ".json"):
        shutil.copy(trained[0].with_suffix(ending), tmp_path / f"gpt{ending}")
    other = tmp_path / "other.txt"
    other.write_text((FOLDER / "examples" / "data.txt").read_text("utf-8").lower(), "utf-8")
    argv = ["--calibrate", str(other), "--init", str(tmp_path / "gpt.pth")]
    assert advanced.main(argv) == 0
    out = capsys.readouterr().out
    before, after = map(float, re.search(r"ECE (\S+) -> (\S+) \(n=", out).groups())
    assert after < before / 2, out
    settings = json.loads((tmp_path / "gpt.json").read_text("utf-8"))
    assert settings["calibration_temperature"] > 1.2
    assert (tmp_path / "gpt_reliability.png").read_bytes().startswith(b"\x89PNG")
    assert load_gpt(tmp_path / "gpt.pth")


def test_calibration_never_uses_text_that_the_model_was_trained_on(trained, tmp_path, capsys):
    text = trained[1].read_text("utf-8")
    unseen = advanced.unseen_part(text, train.seen_texts(trained[0]), "data.txt")
    assert unseen == text[int(len(text) * 0.9) :]
    assert "only its held-out end" in capsys.readouterr().out
    with pytest.raises(UserError, match="trained on all of it"):
        advanced.unseen_part(text, [{"sha256": train.digest(text), "characters": None}], "data.txt")


def test_a_model_that_went_on_from_another_remembers_what_that_one_has_seen(trained, tmp_path,
                                                                            capsys):
    """Rated lines on top of the text: of the text its end is unseen, of the lines nothing is."""
    rated = tmp_path / "rated.txt"
    rated.write_text("\n".join(f"{line}|{i % 3}" for i, line in enumerate(lines_of(12))), "utf-8")
    out = str(tmp_path / "gpt.pth")
    assert advanced.main(["--offline-data", str(rated), "--epochs", "1", "--init", str(trained[0]),
                          "--output", out]) == 0
    assert advanced.main(["--calibrate", str(rated), "--init", out]) == 2
    assert "trained on all of it" in capsys.readouterr().err
    text = trained[1].read_text("utf-8")
    unseen = advanced.unseen_part(text, train.seen_texts(out), "data.txt")
    assert unseen == text[int(len(text) * 0.9) :]


def test_calibration_of_a_long_text_stops_when_it_knows_enough(trained, tmp_path, capsys,
                                                               monkeypatch):
    for ending in (".pth", ".json"):
        shutil.copy(trained[0].with_suffix(ending), tmp_path / f"gpt{ending}")
    other = tmp_path / "other.txt"
    other.write_text("\n".join(lines_of(100, seed=9)), "utf-8")
    vocabulary = len(load_gpt(trained[0])[1])
    monkeypatch.setattr(advanced, "MOST_LOGITS", 500 * vocabulary)
    assert advanced.main(["--calibrate", str(other), "--init", str(tmp_path / "gpt.pth")]) == 0
    out = capsys.readouterr().out
    assert "its first 500 characters" in out
    assert sum(map(int, re.search(r"fitted on (\d+) .* on (\d+) others", out).groups())) == 499


def test_calibration_looks_at_each_guess_once_with_the_context_it_has():
    model = small_gpt()
    ids = torch.randint(11, (23,))
    logits, targets, window = advanced.logits_of(model, ids)
    assert targets.tolist() == ids[1:].tolist() and window.tolist() == sorted(window.tolist())
    # the half of 7 is 3: guess 13 belongs to window 4 (12..14), whose context begins at 9
    expected = model(ids[None, 9:15])[0, 13 - 9].double()
    torch.testing.assert_close(logits[13], expected, atol=1e-5, rtol=1e-4)


# ---- explore: reading ----------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_found(delimiter):
    lines = [delimiter.join(["name", "said, or not", "n"]).replace(",", "" if delimiter == ","
             else ",")] + [delimiter.join(["Ana", "a: b.c", "1"])] * 4
    assert explore.sniff_delimiter([line + "\n" for line in lines]) == delimiter


RAGGED = """name,city
Ana,Paris
Tom
Ida,Rome,Italy

Bo,Oslo,,
"Eve, the
second",Bonn
"Max,Kiel
Lea,Graz
"""


def test_ragged_rows_are_named_with_their_line_and_all_others_are_kept():
    """Line 7 to 8 is one row (quotes); the quote of line 9 is never closed, line 10 is fine."""
    rows, bad, _ = explore.rows_of_csv(RAGGED)
    assert [(row.number, row.values["name"]) for row in rows] == [
        (2, "Ana"), (6, "Bo"), (7, "Eve, the second"), (10, "Lea")]
    assert [number for number, _ in bad] == [3, 4, 9]
    assert bad[0][1] == "1 cells, but the header has 2"
    assert "3 cells" in bad[1][1] and "not CSV" in bad[2][1]


def test_nested_json_becomes_fields_and_broken_lines_are_named():
    text = ('{"a": {"b": 1, "c": [1, "x"]}, "d": null, "e": true, "f": ""}\n'
            '{"a": {"b": 2}, "g": [{"h": 3}, {"h": 4}], "i": "one;\\ntwo"}\n'
            '{"a": \n[1, 2]\n\n7\n{}\n' + "[" * 100_000 + "\n")
    rows, bad, _ = explore.rows_of_jsonl(text)
    assert [row.text for row in rows] == ["a.b: 1; a.c: 1, x; e: true",
                                          "a.b: 2; g.1.h: 3; g.2.h: 4; i: one, two"]
    assert [number for number, _ in bad] == [3, 4, 6, 7, 8]
    assert bad[1][1].endswith("but [1, 2]") and "without values" in bad[3][1]


def test_columns_without_a_name_or_with_the_same_get_one():
    assert explore.header_names(["a", "", "a", "b: c"]) == ["a", "column 2", "a 3", "b c"]
    assert explore.header_names(["a", "a 3", "a"]) == ["a", "a 3", "a 3 3"]


def test_awkward_cells_cost_their_own_row_at_most(tmp_path):
    """U+2028 breaks no row, a cell of 200,000 letters is one bad row, also where the delimiter is
    looked for, a control character and half a surrogate pair become spaces."""
    path = tmp_path / "data.csv"
    path.write_text("a,b\nx\u2028y,1\n" + "z" * 200_000 + ",2\n\x1b[31mred,3\n" + "q,4\n" * 9,
                    "utf-8")
    rows, bad, _ = explore.read_rows(path)
    assert [row.text for row in rows[:3]] == ["a: x y; b: 1", "a: [31mred; b: 3", "a: q; b: 4"]
    assert [number for number, _ in bad] == [3] and "field larger" in bad[0][1]
    assert explore.rows_of_jsonl('{"a": "b\\ud800c"}')[0][0].text == "a: b c"


def test_no_row_of_a_table_is_looked_for_from_the_start():
    """A million rows would otherwise cost half a million million steps."""
    class Lines(list):
        def __iter__(self):
            raise AssertionError("from the start")

    records = list(explore.csv_records(Lines(["a,b\n"] + ["x,1\n"] * 250), ","))
    assert [number for number, _, _ in records] == list(range(1, 252))


@pytest.mark.parametrize(("header", "looks_like_data"), [("n,2nd", False), ("Ana,-3.5", True)])
def test_a_header_that_looks_like_data_is_pointed_out(header, looks_like_data):
    described = explore.rows_of_csv(f"{header}\nBo,2\n")[2]
    assert ("looks like data" in described) == looks_like_data


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"])
def test_every_usual_encoding_is_read(tmp_path, encoding):
    path = tmp_path / "data.csv"
    path.write_bytes(("caf\u00e9,n\r\n" + "Zo\u00eb,1\r\n" * 9).encode(encoding))
    rows, bad, notes = explore.read_rows(path)
    assert [row.text for row in rows] == ["caf\u00e9: Zo\u00eb; n: 1"] * 9 and not bad
    assert len(notes) == (2 if encoding == "cp1252" else 1)  # a guess is made aloud
    assert "cp1252" in notes[-1] or encoding != "cp1252"


# ---- explore: what it finds ----------------------------------------------------------------------


def test_co_occurrences_worked_by_hand():
    """20 rows, a = x in 10, b = 1 in 10, together in 8: by chance 10 * 10 / 20 = 5, lift 1.6."""
    pairs = [("x", "1")] * 8 + [("x", "2")] * 2 + [("y", "1")] * 2 + [("y", "2")] * 8
    rows = [explore.Row(i, {"a": a, "b": b}, "") for i, (a, b) in enumerate(pairs)]
    table = explore.co_occurrences(rows, min_count=3)
    assert table == [("a = x", "b = 1", 8, 5.0, 1.6), ("a = y", "b = 2", 8, 5.0, 1.6)]
    assert explore.co_occurrences(rows, min_count=9) == []
    assert explore.co_occurrences(rows, min_count=3, most=3) == table[:1]


def test_terms_worked_by_hand():
    """Four rows. "red": twice, in one row. "tea": twice, in two. "the": in all four, ln 1 = 0."""
    rows = [explore.Row(i, {}, text) for i, text in enumerate(
        ["the red Red", "the tea", "the tea", "the"])]
    twice = 1 + math.log(2)
    expected = [("red", 2, 1, twice * math.log(4)), ("tea", 2, 2, twice * math.log(2)),
                ("the", 4, 4, 0.0)]
    assert explore.term_statistics(rows) == expected


@pytest.fixture(scope="module")
def explored(folder):
    """The documented command: what it says of a planted pair (night, owl) and row (line 32)."""
    r, lines = random.Random(4), ["time,bird,where"]
    for _ in range(44):
        if r.random() < 0.3:
            lines.append("night,owl,mill")
        else:
            bird, place = r.choice(["wren", "robin"]), r.choice(["wall", "<b>hedge</b>"])
            lines.append(f"{r.choice(['morning', 'evening'])},{bird},{place}")
    lines[31] = "night,penguin,chimney"
    lines[20] += ",too,many"
    (folder / "path" / "to").mkdir(parents=True)
    (folder / "path" / "to" / "data.csv").write_text("\n".join(lines), "utf-8")
    out = command(folder, "explore.py --data path/to/data.csv --epochs 2 "
                  "--output gpt_knowledge.pth")
    assert "wrote gpt_knowledge.html" in out
    return out, (folder / "gpt_knowledge.html").read_text("utf-8"), folder


def test_the_planted_row_is_the_most_surprising_one(explored):
    table = explored[0].partition("most surprising rows")[2].splitlines()[2]
    assert table.split()[1] == "32" and "penguin" in table, explored[0]


def test_the_planted_pair_comes_first_among_the_co_occurrences(explored):
    first = explored[0].partition("co-occurrences (")[2].splitlines()[2]
    assert "owl" in first and ("night" in first or "mill" in first), explored[0]


def test_the_model_expects_the_value_that_belongs_there(explored):
    """Named or not, begun or not; and over all better than the commonest value."""
    model, stoi, _ = load_gpt(explored[2] / "gpt_knowledge.pth")
    rows = explore.read_rows(explored[2] / "path" / "to" / "data.csv")[0]
    fields, columns = ["time", "bird", "where"], explore.columns_of(rows)
    for prompt in ("time: night; bird: owl; ", "time: night; bird: owl; where: ",
                   "time: night; bird: owl; where: mi"):
        prefix, found = explore.suggest(model, stoi, fields, columns, prompt)
        assert prefix.endswith("where: ") and found[0][0] == "mill", found
        assert sum(share for _, share in found) == pytest.approx(1, abs=1e-4)
    right, common = re.search(r"^  bird +\d+ +(\d+)% +(\d+)%", explored[0], re.MULTILINE).groups()
    assert int(right) > int(common) + 10, explored[0]


def test_a_field_is_guessed_from_those_before_and_after_it_in_any_order(explored):
    """By hand: p(value | before) p(after | before, value) of the row as the data would have it."""
    model, stoi, _ = load_gpt(explored[2] / "gpt_knowledge.pth")
    rows = explore.read_rows(explored[2] / "path" / "to" / "data.csv")[0]
    fields, columns = ["time", "bird", "where"], explore.columns_of(rows)
    shown, found = explore.suggest(model, stoi, fields, columns, "where:mill ;time: night;bird:")
    assert shown == "time: night; bird: ?; where: mill" and found[0][0] == "owl"
    whole = [f"{value}; where: mill" for value in columns["bird"]]
    shares = explore.score_values(model, stoi, "time: night; bird: ", whole)
    assert dict(found) == pytest.approx(dict(zip(columns["bird"], shares)))


def test_an_old_model_is_asked_without_training(explored, capsys, monkeypatch):
    """What is asked of it later is what it answered when it was trained."""
    monkeypatch.chdir(explored[2])
    monkeypatch.setattr(explore, "fit", None)
    question = re.search(r"^next: python explore.py (.*)", explored[0], re.MULTILINE)[1]
    assert "--ask gpt_knowledge.pth" in question
    assert explore.main(shlex.split(question)) == 0
    out = capsys.readouterr().out
    said = [line.split() for line in explored[0].splitlines()]
    answers = [line.split() for line in out.splitlines() if "%" in line]
    assert answers and all(line in said for line in answers) and "note" not in out
    (explored[2] / "other.csv").write_text("time,bird\n" + "night,owl\nday,wren\n" * 4, "utf-8")
    argv = ["--data", "other.csv", "--ask", "gpt_knowledge.pth", "--complete", "time: dusk; bird: "]
    assert explore.main(argv) == 2
    assert "the data have no 'ksu'" in capsys.readouterr().err
    argv[-1] = "time: wren; bird: "
    assert explore.main(argv) == 0
    out = capsys.readouterr().out
    assert "no row has time: wren" in out and "not the file that the model was trained on" in out


def test_the_share_of_a_value_is_its_probability_worked_one_character_at_a_time(explored):
    model, stoi, _ = load_gpt(explored[2] / "gpt_knowledge.pth")
    prefix, values, p = "time: night; bird: ", ["owl", "wren", "robin"], []
    for value in values:
        text, log_p = "\n" + prefix, 0.0
        for c in value:
            log_p += model(train.encode(text, stoi)[None])[0, -1].log_softmax(-1)[stoi[c]].item()
            text += c
        end = model(train.encode(text, stoi)[None])[0, -1].softmax(-1)
        p.append(math.exp(log_p) * (end[stoi[";"]] + end[stoi["\n"]]).item())
    shares = explore.score_values(model, stoi, prefix, values)
    assert shares == pytest.approx([x / sum(p) for x in p], rel=1e-3)


def test_bad_rows_are_counted_and_named(explored):
    assert "1 bad ones left out" in explored[0]
    assert "line 21: 5 cells, but the header has 3" in explored[0]


def test_the_page_shows_the_start_of_a_very_long_row():
    row = explore.Row(1, {}, "z" * 5000)
    found = {"surprising": [(1.0, row, [0.0] * 5001, "", 0.0)], "pairs": [], "terms": [],
             "checks": [], "suggested": []}
    page = explore.page("f", [], explore.sections_of(found), found, [])
    assert page.count("z") < 2100 and "zz..." in page


def test_only_a_share_has_a_bar_and_no_value_that_looks_like_one():
    table = explore.html_table(("after", "share", "value"), [("a", "75%", "50%")])
    assert table.count("<meter") == 1 and 'value="0.75"' in table


def test_the_page_escapes_the_data_and_loads_nothing(explored):
    page = explored[1]
    assert "<b>" not in page and "&lt;b&gt;hedge" in page
    assert "default-src 'none'" in page and "<script" not in page
    assert not re.search(r"(src|href)=|url\(|@import", page)
    assert "penguin" in re.sub(r"<[^>]+>", "", page) and "5 cells, but the header has 3" in page


# ---- files and mistakes --------------------------------------------------------------------------


def test_a_stranger_model_file_runs_no_code(trained, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    shutil.copy(trained[0].with_suffix(".json"), tmp_path / "gpt.json")
    torch.save({"x": Bomb()}, tmp_path / "gpt.pth")
    with pytest.raises(UserError, match="does not fit"):
        load_gpt(tmp_path / "gpt.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda p: p.unlink(), "holds the vocabulary"),
        (lambda p: p.write_text("{", "utf-8"), "cannot be read"),
        (lambda p: p.write_text("[]", "utf-8"), "not written by train.py"),
        (lambda p: p.write_text(p.read_text("utf-8").replace('"n_layer": 1', '"n_layer": 2'),
                                "utf-8"), "does not fit"),
        (lambda p: p.write_text(p.read_text("utf-8").replace(': 32', f': {10**15}'), "utf-8"),
         "does not describe"),  # more than any memory holds
        (lambda p: p.write_text(re.sub('"vocabulary": "..', '"vocabulary": "',
                                       p.read_text("utf-8")), "utf-8"), "does not describe"),
    ],
)
def test_a_json_that_is_missing_or_does_not_fit_is_named(trained, tmp_path, change, complaint):
    for ending in (".pth", ".json"):
        shutil.copy(trained[0].with_suffix(ending), tmp_path / f"gpt{ending}")
    change(tmp_path / "gpt.json")
    with pytest.raises(UserError, match=complaint):
        load_gpt(tmp_path / "gpt.pth")


HOSTILE = [
    (train, "--text none.txt", "none.txt cannot be read: No such file"),
    (train, "--text empty.txt", "empty.txt is empty"),
    (train, "--text latin.txt", "is not UTF-8 text"),
    (train, "--text short.txt --output new.pth", "--block-size"),
    (train, "--text good.txt --output nowhere/gpt.pth", "mkdir -p"),
    (train, "--text good.txt --output good.txt", "good.txt"),
    (train, "--text good.txt --output mine.pth", "no model of this program"),
    (train, "--text good.txt --output new.json", "another ending"),
    (train, "--text good.txt --epochs 0", "--epochs 0: must be 1 or more"),
    (train, "--text good.txt --lr nan", "--lr nan"),
    (train, "--text good.txt --n-embd 10 --n-head 4", "n_embd 10"),
    (train, "--text good.txt --n-embd 1000000000000000 --n-head 2", "--n-embd"),
    (train, "--text good.txt --init none.pth", "no such model"),
    (train, "--text good.txt --init good.txt", "good.json is missing"),
    (train, "--text good.txt --init mine.pth", "mine.json is missing"),
    (train, "--text good.txt --val-fraction 2", "must be less than 1"),
    (train, "--text good.txt --seed 9999999999", "less than 2^31"),
    (train, "--text good.txt --output .", "no name of a file"),
    (train, "--text good.txt --output ours.txt", "ours.txt exists and is no model"),
    (train, "--text good.txt --output ours.pt", "ours.json exists and is no model"),
    (advanced, "--calibrate good.txt --init none.pth --output x.pth", "changes no weights"),
    (advanced, "--calibrate good.txt --init ours.pth --plot good.txt", "no picture of this"),
    (advanced, "--decode-beta= --wanted g --init none.pth", "finite numbers"),
    (explore, "--data table.csv --output x.html", "take the place of the model"),
    (explore, "--data table.csv --output x.pth --report x.json", "take the place of the model"),
    (explore, "--data table.csv --complete c:1;b:", "no field 'c'; the fields are a, b"),
    (explore, "--data table.csv --ask none.pth", "no such model"),
    (explore, "--data table.csv --ask ours.pth --output x.pth", "--ask trains nothing"),
    (explore, "--data table.csv --ask ours.pth", "has never seen"),
    (advanced, "--offline-data bad_rewards.txt --output new.pth", "line 2"),
    (advanced, "--offline-data good.txt", "text|reward"),
    (advanced, "--offline-data two.txt", "too few"),
    (advanced, "--offline-data two.txt --reward-temperature 0", "more than 0"),
    (advanced, "--decode-beta 1 --wanted g", "--init gpt.pth"),
    (advanced, "--decode-beta 1,x --wanted g --init none.pth", "finite numbers"),
    (advanced, "--decode-beta 1 --init none.pth", "--wanted g"),
    (advanced, "--self-align --init none.pth", "--domain-terms"),
    (advanced, "--calibrate good.txt --init none.pth", "no such model"),
    (explore, "--data none.csv", "cannot be read"),
    (explore, "--data good.pdf", "the ending says"),
    (explore, "--data empty.csv", "is empty"),
    (explore, "--data zero.csv", "zero bytes"),
    (explore, "--data few.csv", "8 are the least"),
    (explore, "--data table.csv --report good.txt", "no page of this program"),
    (explore, "--data table.csv --complete city", "End it in one"),
    (explore, "--data table.csv --complete b:\u2603", "none of the 2 commonest values of b"),
    (explore, "--data table.csv --folds 1", "--folds 1: must be 2"),
]


@pytest.mark.parametrize(("module", "argv", "words"), HOSTILE)
def test_a_mistake_is_one_message_and_nothing_is_overwritten(module, argv, words, tmp_path,
                                                             monkeypatch, capsys, trained):
    files = {
        "good.txt": b"the cat sees the dog\n" * 40, "empty.txt": b" \n", "short.txt": b"abc" * 30,
        "latin.txt": "caf\u00e9\n".encode("latin-1") * 99, "mine.pth": b"my own notes",
        "bad_rewards.txt": b"fine|1\nbad|x\n", "two.txt": b"a|1\nb|0\n", "empty.csv": b"",
        "zero.csv": b"a,b\n\0\0\n", "few.csv": b"a,b\n1,2\n", "good.pdf": b"x",
        "table.csv": b"a,b\n" + b"1,2\n1,3\n" * 8, "ours.txt": b"a diary, not the model",
        "ours.pth": trained[0].read_bytes(), "ours.json": trained[0].with_suffix(
            ".json").read_bytes(),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    assert module.main(argv.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and words in err and "Traceback" not in err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files


def test_a_loss_that_is_not_finite_stops_the_run_and_writes_nothing(trained, tmp_path, capsys,
                                                                    monkeypatch):
    monkeypatch.setattr(train, "token_losses",
                        lambda model, x, y: model(x).sum(-1) * math.nan)
    argv = ["--text", str(trained[1]), "--output", str(tmp_path / "gpt.pth"), *SMALL]
    assert train.main(argv) == 2
    assert "--lr 0.0003" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_ctrl_c_saves_the_best_so_far_and_says_how_to_go_on(trained, tmp_path, capsys, monkeypatch):
    real, calls = train.token_losses, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train, "token_losses", interrupted)
    out = str(tmp_path / "gpt.pth")
    assert train.main(["--text", str(trained[1]), "--output", out, *SMALL]) == 130
    said = capsys.readouterr()
    assert f"--init {out}" in said.err and "Ctrl-C" in said.err
    before, after = map(float, re.search(r"val loss (\S+) -> (\S+)", said.out).groups())
    assert after < before and load_gpt(out)


@pytest.mark.parametrize(
    ("module", "name", "words"),
    [
        (train, "decode", "--text data.txt --epochs 1"),  # the sample of a model that is trained
        (explore, "judge_unseen", "--data data.txt --epochs 1"),
        (advanced, "learn_from_own", "--self-align --domain-terms bee --samples 8 --sample-chars 40"
         " --init {}"),
    ],
)
def test_ctrl_c_after_the_training_loses_nothing(module, name, words, trained, tmp_path,
                                                 capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    (tmp_path / "data.txt").write_text("\n".join(lines_of(60)), "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, name, interrupted)
    argv = words.format(trained[0]).split() + ["--output", "gpt.pth", "--block-size", "48"]
    assert module.main(argv + SMALL) == 130
    assert "--init gpt.pth" in capsys.readouterr().err and load_gpt("gpt.pth")


def test_a_reader_that_leaves_early_ends_the_program_quietly(folder, explored):
    """As `| head` does, which closes its end of the pipe; here it is closed before the start."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "explore.py", "--data", "path/to/data.csv", "--ask",
                           "gpt_knowledge.pth"], cwd=folder, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_terminal_without_the_letter_is_no_reason_to_stop(tmp_path, monkeypatch):
    (tmp_path / "data.csv").write_text("caf\u00e9,b\n" + "1,2\n" * 7, "utf-8")
    screen = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(explore, "run_explore", lambda args: print("caf\u00e9"))
    assert explore.main(["--data", str(tmp_path / "data.csv")]) == 0
    assert screen.buffer.getvalue() == b"caf?\n"


def test_a_full_disk_is_one_message_and_leaves_the_old_model_whole(trained, tmp_path, capsys):
    for ending in (".pth", ".json"):
        shutil.copy(trained[0].with_suffix(ending), tmp_path / f"gpt{ending}")
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    argv = ["--text", str(trained[1]), "--epochs", "1", "--block-size", "48", "--output",
            str(tmp_path / "gpt.pth"), "--sample-chars", "1", *SMALL]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_999, limits[1]))  # no file longer than that
    try:
        assert train.main(argv) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.match(r"error: .*too large.*half written", capsys.readouterr().err)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files


def test_going_on_from_a_model_keeps_what_it_knew_and_takes_new_characters(trained, tmp_path,
                                                                           capsys):
    text = tmp_path / "more.txt"
    lines = [line.upper() for line in lines_of(60, seed=8)] + lines_of(60)
    text.write_text("\n".join(lines), "utf-8")
    argv = ["--text", str(text), "--init", str(trained[0]), "--epochs", "1", "--sample-chars", "9"]
    assert train.main(argv) == 0
    out = capsys.readouterr().out
    assert "has never seen 'ABCDEFGHIKLNORSTY'" in out
    assert float(re.search(r"val loss (\S+) ->", out)[1]) < 1.5  # from scratch it would be above 3


def test_the_same_seed_gives_the_same_model(trained, tmp_path):
    runs = []
    for name in ("a.pth", "b.pth"):
        argv = ["--text", str(trained[1]), "--output", str(tmp_path / name), "--epochs", "1"]
        train.main([*argv, "--n-embd", "8", "--n-layer", "1", "--n-head", "2",
                    "--block-size", "16"])
        runs.append(torch.load(tmp_path / name, weights_only=True))
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


def test_the_examples_are_what_the_documentation_says():
    examples = FOLDER / "examples"
    texts, rewards = advanced.parse_rewards(
        (examples / "reward_data.txt").read_text("utf-8"), "reward_data.txt")
    assert len(texts) == len(set(texts)) == 120 and any("|" in text for text in texts)
    assert set(rewards.tolist()) <= {x / 10 for x in range(-10, 11)}
    for name in ("data.csv", "data.jsonl", "data.txt"):
        assert explore.read_rows(examples / name)[1] == []
