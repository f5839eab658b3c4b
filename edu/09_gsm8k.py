"""Challenge 9: word problems whose answers can be checked, and a reward that no trick earns.

Goal:
    Pick a word problem, show the prompt, find the one number that is its ground truth, and turn the
    written solution into text and calculator calls. Then pay replies: 1.0 for the right answer, 0.0
    for a wrong one and for every trick. The default is the tiny world's problems; --source hub
    takes GSM8K itself (7473 to train on, 1319 to test), --path a JSONL file in its format.

You will learn:
    - how "<<48/2=24>>" in a solution becomes a call that the model writes and a result it reads
    - why RL needs no solutions, only a number to compare with: the reward is the whole teacher
    - why the comparison is strict about what counts as an answer, and lenient about how it is
      spelled: 1,000.00 is 1000, but two answers are none
    - to attack your reward before a policy does: whatever it pays for, RL will find

Read beside:
    nanochat tasks/gsm8k.py::GSM8K, extract_answer (Nov 2025). Same form of an example and the same
    reward, 0 or 1. Better here: nanochat takes the first "####" and compares spellings, so "42." or
    "$42" earns nothing for a right answer, and naming one answer after another is never punished;
    a call without an expression or a result is left out, where there it has an empty result.

Run:
    python edu/09_gsm8k.py
    python edu/09_gsm8k.py --split test --seed 7

Expect:
    09 gsm8k - cpu - tiny world, split train - 6000 problems - seed 1337
    ground truth: 520
    reference           520             1.0  1.000
    two answers         none            0.0  0.000
    result: reference answers paid in full - -> 100.0% (n=6000)
    next: python edu/10_rl.py

Writes:
    nothing (--source hub fills the cache of the `datasets` library, in your home folder)
"""
import json
import os
import random
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

# ---- settings -----------------------------------------------------------------------------------


@dataclass
class Config:
    data_dir: Path = field(default_factory=lambda: Path(os.environ.get("EDU_DATA", "data")))
    """folder of tiny_gsm_train.jsonl and tiny_gsm_test.jsonl"""
    source: Literal["tiny", "hub"] = "tiny"
    """tiny: the tiny world's problems; hub: GSM8K itself, over the network"""
    path: Path | None = None
    """a JSONL file of your own, each line with "question" and "answer"; wins over source"""
    split: Literal["train", "test"] = "train"
    """which half of the source (a file given by path is one split, whatever this says)"""
    seed: int = 1337
    """decides which problem is shown"""


# ---- shared blocks ------------------------------------------------------------------------------

# --- shared: cli (home: 00_tiny_world.py) ---
class UserError(Exception):
    """A mistake the user can mend: what is wrong, why it matters, the command that fixes it."""


def run_script(run, config_class, argv, description):
    """Turn argv into a config_class, call run(config), and return the exit code.

    0 or whatever run returns; 2 for a UserError, shown as one message without a traceback;
    130 for Ctrl-C; 141 when nobody reads on. tyro itself exits with 2 on a flag it does not know.
    """
    config = tyro.cli(config_class, args=argv, description=description)
    try:
        code = run(config) or 0
        sys.stdout.flush()  # here, where a reader that has gone can still be met
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has enough, as `head` has after its lines
        # what is still to be printed goes nowhere: else Python would complain of it at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
# --- end shared ---


# ---- the idea: an answer is one number, a solution is text and calls -----------------------------


# --- shared: gsm8k (home: 09_gsm8k.py) ---
# What the calculator is asked and what it says is no part of the answer: a reply must state it.
TOOL_USE = re.compile(
    r"<\|python_start\|>.*?(?:<\|python_end\|>|\Z)|<\|output_start\|>.*?(?:<\|output_end\|>|\Z)",
    re.DOTALL,
)
# After the mark: sign and currency in either order, the number, then anything without a digit.
# That last part is what refuses "42 or 43", "1 2 3", "3/4", "7:30", and commas in wrong places.
ONE_NUMBER = re.compile(
    r"\s*(?:[$\u00a3\u20ac]\s*)?(?:([-+\u2212])\s*)?(?:[$\u00a3\u20ac]\s*)?"
    r"(?=\.?[0-9])([0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.([0-9]+))?\D*"
)


