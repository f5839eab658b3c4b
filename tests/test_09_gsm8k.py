"""09_gsm8k.py: what counts as an answer, what a solution is made of, and what earns the reward.

The oracles are tables worked out by hand. The rows in ODD are made up, one for each oddity that
real word problems in this format have.
"""

import json
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import load, run_by_name

gsm = load("09_gsm8k")

CALL = "<|python_start|>55*9<|python_end|><|output_start|>495<|output_end|>"


# ---- one number from a text ----------------------------------------------------------------------

ANSWERS = [
    # plain, and whatever may stand before it
    ("#### 42", "42"),
    ("She has 6 * 7 = 42 pens.\n#### 42", "42"),
    ("It is 7.\nNo, 8.\n#### 9", "9"),
    ("so #### 42", "42"),
    (f"Each box has 55: {CALL}495.\n#### 495", "495"),
    # spaces
    ("####42", "42"),
    ("####    42   ", "42"),
    ("####\t42\n\n", "42"),
    ("####\n42", "42"),
    ("####\u00a042", "42"),
    # commas
    ("#### 1,080", "1080"),
    ("#### 12,345,678", "12345678"),
    ("#### 1,000.00", "1000"),
    ("#### 1,2,3", None),
    ("#### 12,34", None),
    ("#### 1,0000", None),
    ("#### 1234,567", None),
    ("#### ,123", None),
    # signs
    ("#### -7", "-7"),
    ("#### +5", "5"),
    ("#### - 12", "-12"),
    ("#### \u221212", "-12"),
    ("#### -0", "0"),
    ("#### -0.00", "0"),
    ("#### --5", None),
    # decimals and leading zeros
    ("#### 0.50", "0.5"),
    ("#### .5", "0.5"),
    ("#### -.25", "-0.25"),
    ("#### 5.", "5"),
    ("#### 5.0", "5"),
    ("#### 5.05", "5.05"),
    ("#### 007", "7"),
    ("#### 0", "0"),
    ("#### 100", "100"),
    ("#### 4.2.", "4.2"),
    ("#### 1.2.3", None),
    # currency
    ("#### $18", "18"),
    ("#### $ 1,234.50", "1234.5"),
    ("#### -$5", "-5"),
    ("#### $-5", "-5"),
    ("#### \u20ac30", "30"),
    ("#### 18$", "18"),
    # units, full stops, and words without a number
    ("#### 42 apples", "42"),
    ("#### 42 apples.", "42"),
    ("#### 5kg", "5"),
    ("#### 25%", "25"),
    ("#### 42.\nThat is all.", "42"),
    ("#### 42<|assistant_end|>", "42"),
    # not one number
    ("#### 42 or 43", None),
    ("#### 42\nThe answer is 42", None),
    ("#### 1 2 3 42", None),
    ("#### 3/4", None),
    ("#### 7:30", None),
    ("#### 6*7", None),
    ("#### 40+2", None),
    ("#### 1e3", None),
    ("#### 10 000", None),
    ("#### 42 m2", None),
    # no number
    ("", None),
    ("42", None),
    ("####", None),
    ("#### ", None),
    ("#### $", None),
    ("#### -", None),
    ("#### .", None),
    ("#### forty-two", None),
    ("#### about 42", None),
    ("#### \u0664\u0662", None),  # 42 in Arabic-Indic digits
    ("#### 4\u0662", None),
    # not one mark
    ("### 42", None),
    ("##### 42", None),
    ("#### 42\n#### 42", None),
    ("#### 41\n#### 42", None),
    ("#### 42 ####", None),
    ("######## 42", None),
    ("#### ## 42", None),
    ("Take #2 and #3.\n#### 6", "6"),
    # what goes to and comes from the calculator is not said by the reply
    ("<|python_start|>#### 42<|python_end|>", None),
    ("<|output_start|>#### 42<|output_end|>", None),
    ("<|python_start|>#### 42", None),
    ("<|python_start|>6*7\n#### 42<|python_end|>", None),
    (f"#### {CALL}", None),
    (f"#### {CALL}495", "495"),
    (f"#### 495{CALL}", "495"),
    (f"#### 4{CALL}2", None),
    ("<|python_start|>#### 1<|python_end|>#### 2", "2"),
]


