"""train_tiny_chat: the table of pairs learns what counting finds, and no input breaks it."""

import ast
import io
import math
import os
import random
import re
import resource
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import load, script_path

tiny = load("train_tiny_chat")
PARTS = "a cat sat. the dog ran! Us\nAi:"


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def chat(capsys):
    """chat(*flags) runs the script in this process: (exit code, stdout, stderr)."""

    def run(*flags):
        try:
            code = tiny.main([str(flag) for flag in flags])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


def reply_of(out):
    """What stands between the first and the last empty line of the second half: the sample."""
    return re.search(r"\n\n(User: hi\nAssistant:.*?)\n\n(?:wrote|result|next)", out, re.S)[1]


def table(out):
    """{name: (train, val)} of the closing comparison."""
    rows = re.findall(r"^(\S.*?) +(\d+\.\d{4}) +(\d+\.\d{4})$", out, re.M)
    return {name: (float(a), float(b)) for name, a, b in rows}


def log_rows(out):
    rows = re.findall(r"^ +(\d+) +(\d+\.\d{4}) +(\d+\.\d{4})$", out, re.M)
    return [(int(step), float(a), float(b)) for step, a, b in rows]


# ---- the two counted losses and the loss of a model ----------------------------------------------


def test_the_counted_losses_as_worked_by_hand():
    """ababb: targets b a b b, so p(a) = 1/4, p(b) = 3/4. Pairs: a-b twice, b-a once, b-b once, so
    p(b after a) = 1, p(a after b) = p(b after b) = 1/2.
    """
    data = torch.tensor([0, 1, 0, 1, 1])
    single, pairs = tiny.count_losses(data, data, 2)
    assert single == pytest.approx(-(math.log(1 / 4) + 3 * math.log(3 / 4)) / 4)
    assert pairs == pytest.approx(2 * math.log(2) / 4)


def test_on_other_text_every_pair_counts_once_more_as_worked_by_hand():
    """Counts + 1: a-a 1, a-b 3, b-a 2, b-b 2; on the text "aab" that is 1/4 and 3/4; singly
    p(a) = 3/8, p(b) = 5/8.
    """
    single, pairs = tiny.count_losses(torch.tensor([0, 1, 0, 1, 1]), torch.tensor([0, 0, 1]), 2)
    assert pairs == pytest.approx(-(math.log(1 / 4) + math.log(3 / 4)) / 2)
    assert single == pytest.approx(-(math.log(3 / 8) + math.log(5 / 8)) / 2)


@pytest.mark.parametrize("length", [2, 3, 64, 65, 66, 129, 200])
def test_the_mean_loss_counts_every_character_but_the_first_once(length):
    torch.manual_seed(1)
    model, data = tiny.BigramModel(7), torch.randint(7, (length,))
    expected = F.cross_entropy(model.table.weight[data[:-1]], data[1:]).item()
    assert tiny.mean_loss(model, data) == pytest.approx(expected, rel=1e-5)


def test_a_table_that_knows_nothing_loses_ln_v():
    model = tiny.BigramModel(13)
    torch.nn.init.zeros_(model.table.weight)
    assert tiny.mean_loss(model, torch.randint(13, (99,))) == pytest.approx(math.log(13))


def test_trained_to_the_end_the_table_reaches_what_counting_pairs_reaches_and_never_less():
    """Six times the chat, because random windows show the two ends of a text less often."""
    text = 6 * tiny.CHAT
    vocabulary = "".join(sorted(set(text)))
    data = tiny.encode(text, vocabulary)
    floor = tiny.count_losses(data, data, len(vocabulary))[1]
    torch.manual_seed(1)
    model = tiny.BigramModel(len(vocabulary))
    assert tiny.mean_loss(model, data) > math.log(len(vocabulary))
    tiny.train(model, data, data, steps=300, batch_size=48, lr=0.2)
    assert floor < tiny.mean_loss(model, data) < floor + 0.005


