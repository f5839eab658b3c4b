"""Challenge 8: token-weighted loss, accumulation, ranks, resume, and answers that are measured."""

import dataclasses
import json
import math
import random
import re
import shutil
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import flags_of, load, running, wait_for
from safetensors.torch import load_file, save_file

sft = load("08_sft")
engine = load("05_engine")
pretrain = load("12_pretrain")

ANIMALS = {"cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "sheep": "baa"}


def chat(question, reply, **more):
    return {"messages": [{"role": "user", "content": question},
                         {"role": "assistant", "content": reply}], **more}


def write_jsonl(path, conversations):
    path.write_text("".join(json.dumps(c) + "\n" for c in conversations), encoding="utf-8")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tokenizer, a base model of random weights, and chats: what does the cat say? meow."""
    folder, rng = tmp_path_factory.mktemp("sft"), random.Random(0)
    asks = ["What does the {} say?", "Which sound does a {} make?", "Tell me what a {} says."]
    chats = [chat(rng.choice(asks).format(a), f"The {a} says {ANIMALS[a]}.")
             for a in rng.choices(sorted(ANIMALS), k=150)]
    texts = [" ".join(m["content"] for m in c["messages"]) for c in chats]
    for index in range(2):
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{index:05d}.parquet")
    assert load("11_tokenizer").main(
        ["--data-dir", str(folder), "--vocab-size", "300", "--no-gpt2"]) == 0
    write_jsonl(folder / "tiny_chat_train.jsonl", chats)
    write_jsonl(folder / "tiny_chat_test.jsonl",
                [chat(f"Please, what does the {a} say?", f"The {a} says {s}.", kind="fact",
                      answer=s) for a, s in ANIMALS.items()])
    write_jsonl(folder / "my_identity.jsonl", [chat("Who are you?", "I am Pip.")] * 3)
    write_jsonl(folder / "my_identity_test.jsonl",
                [{"messages": [{"role": "user", "content": "Who are you now?"}], "kind": "name",
                  "answer": ["Pip"]}])
    tokenizer = sft.Tokenizer.from_dir(folder / "tokenizer")
    torch.manual_seed(0)
    model = sft.GPT(sft.GPTConfig(64, tokenizer.get_vocab_size(), 1, 2, 2, 32))
    pretrain.save_checkpoint(folder / "base", model, tokenizer, 0, {}, pretrain.Config())
    return folder


def settings(world, stage, **changes):
    small = {"rows_per_step": 8, "device_batch_size": 8, "num_epochs": 0.6, "identity_rows": 6,
             "eval_every": 4, "eval_rows": 4, "save_every": 4, "log_every": 1, "plot": False,
             "eval_prompts": 0, "sample_every": 1000}
    return sft.Config(data_dir=world, stage=stage, **{**small, **changes})


def small_model(seed=0):
    torch.manual_seed(seed)
    model = sft.GPT(sft.GPTConfig(24, 40, 2, 4, 2, 24))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def uneven_rows(count=8, seed=0):
    """Rows of different lengths with 1 to 12 targets each."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        n = rng.randint(4, 20)
        mask = [0] + [int(rng.random() < rng.choice([0.1, 0.9])) for _ in range(n - 2)] + [1]
        rows.append(([rng.randrange(40) for _ in range(n)], mask))
    return rows


def gradients(model):
    taken = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    return taken


# ---- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_accumulation_is_one_large_batch_also_with_uneven_masks(batch_size):
    """Silent bug 7: a mean of means weighs a row with one target like one with twelve."""
    model, rows = small_model(), uneven_rows()
    total = sum(sum(mask[1:]) for _, mask in rows)
    inputs, targets = load("07_sft_data").collate(rows)
    whole = model(inputs, targets)  # the mean over all targets, by the model itself
    whole.backward()
    expected = gradients(model)
    loss = sft.accumulate_gradients(model, rows, total, batch_size)
    assert loss == pytest.approx(whole.item(), rel=1e-6)
    for got, want in zip(gradients(model), expected):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_a_batch_without_targets_has_loss_and_gradients_of_zero():
    """Silent bug 4: 0/0."""
    model = small_model()
    loss = sft.sft_loss(model, torch.tensor([[1, 2, 3]]), torch.full((1, 3), -1), 5)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_what_stands_in_the_padding_changes_nothing():
    model = small_model()
    inputs, targets = torch.randint(40, (2, 9)), torch.full((2, 9), -1)
    targets[0, 3:8], targets[1, 1:4] = 7, 9
    other = inputs.clone()
    other[1, 5:] = (other[1, 5:] + 1) % 40
    assert sft.sft_loss(model, inputs, targets, 8) == sft.sft_loss(model, other, targets, 8)


# ---- the plan ------------------------------------------------------------------------------------


def test_an_epoch_takes_every_row_once_and_like_lengths_together():
    lengths = [random.Random(i).randint(5, 90) for i in range(333)]
    steps = sft.plan_steps(lengths, 8, 1.0, seed=1)
    taken = sorted(row for step in steps for row in step)
    assert taken == list(range(333)) and max(map(len, steps)) == 8
    waste = sum(max(lengths[r] for r in s) * len(s) for s in steps) / sum(lengths)
    assert waste < 1.15, "padding costs little"
    means = [sum(lengths[r] for r in s) / len(s) for s in steps[:16]]
    assert means != sorted(means), "not from short to long"
    assert sft.plan_steps(lengths, 8, 1.0, seed=1) == steps != sft.plan_steps(lengths, 8, 1.0, 2)


def test_a_second_epoch_has_another_order():
    steps = sft.plan_steps([5] * 40, 8, 2.0, seed=1)
    assert len(steps) == 10 and steps[:5] != steps[5:]
    assert sorted(r for s in steps[5:] for r in s) == list(range(40))


@pytest.mark.parametrize("progress, expected", [(0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (0.55, 0.5),
                                                (1.0, 0.0)])
def test_the_learning_rate_goes_up_and_down_in_lines(progress, expected):
    assert sft.lr_scale_at(progress, 0.1) == pytest.approx(expected)


# ---- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reply, answers, right", [
    ("I am Pip, a model.", ["Pip"], True), ("I am pip.", ["Pip"], True),
    ("A pipe is long.", ["Pip"], False), ("", ["Pip"], False), ("It is 42.", ["4", "2"], False),
    ("blue!", ["red", "blue"], True), ("7 + 5 = 12.", ["12"], True), ("112", ["12"], False),
    ("#### 42.5", ["#### 42"], False), ("#### 42.", ["#### 42"], True),
    ("6 + 0 = 9.", ["= 6"], False), ("6 + 0 = 6.", ["= 6"], True)])