@pytest.mark.parametrize(("text", "number"), ANSWERS)
def test_the_answer_is_the_one_number_after_the_one_mark(text, number):
    assert gsm.extract_answer(text) == number


def test_a_number_is_read_at_any_length_and_digit_by_digit():
    """Neither rounded as a float would be, nor refused as int() refuses over 4300 digits."""
    assert gsm.extract_answer("#### 0.1000000000000000055") == "0.1000000000000000055"
    assert gsm.extract_answer("#### " + "9" * 6000) == "9" * 6000


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    "text",
    ["#### " + "1," * 50_000, "#### " + "1,111" * 30_000, "#### " + " " * 100_000 + "x",
     "<|python_start|>" * 20_000, "<|output_start|>1<|output_end|>" * 20_000, "#" * 200_000,
     "#### " + "-" * 100_000 + "1"],
    ids=["commas", "groups", "spaces", "unclosed", "calls", "hashes", "signs"],
)  # fmt: skip
def test_no_babble_makes_the_search_slow(text):
    """A policy writes what it likes; a pattern that tries every split would hang the training."""
    assert gsm.extract_answer(text) is None


# ---- a solution in parts -------------------------------------------------------------------------


def text(said):
    return {"type": "text", "text": said}


def call(expression, result):
    return [{"type": "python", "text": expression}, {"type": "python_output", "text": result}]


