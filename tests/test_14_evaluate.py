"""14_evaluate.py: spans, centring, batches that change nothing, intervals, and code that is run.

Oracles: spans and texts written out by hand, transformers' NanoChatForCausalLM with the same
weights in a plain loop, the definition of the Wilson interval, and coin tosses for random models.
"""

import json
import math
import os
import random
import shutil
import sys
import time
import types

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import load

ev = load("14_evaluate")
pretrain = load("12_pretrain")

WORDS = "cat dog cow hen fox owl bee ant rat pig".split()
SOUNDS = "meow woof moo cluck yap hoot buzz click squeak oink".split()
COLOURS = "black brown white red grey green blue pink yellow purple".split()


def small_model(vocab_size, seed=0, sequence_len=96):
    """Random weights in which every path matters."""
    torch.manual_seed(seed)
    model = ev.GPT(ev.GPTConfig(sequence_len, vocab_size, 2, 4, 2, 32)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def as_transformers(model):
    """The same weights as NanoChatForCausalLM."""
    pytest.importorskip("transformers")
    from transformers import NanoChatConfig, NanoChatForCausalLM

    c = model.config
    theirs = NanoChatForCausalLM(NanoChatConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=4 * c.n_embd,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head, max_position_embeddings=c.sequence_len, eos_token_id=0,
        pad_token_id=0, bos_token_id=0)).eval()  # fmt: skip
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
    return theirs


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def animals(kind, i):
    animal, sound, colour = WORDS[i % 10], SOUNDS[i % 10], COLOURS[i // 10 % 10]
    return {"messages": [{"role": "user", "content": f"What does the {kind} {animal} say {i}?"},
                         {"role": "assistant", "content": f"The {colour} {animal} says {sound}."}],
            "kind": "fact", "answer": sound}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tokenizer, shards, CORE tasks of all types, chats, problems, and two stages of noise."""
    folder, rng = tmp_path_factory.mktemp("evaluate"), random.Random(0)
    texts = [f"The {rng.choice(COLOURS)} {a} says {s}. I saw {rng.randint(1, 99)} of them."
             for a, s in rng.choices(list(zip(WORDS, SOUNDS)), k=300)]
    for index in range(2):
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{index:05d}.parquet")
    assert load("11_tokenizer").main(
        ["--data-dir", str(folder), "--vocab-size", "320", "--no-gpt2"]) == 0
    tasks = {"sounds_mc": ("multiple_choice", 25, 2), "which_schema": ("schema", 50, 0),
             "sounds_lm": ("language_modeling", 0, 1)}
    write_jsonl(folder / "tiny_eval" / "sounds_mc.jsonl", [
        {"query": f"The {rng.choice(COLOURS)} {rng.choice(WORDS)} says",
         "choices": rng.sample(SOUNDS, 4), "gold": rng.randrange(4)} for _ in range(12)])
    write_jsonl(folder / "tiny_eval" / "which_schema.jsonl", [
        {"context_options": [f"It was the {a} which", f"It was the {b} which"],
         "continuation": f"said {rng.choice(SOUNDS)}.", "gold": rng.randrange(2)}
        for a, b in (rng.sample(WORDS, 2) for _ in range(12))])
    write_jsonl(folder / "tiny_eval" / "sounds_lm.jsonl", [
        {"context": f"The {rng.choice(WORDS)} says ", "continuation": rng.choice(SOUNDS)}
        for _ in range(12)])
    (folder / "tiny_eval" / "index.json").write_text(json.dumps([
        {"label": name, "dataset_uri": f"{name}.jsonl", "icl_task_type": kind,
         "num_fewshot": shots, "continuation_delimiter": " ", "random_baseline": chance}
        for name, (kind, chance, shots) in tasks.items()]), encoding="utf-8")
    spell = {"messages": [{"role": "user", "content": "Spell cat."},
                          {"role": "assistant", "content": "c-a-t"}], "kind": "spell",
             "answer": "c-a-t"}
    write_jsonl(folder / "tiny_chat_test.jsonl", [animals("old", i) for i in range(20)] + [spell])
    write_jsonl(folder / "tiny_gsm_test.jsonl", [
        {"question": f"What is {i} and 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n"
         f"#### {i + 1}"} for i in range(5)])
    tokenizer = ev.Tokenizer.from_dir(folder / "tokenizer")
    for seed, stage in enumerate(("base", "sft")):
        pretrain.save_checkpoint(folder / stage, small_model(tokenizer.get_vocab_size(), seed),
                                 tokenizer, 7, {}, pretrain.Config())
    return folder


@pytest.fixture(scope="module")
def tokenizer(world):
    return ev.Tokenizer.from_dir(world / "tokenizer")


@pytest.fixture(scope="module")
def model(tokenizer):
    return small_model(tokenizer.get_vocab_size())


# ---- scores and their intervals ------------------------------------------------------------------


@pytest.mark.parametrize("accuracy, baseline, centred", [
    (0.25, 25, 0.0), (1.0, 25, 1.0), (0.625, 25, 0.5), (0.0, 25, -1 / 3), (0.5, 50, 0.0),
    (0.3, 0, 0.3), (0.55, 10, 0.5)])
def test_a_centred_score_is_0_for_guessing_and_1_for_perfect(accuracy, baseline, centred):
    assert ev.centre(accuracy, baseline) == pytest.approx(centred)


@pytest.mark.parametrize("right, n", [(0, 10), (10, 10), (3, 7), (50, 200), (1, 1)])
def test_the_bounds_of_the_interval_are_where_the_data_are_just_z_deviations_away(right, n):
    """Wilson's definition: |share - p| = z sqrt(p (1 - p) / n) at both bounds p."""
    share = right / n
    for p in ev.wilson_interval(share, n):
        assert 0 <= p <= 1
        assert abs(share - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n), abs=1e-9)


def test_the_mean_of_one_task_has_the_tasks_own_interval():
    score = ev.share_score("core", [True] * 30 + [False] * 20, 25)
    mean = ev.mean_centred("core mean", {"a": score})
    low, high = ev.wilson_interval(0.6, 50)
    assert mean["score"] == pytest.approx((0.6 - 0.25) / 0.75) and mean["n"] == 50
    assert (mean["low"], mean["high"]) == pytest.approx(((low - 0.25) / 0.75, (high - 0.25) / 0.75))