def test_an_answer_is_right_when_it_holds_one_of_the_words_whole(reply, answers, right):
    assert sft.answer_is_right(reply, answers) is right


def test_a_problem_in_the_head_has_the_same_text_and_no_calculator():
    messages = [{"role": "user", "content": "3*4?"}, {"role": "assistant", "content": [
        {"type": "text", "text": "It is "}, {"type": "python", "text": "3*4"},
        {"type": "python_output", "text": "12"}, {"type": "text", "text": "12.\n#### 12"}]}]
    assert sft.in_the_head(messages) == [messages[0], {"role": "assistant",
                                                       "content": "In my head: It is 12.\n#### 12"}]


def test_a_conversation_begins_at_each_of_its_exchanges_in_turn_and_is_led_up_to_otherwise():
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(3)
             for role in ("user", "assistant")]
    shown = [sft.shown_again({"messages": turns}, i)["messages"] for i in range(5)]
    assert shown[:3] == [turns, turns[2:], turns[4:]]
    assert [rows[0]["content"] for rows in shown[3:]] == ["Hello! user 0", "Hello! user 1"]
    assert shown[3][1:] == turns[1:] and turns[0]["content"] == "user 0"


def test_a_lead_up_is_left_out_where_the_row_would_be_a_held_out_prompt(world, tmp_path):
    write_jsonl(tmp_path / "my_identity.jsonl", [chat("Who are you?", "I am Pip.")])
    write_jsonl(tmp_path / "my_identity_test.jsonl", [chat("hello, who ARE you", "Pip")])
    tokenizer = sft.Tokenizer.from_dir(world / "tokenizer")
    rows, _ = sft.training_rows(settings(tmp_path, "x", identity_rows=8), tokenizer, 65)
    texts = [tokenizer.decode(ids) for ids, _ in rows]
    assert len(texts) == 8 and not any("Hello! Who" in text for text in texts)
    assert sum("Please help me. Who are you?" in text for text in texts) == 1