def extract_answer(text):
    """The number after "####" in its plainest spelling ("-1234.5"), or None.

    None as well for several marks or several numbers after it: were one right answer among many
    enough, a policy would learn to list numbers. Unit, currency and full stop do not matter, nor
    do 1,000.00 for 1000, +5 for 5, .5 for 0.5 or -0 for 0. Format: Cobbe et al. 2021 (GSM8K).
    """
    pieces = TOOL_USE.sub(" ", text).split("####")  # a space, lest 4<call>2 become 42
    found = len(pieces) == 2 and ONE_NUMBER.fullmatch(pieces[1])
    if not found:
        return None
    # As text, not as a float: no rounding, and no limit on how long a reply's number may be.
    sign, whole, fraction = found.groups(default="")
    whole, fraction = whole.replace(",", "").lstrip("0") or "0", fraction.rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return f"-{number}" if sign in ("-", "\u2212") and number != "0" else number


def parse_answer(answer):
    """A solution with <<expression=result>> calls as parts [{"type", "text"}, ...].

    Types: text; python, which the model writes; python_output, which the calculator writes.
    A call that lacks a half is dropped, and the text goes on: its result stands after it anyway,
    and an empty output would teach that the calculator has nothing to say.
    Source: nanochat tasks/gsm8k.py::GSM8K.get_example.
    """
    parts = []
    for i, piece in enumerate(re.split(r"<<([^<>\n]*)>>", answer)):
        if i % 2:  # inside of << >>; the last = is the one before the result
            expression, _, result = (half.strip() for half in piece.rpartition("="))
            if expression and result:
                parts += [{"type": "python", "text": expression},
                          {"type": "python_output", "text": result}]
        elif piece and parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += piece
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


class GSM8K:
    """Word problems with a checkable answer: len(task), get_example(i), reward(i, completion).

    source "tiny" is data_dir/tiny_gsm_{split}.jsonl, "hub" the dataset openai/gsm8k; a path to a
    JSONL file wins over both. Read whole, and checked, at once: it is 5 MB at most.
    Raises UserError for a source out of reach, and for a row that no reply could ever solve.
    """

    def __init__(self, split="train", source="tiny", path=None, data_dir="data"):
        for name, value, allowed in (("split", split, ("train", "test")),
                                     ("source", source, ("tiny", "hub"))):
            if value not in allowed:
                raise UserError(f"{name} is {value!r}, but there is only {' and '.join(allowed)}")
        if path is not None:
            remedy = 'each line must be {"question": "...", "answer": "... #### 42"}'
            rows = self.rows_of_file(Path(path), remedy)
        elif source == "tiny":
            remedy = f"make it: python edu/00_tiny_world.py --data-dir {data_dir}"
            rows = self.rows_of_file(Path(data_dir) / f"tiny_gsm_{split}.jsonl", remedy)
        else:
            remedy = "offline: leave --source hub out, or give --path FILE.jsonl"
            rows = self.rows_of_hub(split, data_dir)
        self.questions, self.answers, self.truths = [], [], []
        for where, row in rows:
            pair = [row.get(key) if isinstance(row, dict) else None for key in
                    ("question", "answer")]
            if not all(isinstance(text, str) and text.strip() for text in pair):
                raise UserError(f"{where} lacks a text as question or answer; {remedy}")
            truth = extract_answer(pair[1])
            if truth is None:
                raise UserError(f"{where} ends in {pair[1][-40:]!r}: without exactly one number "
                                f"after one #### no reply to it can be right; {remedy}")
            for known, value in zip((self.questions, self.answers, self.truths), (*pair, truth)):
                known.append(value)
        if not self.questions:
            raise UserError(f"{path or source} has no problems in it; {remedy}")

    @staticmethod
    def rows_of_file(path, remedy):
        """Yield (where, row) for each line of a JSONL file that is not blank."""
        number = 0
        try:
            # Line by line: str.splitlines would also cut at U+2028, which stands inside of texts.
            with open(path, encoding="utf-8-sig") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path} line {number}", json.loads(line)
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror}); {remedy}") from None
        except UnicodeDecodeError:  # read in pieces, so the line is not known
            raise UserError(f"{path} is not UTF-8 text; {remedy}") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{path} line {number} is not JSON ({error.msg}); {remedy}") from None

    @staticmethod
    def rows_of_hub(split, data_dir):
        """Yield (where, row) of the dataset itself: 7473 rows to train on, 1319 to test."""
        offline = (f"two ways need no network: the tiny world's problems (python "
                   f"edu/00_tiny_world.py --data-dir {data_dir}, then leave --source hub out), or "
                   "a copy of the dataset as a JSONL file (--path FILE.jsonl)")
        try:
            import datasets  # takes seconds to import, and only this source needs it

            rows = datasets.load_dataset("openai/gsm8k", "main", split=split)
        except ImportError as error:
            raise UserError(f"--source hub needs the library `datasets` ({error}); pip install -r "
                            f"requirements.txt; {offline}") from None
        except Exception as error:  # of three libraries one upon the other: no common base
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"openai/gsm8k is out of reach ({type(error).__name__}: {reason}); "
                            f"{offline}") from None
        for number, row in enumerate(rows, 1):
            yield f"openai/gsm8k {split} row {number}", row

    def __len__(self):
        return len(self.questions)

    def get_example(self, i):
        """{"messages": [user, assistant]}: the prompt, and the reference solution in parts."""
        return {"messages": [{"role": "user", "content": self.questions[i]},
                             {"role": "assistant", "content": parse_answer(self.answers[i])}]}

    def reward(self, i, completion):
        """1.0 if the reply (str; tool use as special tokens) ends in the right number, else 0.0."""
        # r = 1 if answer(reply) = answer(reference) else 0
        return float(extract_answer(completion) == self.truths[i])