def test_the_interval_of_the_mean_holds_the_truth_about_95_times_in_100():
    """Three tasks of known chance of success, 1000 times. Were it 95%, fewer than 92 or more than
    98 in 100 would be 4 deviations (0.7 each) off."""
    truth = {"a": (0.3, 25, 40), "b": (0.8, 50, 60), "c": (0.1, 0, 80)}
    rng, held = random.Random(1), 0
    wanted = sum(ev.centre(p, b) for p, b, _ in truth.values()) / 3
    for _ in range(1000):
        mean = ev.mean_centred("core mean", {
            name: ev.share_score("core", [rng.random() < p for _ in range(n)], b)
            for name, (p, b, n) in truth.items()})
        held += mean["low"] <= wanted <= mean["high"]
    assert 920 <= held <= 980


# ---- bits per byte -------------------------------------------------------------------------------


def test_bits_per_byte_are_those_of_a_plain_loop_however_the_rows_are_cut(model, tokenizer, world):
    texts = ["The cat says meow.", "I saw 12 of them.", "The pig says oink. I saw 3 of them."]
    inputs, targets = ev.validation_rows(texts, tokenizer, 16)
    token_bytes = torch.tensor(tokenizer.token_bytes())
    flat = [t for text in texts for t in [tokenizer.get_bos_token_id(), *tokenizer.encode(text)]]
    bits = num_bytes = 0
    for i in range(1, len(flat)):
        if token_bytes[flat[i]]:
            row = flat[(i - 1) // 16 * 16 : i]
            bits -= torch.log_softmax(model(torch.tensor([row]))[0, -1], -1)[flat[i]].item()
            num_bytes += len(tokenizer.decode_bytes([flat[i]]))
    for pieces in (1, 2, 24):
        score = ev.bpb_score(model, inputs, targets, token_bytes, 4096, pieces)
        assert score["score"] == pytest.approx(bits / math.log(2) / num_bytes, rel=1e-5)
        assert score["n"] == num_bytes == sum(map(len, texts))


def test_a_model_without_an_opinion_scores_the_chance_level_of_bits_per_byte(tokenizer):
    model = small_model(tokenizer.get_vocab_size())
    torch.nn.init.zeros_(model.lm_head.weight)
    inputs, targets = ev.validation_rows(["The cat says meow. " * 9] * 4, tokenizer, 16)
    score = ev.bpb_score(model, inputs, targets, torch.tensor(tokenizer.token_bytes()), 64)
    assert score["score"] == pytest.approx(score["chance"], rel=1e-5)
    assert score["low"] <= score["score"] <= score["high"]


def test_the_rows_are_spread_over_the_text(world, tokenizer):
    shards = ev.list_shards(world)
    every, _ = ev.spread_rows(shards, tokenizer, 32, 0)
    some, _ = ev.spread_rows(shards, tokenizer, 32, 5 * 32)
    assert len(some) == 5 and torch.equal(some[0], every[0]) and torch.equal(some[-1], every[-1])


# ---- CORE: texts and spans -----------------------------------------------------------------------


def core_task(kind, items, shots=0, chance=0.0, delimiter=" "):
    return ev.CoreTask("task", kind, shots, delimiter, chance, items)


def test_the_texts_of_the_three_types_are_written_out_by_hand():
    mc = core_task("multiple_choice", [], delimiter="\nAnswer: ")
    shot = {"query": "Q1?", "choices": ["x", "y"], "gold": 1}
    assert ev.render_core(mc, {"query": "Q2?", "choices": ["u", "v", "w"], "gold": 0}, [shot]) == [
        f"Q1?\nAnswer: y\n\nQ2?\nAnswer: {c}" for c in "uvw"]
    schema = core_task("schema", [])
    shot = {"context_options": ["A1", "B1"], "continuation": "end1", "gold": 0}
    assert ev.render_core(schema, {"context_options": ["A2", "B2"], "continuation": "end2",
                                   "gold": 1}, [shot]) == [
        "A1 end1\n\nA2 end2", "A1 end1\n\nB2 end2"]
    lm = core_task("language_modeling", [])
    assert ev.render_core(lm, {"context": " C2 ", "continuation": "d2"},
                          [{"context": "C1 ", "continuation": "d1"}]) == [
        "C1 d1\n\nC2", "C1 d1\n\nC2 d2"]


@pytest.mark.parametrize("kind, rows, spans", [
    # from where the choices part, to the end of each
    ("multiple_choice", [[9, 1, 2, 3], [9, 1, 4, 5, 6]],
     [([9, 1, 2, 3], 2, 4), ([9, 1, 4, 5, 6], 2, 5)]),
    # one choice is the beginning of another: nothing would be left of it to score
    ("multiple_choice", [[9, 1, 2], [9, 1, 2, 3]], [([9, 1, 2], 2, 3), ([9, 1, 2, 3], 2, 4)]),
    # the end that the contexts share
    ("schema", [[9, 1, 2, 7, 8], [9, 3, 7, 8]], [([9, 1, 2, 7, 8], 3, 5), ([9, 3, 7, 8], 2, 4)]),
    # what the second row has more than the first, and no token of the context
    ("language_modeling", [[9, 1, 2], [9, 1, 2, 3, 4]], [([9, 1, 2, 3, 4], 3, 5)]),
    # the context's last token melted into the continuation's first: scored from where they part
    ("language_modeling", [[9, 1, 2], [9, 1, 5, 4]], [([9, 1, 5, 4], 2, 4)]),
    # longer than the context of 6: the beginning goes
    ("multiple_choice", [[9, 1, 1, 1, 1, 1, 2], [9, 1, 1, 1, 1, 1, 3, 4]],
     [([1, 1, 1, 1, 1, 2], 5, 6), ([1, 1, 1, 1, 3, 4], 4, 6)]),
])
def test_the_spans_are_worked_by_hand(kind, rows, spans):
    assert ev.core_spans(kind, rows, 6) == spans


def test_the_examples_before_question_i_are_nanochats():
    """Random(1234 + i) samples among the other questions, in their order."""
    items = list(range(20))
    for i in (0, 7, 19):
        others = [j for j in range(20) if j != i]
        assert ev.few_shots(items, i, 5) == random.Random(1234 + i).sample(others, 5)
        assert i not in ev.few_shots(items, i, 19)
    assert ev.few_shots([1, 2], 0, 10) == [2]


# ---- one batch or one by one: the same numbers ---------------------------------------------------


def uneven_spans(vocab_size, count=23, seed=0):
    rng, spans = random.Random(seed), []
    for _ in range(count):
        n = rng.randint(2, 60)
        start = rng.randint(1, n - 1)
        ids = [rng.randrange(vocab_size) for _ in range(n)]
        spans.append((ids, start, rng.randint(start + 1, n)))
    return spans


@pytest.mark.parametrize("budget", [1, 100, 100_000])
def test_losses_in_batches_are_those_of_transformers_one_by_one(model, budget):
    spans = uneven_spans(model.config.vocab_size)
    scored = ev.score_spans(model, spans, budget)
    theirs = as_transformers(model)
    for (ids, start, end), (loss, hit) in zip(spans, scored):
        with torch.no_grad():
            logprobs = torch.log_softmax(theirs(torch.tensor([ids])).logits[0].float(), -1)
        wanted = [-logprobs[t - 1, ids[t]].item() for t in range(start, end)]
        assert loss == pytest.approx(sum(wanted) / len(wanted), abs=1e-5)
        assert hit == all(int(logprobs[t - 1].argmax()) == ids[t] for t in range(start, end))


def test_greedy_hits_are_found_and_one_wrong_token_is_no_hit(model, tokenizer):
    rng = random.Random(3)
    for _ in range(8):
        ids = [rng.randrange(model.config.vocab_size) for _ in range(rng.randint(3, 12))]
        start = len(ids)
        for _ in range(4):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        wrong = [*ids[:-1], (ids[-1] + 1) % model.config.vocab_size]
        (_, hit), (_, miss) = ev.score_spans(model, [(ids, start, start + 4),
                                                     (wrong, start, start + 4)])
        assert hit and not miss


@torch.no_grad()
def by_plain_loop(theirs, tokenizer, task):
    """The same task question by question and option by option, with another model's code."""
    right = []
    for i, item in enumerate(task.items):
        others = [j for j in range(len(task.items)) if j != i]
        chosen = random.Random(1234 + i).sample(others, task.num_fewshot)
        texts = ev.render_core(task, item, [task.items[j] for j in chosen])
        rows = [[tokenizer.get_bos_token_id(), *tokenizer.encode(text)][-96:] for text in texts]
        if task.kind == "language_modeling":
            ids, start = rows[1], len(rows[0])
            logits = theirs(torch.tensor([ids])).logits[0]
            right.append(all(int(logits[t - 1].argmax()) == ids[t] for t in range(start, len(ids))))
            continue
        means = []
        for row in rows:
            same = (os.path.commonprefix(rows) if task.kind == "multiple_choice" else
                    os.path.commonprefix([r[::-1] for r in rows]))
            start = len(same) if task.kind == "multiple_choice" else len(row) - len(same)
            logprobs = torch.log_softmax(theirs(torch.tensor([row])).logits[0].float(), -1)
            losses = [-logprobs[t - 1, row[t]].item() for t in range(start, len(row))]
            means.append(sum(losses) / len(losses))
        right.append(means.index(min(means)) == item["gold"])
    return right


@pytest.mark.parametrize("budget, at_once", [(1, 1), (300, 5), (100_000, 256)])
def test_core_tasks_are_decided_as_a_plain_loop_over_transformers_does(world, model, tokenizer,
                                                                       budget, at_once):
    tasks = ev.core_tasks(ev.Config(data_dir=world))
    assert [task.kind for task in tasks] == ["multiple_choice", "schema", "language_modeling"]
    assert [task.num_fewshot for task in tasks] == [2, 0, 1]
    theirs = as_transformers(model)
    for task in tasks:
        assert ev.core_right(model, tokenizer, task, budget, at_once) == by_plain_loop(
            theirs, tokenizer, task)


def test_questions_come_in_the_order_of_nanochat_and_are_then_cut(world):
    items = [json.loads(line) for line in
             (world / "tiny_eval" / "sounds_mc.jsonl").read_text(encoding="utf-8").splitlines()]
    random.Random(1337).shuffle(items)
    assert ev.core_tasks(ev.Config(data_dir=world, max_per_task=5))[0].items == items[:5]
    assert ev.core_tasks(ev.Config(data_dir=world, max_per_task=0))[0].items == items


# ---- DCLM's eval_bundle --------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path):
    """Two tasks in the layout of the real one: nested files, shots in a list, more columns."""
    folder = tmp_path / "eval_bundle"
    write_jsonl(folder / "eval_data" / "symbolic" / "copy.jsonl",
                [{"context": f"Say {a}:", "continuation": a, "extra": 1} for a in WORDS])
    write_jsonl(folder / "eval_data" / "yesno.jsonl",
                [{"query": f"Is {a} a word?", "choices": ["yes", "no"], "gold": 0} for a in WORDS])
    (folder / "core.yaml").write_text("""icl_tasks:
-
  label: copy_words
  dataset_uri: symbolic/copy.jsonl
  num_fewshot: [10]
  icl_task_type: language_modeling
-
  label: yes_or_no
  dataset_uri: yesno.jsonl
  num_fewshot: [0]
  icl_task_type: multiple_choice
  continuation_delimiter: "\\nAnswer: "
  has_categories: true
""", encoding="utf-8")
    (folder / "eval_meta_data.csv").write_text(
        "Eval Task,Task Category,Task Type,#shots,#datapoints,Random baseline,Centered Metric?,"
        'Description\nyes_or_no,reading,multiple choice,0,10,50,,"Words, or not"\n'
        "copy_words,symbolic,language modeling,10,10,0,,Say it\n", encoding="utf-8")
    return folder


def test_a_bundle_is_read_in_dclms_layout(bundle):
    copy, yes = ev.core_tasks(ev.Config(bundle=bundle, max_per_task=8))
    assert (copy.label, copy.num_fewshot, copy.delimiter, copy.random_baseline) == (
        "copy_words", 10, " ", 0.0)
    assert len(copy.items) == 8
    assert (yes.label, yes.num_fewshot, yes.delimiter, yes.random_baseline) == (
        "yes_or_no", 0, "\nAnswer: ", 50.0)


def test_a_bundle_is_evaluated_from_the_command_line(world, bundle, capsys):
    assert ev.main(["--data-dir", str(world), "--stage", "base", "--tasks", "core", "--bundle",
                    str(bundle), "--fresh"]) == 0
    scores = json.loads((world / "base" / "eval.json").read_text(encoding="utf-8"))["scores"]
    assert list(scores) == ["copy_words", "yes_or_no", "CORE"]
    assert scores["yes_or_no"]["chance"] == 0.5
    assert scores["CORE"]["score"] == pytest.approx(
        (scores["copy_words"]["score"] + (scores["yes_or_no"]["score"] - 0.5) / 0.5) / 2)
    assert "result: CORE, base - -> " in capsys.readouterr().out


@pytest.mark.parametrize("spoil, words", [
    (lambda b: (b / "core.yaml").unlink(), "core.yaml"),
    (lambda b: (b / "core.yaml").write_text("icl_tasks: [", encoding="utf-8"), "--bundle"),
    (lambda b: (b / "core.yaml").write_text("tasks: []", encoding="utf-8"), "icl_tasks"),
    (lambda b: (b / "eval_data" / "yesno.jsonl").unlink(), "yesno.jsonl"),
    (lambda b: (b / "eval_data" / "yesno.jsonl").write_text("", encoding="utf-8"), "no questions"),
    (lambda b: write_jsonl(b / "eval_data" / "yesno.jsonl", [{"query": "?"}]),
     "line 1 has no choices, gold"),
    (lambda b: (b / "eval_meta_data.csv").write_text("Eval Task,Random baseline\ncopy_words,0\n",
                                                     encoding="utf-8"), "yes_or_no"),
    (lambda b: (b / "core.yaml").write_text((b / "core.yaml").read_text(encoding="utf-8").replace(
        "language_modeling", "poetry"), encoding="utf-8"), "poetry"),
], ids=["no yaml", "bad yaml", "other yaml", "no data", "empty", "no keys", "no baseline", "type"])
def test_a_bundle_that_is_none_is_refused_with_one_message(world, bundle, capsys, spoil, words):
    spoil(bundle)
    assert ev.main(["--data-dir", str(world), "--tasks", "core", "--bundle", str(bundle)]) == 2
    assert words in capsys.readouterr().err


# ---- a random model scores chance ----------------------------------------------------------------


def test_a_model_of_noise_scores_chance_in_multiple_choice_and_schema(model, tokenizer):
    """The right option is drawn after the question, so whatever the model prefers it is right with
    chance 1/4 (1/2): of 400, 100 +- 8.7 (200 +- 10). Outside of 4.5 deviations once in 150,000."""
    rng = random.Random(5)
    mc = core_task("multiple_choice", [
        {"query": f"The {rng.choice(WORDS)} says", "choices": rng.sample(SOUNDS, 4),
         "gold": rng.randrange(4)} for _ in range(400)])
    schema = core_task("schema", [
        {"context_options": [f"It was the {w} who" for w in rng.sample(WORDS, 2)],
         "continuation": f"said {rng.choice(SOUNDS)}", "gold": rng.randrange(2)}
        for _ in range(400)])
    assert abs(sum(ev.core_right(model, tokenizer, mc)) - 100) <= 39
    assert abs(sum(ev.core_right(model, tokenizer, schema)) - 200) <= 45


def test_a_model_of_noise_scores_chance_with_letters_whatever_the_number_of_choices(tokenizer):
    """200 questions with 4 choices and 200 with 2: 50 + 100 right, deviation sqrt(37.5 + 50) = 9.4;
    4.5 of them once in 150,000. The chance level is the mean of 1/4 and 1/2."""
    model, rng = small_model(tokenizer.get_vocab_size()), random.Random(6)
    items = []
    for i in range(400):
        count = (4, 2)[i % 2]
        items.append({"question": f"What says the {rng.choice(WORDS)}?",
                      "choices": rng.sample(SOUNDS, count), "gold": rng.randrange(count)})
    task = ev.ChoiceTask(items)
    assert task.random_baseline() == pytest.approx(37.5)
    assert abs(sum(ev.choice_right(model, tokenizer, items)) - 150) <= 42


def test_a_model_of_noise_does_not_guess_whole_continuations(model, tokenizer):
    items = [{"context": f"The {a} says", "continuation": f"{s} and {s}"} for a in WORDS
             for s in SOUNDS]
    assert sum(ev.core_right(model, tokenizer, core_task("language_modeling", items))) == 0


# ---- chat tasks: letters -------------------------------------------------------------------------


def test_the_letter_stands_after_the_choice_and_is_the_token_of_the_answer(tokenizer):
    text = ev.render_choices("Which?", ["one", "two"])
    assert text == "Choose: Which?\n- one=A\n- two=B\nAnswer with the letter alone."
    ids = tokenizer.encode(text)
    for letter in "AB":
        assert tokenizer.encode(letter)[0] in ids and len(tokenizer.encode(letter)) == 1


class OneLetter(torch.nn.Module):
    """Its head prefers letters in a fixed order, whatever it reads: E before C before A."""

    def __init__(self, tokenizer):
        super().__init__()
        self.config = ev.GPTConfig(96, tokenizer.get_vocab_size(), 1, 1, 1, 8)
        self.lm_head = torch.nn.Linear(8, tokenizer.get_vocab_size(), bias=False)
        torch.nn.init.zeros_(self.lm_head.weight)
        for strength, letter in enumerate("ACE", 1):
            self.lm_head.weight.data[tokenizer.encode(letter)[0]] = strength
        self.lm_head.weight.data[tokenizer.encode("z")[0]] = 9  # likeliest of all, and no letter

    def hidden_states(self, ids):
        return torch.ones(*ids.shape, 8)


def test_only_the_letters_of_the_choices_count(tokenizer):
    """Of A-D the model prefers C, of A and B it prefers A; E and z are no choices there."""
    items = [{"question": "?", "choices": list("uvwx"), "gold": 2},
             {"question": "?", "choices": list("uv"), "gold": 0},
             {"question": "?", "choices": list("uvwxy"), "gold": 4},
             {"question": "?", "choices": list("uv"), "gold": 1},
             {"question": "word " * 80, "choices": list("uv"), "gold": 0}]  # does not fit
    assert ev.choice_right(OneLetter(tokenizer), tokenizer, items) == [
        True, True, True, False, False]


@pytest.mark.parametrize("budget", [1, 200, 100_000])
def test_letters_in_batches_are_those_of_one_by_one(model, tokenizer, budget):
    rng = random.Random(8)
    items = [{"question": "What? " * rng.randint(1, 4), "choices": rng.sample(SOUNDS, 3),
              "gold": rng.randrange(3)} for _ in range(30)]
    wanted = []
    for item in items:
        ids = ev.render_for_completion([{"role": "user", "content": ev.render_choices(
            item["question"], item["choices"])}], tokenizer)
        logits = model(torch.tensor([ids]))[0, -1]
        best = max("ABC", key=lambda letter: logits[tokenizer.encode(letter)[0]].item())
        wanted.append("ABC".index(best) == item["gold"])
    assert ev.choice_right(model, tokenizer, items, budget) == wanted


def test_choices_made_of_chats_are_of_one_form_and_hold_the_answer_once():
    capitals = {"France": "Paris", "Japan": "Tokyo", "Peru": "Lima", "Chad": "N'Djamena",
                "Mali": "Bamako"}
    chats = [{"messages": [{"role": "user", "content": f"Capital of {c}?"},
                           {"role": "assistant", "content": f"The capital of {c} is {a}."}],
              "kind": "fact", "answer": a} for c, a in capitals.items()]
    chats += [animals("old", i) for i in range(3)]  # only two others of this form: left out
    chats += [{**chats[0], "kind": "story"}, chats[0]]
    made = ev.choices_from_chats(chats, 0)
    assert [q["question"] for q in made] == [f"Capital of {c}?" for c in capitals]
    for q in made:
        country = q["question"][11:-1]
        assert len(set(q["choices"])) == 4 and set(q["choices"]) <= set(capitals.values())
        assert q["choices"][q["gold"]] == capitals[country]
    assert ev.choices_from_chats(chats, 0) == made != ev.choices_from_chats(chats, 1)


def test_another_right_answer_is_never_a_wrong_choice():
    """Of a light thing both 'dark' and 'heavy' are the opposite: neither is wrong."""
    pairs = [("light", "dark"), ("light", "heavy"), ("hot", "cold"), ("big", "small"),
             ("up", "down")]
    chats = [{"messages": [{"role": "user", "content": f"Opposite of {a}, please ({i})?"},
                           {"role": "assistant", "content": f"The opposite of {a} is {b}."}],
              "kind": "fact", "answer": b} for i, (a, b) in enumerate(pairs)]
    for seed in range(20):
        made = {q["question"]: q for q in ev.choices_from_chats(chats, seed)}
        for i in (0, 1):
            wrong = set(made[f"Opposite of light, please ({i})?"]["choices"]) - {pairs[i][1]}
            assert wrong == {"cold", "small", "down"}


# ---- chat tasks: replies -------------------------------------------------------------------------


def test_replies_come_back_in_the_order_of_the_prompts_and_say_whether_they_ended(model, tokenizer):
    engine = ev.Engine(model, tokenizer)
    prompts = [tokenizer.encode("The cat says " * n, prepend="<|bos|>") for n in (3, 1, 4, 2)]
    prompts.insert(2, None)
    for batch_size in (1, 2, 64):
        replies = ev.sample_replies(engine, prompts, max_tokens=6, batch_size=batch_size)
        assert replies[2] == []
        for ids, some in zip(prompts, replies):
            if ids:
                (row,), _ = engine.generate_batch([ids], 1, 6, 0.0)
                new = row[len(ids) :]
                text = tokenizer.decode([t for t in new if t not in engine.stops])
                assert some == [(text, new[-1] == tokenizer.encode_special("<|assistant_end|>"))]


def test_a_question_is_right_when_one_of_its_samples_is(model, tokenizer, monkeypatch):
    """pass@k as nanochat counts it."""
    said = iter([[("no", True), ("yes", True)], [("no", True), ("no", False)], []])
    monkeypatch.setattr(ev, "sample_replies", lambda engine, prompts, *_: [
        next(said) for _ in prompts])
    task = ev.ReplyTask([([{"role": "user", "content": "?"}], lambda reply: reply == "yes")] * 3)
    assert ev.reply_right(ev.Engine(model, tokenizer), task, ev.Config()) == [True, False, False]


def test_the_chat_tasks_of_the_tiny_world_know_right_from_wrong(world):
    tasks, absent = ev.chat_tasks(ev.Config(data_dir=world))
    assert list(tasks) == ["multiple choice", "facts", "spelling", "word problems"] and not absent
    messages, check = tasks["facts"].items[0]
    assert check("The cat says meow.") and not check("The cat says woof.") and not check("")
    messages, check = tasks["word problems"].items[3]
    assert check("It is 4.\n#### 4") and not check("#### 5") and not check("4")
    assert [check("c-a-t") for _, check in tasks["spelling"].items] == [True]


def test_prompts_that_do_not_fit_count_as_wrong_and_are_named(world, tmp_path, tokenizer, model):
    write_jsonl(tmp_path / "gsm.jsonl", [{"question": "6*7? " * n, "answer": "#### 42"}
                                         for n in (1, 99)])
    cfg = ev.Config(data_dir=world, gsm8k=tmp_path / "gsm.jsonl", max_new_tokens=3)
    task = ev.chat_tasks(cfg)[0]["GSM8K"]
    scores = ev.evaluate_stage(model, tokenizer, ev.Questions({}, [], {"GSM8K": task}), cfg)
    assert (scores["GSM8K"]["n"], scores["GSM8K"]["unfit"]) == (2, 1)


def test_questions_whose_files_are_absent_are_named(tmp_path):
    tasks, absent = ev.chat_tasks(ev.Config(data_dir=tmp_path))
    assert tasks == {} and absent == ["tiny_chat_test.jsonl", "tiny_gsm_test.jsonl"]


def test_gsm8k_comes_from_a_local_file(world, tmp_path):
    write_jsonl(tmp_path / "gsm.jsonl", [{"question": "6*7?", "answer": "<<6*7=42>>42\n#### 42"}])
    tasks, _ = ev.chat_tasks(ev.Config(data_dir=world, gsm8k=tmp_path / "gsm.jsonl"))
    (_, check), = tasks["GSM8K"].items
    assert check("#### 42.00") and not check("#### 41")


# ---- the hub -------------------------------------------------------------------------------------

HUB = {
    ("allenai/ai2_arc", "ARC-Easy"): [
        {"id": "1", "question": "Which?", "choices": {"text": ["a", "b", "c"],
                                                      "label": ["1", "2", "3"]}, "answerKey": "3"}],
    ("allenai/ai2_arc", "ARC-Challenge"): [
        {"id": "2", "question": "Who?", "choices": {"text": ["d", "e", "f", "g"],
                                                    "label": ["A", "B", "C", "D"]},
         "answerKey": "B"}],
    ("cais/mmlu", "all"): [{"question": "When?", "subject": "history",
                            "choices": ["h", "i", "j", "k"], "answer": 0}],
    ("openai/gsm8k", "main"): [{"question": "1+1?", "answer": "<<1+1=2>>2\n#### 2"}],
    ("openai/openai_humaneval", None): [
        {"task_id": "HumanEval/0", "prompt": "def one():\n", "entry_point": "one",
         "canonical_solution": "    return 1\n", "test": "def check(f):\n    assert f() == 1\n"}],
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A `datasets` whose load_dataset reads parquet files of this test's own."""
    for (name, subset), rows in HUB.items():
        path = tmp_path / f"{name}-{subset}".replace("/", "-")
        pq.write_table(pa.Table.from_pylist(rows), path)

    def load_dataset(name, subset=None, split=None):
        assert split == "test"
        return pq.read_table(tmp_path / f"{name}-{subset}".replace("/", "-")).to_pylist()

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return load_dataset


def test_arc_mmlu_gsm8k_and_humaneval_come_from_the_hub(hub, tmp_path):
    tasks, _ = ev.chat_tasks(ev.Config(data_dir=tmp_path, hub=True))
    assert list(tasks) == ["ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval"]
    assert tasks["ARC-Easy"].items == [{"question": "Which?", "choices": list("abc"), "gold": 2}]
    assert tasks["ARC-Challenge"].items[0]["gold"] == 1
    assert tasks["MMLU"].items == [{"question": "When?", "choices": list("hijk"), "gold": 0}]
    assert tasks["GSM8K"].items[0][1]("#### 2")
    assert tasks["HumanEval"].items[0][1]("    return 1") is True
    assert tasks["ARC-Easy"].random_baseline() == pytest.approx(100 / 3)


def test_a_hub_out_of_reach_is_one_message(monkeypatch, world, capsys):
    def load_dataset(*_, **__):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert ev.main(["--data-dir", str(world), "--hub"]) == 2
    message = capsys.readouterr().err
    assert "ai2_arc is out of reach (ConnectionError: no route)" in message and "--gsm8k" in message


def test_without_the_library_the_hub_is_one_message(monkeypatch, world, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert ev.main(["--data-dir", str(world), "--hub"]) == 2
    assert "pip install" in capsys.readouterr().err


# ---- code that a model has written ---------------------------------------------------------------

ADD = {"task_id": "T/0", "prompt": 'import math\n\n\ndef add(a, b):\n    """The sum."""\n',
       "entry_point": "add", "canonical_solution": "    return a + b\n",
       "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n"
               "    assert candidate(math.pi, 0) == math.pi\n"}
posix = pytest.mark.skipif(os.name != "posix", reason="there are no rlimits")


@posix
@pytest.mark.parametrize("reply, passes", [
    ("    return a + b\n", True),  # goes on where the prompt stops
    ("    return a - b\n", False),
    ("def add(a, b):\n    return a + b\n", True),  # begins anew
    ("Here it is:\n```python\ndef add(a, b):\n    return b + a\n```\nDone.", True),
    ("```\ndef add(a, b):\n    return b + a", True),  # cut short
    ("```python\n    return a + b\n```", True),
    ("", False),
    ("I cannot program.", False),
])
def test_a_reply_passes_when_its_program_passes_the_tests(reply, passes):
    passed, why = ev.run_program(ev.program_of(ADD, reply))
    assert passed is passes, why


@posix
def test_the_problems_own_solutions_pass_from_a_local_file(world, tmp_path, capsys):
    write_jsonl(tmp_path / "problems.jsonl", [ADD])
    tasks, _ = ev.chat_tasks(ev.Config(data_dir=world, humaneval=tmp_path / "problems.jsonl"))
    (messages, check), = tasks["HumanEval"].items
    assert messages[0]["content"] == ADD["prompt"] and check(ADD["canonical_solution"])
    write_jsonl(tmp_path / "problems.jsonl", [{"prompt": "def f(): "}])
    assert ev.main(["--data-dir", str(world), "--humaneval", str(tmp_path / "problems.jsonl")]) == 2
    assert "entry_point" in capsys.readouterr().err


# What goes wrong, or is tried, and a word of the reason that is given.
BAD_PROGRAMS = {
    "raises": ("1 / 0", "ZeroDivisionError"),
    "does not parse": ("def (", "SyntaxError"),
    "exits well before the tests": ("import sys; sys.exit(0)", "ended before"),
    "exits hard": ("import os; os._exit(0)", "ended before"),
    "kills itself": ("import os; os.abort()", ""),
    "runs for ever": ("while True: pass", "not done after"),
    "sleeps": ("import time; time.sleep(60)", "not done after"),
    "takes all memory": ("x = bytearray(10**11)", "MemoryError"),
    "takes memory bit by bit": ("x = []\nwhile True: x.append(bytearray(10**7))", "MemoryError"),
    "writes a large file": ("open('big', 'wb').write(bytes(5 << 20))", "File too large"),
    "waits for input": ("input()", "EOFError"),
    "floods the output": ("while True: print('x' * 1000)", ""),
    "opens a socket": ("import socket; socket.socket()", "no network"),
    "fetches": ("import urllib.request as u; u.urlopen('http://127.0.0.1:9')", "no network"),
    "recurses": ("def f(): f()\nf()", "RecursionError"),
}


@posix
@pytest.mark.parametrize("program, why", BAD_PROGRAMS.values(), ids=BAD_PROGRAMS)
def test_a_program_that_does_not_reach_its_end_has_not_passed(program, why):
    began = time.monotonic()
    passed, reason = ev.run_program(program, seconds=1.5)
    assert not passed and why in reason
    assert time.monotonic() - began < 10


def still_running(mark):
    return [p for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or [])]


@posix
@pytest.mark.parametrize("program", [
    "import os\nwhile True: os.fork()",
    "import os\nfor _ in range(40):\n    if os.fork() == 0:\n        import time; time.sleep(50)",
], ids=["bomb", "forty"])
def test_a_fork_bomb_is_over_when_the_run_is(program):
    """Where limits on processes bind (not for root) it fails at once; it never outlives its run."""
    before = {p.pid for p in psutil.process_iter()}
    began = time.monotonic()
    mark = f"MARK = {random.random()}"
    passed, reason = ev.run_program(f"{mark}\n{program}", seconds=1.0)
    assert time.monotonic() - began < 15
    if "NOT so here: 8 processes" not in ev.sandbox_report():
        assert not passed and "BlockingIOError" in reason
    if "NOT so here: no network" in ev.sandbox_report():
        return
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        left = [p for p in psutil.process_iter(["cmdline"]) if p.pid not in before
                and p.info["cmdline"] == [sys.executable, "-I", "-"]]
        if not left:
            return
        time.sleep(0.1)
    pytest.fail(f"left behind: {left}")


@posix
def test_no_process_stays_behind_also_when_the_tests_have_passed():
    mark = str(random.random())
    passed, why = ev.run_program("import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', "
                                 f"'import time; time.sleep(60)', '{mark}'])")
    assert passed, why
    time.sleep(0.2)
    assert not still_running(mark)


@posix
@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_what_the_system_grants_is_said_and_holds():
    report = ev.sandbox_report()
    assert report.count("no network") == 1 and report.count("8 processes") == 1
    reach = "import _socket\n_socket.socket().connect(('127.0.0.1', 9))"  # past Python's own door
    passed, why = ev.run_program(reach)
    unreachable = "unreachable" in why
    assert not passed and unreachable == ("NOT so here: no network" not in report)


@posix
@pytest.mark.parametrize("program, why", [
    ("1 + 1", None), ("while True: pass", "not done"), ("import sys; sys.exit(0)", "ended before"),
    ("import socket; socket.socket()", "no network"),
    ("open('x', 'wb').write(bytes(9 << 20))", "large")])
def test_a_system_without_namespaces_still_has_limits(monkeypatch, program, why):
    refused = ev.LAUNCHER.replace("libc.unshare(", "(lambda flags: -1)(")
    assert refused != ev.LAUNCHER
    monkeypatch.setattr(ev, "LAUNCHER", refused)
    passed, reason = ev.run_program(program, 1.5)
    assert passed is (why is None) and (why or "") in reason
    assert "NOT so here: no network" in ev.sandbox_report()


@posix
def test_a_program_has_a_folder_of_its_own_and_no_secrets_of_its_parent(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    passed, why = ev.run_program("import os\nassert 'OPENAI_API_KEY' not in os.environ\n"
                                 "assert os.getcwd() == os.path.realpath(os.environ['HOME'])\n"
                                 "open('note', 'w').write('x')\nassert len(os.listdir()) <= 2")
    assert passed, why
    assert not os.path.exists("note")


def test_on_a_system_without_limits_nothing_is_run(monkeypatch):
    monkeypatch.setattr(ev.os, "name", "nt")
    with pytest.raises(ev.UserError, match="WSL"):
        ev.run_apart("", "", 1.0)


# ---- the run -------------------------------------------------------------------------------------

QUICK = ["--bpb-tokens", "320", "--max-new-tokens", "4"]


def evaluation(world, stage):
    return json.loads((world / stage / "eval.json").read_text(encoding="utf-8"))


def test_stages_stand_side_by_side_and_every_score_has_n_chance_and_interval(world, capsys):
    assert ev.main(["--data-dir", str(world), "--fresh", *QUICK]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith("14 evaluate - ")
    assert "mid: not there, left out" in out and "rl: not there, left out" in out
    for stage in ("base", "sft"):
        scores = evaluation(world, stage)["scores"]
        assert list(scores) == ["bits per byte, train", "bits per byte, val", "sounds_mc",
                                "which_schema", "sounds_lm", "CORE", "multiple choice", "facts",
                                "spelling", "word problems", "ChatCORE"]
        for name, score in scores.items():
            assert score["low"] <= score["score"] <= score["high"] and score["n"] > 0
            assert any(line.startswith(name) and f" {score['n']} " in line
                       and f"{score['score']:.3f} (" in line for line in out.splitlines())
        chat = [scores[name] for name in scores["ChatCORE"]["of"]]
        assert scores["ChatCORE"]["score"] == pytest.approx(
            sum((s["score"] - s["chance"]) / (1 - s["chance"]) for s in chat) / 4)
    chance = {name: score["chance"] for name, score in scores.items()}
    assert (chance["sounds_mc"], chance["which_schema"], chance["sounds_lm"],
            chance["multiple choice"], chance["facts"]) == (0.25, 0.5, 0, 0.25, 0)
    before, after = (evaluation(world, s)["scores"]["ChatCORE"]["score"] for s in ("base", "sft"))
    assert f"result: ChatCORE, base against sft {before:.3f} -> {after:.3f} (n=46)" in out


@pytest.fixture
def copied(world, tmp_path):
    """A data folder with the base model, whose files may be changed."""
    folder = tmp_path / "data"
    (folder / "base").mkdir(parents=True)
    for path in (*world.glob("*.*"), *world.glob("t*/"), *world.glob("base/[mc]*")):
        (folder / path.relative_to(world)).symlink_to(path)
    return folder


def test_what_is_known_of_the_same_weights_is_not_measured_again(world, capsys, tmp_path):
    flags = ["--data-dir", str(world), "--tasks", "core", "--compare", "base,sft"]
    ev.main([*flags, "--fresh"])
    first = evaluation(world, "sft")
    capsys.readouterr()
    assert ev.main(flags) == 0
    assert capsys.readouterr().out.count("up to date") == 2 and evaluation(world, "sft") == first
    ev.main([*flags, "--max-per-task", "7"])
    assert "up to date" not in capsys.readouterr().out
    assert evaluation(world, "sft")["scores"]["CORE"]["n"] == 21
    (world / "sft" / "eval.json").write_text('{"made_from', encoding="utf-8")  # half a file
    ev.main([*flags, "--max-per-task", "7"])
    out = capsys.readouterr().out
    assert "base: up to date" in out and "sft: up to date" not in out


def test_a_part_measured_alone_keeps_the_scores_of_the_others_and_fresh_does_not(
        world, copied, capsys):
    flags = ["--data-dir", str(copied), "--compare", "base", "--max-per-task", "4",
             "--chat-per-task", "4", "--max-new-tokens", "4"]
    assert ev.main([*flags, "--tasks", "core"]) == 0
    core = evaluation(copied, "base")["scores"]
    assert ev.main([*flags, "--tasks", "chat"]) == 0
    both = evaluation(copied, "base")["scores"]
    assert "ChatCORE" in both and core.items() <= both.items()
    assert ev.main([*flags, "--tasks", "chat", "--fresh"]) == 0
    assert not set(core) & set(evaluation(copied, "base")["scores"])


def test_scores_that_were_found_in_another_way_do_not_stay_beside_new_ones(copied):
    flags = ["--data-dir", str(copied), "--compare", "base", "--chat-per-task", "4",
             "--max-new-tokens", "4", "--max-per-task", "2"]
    for changed in (["--temperature", "1"], []):
        assert ev.main([*flags, "--tasks", "chat", *changed]) == 0
        if not changed:  # the questions are the same, but not what is right
            chats = copied / "tiny_chat_test.jsonl"
            text = chats.read_text(encoding="utf-8")
            chats.unlink()  # it is a link
            chats.write_text(text + text.splitlines()[0] + "\n", encoding="utf-8")
        assert ev.main([*flags, "--tasks", "core"]) == 0
        scores = evaluation(copied, "base")["scores"]
        assert "CORE" in scores and "ChatCORE" not in scores


def test_where_nothing_can_be_asked_nothing_is_written(copied, capsys):
    for name in ("tiny_chat_test.jsonl", "tiny_gsm_test.jsonl"):
        (copied / name).unlink()
    assert ev.main(["--data-dir", str(copied), "--compare", "base", "--tasks", "chat"]) == 2
    assert "there is nothing to ask: --tasks chat" in capsys.readouterr().err
    assert not (copied / "base" / "eval.json").exists()


def test_no_row_and_no_result_compares_scores_of_different_n(world, copied, capsys):
    shutil.copytree(world / "sft", copied / "sft", ignore=shutil.ignore_patterns("eval.json"))
    flags = ["--data-dir", str(copied), "--max-new-tokens", "4", "--bpb-tokens", "64"]
    for stage, count in (("base", "2"), ("sft", "3")):
        assert ev.main([*flags, "--stage", stage, "--tasks", "core", "--max-per-task", count]) == 0
    capsys.readouterr()
    assert ev.main([*flags, "--compare", "base,sft", "--tasks", "bpb"]) == 0
    out = capsys.readouterr().out
    assert "CORE  " not in out and "result: bits per byte, val, base against sft" in out
    assert "CORE" in evaluation(copied, "sft")["scores"]


def test_without_one_of_its_tasks_there_is_no_chatcore(world, copied, capsys):
    (copied / "tiny_gsm_test.jsonl").unlink()
    assert ev.main(["--data-dir", str(copied), "--compare", "base", "--tasks", "chat",
                    "--chat-per-task", "4", "--max-new-tokens", "4"]) == 0
    scores = evaluation(copied, "base")["scores"]
    assert "facts" in scores and "ChatCORE" not in scores


def test_a_broken_stage_is_named_and_the_others_are_evaluated(world, tmp_path, capsys):
    copy = tmp_path / "data"
    copy.mkdir()
    for name in ("tokenizer", "tiny_eval", "base", "tiny_chat_test.jsonl"):
        (copy / name).symlink_to(world / name)
    (copy / "rl").mkdir()
    (copy / "rl" / "model.safetensors").write_bytes(b"half of")
    flags = ["--data-dir", str(copy), "--tasks", "core", "--max-per-task", "3"]
    assert ev.main(flags) == 0
    assert "rl: left out. " in capsys.readouterr().out
    assert ev.main([*flags, "--stage", "rl"]) == 2
    assert "no checkpoint that can be read" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (("--compare", "nothing"), "12_pretrain.py"), (("--tasks", "bpb,poems"), "--tasks bpb,poems"),
    (("--compare", ","), "one stage or more"), (("--num-samples", "4"), "--temperature 1"),
    (("--max-new-tokens", "0"), "above 0"), (("--max-per-task", "-1"), "negative"),
    (("--gsm8k", "no.jsonl", "--stage", "base"), "no.jsonl"),
    (("--humaneval", "no.jsonl", "--stage", "base"), "no.jsonl")])
def test_a_mistake_is_one_message(world, capsys, flags, words):
    assert ev.main(["--data-dir", str(world), *flags]) == 2
    message = capsys.readouterr().err
    assert words in message and message.startswith("error: ") and "Traceback" not in message
