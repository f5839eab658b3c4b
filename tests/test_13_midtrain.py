"""Challenge 13: the mixture, the packing, what is held out, resume, and a form that is learned."""

import json
import random
import re
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import flags_of, load, running, wait_for
from safetensors.torch import load_file

mid = load("13_midtrain")
sft = load("08_sft")
pretrain = load("12_pretrain")

ANIMALS = {"cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "sheep": "baa"}


def chat(question, reply, **more):
    return {"messages": [{"role": "user", "content": question},
                         {"role": "assistant", "content": reply}], **more}


def write_jsonl(path, conversations):
    path.write_text("".join(json.dumps(c) + "\n" for c in conversations), encoding="utf-8")


def problem(a, b):
    return {"messages": [{"role": "user", "content": f"What is {a} and {b}?"},
                         {"role": "assistant", "content": [
                             {"type": "text", "text": "It is "},
                             {"type": "python", "text": f"{a}+{b}"},
                             {"type": "python_output", "text": str(a + b)},
                             {"type": "text", "text": f"{a + b}.\n#### {a + b}"}]}]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tokenizer, a base model of random weights, chats about animals, and problems."""
    folder, rng = tmp_path_factory.mktemp("mid"), random.Random(0)
    asks = ["What does the {} say?", "Which sound does a {} make?", "Tell me what a {} says."]
    chats = [chat(rng.choice(asks).format(a), f"The {a} says {ANIMALS[a]}.", kind="fact",
                  answer=ANIMALS[a]) for a in rng.choices(sorted(ANIMALS), k=120)]
    texts = [" ".join(m["content"] for m in c["messages"]) for c in chats]
    for index in range(2):
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{index:05d}.parquet")
    assert load("11_tokenizer").main(
        ["--data-dir", str(folder), "--vocab-size", "300", "--no-gpt2"]) == 0
    write_jsonl(folder / "tiny_chat_train.jsonl", chats)
    write_jsonl(folder / "tiny_chat_test.jsonl",
                [chat(f"Please, what does the {a} say?", f"The {a} says {s}.", kind="fact",
                      answer=s) for a, s in ANIMALS.items()])
    write_jsonl(folder / "tiny_gsm_train.jsonl", [problem(a, a + 1) for a in range(30)])
    write_jsonl(folder / "tiny_gsm_test.jsonl", [problem(a, a + 5) for a in range(4)])
    tokenizer = mid.Tokenizer.from_dir(folder / "tokenizer")
    torch.manual_seed(0)
    model = mid.GPT(mid.GPTConfig(96, tokenizer.get_vocab_size(), 1, 2, 2, 32))
    pretrain.save_checkpoint(folder / "base", model, tokenizer, 0, {}, pretrain.Config())
    return folder


@pytest.fixture(scope="module")
def tokenizer(world):
    return mid.Tokenizer.from_dir(world / "tokenizer")


def settings(world, stage, **changes):
    small = {"device_batch_size": 4, "total_batch_size": 384, "num_iterations": 10, "save_every": 4,
             "log_every": 1, "plot": False, "eval_questions": 0}
    return mid.Config(data_dir=world, stage=stage, **{**small, **changes})


# ---- the mixture ---------------------------------------------------------------------------------


def test_a_weight_says_how_often_each_conversation_of_a_source_comes():
    sources = {"a": ([f"a{i}" for i in range(10)], 2.0), "b": ([f"b{i}" for i in range(8)], 0.5),
               "c": ([f"c{i}" for i in range(4)], 1.25)}
    mixed = mid.mix_sources(sources, 1)
    counts = {name: mixed.count(name) for name in set(mixed)}
    assert all(counts[f"a{i}"] == 2 for i in range(10))
    assert sum(counts.get(f"b{i}", 0) for i in range(8)) == 4 and counts.get("b0", 0) <= 1
    assert sorted(counts[f"c{i}"] for i in range(4)) == [1, 1, 1, 2]
    assert mixed == mid.mix_sources(sources, 1) != mid.mix_sources(sources, 2)
    assert "".join(x[0] for x in mixed) != "".join(sorted(x[0] for x in mixed))


def test_what_is_spelled_is_spelled_right_and_counted_as_the_calculator_counts():
    rows = mid.spelling_conversations(["strawberry", "cat", "letter"], 3)
    assert len(rows) == 6
    for spelled, counted in zip(rows[::2], rows[1::2]):
        word = spelled["messages"][0]["content"].rpartition(" ")[2]
        assert spelled["messages"][1]["content"] == f"The word {word} is spelled {'-'.join(word)}."
        said, call, output, end = counted["messages"][1]["content"]
        assert mid.use_calculator(call["text"]) == output["text"]
        assert end["text"].split()[0] == output["text"]
        letter = counted["messages"][0]["content"].split()[3]
        assert output["text"] == str(sum(c == letter for c in word))
        mid.check_messages(counted["messages"])


def test_words_that_a_test_asks_for_are_never_spelled_in_training():
    """nanochat's SpellingBee drew train and test from one generator with seeds of equal effect."""
    train = [chat("Do you like the garden?", "The puppy sleeps in the garden, well-known to Tom.")]
    held_out = [chat("Spell the word puppy.", "The word puppy is spelled p-u-p-p-y.", kind="spell")]
    words = mid.spelling_words(train, held_out)
    assert "garden" in words and "puppy" not in words
    assert not {"Tom", "the", "well", "known", "in"} & set(words)


def test_the_answer_to_a_choice_is_its_letter_alone():
    questions = [{"question": "Which?", "choices": ["u", "v", "w", "x"], "gold": g} for g in (0, 3)]
    for row, letter in zip(mid.choice_conversations(questions), "AD"):
        user, assistant = row["messages"]
        assert user["content"] == mid.render_choices("Which?", ["u", "v", "w", "x"])
        assert assistant["content"] == letter


@pytest.mark.parametrize("text, parsed", [
    ("mine=a/b.jsonl", ("mine", "a/b.jsonl", 1)), ("m=x.jsonl:2", ("m", "x.jsonl", 2)),
    ("m-2=x.jsonl:.5", ("m-2", "x.jsonl", 0.5)), ("m=C:/x.jsonl:3.5", ("m", "C:/x.jsonl", 3.5))])
def test_a_source_of_ones_own_is_name_path_and_weight(text, parsed):
    name, path, weight = mid.parse_mix(text)
    assert (name, path.as_posix(), weight) == parsed


def test_own_conversations_join_the_mixture(world, tmp_path):
    write_jsonl(tmp_path / "mine.jsonl", [chat("Hi!", "Hello.")])
    mine = f"mine={tmp_path}/mine.jsonl:3"
    sources = mid.load_sources(settings(world, "x", choices=0, mix=(mine,)))
    assert list(sources) == ["chats", "problems", "spelling", "mine"]
    assert sources["mine"] == ([chat("Hi!", "Hello.")], 3.0)
    assert mid.mix_sources(sources, 0).count(chat("Hi!", "Hello.")) == 3


# ---- train and test are disjoint -----------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    assert load("00_tiny_world").main(
        ["--data-dir", str(folder), "--size-mb", "1", "--num-chats", "3000", "--num-problems",
         "500", "--num-eval", "20"]) == 0
    return folder


def test_nothing_that_is_asked_afterwards_was_in_the_training_mixture(tiny_world):
    sources = mid.load_sources(mid.Config(data_dir=tiny_world))
    assert {name: bool(rows) for name, (rows, _) in sources.items()} == dict.fromkeys(
        ("chats", "problems", "choices", "spelling"), True)
    seen = {m["content"] for rows, _ in sources.values() for row in rows for m in row["messages"]
            if m["role"] == "user"}
    held_out = mid.held_out_data(tiny_world, 10**6, 1337)
    choices = mid.choice_conversations(held_out.questions)
    assert len(held_out.chats) > 100 and len(held_out.problems) > 50 and len(choices) > 50
    for row in choices + held_out.problems:
        assert row["messages"][0]["content"] not in seen
    for row in held_out.chats:  # the turns before the last one lead up to it, and may be known
        if row["kind"] in ("fact", "sum", "spell", "count"):
            assert row["messages"][-2]["content"] not in seen
    asked = {item["question"] for item in held_out.questions}
    trained = {row["messages"][0]["content"].splitlines()[0].removeprefix("Choose: ")
               for row in sources["choices"][0]}
    assert not asked & trained and len(trained) > 300


def test_the_answer_to_a_multiple_choice_question_is_the_chats_own(tiny_world):
    """And the letters are used alike, within 4.5 deviations of a fair die with four sides."""
    chats = mid.read_conversations(tiny_world / "tiny_chat_train.jsonl")
    answers = {row["messages"][-2]["content"]: row["answer"] for row in chats
               if row["kind"] == "fact"}
    questions = mid.choices_from_chats(chats, 1)
    for item in questions:
        assert item["choices"][item["gold"]] == answers[item["question"]]
        assert len(set(item["choices"])) == 4
    n = len(questions)
    for letter in range(4):
        count = sum(item["gold"] == letter for item in questions)
        assert abs(count - n / 4) < 4.5 * (n * 3 / 16) ** 0.5


# ---- packing -------------------------------------------------------------------------------------


def test_the_stream_holds_every_conversation_whole_and_one_after_the_other(world, tokenizer):
    rows = mid.read_conversations(world / "tiny_gsm_train.jsonl")[:3]
    text = tokenizer.decode(mid.pack_conversations(rows, tokenizer).tolist())
    assert text == "".join(
        f"<|bos|><|user_start|>What is {a} and {a + 1}?<|user_end|><|assistant_start|>It is "
        f"<|python_start|>{a}+{a + 1}<|python_end|><|output_start|>{2 * a + 1}<|output_end|>"
        f"{2 * a + 1}.\n#### {2 * a + 1}<|assistant_end|>" for a in range(3))


def test_every_token_is_a_target_once_in_an_epoch():
    stream, rows, T = torch.arange(6 * 20 + 1), 4, 5
    inputs, targets = zip(*(mid.batch_of_step(stream, step, rows, T) for step in range(6)))
    assert torch.cat([y.flatten() for y in targets]).tolist() == list(range(1, 121))
    assert torch.equal(torch.cat(inputs) + 1, torch.cat(targets))
    again, _ = mid.batch_of_step(stream, 6, rows, T)
    assert torch.equal(again, inputs[0])  # the second epoch


def test_the_ranks_share_the_rows_of_a_step():
    stream = torch.arange(1000)
    whole, _ = mid.batch_of_step(stream, 3, 6, 7)
    parts = [mid.batch_of_step(stream, 3, 6, 7, rank, 2)[0] for rank in range(2)]
    assert sorted(torch.cat(parts).tolist()) == sorted(whole.tolist())


@pytest.mark.parametrize("progress, ratio, scale", [(0, 0.2, 1), (0.8, 0.2, 1), (0.9, 0.2, 0.5),
                                                    (0.99, 0, 1), (0.5, 1, 0.5)])
def test_the_learning_rate_stays_and_then_falls(progress, ratio, scale):
    assert mid.falling_at_the_end(progress, ratio) == pytest.approx(scale)


# ---- what is measured ----------------------------------------------------------------------------


@pytest.mark.parametrize("reply, ended, good", [
    ("Paris.", True, True), ("Paris.", False, False), ("", True, False), (" \n", True, False),
    ("It is <|python_start|>1+2<|python_end|><|output_start|>3<|output_end|>3.", True, True),
    ("<|python_start|>one<|python_end|>no result", True, True),
    ("<|python_start|>1+2", True, False), ("1+2<|python_end|>", True, False),
    ("<|output_start|>3<|output_end|>3", True, False), ("Hi<|user_start|>", True, False),
    ("<|python_start|><|python_start|>1<|python_end|>", True, False)])
def test_a_reply_is_well_formed_when_it_ends_and_its_calls_are_whole(reply, ended, good):
    assert mid.is_well_formed(reply, ended) is good


def test_the_chat_loss_is_what_fine_tuning_calls_the_validation_loss(world, tokenizer):
    model, _ = mid.load_checkpoint(world / "base", tokenizer, torch.device("cpu"))
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    chats = mid.read_conversations(world / "tiny_chat_test.jsonl")
    rows, _ = sft.render_rows(chats, tokenizer, 97)
    for batch_size in (1, 3, 32):
        loss, count = mid.chat_loss(model, chats, tokenizer, batch_size)
        assert loss == pytest.approx(sft.validation_loss(model, rows, 2, torch.float32), rel=1e-5)
        assert count == sum(sum(mask) for _, mask in rows)


# ---- the run -------------------------------------------------------------------------------------


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(a, b, tolerance=0.0):
    first, second = weights(a), weights(b)
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=tolerance, rtol=0)


def test_the_form_is_learned_and_the_change_is_said(world, capsys):
    done = mid.train(settings(world, "learns", num_iterations=250, num_epochs=80, save_every=1000,
                              eval_questions=20, log_every=50))
    table = done["table"]
    n, before, after = table["chat loss"]
    assert after < before / 3 and n > 20
    assert table["replies well formed"][1] == 0 and table["replies well formed"][2] >= 0.7
    assert table["problems: calculator used"][2] >= 0.5 and table["multiple choice right"][0] == 5
    out = capsys.readouterr().out
    assert f"result: chat loss, nats per token of the assistant {before:.3f} -> {after:.3f}" in out
    about = json.loads((world / "learns" / "config.json").read_text(encoding="utf-8"))
    assert about["metrics"]["chat loss"] == {"n": n, "before": before, "after": after}


def test_a_killed_and_resumed_run_is_the_uninterrupted_run_to_the_bit(world, monkeypatch):
    """Silent bug 10."""
    straight = mid.train(settings(world, "straight"))

    class Killed(BaseException):
        pass

    real, count = mid.TrainStep.__call__, iter(range(1000))

    def dies(*args):
        if next(count) == 6:  # after the checkpoint of step 4
            raise Killed
        return real(*args)

    monkeypatch.setattr(mid.TrainStep, "__call__", dies)
    with pytest.raises(Killed):
        mid.train(settings(world, "split"))
    monkeypatch.setattr(mid.TrainStep, "__call__", real)
    split = mid.train(settings(world, "split", resume=True))
    assert_same_weights(world / "straight", world / "split")
    timeless = [[{k: v for k, v in row.items() if k != "tok_per_s"} for row in run["rows"]]
                for run in (straight, split)]
    assert timeless[0] == timeless[1]


def test_kill_9_costs_only_the_steps_since_the_last_checkpoint(world, tmp_path):
    long = {"num_iterations": 80, "num_epochs": 30, "save_every": 8, "log_every": 1000}
    with running("13_midtrain", settings(world, "killed", **long), tmp_path / "log") as process:
        wait_for((world / "killed" / "resume.pt").exists, process)
        process.send_signal(signal.SIGKILL)
    mid.train(settings(world, "killed", resume=True, **long))
    mid.train(settings(world, "not_killed", **long))
    assert_same_weights(world / "killed", world / "not_killed")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_the_run_goes_on_to_the_same_end(world, monkeypatch, capsys, number):
    real, count = mid.TrainStep.__call__, iter(range(1000))

    def interrupted(*args):
        if next(count) == 5:
            signal.raise_signal(number)
        return real(*args)

    monkeypatch.setattr(mid.TrainStep, "__call__", interrupted)
    mid.train(settings(world, "stopped"))
    out = capsys.readouterr().out
    assert "stopped at step 6 of 10; --resume" in out and not re.search("^result:", out, re.M)
    mid.train(settings(world, "stopped", resume=True))
    assert "resumed at step 6 of 10" in capsys.readouterr().out
    mid.train(settings(world, "not_stopped"))
    assert_same_weights(world / "stopped", world / "not_stopped")


def test_smaller_passes_give_the_same_run(world):
    mid.train(settings(world, "whole"))
    mid.train(settings(world, "parts", device_batch_size=1))
    assert_same_weights(world / "whole", world / "parts", 2e-4)  # Muon magnifies rounding


def test_two_ranks_train_as_one(world, run_script):
    cfg = settings(world, "two", num_iterations=4, device_batch_size=2)
    done = run_script("13_midtrain", *flags_of(cfg), nproc=2, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    mid.train(settings(world, "one", num_iterations=4))
    assert_same_weights(world / "one", world / "two", 2e-4)
    assert done.stdout.count("result: ") == 1


def test_another_run_is_not_resumed_by_mistake(world):
    mid.train(settings(world, "other", num_iterations=2))
    with pytest.raises(mid.UserError, match="matrix_lr 0.5 -> 0.02"):
        mid.train(settings(world, "other", num_iterations=2, resume=True, matrix_lr=0.5))
    with pytest.raises(mid.UserError, match="mixture"):
        mid.train(settings(world, "other", num_iterations=2, resume=True, chats=2.0))
    with pytest.raises(mid.UserError, match="eval_questions 3 -> 0, held_out"):
        mid.train(settings(world, "other", num_iterations=2, resume=True, eval_questions=3))


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(world, monkeypatch):
    mid.train(settings(world, "diverges", num_iterations=2))
    before = weights(world / "diverges")
    monkeypatch.setattr(mid.TrainStep, "backward", lambda self, *_: torch.tensor(float("nan")))
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda _: torch.tensor(1.0))
    assert mid.main(["--data-dir", str(world), "--stage", "diverges", "--total-batch-size", "384",
                     "--device-batch-size", "4", "--eval-questions", "0", "--no-plot"]) == 1
    assert all(torch.equal(before[n], w) for n, w in weights(world / "diverges").items())


@pytest.mark.parametrize("flags, words", [
    (("--source", "nothing"), "12_pretrain.py"), (("--total-batch-size", "100"), "not a multiple"),
    (("--mix", "mine"), "NAME=PATH:WEIGHT"), (("--mix", "mine=no.jsonl:1"), "no.jsonl"),
    (("--mix", "chats=x.jsonl"), "take another"), (("--chats", "-1"), "negative"),
    (("--chats", "0", "--problems", "0", "--choices", "0", "--spelling", "0"), "00_tiny_world.py"),
    (("--warmdown-ratio", "2"), "share"), (("--num-epochs", "0"), "above 0"),
    (("--num-epochs", "inf"), "a number above 0"), (("--chats", "nan"), "must be numbers"),
    (("--stage", "./base"), "would be overwritten")])
def test_a_mistake_is_one_message(world, capsys, flags, words):
    small = ("--total-batch-size", "768")
    assert mid.main(["--data-dir", str(world), "--stage", "wrong", *small, *flags]) == 2
    message = capsys.readouterr().err
    assert words in message and message.startswith("error: ") and "Traceback" not in message
    assert not (world / "wrong").exists()