def test_the_trained_table_holds_the_odds_that_counting_gives():
    """After q always comes u, after u comes a or e, two to one."""
    text = "quaquaque" * 40
    data = tiny.encode(text, "aequ")
    torch.manual_seed(1)
    model = tiny.BigramModel(4)
    tiny.train(model, data, data, steps=300, batch_size=32, lr=0.1)
    odds = model.table.weight.softmax(1)
    assert odds["aequ".index("q"), "aequ".index("u")] > 0.99
    assert odds["aequ".index("u"), 0].item() == pytest.approx(2 / 3, abs=0.03)


# ---- the models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bigram", "transformer"])
def test_no_later_character_changes_an_earlier_score(kind):
    torch.manual_seed(1)
    model, x = tiny.MODELS[kind](11), torch.randint(11, (3, 20))
    scores = model(x)
    assert scores.shape == (3, 20, 11)
    for t in range(20):
        changed = x.clone()
        changed[:, t] = (x[:, t] + 1) % 11
        after = model(changed)
        torch.testing.assert_close(after[:, :t], scores[:, :t], atol=0, rtol=0)
        assert (after[:, t] - scores[:, t]).abs().amax(-1).min() > 1e-6


def test_only_the_transformer_sees_more_than_one_character_back():
    torch.manual_seed(1)
    for kind, sees in (("bigram", False), ("transformer", True)):
        model = tiny.MODELS[kind](11)
        one, other = torch.tensor([[1, 2, 3]]), torch.tensor([[9, 2, 3]])
        assert torch.equal(model(one)[0, -1], model(other)[0, -1]) != sees


def test_the_transformer_learns_what_no_table_of_pairs_can(capsys):
    """In abcabd the character after b depends on two back, so a bigram is left with ln 2 there."""
    data = tiny.encode("xaybzazb" * 40, "abxyz")  # after a: y or z; after b: z or x
    floor = tiny.count_losses(data, data, 5)[1]
    assert floor > 0.3
    torch.manual_seed(1)
    model = tiny.TinyTransformer(5)
    tiny.train(model, data, data, steps=60, batch_size=8, lr=0.005)
    assert tiny.mean_loss(model, data) < floor / 2


@pytest.mark.parametrize("kind", ["bigram", "transformer"])
def test_a_reply_goes_on_past_the_context_and_repeats_with_its_seed(kind):
    torch.manual_seed(1)
    model, prompt = tiny.MODELS[kind](9), torch.tensor([3, 1, 4])
    length = tiny.CONTEXT + 9
    first, again, other = (tiny.write_reply(model, prompt, length, seed) for seed in (5, 5, 6))
    assert first.shape == (3 + length,) and first[:3].tolist() == [3, 1, 4]
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_reply_follows_the_models_odds():
    """A table in which 0 is followed by 1 with probability 0.8: of 4000 draws from state 0, the
    share of 1 is within 0.8 +- 5 sqrt(0.8 0.2 / 4000) = 0.032 (odds against: 1 in 1.7 million).
    """
    model = tiny.BigramModel(2)
    with torch.no_grad():
        model.table.weight.copy_(torch.tensor([[0.2, 0.8], [0.2, 0.8]]).log())
    ids = tiny.write_reply(model, torch.tensor([0]), 4000, seed=1)[1:]
    assert abs(ids.double().mean().item() - 0.8) < 0.032


# ---- a run ---------------------------------------------------------------------------------------


def test_with_no_flag_it_trains_and_replies_within_15_seconds(run_script):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_script("train_tiny_chat")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert spent < 15, f"{spent:.1f} s of CPU time, which other programs do not lengthen"
    out = done.stdout
    assert out.startswith("tiny chat - cpu - float32 - bigram - ")
    rows = log_rows(out)
    assert len(rows) >= 10 and [row[0] for row in rows] == sorted({row[0] for row in rows})
    assert rows[-1][1] < rows[0][1] - 1 and rows[-1][2] < rows[0][2] - 1
    assert len(reply_of(out)) == len("User: hi\nAssistant:") + 120
    found = re.search(r"result: val loss (\S+) -> (\S+) \(n=(\d+)\)\nnext: python edu/", out)
    assert float(found[1]) == pytest.approx(rows[0][2], abs=0.006)
    assert float(found[2]) == pytest.approx(rows[-1][2], abs=0.006)
    ladder = table(out)
    assert ladder["knows nothing: ln V"][1] > ladder["single counts"][1] > ladder["this bigram"][1]
    floor = ladder["bigram counts"][0]
    assert floor < ladder["this bigram"][0] < floor + 0.1