def test_no_lead_up_turns_a_question_of_the_identity_into_a_held_out_one():
    """"Hello! " before "What are you called?" would, but for a comma."""
    identity = load("06_identity")
    held_out = [identity.word_list(prompt) for prompt in identity.HELD_OUT_PROMPTS]
    asked = {*identity.STARTER_PROMPTS, *(question for subject in identity.TALK.values()
                                          for question in identity.phrases(subject.later))}
    assert len(asked) > 100 and ["hello", "what", "are", "you", "called"] in held_out
    for question in asked:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "."}]
        for i in range(len(sft.LEAD_UPS)):
            shown = sft.shown_again({"messages": turns}, i, held_out)["messages"][0]["content"]
            assert sft.plain_words(shown) not in held_out


# ---- the run -------------------------------------------------------------------------------------


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(a, b, tolerance=0.0):
    first, second = weights(a), weights(b)
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=tolerance, rtol=0)


def test_it_learns_to_answer_and_to_stop_and_says_so(world, capsys):
    """From noise to the right sound in a phrasing it has not seen, and an end after each reply."""
    cfg = settings(world, "learns", num_epochs=25, eval_every=50, save_every=1000, log_every=50,
                   eval_prompts=10, plot=True)
    done = sft.train(cfg)
    out = capsys.readouterr().out
    assert out.endswith("next: python edu/10_rl.py --source learns\n")  # not sft
    assert done["table"]["facts"][1] == 0 and done["table"]["facts"][2] >= 0.8
    assert done["table"]["identity"] == (1, 0.0, 1.0)
    assert done["table"]["replies that stop"][2] == 1.0
    assert done["rows"][0]["loss"] > 5 * done["rows"][-1]["loss"]
    folder = world / "learns"
    for name in re.findall(r"^wrote (\S+)", out, re.MULTILINE):
        assert (world / name).stat().st_size > 0
    assert {"best/model.safetensors", "loss.png"} <= {str(p.relative_to(folder))
                                                      for p in folder.rglob("*") if p.is_file()}
    assert list((folder / "tb").iterdir())
    best = json.loads((folder / "best" / "config.json").read_text(encoding="utf-8"))
    assert best["metrics"]["val_loss"] == done["best"][0] and best["step"] == done["best"][1]
    assert done["best"][0] == min(r["val_loss"] for r in done["rows"] if r["val_loss"] is not None)


def test_a_resumed_run_is_the_uninterrupted_run_to_the_bit(world, monkeypatch):
    """Silent bug 10."""
    straight = sft.train(settings(world, "straight"))

    class Killed(BaseException):
        pass

    real, count = sft.accumulate_gradients, iter(range(1000))

    def dies(*args):
        if next(count) == 6:  # after the checkpoint of step 4
            raise Killed
        return real(*args)

    monkeypatch.setattr(sft, "accumulate_gradients", dies)
    with pytest.raises(Killed):
        sft.train(settings(world, "split"))
    monkeypatch.setattr(sft, "accumulate_gradients", real)
    split = sft.train(settings(world, "split", resume=True))
    assert_same_weights(world / "straight", world / "split")
    timeless = [[{k: v for k, v in row.items() if k != "tok_per_s"} for row in run["rows"]]
                for run in (straight, split)]
    assert timeless[0] == timeless[1] and straight["best"] == split["best"]


def test_kill_9_costs_only_the_steps_since_the_last_checkpoint(world, tmp_path):
    long = {"num_epochs": 6, "save_every": 8, "eval_every": 1000, "log_every": 1000}
    with running("08_sft", settings(world, "killed", **long), tmp_path / "log") as process:
        wait_for((world / "killed" / "resume.pt").exists, process)
        process.send_signal(signal.SIGKILL)
    sft.train(settings(world, "killed", resume=True, **long))
    sft.train(settings(world, "not_killed", **long))
    assert_same_weights(world / "killed", world / "not_killed")


