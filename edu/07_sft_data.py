"""Challenge 07: the data of supervised fine-tuning, where a conversation becomes ids and a mask.

Goal:
    Turn conversations into rows that a model can learn from: special tokens mark who speaks, and
    only what the assistant says is trained. The mask decides everything here, and a mask that is
    off by one gives a fine loss curve and a model that never stops or speaks for its user. So this
    script shows token, text, mask and target side by side.

You will learn:
    - what the special tokens of a chat are for, and which of them are trained
    - why the end token must be a target, and the calculator's output must not
    - the shift by one between inputs and targets, with -1 for "not trained"
    - what padding and cutting cost, counted

Read beside:
    nanochat/tokenizer.py::RustBPETokenizer.render_conversation, scripts/chat_sft.py. Different
    here: padding is ignored by its place and not by its id, a row that a cut leaves without a
    target is dropped and counted, and text that spells a special token stays text.

Run:
    python edu/07_sft_data.py
    python edu/07_sft_data.py --show 1

Expect:
    07 sft data - ...
    place    id  text                 mask  target
    supervised text = what the assistant says: true for ... conversations
    result: supervised share of the tokens 1.00 -> 0.40 (n=...)

Writes:
    nothing
"""

import base64
import hashlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import tiktoken
import torch
import tyro

# ---- settings ------------------------------------------------------------------------------------

FILES = ("my_identity.jsonl", "tiny_chat_train.jsonl", "tiny_gsm_train.jsonl")

# Shown, and checked, when none of the files is there yet: a system prompt, two turns, a calculator.
EXAMPLES = [
    {"messages": [
        {"role": "system", "content": "You are a friendly robot."},
        {"role": "user", "content": "Hello! Who are you?"},
        {"role": "assistant", "content": "I am a friendly robot."},
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is Paris."}]},
    {"messages": [
        {"role": "user", "content": "A bus has 17 people on it. 25 more get on. How many is that?"},
        {"role": "assistant", "content": [
            {"type": "text", "text": "There are "}, {"type": "python", "text": "17+25"},
            {"type": "python_output", "text": "42"},
            {"type": "text", "text": "42 people.\n#### 42"}]}]},
]


@dataclass
class Config:
    data_dir: Path = field(default_factory=lambda: Path(os.environ.get("EDU_DATA", "data")))
    """Folder with tokenizer/ and the conversations (without them: bytes and two examples)."""
    file: tuple[Path, ...] = ()
    """JSONL files to read instead, one {"messages": [...]} per line."""
    max_tokens: int = 257
    """Longest row in ids; one more than the context of the model, for the shift by one."""
    batch_size: int = 4
    """Conversations in the batch that is collated."""
    show: int = 2
    """Conversations to print token by token."""
    seed: int = 1337
    """Seed of the choice of those conversations."""


# ---- shared blocks -------------------------------------------------------------------------------

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


# --- shared: tokenizer (home: 11_tokenizer.py) ---
SPECIAL_TOKENS = (
    "<|bos|>",  # begins every document
    "<|user_start|>", "<|user_end|>",
    "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>",  # the model calls the calculator
    "<|output_start|>", "<|output_end|>",  # and the calculator answers
)


class Tokenizer:
    """Text <-> ids. Ids 0..255 are bytes, then the merges in order, the special tokens last.

    A str never encodes to a special token, whatever it spells; only prepend and append give one.
    Lone surrogates, which no UTF-8 can hold, become U+FFFD; all else comes back byte for byte.
    Source: nanochat/tokenizer.py::RustBPETokenizer.
    """

    def __init__(self, encoding, sha256, bos_token=SPECIAL_TOKENS[0]):
        self.encoding, self.sha256, self.bos_token = encoding, sha256, bos_token

    @staticmethod
    def identity(rank_file, pattern, special_tokens):
        """sha256 over everything that decides an id: bytes of the rank file, pattern, specials."""
        rest = json.dumps([pattern, special_tokens], sort_keys=True)
        return hashlib.sha256(rank_file + b"\0" + rest.encode()).hexdigest()

    @classmethod
    def from_dir(cls, path):
        """Load what 11_tokenizer.py wrote to `path`. Raises UserError if absent or damaged."""
        path = Path(path)
        remedy = f"train one: python edu/11_tokenizer.py --data-dir {path.parent}"
        try:
            rank_file = (path / "tokenizer.tiktoken").read_bytes()
            config = json.loads((path / "config.json").read_bytes())
            pattern, special_tokens = config["pattern"], config["special_tokens"]
            sha256 = cls.identity(rank_file, pattern, special_tokens)
            if sha256 != config["sha256"]:
                raise ValueError(f"its sha256 is {sha256[:12]}, config.json says otherwise")
            lines = (line.split() for line in rank_file.splitlines())
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        except OSError as error:
            raise UserError(f"no tokenizer in {path} ({error.strerror}); {remedy}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"the tokenizer in {path} is damaged ({error}); {remedy}") from None
        encoding = tiktoken.Encoding(
            f"edu-{sha256[:12]}", pat_str=pattern, mergeable_ranks=ranks,
            special_tokens=special_tokens,
        )
        return cls(encoding, sha256)

    def encode(self, text, prepend=None, append=None, num_threads=8):
        """str -> ids, or list of str -> list of ids; prepend and append: special token or id."""
        before, after = (
            [self.encode_special(extra)] if isinstance(extra, str) else
            [] if extra is None else [extra] for extra in (prepend, append)
        )
        if isinstance(text, str):
            return before + self.encoding.encode_ordinary(text) + after
        rows = self.encoding.encode_ordinary_batch(text, num_threads=num_threads)
        return [before + row + after for row in rows] if before or after else rows

    def encode_special(self, token):
        """The id of a special token. Raises KeyError for any other text."""
        if token not in self.encoding.special_tokens_set:
            raise KeyError(f"{token!r} is no special token")
        return self.encoding.encode_single_token(token)

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes(ids)

    def decode(self, ids):
        """ids -> str; bytes that are not UTF-8, such as half a letter, become U+FFFD."""
        return self.encoding.decode(ids)

    def get_bos_token_id(self):
        return self.encode_special(self.bos_token)

    def get_vocab_size(self):
        return self.encoding.n_vocab

    def token_bytes(self):
        """Raw length in bytes of each id, 0 for special tokens: (V,) list for bits per byte."""
        tokens = enumerate(self.encoding.decode_tokens_bytes(range(self.get_vocab_size())))
        return [0 if self.encoding.is_special_token(i) else len(token) for i, token in tokens]
# --- end shared ---


# --- shared: byte-tokenizer (home: 05_engine.py) ---
def byte_tokenizer():
    """A tokenizer of the 256 bytes and the special tokens, for when none has been trained."""
    encoding = tiktoken.Encoding(
        "bytes", pat_str=r"(?s:.)", mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)})
    return Tokenizer(encoding, sha256="bytes")
# --- end shared ---


# ---- the idea: who is trained to say what --------------------------------------------------------


# --- shared: conversation (home: 07_sft_data.py) ---
# What stands around each part of an answer, and whether the model is to learn it.
PART_TOKENS = {"text": (None, None, 1), "python": ("<|python_start|>", "<|python_end|>", 1),
               "python_output": ("<|output_start|>", "<|output_end|>", 0)}


def check_messages(messages):
    """Raise ValueError, naming the message, unless user and assistant alternate, user first.

    messages: [{"role", "content"}, ...]; one system message may come first. content is a str, or
    for the assistant a list of parts {"type": "text" | "python" | "python_output", "text": str}.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("no messages")
    for message in messages:
        if not isinstance(message, dict):
            raise ValueError(f"{message!r} should be an object with role and content")
    turns = messages[1:] if messages[0].get("role") == "system" else messages
    if turns is not messages and not isinstance(messages[0].get("content"), str):
        raise ValueError(f"the system message must be a text, not {messages[0].get('content')!r}")
    if not turns:
        raise ValueError("a system message, and nobody answers it")
    for i, message in enumerate(turns):
        role, content = message.get("role"), message.get("content")
        if role != ("user", "assistant")[i % 2]:
            raise ValueError(f"turn {i} is by {role!r}, but user and assistant take turns")
        parts = [content] if isinstance(content, str) else content
        if not isinstance(parts, list) or not parts or (role == "user" and parts is content):
            raise ValueError(f"turn {i}: content must be a text, not {content!r}")
        for part in parts:
            if part is not content and not (
                    isinstance(part, dict) and part.get("type") in PART_TOKENS
                    and isinstance(part.get("text"), str)):
                raise ValueError(f"turn {i}: {part!r} is no part of type {', '.join(PART_TOKENS)}")


def render_conversation(messages, tokenizer, max_tokens=257):
    """A conversation as (ids, mask), two lists of one length; mask 1: the model is to learn it.

    Trained: all that the assistant says, its calls of the calculator, and <|assistant_end|>, or it
    would never stop. Not trained: the user, <|assistant_start|> (the program writes it), and what
    the calculator answers. A system message becomes the beginning of the first user message.
    Whatever lies beyond max_tokens is cut off. Raises ValueError for a bad conversation.
    Source: nanochat/tokenizer.py::RustBPETokenizer.render_conversation.
    """
    check_messages(messages)
    special, ids, mask = tokenizer.encode_special, [tokenizer.get_bos_token_id()], [0]

    def add(tokens, trained):
        ids.extend(tokens)
        mask.extend([trained] * len(tokens))

    before = ""
    for message in messages:
        content = message["content"]
        if message["role"] == "system":
            before = content + "\n\n"
        elif message["role"] == "user":
            add([special("<|user_start|>"), *tokenizer.encode(before + content),
                 special("<|user_end|>")], 0)
            before = ""
        else:
            add([special("<|assistant_start|>")], 0)
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for part in parts:
                start, end, trained = PART_TOKENS[part["type"]]
                text = tokenizer.encode(part["text"])
                add([special(start), *text, special(end)] if start else text, trained)
            add([special("<|assistant_end|>")], 1)
    return ids[:max_tokens], mask[:max_tokens]


def render_for_completion(messages, tokenizer):
    """The ids after which the assistant is to speak: all but its last message, and its start token.

    Source: nanochat/tokenizer.py::RustBPETokenizer.render_for_completion.
    """
    messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    ids, _ = render_conversation(messages, tokenizer, max_tokens=None)
    return [*ids, tokenizer.encode_special("<|assistant_start|>")]


def render_rows(conversations, tokenizer, max_tokens=257):
    """(rows, counts): rendered conversations as (ids, mask), and how many were "cut" or "dropped".

    The rule: a row is cut at max_tokens, the end goes; a row that is left without one target is
    dropped, since the mean over no token is 0/0. Raises ValueError naming the conversation.
    """
    rows, counts = [], {"cut": 0, "dropped": 0}
    for number, conversation in enumerate(conversations):
        try:
            ids, mask = render_conversation(conversation["messages"], tokenizer, max_tokens + 1)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"conversation {number}: {error}") from error
        counts["cut"] += len(ids) > max_tokens
        ids, mask = ids[:max_tokens], mask[:max_tokens]
        if any(mask[1:]):
            rows.append((ids, mask))
        else:
            counts["dropped"] += 1
    return rows, counts


def collate(rows):
    """Rows (ids, mask) -> inputs, targets: LongTensors (B, T), T of the longest row less one.

    Targets are the inputs shifted by one, and -1 wherever the model is not to be trained: where the
    mask is 0, and in the padding on the right, which causal attention keeps from mattering.
    """
    T = max(len(ids) for ids, _ in rows) - 1
    inputs, targets = torch.zeros(len(rows), T, dtype=torch.long), torch.full((len(rows), T), -1)
    for row, (ids, mask) in enumerate(rows):
        n = len(ids) - 1
        inputs[row, :n] = torch.tensor(ids[:-1])
        # target t is id t + 1, and it counts where that id itself is trained: mask[t + 1]
        trained = torch.tensor(mask[1:], dtype=torch.bool)
        targets[row, :n] = torch.where(trained, torch.tensor(ids[1:]), -1)
    return inputs, targets


def read_conversations(path):
    """The conversations of a JSONL file, a list of dicts. Raises UserError naming file and line."""
    try:
        # Not splitlines: it would also cut at U+2028, which may stand inside of a text.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read conversations from {path} ({error}).") from error
    conversations = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            conversation = json.loads(line)
            check_messages(conversation["messages"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, line {number}, is no conversation ({error!r}); it should be "
                            'like {"messages": [{"role": "user", "content": "Hi"}, ...]}') from None
        conversations.append(conversation)
    if not conversations:
        raise UserError(f"{path} is empty: no conversation in it.")
    return conversations
# --- end shared ---


# ---- the loop ------------------------------------------------------------------------------------


def assistant_text(messages):
    """What the supervised tokens must spell: the assistant's words and calls, end tokens included.

    Written apart from render_conversation, so that the one can check the other.
    """
    around = {"text": "{}", "python": "<|python_start|>{}<|python_end|>", "python_output": ""}
    text = ""
    for message in messages:
        if message["role"] == "assistant":
            parts = message["content"]
            for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
                text += around[part["type"]].format(part["text"])
            text += "<|assistant_end|>"
    # half of an emoji, which JSON can spell and UTF-8 cannot, is U+FFFD to the tokenizer
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def print_row(ids, mask, tokenizer, colour):
    """A row as a table, what is trained in green: at each place the input and its target."""
    inputs, targets = (tensor[0].tolist() for tensor in collate([(ids, mask)]))
    print(f"{'place':>5} {'id':>5}  {'text':<20} {'mask':>4}  target")
    for t, (token, target) in enumerate(zip(inputs, targets)):
        text = repr(tokenizer.decode([token]))[1:-1]
        goal = "-1" if target == -1 else f"{target} {tokenizer.decode([target])!r}"
        line = f"{t:>5} {token:>5}  {text:<20} {mask[t]:>4}  {goal}"
        print(f"\033[32m{line}\033[0m" if colour and target != -1 else line)
    print()


def load_conversations(cfg):
    """[(name, conversations)] of the files asked for, those in data_dir, or the examples."""
    paths = list(cfg.file) or [path for name in FILES if (path := cfg.data_dir / name).exists()]
    if paths:
        return [(path.name, read_conversations(path)) for path in paths]
    print(f"no conversations in {cfg.data_dir}: two examples instead (get some: "
          "python edu/06_identity.py)")
    return [("examples", EXAMPLES)]


def run_sft_data(cfg):
    if cfg.max_tokens < 2 or cfg.batch_size < 1 or cfg.show < 0:
        raise UserError(f"--max-tokens {cfg.max_tokens} (at least 2), --batch-size "
                        f"{cfg.batch_size} (at least 1), --show {cfg.show} (at least 0).")
    # 1. a tokenizer and conversations
    has_tokenizer = (cfg.data_dir / "tokenizer").exists()
    tokenizer = Tokenizer.from_dir(cfg.data_dir / "tokenizer") if has_tokenizer else \
        byte_tokenizer()
    print(f"07 sft data - {tokenizer.get_vocab_size()} tokens"
          f"{'' if has_tokenizer else ' (bytes: no tokenizer is trained)'} - seed {cfg.seed}")
    sources = load_conversations(cfg)

    # 2. rows, and what was cut
    everything, rows, checked = [], [], 0
    print(f"{'file':<22} {'rows':>6} {'ids':>8} {'trained':>8} {'longest':>8} {'cut':>5} dropped")
    for name, conversations in sources:
        new, counts = render_rows(conversations, tokenizer, cfg.max_tokens)
        ids, trained = sum(len(i) for i, _ in new), sum(sum(m[1:]) for _, m in new)
        print(f"{name:<22} {len(new):>6} {ids:>8} {trained / max(1, ids):>8.0%} "
              f"{max((len(i) for i, _ in new), default=0):>8} {counts['cut']:>5} "
              f"{counts['dropped']:>7}")
        rows += new
        everything += conversations
    if not rows:
        raise UserError(f"not one conversation has a target within --max-tokens {cfg.max_tokens}: "
                        "allow more.")

    # 3. one at random, token by token; then a batch
    generator = torch.Generator().manual_seed(cfg.seed)
    order = torch.randperm(len(rows), generator=generator).tolist()
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for index in order[: cfg.show]:
        print_row(*rows[index], tokenizer, colour)
    batch = [rows[index] for index in order[: cfg.batch_size]]
    inputs, targets = collate(batch)
    print(f"a batch: inputs and targets {tuple(inputs.shape)}, of {targets.numel()} places "
          f"{(targets != -1).float().mean():.0%} trained, "
          f"{1 - sum(len(ids) - 1 for ids, _ in batch) / inputs.numel():.0%} padding")

    # 4. what is trained is what the assistant says, for every conversation that was not cut
    for conversation in everything:
        (ids, mask), messages = render_conversation(conversation["messages"], tokenizer, None), \
            conversation["messages"]
        spoken = tokenizer.decode([token for token, trained in zip(ids, mask) if trained])
        assert spoken == assistant_text(messages), (spoken, assistant_text(messages))
        checked += 1
    print(f"supervised text = what the assistant says: true for {checked} conversations")
    total, trained = sum(len(ids) for ids, _ in rows), sum(sum(mask[1:]) for _, mask in rows)
    print(f"result: supervised share of the tokens 1.00 -> {trained / total:.2f} (n={total})")
    print("next: python edu/08_sft.py")


# ---- the command line ----------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    return run_script(run_sft_data, Config, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
