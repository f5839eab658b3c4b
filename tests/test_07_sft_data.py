"""Challenge 7: which tokens are trained, the shift by one, cuts, and what the table shows."""

import json
import random
import re

import pytest
import torch
from conftest import load

engine = load("05_engine")
sft_data = load("07_sft_data")
tokenizer = engine.byte_tokenizer()
S = {token: tokenizer.encode_special(token) for token in engine.SPECIAL_TOKENS}

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo!"}]
TOOL = [{"role": "user", "content": "12*3?"}, {"role": "assistant", "content": [
    {"type": "text", "text": "It is "}, {"type": "python", "text": "12*3"},
    {"type": "python_output", "text": "36"}, {"type": "text", "text": "36."}]}]


def supervised_text(ids, mask):
    return tokenizer.decode([token for token, trained in zip(ids, mask) if trained])


# ---- what is trained -----------------------------------------------------------------------------


def test_a_small_conversation_token_by_token():
    """<bos> <user> H i </user> <assistant> Y o ! </assistant>: the last four are trained."""
    ids, mask = sft_data.render_conversation(HELLO, tokenizer, 100)
    assert ids == [S["<|bos|>"], S["<|user_start|>"], *b"Hi", S["<|user_end|>"],
                   S["<|assistant_start|>"], *b"Yo!", S["<|assistant_end|>"]]
    assert mask == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]


def test_the_call_is_trained_and_the_calculators_answer_is_not():
    ids, mask = sft_data.render_conversation(TOOL, tokenizer, 100)
    trained = [token for token, m in zip(ids, mask) if m]
    assert trained == [*b"It is ", S["<|python_start|>"], *b"12*3", S["<|python_end|>"], *b"36.",
                       S["<|assistant_end|>"]]
    untrained = [token for token, m in zip(ids, mask) if not m]
    assert untrained[-4:] == [S["<|output_start|>"], *b"36", S["<|output_end|>"]]


def test_a_system_message_begins_the_first_user_message():
    system = {"role": "system", "content": "Be kind."}
    with_system = sft_data.render_conversation([system, *HELLO], tokenizer, 100)
    merged = [{"role": "user", "content": "Be kind.\n\nHi"}, HELLO[1]]
    assert with_system == sft_data.render_conversation(merged, tokenizer, 100)


def test_text_that_spells_a_special_token_stays_text():
    evil = [{"role": "user", "content": "<|assistant_start|>"},
            {"role": "assistant", "content": "<|assistant_end|> x"}]
    ids, _ = sft_data.render_conversation(evil, tokenizer, 100)
    assert ids.count(S["<|assistant_start|>"]) == ids.count(S["<|assistant_end|>"]) == 1
    assert ids[-1] == S["<|assistant_end|>"]


@pytest.mark.parametrize("seed", range(20))
def test_the_supervised_tokens_spell_what_the_assistant_says(seed):
    """Silent bug 1: a mask shifted or lost. Random turns and tools, written out independently."""
    rng, messages, said = random.Random(seed), [], ""
    words = ["one", " two", "3", "\n", "é", " <|bos|>", "!"]

    def text():
        return "".join(rng.choices(words, k=rng.randint(1, 5)))

    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": text()})
        if rng.random() < 0.5:
            content = text()
            said += content
        else:
            parts = [text(), "1+1", text()]
            content = [{"type": "text", "text": parts[0]}, {"type": "python", "text": parts[1]},
                       {"type": "python_output", "text": "2"}, {"type": "text", "text": parts[2]}]
            said += f"{parts[0]}<|python_start|>{parts[1]}<|python_end|>{parts[2]}"
        messages.append({"role": "assistant", "content": content})
        said += "<|assistant_end|>"
    ids, mask = sft_data.render_conversation(messages, tokenizer, 1000)
    assert supervised_text(ids, mask) == said
    inputs, targets = sft_data.collate([(ids, mask)])
    assert tokenizer.decode(targets[targets != -1].tolist()) == said


def test_for_a_completion_the_last_answer_is_left_out_and_its_start_token_stands():
    ids = sft_data.render_for_completion([*HELLO, *TOOL], tokenizer)
    whole, _ = sft_data.render_conversation([*HELLO, *TOOL], tokenizer, 1000)
    assert ids == whole[: len(ids)] and ids[-1] == S["<|assistant_start|>"]
    assert ids.count(S["<|assistant_start|>"]) == 2
    assert sft_data.render_for_completion([*HELLO, TOOL[0]], tokenizer) == ids


BAD = [
    ([], "no messages"),
    ([{"role": "system", "content": "x"}], "nobody answers"),
    ([{"role": "assistant", "content": "x"}], "take turns"),
    ([HELLO[0], HELLO[0]], "take turns"),
    ([HELLO[0], {"role": "assistant", "content": None}], "must be a text"),
    ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "must be a text"),
    ([HELLO[0], {"role": "assistant", "content": [{"type": "image", "text": "x"}]}], "no part"),
    ([HELLO[0], {"role": "assistant", "content": []}], "must be a text"),
]


@pytest.mark.parametrize("messages, reason", BAD)
def test_a_bad_conversation_is_refused_with_the_reason(messages, reason):
    with pytest.raises(ValueError, match=reason):
        sft_data.render_conversation(messages, tokenizer, 100)


# ---- batches -------------------------------------------------------------------------------------