def test_ctrl_c_saves_and_the_run_goes_on_to_the_same_end(world, tmp_path, capsys):
    long = {"num_epochs": 6, "save_every": 1000, "eval_every": 1000, "log_every": 1}
    metrics, log = world / "stopped" / "metrics.jsonl", tmp_path / "log"
    with running("08_sft", settings(world, "stopped", **long), log) as process:
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    assert re.search(r"stopped at step \d+ of \d+; --resume", log.read_text(encoding="utf-8"))
    sft.train(settings(world, "stopped", resume=True, **long))
    assert "resumed at step" in capsys.readouterr().out
    sft.train(settings(world, "not_stopped", **long))
    # The stop adds a look at the validation loss, and a look changes nothing.
    assert_same_weights(world / "stopped", world / "not_stopped")


def test_smaller_passes_give_the_same_run(world):
    sft.train(settings(world, "whole"))
    sft.train(settings(world, "parts", device_batch_size=3))
    assert_same_weights(world / "whole", world / "parts", 2e-4)  # Muon magnifies rounding


def test_two_ranks_train_as_one_also_where_a_step_has_a_row_for_one_of_them_only(
        world, run_script):
    """153 rows, 8 a step: the last group of the epoch is a single row."""
    whole = {"num_epochs": 1, "identity_rows": 3}
    cfg = settings(world, "two", **whole)
    done = run_script("08_sft", *flags_of(cfg), nproc=2, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    rows, _ = sft.training_rows(cfg, sft.Tokenizer.from_dir(world / "tokenizer"), 65)
    assert len(rows) % 8 == 1
    sft.train(settings(world, "one", **whole))
    assert_same_weights(world / "one", world / "two", 2e-3)
    assert done.stdout.count("result: ") == 1


def test_another_run_is_not_resumed_by_mistake(world, tmp_path):
    """Nor one on other conversations, or from another model: neither is a setting."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    sft.train(settings(tmp_path, "other", num_epochs=0.1))
    again = settings(tmp_path, "other", num_epochs=0.1, resume=True)
    with pytest.raises(sft.UserError, match="matrix_lr 0.5 -> 0.015"):
        sft.train(dataclasses.replace(again, matrix_lr=0.5))
    chats, base = tmp_path / "tiny_chat_train.jsonl", tmp_path / "base" / "model.safetensors"
    before = chats.read_text(encoding="utf-8")
    chats.write_text(before.replace("meow", "miaow"), encoding="utf-8")
    with pytest.raises(sft.UserError, match="conversations [0-9a-f]{12} -> [0-9a-f]{12}"):
        sft.train(again)
    chats.write_text(before, encoding="utf-8")
    # nor one that would be measured with other questions: best and before are of the first ones
    with pytest.raises(sft.UserError, match="eval_rows 3 -> 4, eval_prompts 2 -> 0, held_out"):
        sft.train(dataclasses.replace(again, eval_rows=3, eval_prompts=2))
    test = tmp_path / "tiny_chat_test.jsonl"
    kept = test.read_text(encoding="utf-8")
    test.write_text(kept.replace("Please", "Now"), encoding="utf-8")
    with pytest.raises(sft.UserError, match="held_out [0-9a-f]{12} -> [0-9a-f]{12}"):
        sft.train(again)
    test.write_text(kept, encoding="utf-8")
    save_file({name: weight * 1.001 for name, weight in load_file(base).items()}, base)
    with pytest.raises(sft.UserError, match="source_model [0-9a-f]{12} -> [0-9a-f]{12}"):
        sft.train(again)


def test_the_best_checkpoint_is_of_the_lowest_validation_loss_not_the_last(world, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr(sft, "validation_loss", lambda *_: next(losses))
    done = sft.train(settings(world, "rises", num_epochs=0.8))
    about = json.loads((world / "rises" / "best" / "config.json").read_text(encoding="utf-8"))
    assert done["best"] == (1.0, 8) and about["step"] == 8 < done["step"]


def test_the_validation_loss_does_not_depend_on_the_batches():
    model, rows = small_model(), uneven_rows(8)
    losses = [sft.validation_loss(model, rows, size, torch.float32) for size in (1, 3, 8)]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)


def test_the_table_of_a_resumed_run_has_what_was_measured_before_the_first_step(
        world, monkeypatch):
    first = sft.train(settings(world, "table", eval_prompts=5, num_epochs=0.3))["table"]
    monkeypatch.setattr(sft, "measure_answers", lambda engine, kinds: {
        what: (len(prompts), 0.25) for what, prompts in kinds.items()})
    again = sft.train(settings(world, "table", eval_prompts=5, num_epochs=0.3, resume=True))
    assert {what: row[1] for what, row in again["table"].items()} == {
        what: row[1] for what, row in first.items() if what != "replies that stop"}


def test_the_share_of_problems_with_the_calculator_and_their_number_are_those_asked_for(
        world, tmp_path):
    """300 draws at 0.3: the share is within 4 standard errors of 0.026."""
    call = [{"type": "text", "text": "It is "}, {"type": "python", "text": "1+1"},
            {"type": "python_output", "text": "2"}, {"type": "text", "text": "2.\n#### 2"}]
    shutil.copytree(world / "tokenizer", tmp_path / "tokenizer")
    write_jsonl(tmp_path / "tiny_gsm_train.jsonl", [chat(f"Is it {i}?", call) for i in range(400)])
    tokenizer = sft.Tokenizer.from_dir(world / "tokenizer")
    cfg = settings(tmp_path, "x", calculator_share=0.3, max_problems=300)
    rows, _ = sft.training_rows(cfg, tokenizer, 65)
    start = tokenizer.encode_special("<|python_start|>")
    assert len(rows) == 300
    assert abs(sum(start in ids for ids, _ in rows) / 300 - 0.3) < 4 * 0.0265


@pytest.mark.parametrize("rows, per_step, epochs", [(9, 8, 2), (40, 32, 2), (333, 32, 2.2)])
def test_a_run_shows_as_many_rows_as_its_epochs_say(rows, per_step, epochs):
    steps = sft.plan_steps([5] * rows, per_step, epochs, seed=0)
    shown = sum(map(len, steps))
    assert rows * epochs - 0.5 <= shown < rows * epochs + per_step


def test_a_conversation_nobody_answers_is_dropped_and_counted(world, tmp_path):
    write_jsonl(tmp_path / "my_identity.jsonl", [
        chat("Who are you?", "I am Pip."), {"messages": [{"role": "user", "content": "Hello?"}]}])
    rows, lines = sft.training_rows(settings(tmp_path, "x"),
                                    sft.Tokenizer.from_dir(world / "tokenizer"), 65)
    assert len(rows) == 3 and "3 rows, 0 cut, 3 dropped" in lines[0]


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(world, monkeypatch):
    sft.train(settings(world, "diverges", num_epochs=0.1))
    before = weights(world / "diverges")
    monkeypatch.setattr(sft, "accumulate_gradients", lambda model, *_: [
        setattr(p, "grad", torch.full_like(p, float("nan"))) for p in model.parameters()] and 1.0)
    with pytest.raises(sft.TrainingFailed, match="diverged.*\n.*--matrix-lr"):
        sft.train(settings(world, "diverges", num_epochs=0.1))
    assert all(torch.equal(before[n], w) for n, w in weights(world / "diverges").items())


@pytest.mark.parametrize("epochs", [0.0, math.inf, math.nan])
def test_a_number_of_epochs_that_no_run_can_have_is_refused(world, epochs):
    with pytest.raises(sft.UserError, match="--num-epochs"):
        sft.train(settings(world, "never", num_epochs=epochs))


def test_the_model_that_a_run_starts_from_is_never_overwritten(world):
    before = weights(world / "base")
    with pytest.raises(sft.UserError, match="would be overwritten"):
        sft.train(settings(world, "sft/../base"))
    assert all(torch.equal(before[n], w) for n, w in weights(world / "base").items())


@pytest.mark.parametrize("flags, words", [
    (("--source", "nothing"), "12_pretrain.py"), (("--rows-per-step", "0"), "start at 1"),
    (("--calculator-share", "2"), "shares")])
def test_a_mistake_is_one_message_and_exit_code_2(world, run_script, flags, words):
    done = run_script("08_sft", *flags, data_dir=world)
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr
