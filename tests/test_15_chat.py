"""15_chat.py: characters out of tokens, turns that fit, commands, and a real terminal.

The models are real ones with weights set by hand, so that each token has one successor: what a
stage answers is known before it runs. "rl" uses the calculator, "sft" writes an emoji byte by byte,
"base" never ends.
"""

import base64
import io
import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import load, script_path, wait_for
from safetensors.torch import save_file

chat = load("15_chat")

BYTES = chat.Tokenizer(
    chat.tiktoken.Encoding(
        "bytes", pat_str=r"(?s:.)", mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={name: 256 + i for i, name in enumerate(chat.SPECIAL_TOKENS)}), "bytes")
START, END = BYTES.encode_special("<|assistant_start|>"), BYTES.encode_special("<|assistant_end|>")
CALL, CALLED = BYTES.encode_special("<|python_start|>"), BYTES.encode_special("<|python_end|>")
OUT, OUT_END = BYTES.encode_special("<|output_start|>"), BYTES.encode_special("<|output_end|>")
EMOJI = "\U0001f600"  # F0 9F 98 80, four different bytes


def model_that_writes(chain, sequence_len=256):
    """A GPT in which chain[i] is followed by chain[i + 1], for tokens that stand in it once.

    The blocks add nothing, so the head sees the last token's embedding alone, and each row of the
    head is the embedding of the token that comes before its own.
    """
    torch.manual_seed(0)
    config = chat.GPTConfig(sequence_len=sequence_len, vocab_size=BYTES.get_vocab_size(), n_layer=1,
                            n_head=1, n_kv_head=1, n_embd=128)
    model = chat.GPT(config).eval()
    with torch.no_grad():
        for before, after in zip(chain, chain[1:]):
            model.lm_head.weight[after] += 0.1 * model.transformer.wte.weight[before]
    return model


CALLING = [START, CALL, *b"6*7", CALLED, OUT_END, *b".!", END]  # the engine puts 42 in between
SMILING = [START, *("Hi " + EMOJI).encode(), END]
ENDLESS = [START, *b"abc", *b"a"]


def write_stage(folder, model):
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    about = {"model": vars(model.config), "tokenizer_sha256": folder_sha(folder.parent)}
    (folder / "config.json").write_text(json.dumps(about))


def folder_sha(data):
    return json.loads((data / "tokenizer/config.json").read_text())["sha256"]


def write_tokenizer(folder):
    """The 256 bytes as a rank file, in the format of 11_tokenizer.py."""
    folder.mkdir(parents=True)
    ranks = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    specials = {name: 256 + i for i, name in enumerate(chat.SPECIAL_TOKENS)}
    about = {"pattern": r"(?s:.)", "special_tokens": specials}
    about["sha256"] = chat.Tokenizer.identity(ranks, about["pattern"], specials)
    (folder / "tokenizer.tiktoken").write_bytes(ranks)
    (folder / "config.json").write_text(json.dumps(about))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder with three stages; the tests write elsewhere, but for chat_history."""
    folder = tmp_path_factory.mktemp("data")
    write_tokenizer(folder / "tokenizer")
    write_stage(folder / "rl", model_that_writes(CALLING))
    write_stage(folder / "sft", model_that_writes(SMILING))
    write_stage(folder / "base", model_that_writes(ENDLESS, sequence_len=8192))
    return folder


def config(data, **changes):
    return chat.Config(**{"data_dir": data, "stage": "sft", "temperature": 0.0, **changes})


class Scripted:
    """An engine that writes what it is told, token by token, and remembers what it was given."""

    def __init__(self, *answers):
        self.answers, self.given, self.stops = list(answers), [], {END}

    def generate(self, ids, num_samples, max_tokens, temperature, top_k, seed):
        self.given.append((ids, max_tokens, temperature, top_k, seed))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        for token in answer[:max_tokens]:
            yield [token], [1]


@pytest.fixture
def talk(data):
    """talk(*answers, context=256, **config) -> (chat, what is shown) with a scripted engine."""

    def start(*answers, context=256, **changes):
        shown = io.StringIO()
        talk = chat.Chat(config(data, **changes), torch.device("cpu"), chat.Screen(shown))
        talk.engine, talk.context = Scripted(*answers), context
        return talk, shown

    return start


def say(text):
    return [*text.encode(), END]


# ---- tokens are not characters -------------------------------------------------------------------


def events(tokens):
    parts = chat.AnswerParts(BYTES)
    found = [event for token in tokens for event in parts.feed(token)]
    content = parts.content()
    return [*found, *parts.finish()], content


def test_the_bytes_of_an_emoji_come_out_as_one_character():
    found, content = events(EMOJI.encode())
    assert found == [("text", ""), ("text", EMOJI)]
    assert content == EMOJI


def test_half_a_character_at_the_end_becomes_one_replacement_character():
    found, _ = events(b"ok" + EMOJI.encode()[:3])
    assert [text for _, text in found] == ["", "o", "k", "\ufffd"]


def test_half_a_character_at_the_end_of_an_answer_is_shown_and_kept_alike(talk):
    told, shown = talk([*b"ok", *EMOJI.encode()[:3], END])
    told.ask("?")
    assert shown.getvalue() == "sft> ok\ufffd\n"
    assert told.messages[-1]["content"] == "ok\ufffd"


def test_half_a_character_before_a_call_does_not_swallow_the_call():
    found, content = events([*EMOJI.encode()[:2], CALL, *b"1", CALLED, *EMOJI.encode()])
    assert content == [{"type": "text", "text": "\ufffd"}, {"type": "python", "text": "1"},
                       {"type": "text", "text": EMOJI}]
    assert [text for _, text in found if text] == ["\ufffd", "1", EMOJI]


def test_whatever_the_text_its_bytes_one_by_one_give_it_back():
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(chr(rng.choice([rng.randrange(1, 128), rng.randrange(160, 0xD800),
                                       rng.randrange(0xE000, 0x110000)])) for _ in range(12))
        found, content = events(text.encode())
        assert content == text and [piece for _, piece in found[1:]] == list(text)


def test_bytes_that_are_no_text_never_raise():
    rng = random.Random(0)
    for _ in range(200):
        tokens = [rng.randrange(BYTES.get_vocab_size()) for _ in range(40)]
        found, content = events(tokens)
        chat.check_messages([{"role": "user", "content": "?"},
                             {"role": "assistant", "content": content}])
        assert "".join(text for _, text in found).encode()  # no lone surrogate either


def test_a_call_and_its_result_are_parts():
    _, content = events([*b"It is ", CALL, *b"6*7", CALLED, OUT, *b"42", OUT_END, *b"42.", END])
    assert content == [
        {"type": "text", "text": "It is "}, {"type": "python", "text": "6*7"},
        {"type": "python_output", "text": "42"}, {"type": "text", "text": "42."}]


@pytest.mark.parametrize(
    ("tokens", "content"),
    [
        ([*b"So ", CALL, *b"6*"], "So "),
        ([*b"So ", CALL, *b"6*7", CALLED, OUT, *b"4"],
         [{"type": "text", "text": "So "}, {"type": "python", "text": "6*7"}]),
        ([CALL, CALLED, *b"x"], "x"),
        ([*b"a", START, *b"b"], "ab"),
        ([END], ""),
        ([], ""),
    ],
)
def test_what_is_half_written_or_empty_is_no_part(tokens, content):
    assert events(tokens)[1] == content


# ---- what is shown -------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("tokens", "shown"),
    [
        ([*b"is ", CALL, *b"6*7", CALLED, OUT, *b"42", OUT_END, *b"42."], "is [6*7 = 42] 42."),
        ([CALL, *b"6*7", CALLED, OUT, *b"42", OUT_END, *b", or"], "[6*7 = 42], or"),
        ([CALL, *b"9**9", CALLED, *b" or so"], "[9**9 = ?] or so"),
        ([CALL, *b"1", CALLED, CALL, *b"2", CALLED, OUT, *b"2", OUT_END], "[1 = ?][2 = 2]"),
        ([*b"x", OUT, *b"5", OUT_END, *b"."], "x[= 5]."),  # a result that nobody asked for
        ([CALL, *b"6*"], "[6* = ?]"),
    ],
)
def test_calls_stand_in_brackets(talk, tokens, shown):
    told, out = talk([*tokens, END])
    told.ask("?")
    assert out.getvalue() == f"sft> {shown}\n"


def test_calls_are_coloured_on_a_terminal_and_the_letters_stay(monkeypatch, talk):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    told, _ = talk([*b"It is ", CALL, *b"6*7", CALLED, OUT, *b"42", OUT_END, *b"42.", END])
    told.screen = chat.Screen(Terminal())
    told.ask("?")
    shown = told.screen.stream.getvalue()
    coloured = re.findall(r"\x1b\[36m(.*?)\x1b\[0m", shown)
    assert "".join(coloured) == "[6*7 = 42]" and "It is" in shown
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown) == "sft> It is [6*7 = 42] 42.\n"


@pytest.mark.parametrize("variable", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colour_where_it_is_not_wanted(monkeypatch, variable):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(*variable)
    assert chat.Screen(Terminal()).paint("call", "x") == "x"


def test_a_model_cannot_drive_the_terminal(talk):
    """ESC ] and CSI (one byte in Latin-1, U+009B here) move cursors, set titles, answer queries."""
    evil = "a\x1b]0;title\x07\u009b2J\r\x00b\n\tc"
    told, _ = talk(say(evil))
    told.screen = chat.Screen(Terminal())
    told.screen.has_color = False
    told.ask("?")
    assert told.screen.stream.getvalue() == (
        "sft> a\ufffd]0;title\ufffd\ufffd2J\ufffd\ufffdb\n\tc\n")
    assert told.messages[-1]["content"] == evil  # what was said is kept as it was


# ---- what fits the context -----------------------------------------------------------------------


def conversation(rng, turns, system):
    letters = "ab \u00e9"
    messages = [{"role": "system", "content": "be kind"}] if system else []
    for _ in range(turns):
        for role in ("user", "assistant"):
            text = "".join(rng.choice(letters) for _ in range(rng.randrange(1, 20)))
            messages.append({"role": role, "content": text})
    return [*messages, {"role": "user", "content": "now?"}]


def length(messages):
    """Tokens of a prompt, counted by hand: <|bos|>, two around each message, and one to begin."""
    said = [m for m in messages if m["role"] != "system"]
    system = sum(len(m["content"].encode()) + 2 for m in messages if m["role"] == "system")
    return 1 + sum(len(m["content"].encode()) + 2 for m in said) + system + 1


@pytest.mark.parametrize("system", [False, True])
def test_the_newest_turns_that_fit_are_kept_and_no_more_are_left_out(system):
    rng = random.Random(1)
    for _ in range(100):
        messages = conversation(rng, rng.randrange(8), system)
        context, reserve = rng.randrange(40, 200), rng.randrange(1, 30)
        ids, forgotten = chat.fit_turns(messages, BYTES, context, reserve)
        head = messages[: int(system)]
        fits = [n for n in range(len(messages) // 2 + 1)
                if messages[len(head) + 2 * n :]
                and length(head + messages[len(head) + 2 * n :]) + reserve <= context]
        expected = fits[0] if fits else (len(messages) - len(head)) // 2
        assert forgotten == expected
        assert len(ids) == length(head + messages[len(head) + 2 * forgotten :])
        kept = head + messages[len(head) + 2 * forgotten :]
        assert ids == chat.render_for_completion(kept, BYTES)


def test_a_long_talk_goes_on_and_says_what_it_leaves_out(talk):
    told, shown = talk(say("x" * 20), context=120, max_tokens=30)
    for i in range(9):
        told.ask(f"question {i}?")
        prompt = BYTES.decode(told.engine.given[-1][0])
        assert len(told.engine.given[-1][0]) + 30 <= 120
        assert f"question {i}?" in prompt
    # by hand: a turn has 11 + 2 + 20 + 2 = 35 tokens, the question 13, <|bos|> and a start 2:
    # 15 + 35 n + 30 <= 120 holds for n = 2
    assert "question 7?" in prompt and "question 6?" in prompt and "question 5?" not in prompt
    notes = re.findall(r"\((.*left out)\)", shown.getvalue())
    assert notes[0] == "a context of 120 tokens holds no more: the oldest turn is left out"
    assert notes[-1].endswith("the oldest 6 turns are left out") and len(notes) == 6
    assert len(told.messages) == 18  # for /save nothing is forgotten


def test_a_message_too_long_is_refused_by_the_number_of_tokens_and_taken_back(talk):
    told, _ = talk(say("yes"), context=100)
    told.ask("a")
    before = list(told.messages)
    # <|bos|>, two around the message, a start, and 16 for the answer: 80 fit, 81 do not
    with pytest.raises(chat.UserError, match="too long by 1 tokens"):
        told.ask("x" * 81)
    assert told.messages == before
    told.ask("x" * 80)
    assert told.engine.given[-1][1] == 16 and told.messages[-1]["content"] == "yes"


def test_an_answer_that_is_cut_says_why(talk):
    told, shown = talk([*b"abcdefgh"] * 9, max_tokens=5)
    told.ask("?")
    assert shown.getvalue().endswith("abcde\n(cut after 5 tokens: --max-tokens allows more)\n")
    told, shown = talk([*b"abcdefgh"] * 9, context=60, max_tokens=60)
    told.ask("x" * 36)
    assert shown.getvalue().endswith("(cut: the context of 60 tokens is full)\n")


def test_an_empty_answer_is_said_to_be_one(talk):
    told, shown = talk([END])
    told.ask("?")
    assert shown.getvalue() == "sft> \n(an empty answer)\n"
    told.ask("and now?")  # the talk goes on


# ---- Ctrl-C --------------------------------------------------------------------------------------


class Interrupted(Scripted):
    """Ctrl-C is pressed after `after` tokens, `times` times."""

    def __init__(self, answer, after, times=1):
        super().__init__(answer)
        self.after, self.times = after, times

    def generate(self, *request):
        for i, column in enumerate(super().generate(*request)):
            if i == self.after:
                for _ in range(self.times):
                    signal.raise_signal(signal.SIGINT)
            yield column


def test_ctrl_c_stops_the_answer_and_what_was_said_stays(talk):
    told, shown = talk(say("x"))
    told.engine = Interrupted(say("abcdef"), after=2)
    assert told.ask("?") is False
    assert shown.getvalue() == "sft> abc\n(stopped)\n"
    assert told.messages[-1] == {"role": "assistant", "content": "abc"}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_within_a_call_keeps_no_half_of_it(talk):
    told, shown = talk(say("x"))
    told.engine = Interrupted([*b"So ", CALL, *b"6*7", CALLED, END], after=4)
    told.ask("?")
    assert told.messages[-1]["content"] == "So "


def test_ctrl_c_before_the_first_character_takes_the_question_back(talk):
    told, shown = talk(say("x"))
    told.engine = Interrupted([*EMOJI.encode(), END], after=0)
    told.ask("?")
    assert told.messages == [] and told.answered == 0
    assert "taken back" in shown.getvalue()


def test_a_second_ctrl_c_insists_and_leaves_a_talk_that_can_go_on(talk):
    told, _ = talk(say("x"))
    told.engine = Interrupted(say("abcdef"), after=2, times=2)
    with pytest.raises(KeyboardInterrupt):
        told.ask("?")
    assert told.messages == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    told.engine = Scripted(say("well"))
    told.ask("again?")
    assert [m["role"] for m in told.messages] == ["user", "assistant"]


# ---- commands ------------------------------------------------------------------------------------


class Lines:
    """A keyboard with its lines typed beforehand; an exception among them is raised."""

    def __init__(self, *lines):
        self.lines = list(lines)

    def ask(self, prompt):
        line = self.lines.pop(0) if self.lines else None
        if isinstance(line, type):
            raise line
        return line


def test_commands_change_how_the_next_answer_is_sampled(talk):
    told, shown = talk(say("x"))
    chat.converse(told, Lines("a", "/temp 1.25", "/topk 7", "b", "/temp 1e-30", "c", "/temp"))
    assert [given[2:] for given in told.engine.given] == [
        (0.0, 50, 1337), (1.25, 7, 1338), (0.0, 7, 1339)]
    assert shown.getvalue().endswith("(temperature 0)\n")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/temp hot", "'hot' is no number; like this: /temp 0.6"),
        ("/temp nan", "temperature nan is not between 0"),
        ("/temp inf", "temperature inf is not between 0"),
        ("/temp -1", "temperature -1.0 is not between 0"),
        ("/temp 2.01", "and 2"),
        ("/temp 0.5 0.6", "'0.5 0.6' is no number"),
        ("/topk 1.5", "'1.5' is no whole number; like this: /topk 50"),
        ("/topk -3", "top-k -3 is below 0"),
        ("/topk " + "9" * 5000, "is no whole number"),
        ("/stage nowhere", "there is no model 'nowhere' in"),
        ("/stage nowhere", "only: rl, sft, base"),
        ("/stage ..", "there is no model '..'"),
        ("/load", "give a file"),
        ("/load no/such/file.jsonl", "cannot read conversations from no/such/file.jsonl"),
        ("/save", "give a file: /save talk.jsonl"),
        ("/shout", "there is no /shout, only /clear /temp /topk /stage /save /load /help"),
        ("/", "there is no /"),
        ("/Temp 1", "there is no /Temp"),
        ("x" * 400, "too long by"),
    ],
)
def test_a_bad_value_costs_a_sentence_and_nothing_else(talk, line, sentence):
    told, shown = talk(say("fine"))
    chat.converse(told, Lines("hello", line, "still there?"))
    assert sentence in shown.getvalue()
    assert (told.temperature, told.top_k, told.stage) == (0.0, 50, "sft")
    assert [m["content"] for m in told.messages] == ["hello", "fine", "still there?", "fine"]


def test_nothing_is_saved_before_anything_was_said(talk, tmp_path):
    told, shown = talk(say("x"))
    chat.converse(told, Lines(f"/save {tmp_path / 'a.jsonl'}"))
    assert "nothing to save yet" in shown.getvalue() and not list(tmp_path.iterdir())


def test_clear_forgets_the_conversation(talk):
    told, _ = talk(say("x"))
    chat.converse(told, Lines("first", "/clear", "second"))
    assert "first" not in BYTES.decode(told.engine.given[-1][0])


def test_help_names_every_command_and_both_keys(talk):
    told, shown = talk(say("x"))
    chat.converse(told, Lines("/help"))
    for name in ("/clear", "/temp", "/topk", "/stage", "/save", "/load", "/help", "Ctrl-C"):
        assert name in shown.getvalue()


def test_a_slash_behind_a_space_and_empty_lines_are_no_commands(talk):
    told, _ = talk(say("x"))
    chat.converse(told, Lines(" /clear", "", "   ", "/quit", "never asked"))
    assert [m["content"] for m in told.messages] == ["/clear", "x"]


def test_ctrl_c_at_the_prompt_ends_nothing(talk):
    told, shown = talk(say("x"))
    chat.converse(told, Lines(KeyboardInterrupt, "hello"))
    assert told.answered == 1 and "Ctrl-D ends the program" in shown.getvalue()


def test_another_stage_goes_on_with_the_same_conversation(data, capsys):
    told = chat.Chat(config(data), torch.device("cpu"), chat.Screen(sys.stdout))
    chat.converse(told, Lines("hello", "/stage rl", "again", "/stage"))
    out = capsys.readouterr().out
    assert f"sft> Hi {EMOJI}\n" in out and "rl> [6*7 = 42].!\n" in out
    assert "(stage rl; there are: rl, sft, base)" in out
    assert [m["role"] for m in told.messages] == ["user", "assistant"] * 2


# ---- /save and /load -----------------------------------------------------------------------------


def test_what_is_saved_is_loaded_and_goes_on(talk, tmp_path):
    path = tmp_path / "with a space.jsonl"
    told, _ = talk([*b"It is ", CALL, *b"6*7", CALLED, OUT, *b"42", OUT_END, *b"42.", END])
    chat.converse(told, Lines("6*7? \u2028 \u00e9", f"/save {path}"))
    assert json.loads(path.read_text("ascii")) == {"messages": told.messages}
    again, shown = talk(say("as I said"))
    chat.converse(again, Lines(f"/load {path}", "sure?"))
    assert again.messages[:2] == told.messages
    assert "you> 6*7? \u2028 \u00e9\nsft> It is [6*7 = 42] 42.\n" in shown.getvalue()
    assert again.engine.given[-1][0] == chat.render_for_completion(
        [*told.messages, {"role": "user", "content": "sure?"}], BYTES)


def test_the_other_stages_can_train_on_what_is_saved(talk, tmp_path):
    told, _ = talk(say("yes"))
    chat.converse(told, Lines("really?", f"/save {tmp_path}/a.jsonl"))
    (conversation,) = load("08_sft").read_conversations(tmp_path / "a.jsonl")
    ids, mask = load("07_sft_data").render_conversation(conversation["messages"], BYTES)
    assert BYTES.decode([i for i, m in zip(ids, mask) if m]) == "yes<|assistant_end|>"


def test_a_file_grows_by_a_line_and_a_line_grows_with_its_talk(talk, tmp_path):
    path = tmp_path / "a.jsonl"
    first = '{"messages":   [{"role": "user", "content": "kept"}], "kind": "as it was"}'
    path.write_text(first + "\n")
    told, _ = talk(say("x"))
    chat.converse(told, Lines("one", f"/save {path}", "two", f"/save {path}", "/clear", "three",
                              f"/save {path}"))
    lines = path.read_text().splitlines()
    assert lines[0] == first and len(lines) == 3
    said = [[m["content"] for m in json.loads(line)["messages"]] for line in lines[1:]]
    assert said == [["one", "x", "two", "x"], ["three", "x"]]


def test_a_line_end_of_unicode_in_a_text_and_blank_lines_are_no_lines_of_the_file(talk, tmp_path):
    path = tmp_path / "a.jsonl"
    first = '{"messages": [{"role": "user", "content": "a\u2028b"}]}'
    path.write_text(first + "\n\n", encoding="utf-8")
    told, shown = talk(say("x"))
    chat.converse(told, Lines("one", f"/save {path}", f"/load {path} 2"))
    lines = path.read_text(encoding="utf-8").split("\n")
    assert lines[0] == first and len(lines) == 3 and json.loads(lines[1])["messages"]
    assert "saved as line 2 of" in shown.getvalue() and "(line 2 of" in shown.getvalue()


def test_a_file_that_holds_something_else_is_never_overwritten(talk, tmp_path):
    path = tmp_path / "README.md"
    path.write_text("# precious\n")
    told, shown = talk(say("x"))
    chat.converse(told, Lines("one", f"/save {path}", f"/save {tmp_path}",
                              f"/save {path}/x", "/save " + "x" * 5000, "/load " + "x" * 5000,
                              "/stage " + "x" * 5000, "/load \0", "/load ~nobody-at-all/x"))
    assert path.read_text() == "# precious\n" and list(tmp_path.iterdir()) == [path]
    assert "line 1, is no conversation" in shown.getvalue()


def test_a_disk_that_fails_leaves_the_old_file_whole(talk, tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    told, shown = talk(say("x"))
    chat.converse(told, Lines("one", f"/save {path}"))
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(chat.os, "replace", full)
    chat.converse(told, Lines("two", f"/save {path}"))
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    assert "No space left on device" in shown.getvalue()


USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    "line",
    [
        "{", "[]", "5", "null", '{"messages": []}', '{"messages": 5}', '{"messages": [5]}',
        json.dumps({"messages": [{"role": "assistant", "content": "a"}]}),
        json.dumps({"messages": [USER, USER]}),
        json.dumps({"messages": [{"role": "user", "content": 5}]}),
        json.dumps({"messages": [{"role": "system", "content": 5}, USER]}),
        json.dumps({"messages": [USER, {"role": "assistant", "content": ["a"]}]}),
        json.dumps({"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]}),
        "",
    ],
)
def test_what_is_no_conversation_is_not_loaded(talk, tmp_path, line):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    told, shown = talk(say("x"))
    chat.converse(told, Lines("one", f"/load {tmp_path}/a.jsonl", "two"))
    assert re.search(r"\(.*a\.jsonl.*\)", shown.getvalue())
    assert [m["content"] for m in told.messages] == ["one", "x", "two", "x"]


def test_a_line_of_several_is_chosen_and_one_that_waits_is_answered(talk, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n"
                            for text in ("first", "second")))
    told, shown = talk(say("x"))
    chat.converse(told, Lines(f"/load {path} 1"))
    assert [m["content"] for m in told.messages] == ["first", "x"]
    chat.converse(told, Lines(f"/load {path}", f"/load {path} 3", f"/load {path} 0",
                              f"/load {path} -1"))
    assert [m["content"] for m in told.messages] == ["second", "x"]
    assert shown.getvalue().count("has the lines 1 to 2, and no line") == 3


# ---- settings ------------------------------------------------------------------------------------


def test_the_last_stage_that_is_there_is_taken(data, tmp_path):
    assert chat.stages_present(data) == ["rl", "sft", "base"]
    for name in ("base", "mine", "sft", "half"):
        (tmp_path / name).mkdir()
        if name != "half":
            (tmp_path / name / "model.safetensors").touch()
    assert chat.stages_present(tmp_path) == ["sft", "base", "mine"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperature", "3"], "temperature 3.0 is not between 0"),
        (["--top-k", "-1"], "top-k -1 is below 0"),
        (["--max-tokens", "0"], "--max-tokens 0"),
        (["-p", "  "], "the question is empty"),
        (["-p", "-"], "the question is empty"),
        (["--stage", "nowhere"], "there is no model 'nowhere'"),
        (["-p", "x" * 300], "too long by"),
    ],
)
def test_a_wrong_flag_ends_with_2_and_a_sentence(data, capsys, monkeypatch, flags, words):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert chat.main(["--data-dir", str(data), "--device-type", "cpu", *flags]) == 2
    shown = capsys.readouterr()
    assert words in shown.err and shown.out == ""


def test_without_a_model_the_message_says_how_to_get_one(tmp_path, capsys):
    assert chat.main(["--data-dir", str(tmp_path), "-p", "hi"]) == 2
    assert "bash my_pipeline.sh" in capsys.readouterr().err


# ---- one shot, as a process ----------------------------------------------------------------------


def test_one_shot_prints_the_answer_and_nothing_else(run_script, data):
    done = run_script("15_chat", "-t", "0", "-p", "What is 6*7?", data_dir=data)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[6*7 = 42].!\n", "")


def test_one_shot_reads_from_a_pipe_and_puts_notes_elsewhere(data, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Who\nare you?\n"))
    flags = ["--data-dir", str(data), "--stage", "base", "-t", "0", "--max-tokens", "4", "-p", "-"]
    assert chat.main(flags) == 0
    shown = capsys.readouterr()
    assert shown.out == "abca\n" and "cut after 4 tokens" in shown.err


def test_bytes_that_are_no_text_and_letters_the_output_lacks_end_nothing(data, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe?"), "utf-8"))
    monkeypatch.setattr("sys.stdout", out)
    assert chat.main(["--data-dir", str(data), "--stage", "sft", "-t", "0", "-p", "-"]) == 0
    assert out.buffer.getvalue() == b"Hi ?\n"


def test_a_reader_who_has_enough_ends_one_shot_quietly(data):
    command = [sys.executable, str(script_path("15_chat")), "--data-dir", str(data), "--stage",
               "base", "-t", "0", "--max-tokens", "8000", "-p", "go on"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout.read(10) == b"abcabcabca"
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 0


def test_lines_from_a_pipe_are_turns_and_the_transcript_is_whole(data, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/topk 3\n\u00e9?"))
    assert chat.main(["--data-dir", str(data), "--stage", "sft", "-t", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("15 chat - ") and "stage sft" in lines[0]
    assert lines[3:] == ["you> hello", f"sft> Hi {EMOJI}", "you> /topk 3", "(top-k 3)",
                         "you> \u00e9?", f"sft> Hi {EMOJI}", "you> ",
                         "result: messages answered 0 -> 2 (n=2)",
                         "next: python edu/16_serve.py"]


# ---- a real terminal -----------------------------------------------------------------------------


class Typist:
    """A process on a pseudo-terminal: types, and waits for what should appear."""

    def __init__(self, data, *flags, columns=80, env=None):
        pty = pytest.importorskip("pty")
        import fcntl
        import struct
        import termios

        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, str(script_path("15_chat")), "--data-dir", str(data), *flags],
            stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "INPUTRC": os.devnull,
                 **(env or {})})
        os.close(slave)
        self.seen = b""

    def type(self, text):
        os.write(self.master, text.encode() if isinstance(text, str) else text)

    def wait(self, text, seconds=60):
        """What appears up to and with `text`; what follows is kept for the next wait."""
        wanted, until = text.encode(), time.monotonic() + seconds
        while wanted not in self.seen:
            ready = select.select([self.master], [], [], max(0, until - time.monotonic()))[0]
            try:
                new = os.read(self.master, 65536) if ready else b""
            except OSError:  # Linux: the other side is closed
                new = b""
            assert new, f"{text!r} did not appear, only {self.seen[-2000:]!r}"
            self.seen += new
        found, _, self.seen = self.seen.partition(wanted)
        return (found + wanted).decode()

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def typist(data):
    """typist(*flags, ...) -> a Typist that is killed when the test ends."""
    started = []

    def start(*flags, **options):
        started.append(Typist(data, *flags, **options))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.mark.skipif(chat.readline is None, reason="this Python has no readline")
def test_a_talk_in_a_terminal(typist, data):
    """Colours, editing, a paste of three lines, a calculator call, an emoji, Ctrl-D, history."""
    (data / "chat_history").unlink(missing_ok=True)
    one = typist("-t", "0")
    one.wait("you> ")
    one.type("Who \u00e9 are yoX\x7fu?\r")  # a typing mistake, mended with backspace
    shown = one.wait("you> ")
    assert "\x1b[36m6\x1b[0m" in shown and "\x1b[36m.\x1b[0m" not in shown
    assert "\r\nrl> [6*7 = 42].!\r\n" in re.sub(r"\x1b\[[0-9;]*m", "", shown)
    one.type("/stage sft\r")
    one.wait("the conversation goes on")
    one.wait("you> ")
    one.type("\x1b[200~first\nsecond\nthird\x1b[201~")  # as a terminal marks what is pasted
    one.type("\r")
    assert f"Hi {EMOJI}" in one.wait("you> ")
    one.type("half a line")
    one.wait("half a line")
    # Python misses a signal between a prompt and its wait for keys, until the next key
    wait_for(lambda: psutil.Process(one.process.pid).status() == psutil.STATUS_SLEEPING,
             one.process)
    one.type("\x03")  # Ctrl-C at the prompt
    one.wait("Ctrl-D ends the program")
    one.wait("you> ")
    one.type("\x04")
    one.wait("result: messages answered 0 -> 2 (n=2)")
    assert one.process.wait(20) == 0
    kept = [json.loads(line) for line in (data / "chat_history").read_text().splitlines()]
    assert kept == ["Who \u00e9 are you?", "/stage sft", "first\nsecond\nthird"]
    assert (data / "chat_history").stat().st_mode & 0o077 == 0


@pytest.mark.skipif(chat.readline is None, reason="this Python has no readline")
def test_ctrl_c_in_a_terminal_stops_the_answer_and_the_program_goes_on(typist, data):
    (data / "chat_history").write_text('"an older line"\nhalf a li\n"/topk 5"\n')
    one = typist("--stage", "base", "-t", "0", "--max-tokens", "8000", columns=20,
                 env={"NO_COLOR": "1"})
    one.wait("you> ")
    one.type("talk for ever\r")
    one.wait("abcabc")
    one.type("\x03")
    one.wait("(stopped)")
    one.wait("you> ")
    one.type("\x1b[A\x1b[A\r")  # up twice: past the question, to the last line of the file
    assert "(top-k 5)" in one.wait("you> ")
    one.type("/stage sft\r")
    one.wait("you> ")
    one.type("line one\nline two\nline three\n")  # pasted into a terminal that does not mark it
    assert f"Hi {EMOJI}" in one.wait("you> ")
    one.type("\x04")
    one.wait("result: messages answered 0 -> 2 (n=2)")
    assert one.process.wait(20) == 0


def test_a_history_that_cannot_be_written_costs_only_the_history(tmp_path, monkeypatch):
    if chat.readline is None:
        pytest.skip("this Python has no readline")
    (tmp_path / "file").touch()
    keyboard = chat.Keyboard(chat.Screen(io.StringIO()), tmp_path / "file" / "chat_history")
    keyboard.has_editing = True
    keyboard.remember("hello")


def test_the_history_keeps_the_newest_messages(tmp_path):
    if chat.readline is None:
        pytest.skip("this Python has no readline")
    keyboard = chat.Keyboard(chat.Screen(io.StringIO()), tmp_path / "chat_history")
    keyboard.history.write_text("".join(f'"{i}"\n' for i in range(1500)))
    keyboard.has_editing = True
    keyboard.remember("new")
    assert keyboard.read_history() == [*map(str, range(501, 1500)), "new"]