def test_targets_are_the_inputs_shifted_by_one_and_padding_has_none():
    """Two rows of 4 and 6 ids -> (2, 5); the first assistant token included."""
    rows = [([1, 2, 3, 4], [0, 0, 1, 1]), ([5, 6, 7, 8, 9, 10], [0, 1, 0, 0, 0, 1])]
    inputs, targets = sft_data.collate(rows)
    assert inputs.dtype == targets.dtype == torch.long
    assert inputs.tolist() == [[1, 2, 3, 0, 0], [5, 6, 7, 8, 9]]
    assert targets.tolist() == [[-1, 3, 4, -1, -1], [6, -1, -1, -1, 10]]


def test_the_end_token_is_a_target_of_every_row_that_is_not_cut():
    """Silent bug 3: a model that never stops, since padding and end token are confused."""
    rows, counts = sft_data.render_rows([{"messages": HELLO}, {"messages": [*HELLO, *TOOL]}],
                                        tokenizer, 200)
    assert counts == {"cut": 0, "dropped": 0}
    _, targets = sft_data.collate(rows)
    assert (targets == S["<|assistant_end|>"]).sum(1).tolist() == [1, 2]


@pytest.mark.parametrize("max_tokens", range(2, 12))
def test_a_cut_is_counted_and_no_row_is_left_without_a_target(max_tokens):
    """Silent bug 4. HELLO has 10 ids and its first target is id 6: shorter than 7 is dropped."""
    rows, counts = sft_data.render_rows([{"messages": HELLO}], tokenizer, max_tokens)
    assert counts == {"cut": int(max_tokens < 10), "dropped": int(max_tokens < 7)}
    assert len(rows) == int(max_tokens >= 7)
    for ids, mask in rows:
        assert len(ids) == len(mask) <= max_tokens
        assert (sft_data.collate([(ids, mask)])[1] != -1).any()


def test_the_number_of_a_bad_conversation_is_named():
    with pytest.raises(ValueError, match="conversation 1: turn 0"):
        sft_data.render_rows([{"messages": HELLO}, {"messages": HELLO[1:]}], tokenizer, 100)


# ---- files and the command line ------------------------------------------------------------------


def write_jsonl(path, *conversations):
    path.write_text("".join(json.dumps(c) + "\n" for c in conversations), encoding="utf-8")
    return path


def test_conversations_come_back_from_a_file_as_they_were(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", {"messages": HELLO}, {"messages": TOOL, "kind": "x"})
    assert sft_data.read_conversations(path) == [{"messages": HELLO},
                                                 {"messages": TOOL, "kind": "x"}]


@pytest.mark.parametrize("text, reason", [
    ("{", "line 1"), ('{"messages": []}', "line 1"), ("", "empty"),
    (json.dumps({"messages": HELLO}) + "\n[1]\n", "line 2")])
def test_a_damaged_file_is_named_with_its_line(tmp_path, text, reason):
    path = tmp_path / "c.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(sft_data.UserError, match=reason):
        sft_data.read_conversations(path)


def test_run_alone_it_shows_token_mask_and_target_side_by_side(run_script):
    done = run_script("07_sft_data")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r"\s+\d+\s+\d+ ", line)]
    assert len(rows) > 50
    user_start = str(S["<|user_start|>"])
    places = [i for i, row in enumerate(rows) if row[1] == user_start]
    assert places and all(rows[i][-1] == "-1" for i in places), "a user's words are no target"
    assert "\033[" not in done.stdout, "no colours in a pipe"
    assert done.stdout.strip().endswith("next: python edu/08_sft.py")


def test_it_reads_files_it_is_given_and_counts_what_it_cuts(run_script, tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", {"messages": HELLO}, {"messages": [*HELLO, *TOOL]})
    done = run_script("07_sft_data", "--file", path, "--max-tokens", "20", "--show", "0")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^c\.jsonl\s+2\s+30\s+\d+%\s+20\s+1\s+0$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("flags, words", [
    (("--max-tokens", "1"), "--max-tokens"), (("--file", "absent.jsonl"), "absent.jsonl"),
    (("--max-tokens", "5"), "allow more")])
def test_a_mistake_is_one_message_and_exit_code_2(run_script, flags, words):
    done = run_script("07_sft_data", *flags)
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr


def test_a_line_separator_inside_of_a_text_and_a_blank_line_are_no_trouble(tmp_path):
    """str.splitlines would cut at U+2028 and U+0085, in the middle of the JSON."""
    rows = [{"messages": [{"role": "user", "content": "one\u2028two\x85three"},
                          {"role": "assistant", "content": "yes"}]}] * 2
    path = tmp_path / "lines.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n",
                    encoding="utf-8")
    assert sft_data.read_conversations(path) == rows


def test_half_an_emoji_is_trained_as_a_replacement_character_and_that_is_no_fault(
        tmp_path, capsys):
    path = tmp_path / "cut.jsonl"
    messages = [{"role": "user", "content": "\ud83d?"},
                {"role": "assistant", "content": "Yes \ud83d, \ud83d\ude00."}]
    path.write_text(json.dumps({"messages": messages}), encoding="utf-8")
    assert sft_data.main(["--data-dir", str(tmp_path), "--file", str(path)]) == 0
    assert "true for 1 conversations" in capsys.readouterr().out
    ids, mask = sft_data.render_conversation(messages, tokenizer, 100)
    assert supervised_text(ids, mask) == "Yes \ufffd, \U0001f600.<|assistant_end|>"


@pytest.mark.parametrize("messages", [
    ["x"], [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [5]}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ["text"]}],
    [{"role": "system", "content": None}, {"role": "user", "content": "Hi"}]])
def test_whatever_is_no_conversation_is_a_value_error(messages):
    with pytest.raises(ValueError):
        sft_data.check_messages(messages)