# --- end shared ---


# ---- the loop ------------------------------------------------------------------------------------

AROUND = {
    "text": ("", ""),
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}


def text_of_parts(parts):
    """The reply that has these parts, with its tool use as the special tokens a model writes."""
    reply = ""
    for part in parts:
        before, after = AROUND[part["type"]]
        reply += before + part["text"] + after
    return reply


def replies_to(task, i):
    """{kind: reply}: three good ones, then what a policy might try instead of solving."""
    truth = task.truths[i]
    wrong = truth + "1"  # 42 -> 421, 0.5 -> 0.51
    user, assistant = task.get_example(i)["messages"]
    return {
        "reference": text_of_parts(assistant["content"]),
        "number alone": f"#### {truth}",
        "other spelling": f"####  {truth} apples.",
        "wrong": f"#### {wrong}",
        "empty": "",
        "prompt echo": user["content"],
        "no mark": f"It is {truth}.",
        "digit soup": f"#### 1 2 3 {truth} 4 5 6",
        "two answers": f"#### {wrong}\n#### {truth}",
        "goes on": f"#### {truth}\nOr rather {wrong}.",
    }


def show_problem(task, i):
    user, assistant = task.get_example(i)["messages"]
    print(f"problem {i}")
    print(f"prompt: {user['content']}")
    print(f"ground truth: {task.truths[i]}")
    print("\nthe reference solution")
    for part in assistant["content"]:
        print(f"{part['type']:<14}  {part['text']!r}")


def run(cfg):
    # 1. load: every row is checked
    task = GSM8K(cfg.split, cfg.source, cfg.path, cfg.data_dir)
    origin = {"tiny": "tiny world", "hub": "openai/gsm8k"}[cfg.source] + f", split {cfg.split}"
    print(f"09 gsm8k - cpu - {cfg.path or origin} - {len(task)} problems - seed {cfg.seed}")

    # 2. one problem, seen closely
    shown = random.Random(cfg.seed).randrange(len(task))
    show_problem(task, shown)

    # 3. pay every kind of reply to every problem
    paid = dict.fromkeys(replies_to(task, shown), 0.0)
    for i in range(len(task)):
        for kind, reply in replies_to(task, i).items():
            paid[kind] += task.reward(i, reply)

    # 4. report: what the shown problem pays, and the mean over all
    print(f"\n{'reply':<18}  {'answer found':<14}  reward  mean of {len(task)}")
    for kind, reply in replies_to(task, shown).items():
        print(f"{kind:<18}  {extract_answer(reply) or 'none':<14}  {task.reward(shown, reply):6.1f}"
              f"  {paid[kind] / len(task):.3f}")
    print(f"result: reference answers paid in full - -> {paid['reference'] / len(task):.1%} "
          f"(n={len(task)})")
    print("next: python edu/10_rl.py")


# ---- the command line ----------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    return run_script(run, Config, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