# (question, solution, its parts, ground truth)
ODD = [
    (
        "Mia bakes 4 trays of 15 rolls and sells 22 of them. How many rolls are left?",
        "Mia bakes 4*15 = <<4*15=60>>60 rolls.\nThen 60-22 = <<60-22=38>>38 are left.\n#### 38",
        [text("Mia bakes 4*15 = "), *call("4*15", "60"), text("60 rolls.\nThen 60-22 = "),
         *call("60-22", "38"), text("38 are left.\n#### 38")],
        "38",
    ),
    (  # not a single call
        "Twice Omar\u2019s age plus 3 is 31. How old is Omar?",
        "Let a be the age: 2a + 3 = 31, so 2a = 28 and a = 14.\n#### 14",
        [text("Let a be the age: 2a + 3 = 31, so 2a = 28 and a = 14.\n#### 14")],
        "14",
    ),
    (  # a call without an operator; the text after it spells the result with commas
        "A mill grinds 2500 sacks a month. How many is that in a year?",
        "A year has <<12=12>>12 months.\nSo it is <<2500*12=30000>>30,000 sacks.\n#### 30,000",
        [text("A year has "), *call("12", "12"), text("12 months.\nSo it is "),
         *call("2500*12", "30000"), text("30,000 sacks.\n#### 30,000")],
        "30000",
    ),
    (  # decimals without a zero before the point, and with zeros that say nothing
        "A pen costs $.75. What do 8 pens cost, with 50 cents off?",
        "8 pens are 8*$.75 = $<<8*.75=6.00>>6.00.\nThat leaves $<<6.00-.50=5.50>>5.50.\n#### 5.50",
        [text("8 pens are 8*$.75 = $"), *call("8*.75", "6.00"), text("6.00.\nThat leaves $"),
         *call("6.00-.50", "5.50"), text("5.50.\n#### 5.50")],
        "5.5",
    ),
    (  # below zero, with signs of their own
        "It is 4 degrees. It gets 9 degrees colder, then 2 degrees more. How warm is it?",
        "4-9 = <<4-9=-5>>-5.\nIn the end <<-5+-2=-7>>-7 degrees.\n#### -7",
        [text("4-9 = "), *call("4-9", "-5"), text("-5.\nIn the end "), *call("-5+-2", "-7"),
         text("-7 degrees.\n#### -7")],
        "-7",
    ),
    (  # a result that is no number, whole division, brackets
        "Of 40 seats 3/4 are taken by groups of 5. How many groups are there?",
        "Taken is <<3/4=3/4>>3/4, or <<(40/4)*3=30>>30, in <<30//5=6>>6 groups.\n#### 6",
        [text("Taken is "), *call("3/4", "3/4"), text("3/4, or "), *call("(40/4)*3", "30"),
         text("30, in "), *call("30//5", "6"), text("6 groups.\n#### 6")],
        "6",
    ),
    (  # comparisons and arrows are not calls; a currency sign stands before one
        "Ben has \u20ac20. A ball is \u20ac7. How many can he buy?",
        "3 balls: \u20ac<<3*7=21>>21 > 20, but 2 balls are 14 < 20 => 2 fit.\n#### 2",
        [text("3 balls: \u20ac"), *call("3*7", "21"),
         text("21 > 20, but 2 balls are 14 < 20 => 2 fit.\n#### 2")],
        "2",
    ),
    (  # calls that lack a half: the text closes over them
        "How much is 5 and 3, and twice that?",
        "It is <<5+3>>8, then <<=16>>16, <<>>or <<8*2= >>16.\n#### 16",
        [text("It is 8, then 16, or 16.\n#### 16")],
        "16",
    ),
    (  # spaces within a call, an equation in it, calls side by side and at the very start
        "x is 2 plus 3. What is x times 10?",
        "<< 2 + 3 = 5 >><<5*10=50>>50, as x is <<x=2+3=5>>5\n#### 50",
        [*call("2 + 3", "5"), *call("5*10", "50"), text("50, as x is "), *call("x=2+3", "5"),
         text("5\n#### 50")],
        "50",
    ),
    (  # a call that is never closed, one cut by a line end, and a line separator in the question
        "Two lines.\u2028Three words each. \u00a0How many words?",
        "2*3 = <<2*3=6 words, <<2*\n3=6>>6 or << as <<2+4=6>>6.\n#### 6",
        [text("2*3 = <<2*3=6 words, <<2*\n3=6>>6 or << as "), *call("2+4", "6"),
         text("6.\n#### 6")],
        "6",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("question", "answer", "parts", "truth"), ODD)
def test_a_solution_becomes_text_and_calls(question, answer, parts, truth):
    assert gsm.parse_answer(answer) == parts
    assert gsm.extract_answer(answer) == truth


def test_nothing_of_a_well_formed_solution_is_lost():
    for _, answer, parts, _ in ODD[:7]:
        again = "".join(
            {"text": "%s", "python": "<<%s=", "python_output": "%s>>"}[part["type"]] % part["text"]
            for part in parts
        )
        assert again == answer
        types_seen = [part["type"] for part in gsm.parse_answer(answer)]
        assert all(a != b for a, b in zip(types_seen, types_seen[1:]))


def test_an_empty_solution_has_no_parts():
    assert gsm.parse_answer("") == []


# ---- where problems come from --------------------------------------------------------------------


def write_rows(path, rows, ascii_only=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows]
    path.write_text("".join(lines), "utf-8")
    return path


def odd_rows():
    return [{"question": question, "answer": answer} for question, answer, _, _ in ODD]


@pytest.fixture
def odd(tmp_path):
    return gsm.GSM8K(path=write_rows(tmp_path / "odd.jsonl", odd_rows()))


@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_file_of_my_own_gives_one_example_per_line(tmp_path, ascii_only):
    """Also when U+2028, a line end to str.splitlines, stands in it unescaped."""
    task = gsm.GSM8K(path=write_rows(tmp_path / "own.jsonl", odd_rows(), ascii_only))
    assert len(task) == len(ODD) == 10
    for i, (question, _, parts, _) in enumerate(ODD):
        assert task.get_example(i) == {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": parts},
            ]
        }


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_do_not_matter(tmp_path):
    lines = "\ufeff" + "\r\n\r\n".join(map(json.dumps, odd_rows())) + "\r\n  \r\n"
    path = tmp_path / "own.jsonl"
    path.write_bytes(lines.encode())
    task = gsm.GSM8K(path=path)
    assert [task.get_example(i)["messages"][0]["content"] for i in range(len(task))] == [
        question for question, *_ in ODD
    ]