def test_the_closing_table_is_a_ladder_and_the_transformer_stands_on_its_last_rung(chat):
    code, out, _ = chat("--model", "transformer", "--steps", 90, "--lr", 0.005)
    rows = table(out)
    names = ("knows nothing: ln V", "single counts", "bigram counts", "this transformer")
    assert code == 0 and list(rows) == list(names)
    for split in (0, 1):  # on text it was trained on, and on text it was not
        losses = [rows[name][split] for name in names]
        assert losses == sorted(losses, reverse=True) and len(set(losses)) == 4


def test_the_same_seed_prints_the_same_and_another_does_not(chat):
    first = chat("--steps", 5)
    assert chat("--steps", 5) == first
    other = chat("--steps", 5, "--seed", 2)
    assert reply_of(other[1]) != reply_of(first[1])


def test_the_flags_change_what_they_name(chat):
    _, out, _ = chat("--steps", 7, "--max-new-tokens", 9, "--prompt", r"Us\nAs", "--batch-size", 3)
    assert [row[0] for row in log_rows(out)] == list(range(8))
    assert re.search(r"\n\nUs\nAs(.{9})\n\nresult", out, re.S)
    out_with = {lr: chat("--steps", 5, "--lr", lr)[1] for lr in (0.01, 0.1)}
    assert log_rows(out_with[0.01])[-1][1] > log_rows(out_with[0.1])[-1][1]


def test_before_and_after_are_measured_on_the_same_held_out_text(chat, tmp_path):
    """The table of steps looks at 5000 characters; the result is about all of them, twice."""
    rng = random.Random(1)
    file = tmp_path / "text.txt"
    train = "".join(rng.choice("ab") for _ in range(6000))
    file.write_text(train + "a" * 5000 + "b" * 1000, "utf-8")
    _, out, _ = chat("--data", file, "--val-fraction", 0.5, "--prompt", "a", "--steps", 1,
                     "--lr", 1e-9)
    before, after, n = re.search(r"result: val loss (\S+) -> (\S+) \(n=(\d+)\)", out).groups()
    assert before == after and n == "5999"


def test_ctrl_c_is_one_line_without_a_traceback(chat, monkeypatch):
    def press(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "randint", press)
    code, _, err = chat("--steps", 1)
    assert code == 130 and err == "stopped by Ctrl-C\n"