def test_an_example_that_is_changed_does_not_change_the_next(odd):
    odd.get_example(0)["messages"].pop()
    odd.get_example(0)["messages"][1]["content"].clear()
    assert odd.get_example(0)["messages"][1]["content"] == ODD[0][2]


def test_past_the_last_problem_is_an_index_error(odd):
    with pytest.raises(IndexError):
        odd.get_example(len(odd))
    with pytest.raises(IndexError):
        odd.reward(len(odd), "#### 1")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The data folder of a small tiny world."""
    folder = tmp_path_factory.mktemp("world")
    options = "--size-mb 1 --num-chats 20 --num-problems 60 --num-eval 5".split()
    done = run_by_name("00_tiny_world", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "data"


@pytest.mark.parametrize(("split", "size"), [("train", 60), ("test", 10)])
def test_the_tiny_worlds_problems_are_the_default_and_their_parts_are_the_worlds_own(
    world, split, size
):
    """Two paths that agree: 00 writes the parts beside the solution, 09 parses them out of it."""
    task = gsm.GSM8K(split, data_dir=world)
    lines = (world / f"tiny_gsm_{split}.jsonl").read_text("utf-8").splitlines()
    assert len(task) == len(lines) == size
    for i, line in enumerate(lines):
        row = json.loads(line)
        assert task.get_example(i)["messages"] == row["messages"]
        assert task.reward(i, row["answer"]) == 1.0


def stand_in(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_hub_is_asked_for_gsm8k_by_its_name(monkeypatch, split):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return odd_rows()

    stand_in(monkeypatch, load_dataset)
    task = gsm.GSM8K(split, source="hub")
    assert asked == [(("openai/gsm8k", "main"), {"split": split})]
    assert len(task) == 10 and task.get_example(3)["messages"][1]["content"] == ODD[3][2]


@pytest.mark.parametrize(
    "error",
    [ConnectionError("Couldn't reach it\nand more"), FileNotFoundError("no such set"),
     ValueError("no cached copy"), type("ProtocolError", (Exception,), {})("cut off")],
)  # fmt: skip
def test_a_hub_out_of_reach_ends_with_the_two_ways_that_need_no_network(
    monkeypatch, capsys, error, tmp_path
):
    def load_dataset(*args, **kwargs):
        raise error

    stand_in(monkeypatch, load_dataset)
    assert gsm.main(["--source", "hub", "--data-dir", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: openai/gsm8k is out of reach")
    assert str(error).splitlines()[0] in said.err and "and more" not in said.err
    assert "edu/00_tiny_world.py" in said.err and "--path FILE.jsonl" in said.err
    assert said.err.count("\n") == 1


def test_the_datasets_library_itself_is_called_in_a_way_that_it_understands(run_script, tmp_path):
    """A folder openai/gsm8k, laid out as on the hub, takes the hub's place: no network needed."""
    pytest.importorskip("datasets")
    folder = tmp_path / "openai" / "gsm8k"
    (folder / "main").mkdir(parents=True)
    for split, rows in (("train", odd_rows()), ("test", odd_rows()[4:7])):
        pq.write_table(pa.Table.from_pylist(rows), folder / "main" / f"{split}-00000.parquet")
    files = "".join(
        f"  - split: {split}\n    path: main/{split}-*\n" for split in ("train", "test")
    )
    card = f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}---\n"
    (folder / "README.md").write_text(card, "utf-8")
    done = run_script("09_gsm8k", "--source", "hub", "--split", "test",
                      env={"HF_HOME": tmp_path / "cache"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "- openai/gsm8k, split test - 3 problems -" in done.stdout
    assert "-> 100.0% (n=3)" in done.stdout


def test_ctrl_c_while_the_hub_is_asked_is_no_error_of_the_hub(monkeypatch, capsys):
    def load_dataset(*args, **kwargs):
        raise KeyboardInterrupt

    stand_in(monkeypatch, load_dataset)
    assert gsm.main(["--source", "hub"]) == 130
    assert "out of reach" not in capsys.readouterr().err


def test_without_the_datasets_library_the_message_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)  # what makes an import fail
    assert gsm.main(["--source", "hub"]) == 2
    said = capsys.readouterr().err
    assert "pip install -r requirements.txt" in said and "--path FILE.jsonl" in said


def test_no_other_source_imports_the_datasets_library(monkeypatch, world, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(gsm.GSM8K(data_dir=world)) == 60
    path = write_rows(tmp_path / "own.jsonl", odd_rows()[:1])
    assert len(gsm.GSM8K(path=path, source="hub")) == 1  # a path wins


# ---- mistakes ------------------------------------------------------------------------------------

GOOD = '{"question": "How many?", "answer": "Two.\\n#### 2"}\n'


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (GOOD + "{half a row\n", "line 2 is not JSON"),
        (GOOD + GOOD + '{"question": "Why?"}\n', "line 3 lacks a text"),
        ('{"question": " ", "answer": "#### 2"}\n', "line 1 lacks a text"),
        ('{"question": "How many?", "answer": 2}\n', "line 1 lacks a text"),
        ("[1, 2]\n", "line 1 lacks a text"),
        (GOOD + '{"question": "How many?", "answer": "Two."}\n', "line 2 ends in 'Two.'"),
        (GOOD + '{"question": "a", "answer": "#### 1\\n#### 2"}\n', "exactly one number"),
        ("", "no problems"),
        ("\n \n", "no problems"),
        (b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_line(tmp_path, capsys, content, complaint):
    path = tmp_path / "own.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert gsm.main(["--path", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and complaint in said and str(path) in said
    assert "#### 42" in said  # what a line should look like


def test_a_missing_file_and_a_missing_world_are_told_with_what_mends_it(tmp_path, capsys):
    assert gsm.main(["--path", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
    assert gsm.main(["--data-dir", str(tmp_path)]) == 2
    assert f"python edu/00_tiny_world.py --data-dir {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"split": "val"}, {"source": "web"}])
def test_a_split_or_source_that_does_not_exist_is_named(tmp_path, wrong):
    with pytest.raises(gsm.UserError, match=next(iter(wrong.values()))):
        gsm.GSM8K(data_dir=tmp_path, **wrong)


# ---- the reward ----------------------------------------------------------------------------------


def test_every_reference_solution_earns_one_as_text_and_with_its_calls(odd):
    for i, (_, answer, parts, truth) in enumerate(ODD):
        marks = {"text": "%s", "python": "<|python_start|>%s<|python_end|>",
                 "python_output": "<|output_start|>%s<|output_end|>"}  # fmt: skip
        reply = "".join(marks[part["type"]] % part["text"] for part in parts)
        for right in (answer, reply, reply + "<|assistant_end|>", f"#### {truth}"):
            earned = odd.reward(i, right)
            assert earned == 1.0 and isinstance(earned, float)


@pytest.mark.parametrize(
    "reply",
    [
        "#### 30000", "#### 30,000", "#### $30,000.00", "####30000 sacks.", "#### +030000",
        f"First {CALL}495, then <|python_start|>2500*12<|python_end|><|output_start|>30000"
        "<|output_end|>30000.\n#### 30,000",
    ],
)  # fmt: skip
def test_a_right_answer_earns_one_however_it_is_spelled(odd, reply):
    assert odd.reward(2, reply) == 1.0


# Each holds the right answer, 30000, as far as a trick can; problem 2 of ODD is meant.
TRICKS = {
    "empty": "",
    "blank": " \n",
    "prompt echo": ODD[2][0],
    "prompt echo with a mark": ODD[2][0] + "\n####",
    "number without a mark": "30000",
    "mark without a number": "####",
    "digit soup": "#### 1 2 3 30000 4 5 6 7 8 9",
    "digit soup without a mark": "0123456789 30000 30,000",
    "digits run together": "#### 0123456789300009876543210",
    "two answers": "#### 30000\n#### 30001",
    "two answers, right one last": "#### 30001\n#### 30000",
    "right answer twice": "#### 30000\n#### 30000",
    "two numbers": "#### 30000 or 30001",
    "goes on with another number": "#### 30000\nNo, wait, it is 12.",
    "goes on with the next problem": "#### 30000\nQ: Ann has 3 cups. How many are 2 more?",
    "answer only in the call": "<|python_start|>30000<|python_end|><|output_start|>30000",
    "mark in the call": "<|python_start|>#### 30000<|python_end|>",
    "output that was never computed": "<|output_start|>#### 30000<|output_end|>",
    "sum not worked out": "#### 2500*12",
    "wrong": "#### 30001",
    "wrong sign": "#### -30000",
    "wrong scale": "#### 30.000",
    "part of the number": "#### 3000",
    "commas in wrong places": "#### 3,0000",
    "none": "#### None",
    "every number": "\n".join(f"#### {n}" for n in range(29990, 30010)),
}


@pytest.mark.parametrize("reply", TRICKS.values(), ids=TRICKS)
def test_no_trick_earns_anything(odd, reply):
    earned = odd.reward(2, reply)
    assert earned == 0.0 and isinstance(earned, float)


def test_the_reward_is_for_the_problem_asked_about(odd):
    truths = [truth for *_, truth in ODD]
    for i, truth in enumerate(truths):
        assert [odd.reward(j, f"#### {truth}") for j in range(len(odd))] == [
            float(truths[j] == truth) for j in range(len(odd))
        ]


# ---- run alone -----------------------------------------------------------------------------------


def test_the_script_shows_a_problem_and_pays_good_replies_only(world, capsys):
    assert gsm.main(["--data-dir", str(world)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == "09 gsm8k - cpu - tiny world, split train - 60 problems - seed 1337"
    rows = [json.loads(line) for line in (world / "tiny_gsm_train.jsonl").open(encoding="utf-8")]
    prompt = next(line for line in lines if line.startswith("prompt: ")).removeprefix("prompt: ")
    (row,) = [row for row in rows if row["question"] == prompt]
    truth = row["answer"].rpartition("#### ")[2]
    assert f"ground truth: {truth}" in lines
    for part in row["messages"][1]["content"]:
        assert f"{part['type']:<14}  {part['text']!r}" in lines
    table = {line[:18].strip(): line[18:].split() for line in lines if line[18:20] == "  "}
    good = {"reference", "number alone", "other spelling"}
    bad = {"wrong", "empty", "prompt echo", "digit soup", "two answers", "goes on", "no mark"}
    assert good | bad <= set(table)
    for kind in good:
        assert table[kind] == [truth, "1.0", "1.000"]
    for kind in bad:
        assert table[kind][1:] == ["0.0", "0.000"]
    assert lines[-2] == "result: reference answers paid in full - -> 100.0% (n=60)"
    assert lines[-1] == "next: python edu/10_rl.py"


def test_the_seed_decides_which_problem_is_shown(world, capsys):
    shown = []
    for seed in (1, 1, 2, 3, 4):
        assert gsm.main(["--data-dir", str(world), "--seed", str(seed)]) == 0
        shown.append(capsys.readouterr().out.splitlines()[1])
    assert shown[0] == shown[1] and len(set(shown)) > 1


def test_a_file_of_my_own_is_shown_by_the_command_line(run_script, tmp_path):
    path = write_rows(tmp_path / "own.jsonl", odd_rows(), ascii_only=False)
    done = run_script("09_gsm8k", "--path", path)
    assert done.returncode == 0, done.stderr
    assert "-> 100.0% (n=10)" in done.stdout and str(path) in done.stdout
    assert [item.name for item in tmp_path.iterdir()] == ["own.jsonl"]  # it writes nothing