def test_a_reader_that_has_enough_is_no_traceback(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert tiny.main(["--steps", "1"]) == 141


def test_the_held_out_end_is_never_trained_on(chat, tmp_path):
    text = PARTS * 30
    file = tmp_path / "chat.txt"
    outs = []
    for end in (text[-270:], text[-270:][::-1]):  # another end of the same characters
        file.write_text(text[:-270] + end, "utf-8")
        flags = ("--data", file, "--val-fraction", 270 / len(text), "--prompt", "a", "--steps", 20)
        outs.append(chat(*flags)[1])
    first, second = (log_rows(out) for out in outs)
    assert [row[:2] for row in first] == [row[:2] for row in second]
    assert [row[2] for row in first] != [row[2] for row in second]
    assert outs[0].split("this bigram")[1].split("result")[0].split("\n", 1)[1] == (
        outs[1].split("this bigram")[1].split("result")[0].split("\n", 1)[1])  # fmt: skip


def test_line_ends_and_a_byte_order_mark_do_not_matter(chat, tmp_path):
    outs = []
    for raw in (tiny.CHAT.encode(), b"\xef\xbb\xbf" + tiny.CHAT.replace("\n", "\r\n").encode()):
        (tmp_path / "chat.txt").write_bytes(raw)
        outs.append(chat("--data", tmp_path / "chat.txt", "--steps", 3))
    assert outs[0] == outs[1] == chat("--steps", 3)


def test_any_language_can_be_learned(chat, tmp_path):
    (tmp_path / "chat.txt").write_text("Ü: grüß dich 😀\nß: 你好!\n" * 20, "utf-8")
    flags = ("--data", tmp_path / "chat.txt", "--prompt", "Ü: 你", "--steps", 3)
    code, out, _ = chat(*flags)
    assert code == 0 and "\nÜ: 你" in out


def test_it_needs_nothing_but_torch_and_the_standard_library():
    tree = ast.parse(script_path("train_tiny_chat").read_text("utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    assert found - set(sys.stdlib_module_names) == {"torch"}


# ---- save and load -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bigram", "transformer"])
def test_a_loaded_model_gives_the_identical_reply(chat, tmp_path, kind):
    file = tmp_path / "model.pt"
    code, out, _ = chat("--model", kind, "--steps", 5, "--seed", 3, "--save", file)
    assert code == 0 and f"wrote {file} " in out
    code, again, _ = chat("--load", file, "--seed", 3)
    assert code == 0 and reply_of(again) == reply_of(out)
    assert reply_of(chat("--load", file, "--seed", 4)[1]) != reply_of(out)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"], "no temporary file stays"


def test_saving_again_replaces_an_older_model(chat, tmp_path):
    file = tmp_path / "model.pt"
    chat("--steps", 1, "--save", file)
    code, out, _ = chat("--steps", 2, "--save", file)
    assert code == 0 and reply_of(chat("--load", file)[1]) == reply_of(out)


class Evil:
    """Unpickled in earnest, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("part", [None, "kind", "vocabulary", "weights"])
def test_a_malicious_file_runs_nothing(chat, tmp_path, part):
    evil = Evil(str(tmp_path / "owned"))
    model = tiny.BigramModel(3)
    contents = {"kind": "bigram", "vocabulary": "abc", "weights": model.state_dict()}
    torch.save(evil if part is None else {**contents, part: evil}, tmp_path / "model.pt")
    code, out, err = chat("--load", tmp_path / "model.pt")
    assert code == 2 and err.startswith("error: --load ") and out == ""
    assert not (tmp_path / "owned").exists()


def test_a_damaged_file_is_one_message_wherever_it_is_cut(chat, tmp_path):
    file = tmp_path / "model.pt"
    chat("--steps", 1, "--save", file)
    whole = file.read_bytes()
    for cut in range(0, len(whole), len(whole) // 15):
        file.write_bytes(whole[:cut])
        code, _, err = chat("--load", file)
        assert code == 2 and err.startswith("error: ") and err.count("\n") <= 2


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "mamba"}, {"kind": None}, {"kind": ["bigram"]},
        {"vocabulary": "abcd"}, {"vocabulary": 3}, {"vocabulary": [[1], [2], [3]]},
        {"weights": {}}, {"weights": 3}, {"weights": {"table.weight": "text"}},
        {"kind": "transformer"},
    ],
    ids=str,
)  # fmt: skip
def test_a_file_with_other_contents_is_refused(chat, tmp_path, change):
    weights = tiny.BigramModel(3).state_dict()
    right = {"kind": "bigram", "vocabulary": "abc", "weights": weights}
    torch.save({**right, **change}, tmp_path / "model.pt")
    code, _, err = chat("--load", tmp_path / "model.pt", "--prompt", "a")
    assert code == 2 and "not a model that --save wrote" in err
    torch.save(right, tmp_path / "model.pt")
    assert chat("--load", tmp_path / "model.pt", "--prompt", "a")[0] == 0


@pytest.mark.parametrize("contents", [[1, 2], 3, "text", {}, torch.zeros(3)], ids=str)
def test_a_file_of_another_kind_is_refused(chat, tmp_path, contents):
    torch.save(contents, tmp_path / "model.pt")
    assert chat("--load", tmp_path / "model.pt")[0] == 2


# ---- bad input -----------------------------------------------------------------------------------


def bad_files(folder):
    """{name: (path, part of the message)}."""
    contents = {
        "empty.txt": (b"", "0 characters"),
        "short.txt": (b"User: hi\n", "9 characters"),
        "latin1.txt": ("é".encode("latin1") * 500, "UTF-8"),
        "utf16.txt": (("abc " * 100).encode("utf-16"), "UTF-8"),
        "binary.bin": (bytes(range(256)) * 9, "UTF-8"),
    }
    for name, (raw, _) in contents.items():
        (folder / name).write_bytes(raw)
    found = {name: (folder / name, message) for name, (_, message) in contents.items()}
    found["missing.txt"] = (folder / "missing.txt", "No such file")
    found["folder"] = (folder, "directory")
    return found


def test_a_file_that_cannot_be_learned_is_one_message_and_exit_code_2(chat, tmp_path):
    for path, message in bad_files(tmp_path).values():
        code, out, err = chat("--data", path)
        assert code == 2 and err.startswith("error: ") and message in err, (path, err)
        assert out == "" and err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--prompt", "User: 你好"], "['你', '好']"),
        (["--prompt", ""], "empty prompt"),
        (["--steps", "0"], "--steps 0"),
        (["--steps", "-3"], "--steps -3"),
        (["--steps", "many"], "--steps"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--lr", "0"], "--lr 0"),
        (["--lr", "nan"], "--lr nan"),
        (["--seed", "-1"], "--seed -1"),
        (["--val-fraction", "0"], "--val-fraction 0"),
        (["--val-fraction", "nan"], "--val-fraction nan"),
        (["--val-fraction", "0.999"], "too few"),
        (["--val-fraction", "0.0001"], "too few"),
        (["--val-fraction", "2"], "too few"),
        (["--model", "rnn"], "rnn"),
        (["--load", "no.pt"], "no.pt"),
        (["--load", ""], "--load is empty"),
        (["--data", ""], "--data is empty"),
        (["--save", ""], "--save is empty"),
        (["--load", "no.pt", "--steps", "3"], "--steps cannot go with it"),
        (["--load", "no.pt", "--model", "transformer"], "--model cannot go with it"),
        (["--load", "no.pt", "--save", "new.pt"], "--save cannot go with it"),
        (["--learning-rate", "1"], "--learning-rate"),
    ],
)
def test_a_mistake_in_the_flags_is_named_before_anything_is_trained(chat, flags, complaint):
    code, out, err = chat(*flags)
    assert code == 2 and complaint in err and "error: " in err and out == ""


def test_a_prompt_that_a_loaded_model_cannot_read_is_named(chat, tmp_path):
    chat("--steps", 1, "--save", tmp_path / "model.pt")
    code, _, err = chat("--load", tmp_path / "model.pt", "--prompt", "Ω")
    assert code == 2 and "['Ω']" in err


def test_a_place_that_cannot_be_saved_to_is_named_before_the_training(chat, tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "no" / "model.pt", tmp_path, tmp_path / "file" / "model.pt"):
        code, out, err = chat("--save", path)
        assert code == 2 and err.startswith("error: --save ") and out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_saving_never_overwrites_a_file_that_is_no_model(chat, tmp_path):
    file = tmp_path / "chat.txt"
    file.write_text(tiny.CHAT, "utf-8")
    code, out, err = chat("--data", file, "--save", file)
    assert code == 2 and "chat.txt: not a model" in err and out == ""
    assert file.read_text("utf-8") == tiny.CHAT


def test_a_training_that_blows_up_says_so_and_keeps_the_older_model(chat, tmp_path):
    file = tmp_path / "model.pt"
    chat("--steps", 1, "--save", file)
    whole = file.read_bytes()
    code, out, err = chat("--lr", 1e9, "--model", "transformer", "--steps", 20, "--save", file)
    assert code == 2 and "the loss is nan" in err and "less than --lr 1e+09" in err
    assert file.read_bytes() == whole and "result" not in out


def test_help_names_every_flag(chat):
    code, out, _ = chat("--help")
    flags = ("data model steps lr batch-size val-fraction prompt max-new-tokens seed save load")
    assert code == 0 and all(f"--{flag}" in out for flag in flags.split())


def test_torch_save_of_the_script_is_readable_by_anyone_with_torch(chat, tmp_path):
    chat("--steps", 1, "--save", tmp_path / "model.pt")
    raw = io.BytesIO((tmp_path / "model.pt").read_bytes())
    saved = torch.load(raw, weights_only=True)
    assert set(saved) == {"kind", "vocabulary", "weights"} and saved["kind"] == "bigram"
    assert saved["vocabulary"] == "".join(sorted(set(tiny.CHAT)))
