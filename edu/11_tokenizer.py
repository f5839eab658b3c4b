"""Challenge 11: teach a machine to spell, by merging the commonest pair of symbols again and again.

Goal:
    Train a byte-level BPE tokenizer on the shards: every text becomes a list of small integers and
    comes back byte for byte, and a common word costs one token instead of one per letter. The
    vocabulary is what the model's first and last layers are as tall as, so size is a trade.

You will learn:
    - byte-pair encoding: 256 bytes, then one new token per merge, and why the order is the model
    - why text is first split by a pattern: no token may straddle words, digits stay apart
    - why special tokens live outside the text: a user who types <|bos|> gets small tokens of text
    - why bytes: no unknown token, any emoji or broken UTF-8 survives the round trip
    - how to compare tokenizers: bytes per token, on text that it was not trained on

Read beside:
    nanochat/tokenizer.py::RustBPETokenizer, scripts/tok_train.py, scripts/tok_eval.py (Nov 2025).
    Same trainer and same nine special tokens. Better here: plain files instead of a pickle, a hash
    that names the tokenizer, raw byte lengths (nanochat measured a lone byte as three), no panic
    on a million spaces, and a clear word when there is too little text for the vocabulary.

Run:
    python edu/11_tokenizer.py
    python edu/11_tokenizer.py --vocab-size 1024 --digits 2

Expect:
    11 tokenizer - cpu - 2048 tokens - numbers split after 1 digit - 4 training shards
    round trip: 14 awkward texts and 2048 tokens come back byte for byte
    wrote ...tokenizer/tokenizer.tiktoken
    result: val bytes per token 1.00 -> 2.92 (n=549724)
    next: python edu/12_pretrain.py

Writes:
    tokenizer/tokenizer.tiktoken, tiktoken's rank file: base64 of the token, a space, its rank
    tokenizer/config.json, with the split pattern, special tokens, sha256 identity, vocabulary size
"""
import base64
import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import rustbpe
import tiktoken
import tyro

# ---- settings -----------------------------------------------------------------------------------

BYTES = 256  # ids 0..255 are the bytes themselves
AWKWARD_TEXTS = (
    "", " ", "plain words, and a number: 1234567.", "line\r\nline\rline\n\n\n\tindented   \n",
    "I'll say it's THEY'RE we'd", "na\u00efve caf\u00e9 \u2014 \u201cquotes\u201d \u2026",
    "\u4f60\u597d\uff0c\u4e16\u754c", "\u0645\u0631\u062d\u0628\u0627",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7 \U0001f44d\U0001f3fd",
    "e\u0301 and \u00e9 look alike", "zero\x00byte \x7f\x1b[0m", "\ufeffmark \u200b\u00a0\u3000",
    "<|bos|>user text that spells <|assistant_end|>", "a" * 3000 + " " * 3000,
)


@dataclass
class Config:
    data_dir: Path = field(default_factory=lambda: Path(os.environ.get("EDU_DATA", "data")))
    """folder of the shards; the tokenizer goes into its subfolder tokenizer/"""
    vocab_size: int = 2048
    """all ids: 256 bytes, merges, 9 special tokens. More ids carry more bytes each, but the head's
    arithmetic grows with them; a world of under 2000 words needs no more (nanochat: 65536)"""
    digits: int = 1
    """digits per token at most: 1 lets a tiny model learn sums, nanochat takes 2, GPT-4 took 3"""
    max_chars: int = 100_000_000
    """stop reading here: two cores count this much in about 10 s, and more hardly moves a merge"""
    doc_cap: int = 10_000
    """characters taken of one document, lest a single long one dictate merges (as nanochat)"""
    eval_chars: int = 2_000_000
    """characters of train and of validation text on which bytes per token are measured"""
    gpt2: bool = True
    """compare with GPT-2's tokenizer, which tiktoken has cached or fetches from the network"""
    gpt2_patience: float = 3.0
    """seconds to wait for it: a comparison is not worth a hang"""


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


# --- shared: atomic-write (home: 01_download.py) ---
@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`; flush it to disk and rename it only on success.

    os.replace is atomic within one folder, so a reader sees the old file or the new one whole,
    never half of it, whatever kills the writer.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
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


# --- shared: parquet (home: 02_dataloader.py) ---
def list_shards(data_dir, split="train"):
    """Paths of a split in order: the last shard is "val", all before it are "train".

    Raises UserError when there is nothing to read. Source: nanochat/dataset.py.
    """
    paths = sorted(Path(data_dir).glob("shard_*.parquet"))
    if len(paths) < 2:
        found = (f"there is only {paths[0].name}, and the last shard is validation" if paths else
                 "there are none" if Path(data_dir).is_dir() else "the folder does not exist")
        raise UserError(f"{data_dir} must hold two or more shard_*.parquet, but {found}; get them: "
                        "python edu/01_download.py (or, with no network, python "
                        "edu/00_tiny_world.py and python edu/01_download.py --base-url mirror)")
    return paths[:-1] if split == "train" else paths[-1:]


def open_shard(path):
    """An open ParquetFile with text in it. Raises UserError naming what is wrong with the file."""
    remedy = f"delete {path} and fetch it again: python edu/01_download.py"
    try:
        # read page by page through a small buffer: pre_buffer would hold a whole row group's bytes
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; get it: python edu/01_download.py") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a parquet file ({error}); {remedy}") from None
    schema = file.schema_arrow
    kind = schema.field("text").type if "text" in schema.names else None
    if kind not in (pa.string(), pa.large_string()):
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise UserError(f"{path} has no string column `text`, only {columns}; {remedy}")
    if file.metadata.num_rows == 0:
        raise UserError(f"{path} has no rows; {remedy}")
    return file


def parquet_texts(paths, rank=0, world_size=1, start=None):
    """Yield the documents (str) of row groups rank, rank + world_size, ... one group at a time.

    Row groups are counted across all files, so no rank starves when a file has fewer groups than
    there are ranks. start: how many of this rank's documents to skip; whole groups are skipped
    by their footer, unread. Raises UserError for a bad file, or a rank that has nothing to read.
    Source: nanochat/dataloader.py::tokenizing_distributed_data_loader.
    """
    groups, skip = 0, start or 0
    for path in paths:
        with open_shard(path) as file:
            mine = [g for g in range(file.num_row_groups) if (groups + g) % world_size == rank]
            groups += file.num_row_groups
            for group in mine:
                rows = file.metadata.row_group(group).num_rows
                if skip >= rows:
                    skip -= rows
                    continue
                try:
                    # one thread: arrow's own would each hold a page, and tokenizing takes longer
                    batches = file.iter_batches(128, [group], ["text"], use_threads=False)
                    for batch in batches:
                        texts = batch.column(0).to_pylist()
                        if None in texts:
                            raise ValueError("a text is null")
                        yield from texts[skip:]
                        skip = max(0, skip - len(texts))
                except (pa.ArrowException, OSError, ValueError) as error:  # also bad UTF-8
                    raise UserError(f"{path} is damaged in row group {group} ({error}); delete it "
                                    "and fetch it again: python edu/01_download.py") from None
    if groups <= rank:
        raise UserError(f"rank {rank} of {world_size} has nothing to read: the {len(paths)} shards "
                        f"hold {groups} row groups; start at most {groups} processes")
# --- end shared ---


# --- shared: gpt2 (home: 02_dataloader.py) ---
def fetch_gpt2(patience):
    """GPT-2's encoding as tiktoken has it cached or fetches it: (encoding, "") or (None, reason).

    tiktoken sets no timeout, so a dead network could hold it for ever: a daemon thread may be left
    behind after `patience` seconds, and does not keep the process alive.
    """
    answer = [None, f"no answer within {patience:g} s"]

    def fetch():
        try:
            answer[:] = tiktoken.get_encoding("gpt2"), ""
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            answer[1] = f"{type(error).__name__}: its file is neither cached nor reachable"

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(patience)
    return tuple(answer)
# --- end shared ---


# ---- the idea -----------------------------------------------------------------------------------

def split_pattern(digits):
    """The pattern that cuts text into pieces; merges happen inside a piece only.

    It is GPT-4's with `digits` digits in a row at most (nanochat: 2).
    """
    return "|".join((
        r"'(?i:[sdmt]|ll|ve|re)",  # it's, don't, we'll
        r"[^\r\n\p{L}\p{N}]?+\p{L}+",  # a word, with the space before it
        r"\p{N}" if digits == 1 else rf"\p{{N}}{{1,{digits}}}",
        r" ?[^\s\p{L}\p{N}]++[\r\n]*",  # marks, with the line end after them
        r"\s*[\r\n]",  # blank lines
        # Spaces but the last, which goes to the next word. The cap is ours: the regex engine keeps
        # one way back per space, and without it 1 MB of spaces overflows its stack and panics.
        r"\s{1,100000}(?!\S)",
        r"\s+",
    ))


def training_texts(paths, max_chars, doc_cap):
    """Yield documents cut to doc_cap characters until max_chars are out."""
    for text in parquet_texts(paths):
        text = text[: min(doc_cap, max_chars)]
        max_chars -= len(text)
        yield text
        if max_chars <= 0:
            return


def train_bpe(texts, vocab_size, pattern):
    """Merge the commonest adjacent pair until the ids are used up; {token bytes: rank} in order.

    Of equally common pairs the one with the smaller (left id, right id) goes first, so the order
    of the documents and of the threads does not matter. Counts include overlaps (aaa has aa twice).
    Raises UserError when the text runs out of pairs first.
    Sources: Sennrich et al. 2016; nanochat's rustbpe, the trainer used here.
    """
    merges = vocab_size - BYTES - len(SPECIAL_TOKENS)
    if merges < 1:
        raise UserError(f"--vocab-size {vocab_size} leaves no merge: {BYTES} bytes and "
                        f"{len(SPECIAL_TOKENS)} special tokens come first; use 512 or more")
    chars = 0

    def counted():
        nonlocal chars
        for text in texts:
            chars += len(text)
            yield text

    trainer = rustbpe.Tokenizer()
    # the small buffer bounds memory: this many documents are held as text at a time
    trainer.train_from_iterator(counted(), BYTES + merges, buffer_size=1024, pattern=pattern)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) < BYTES + merges:
        most = len(ranks) + len(SPECIAL_TOKENS)
        raise UserError(
            f"--vocab-size {vocab_size} needs {merges} merges, but in {chars} characters of text "
            f"every piece was whole after {len(ranks) - BYTES}; give more text (--max-chars, more "
            f"shards) or: python edu/11_tokenizer.py --vocab-size {most}")
    return ranks


def save_tokenizer(path, ranks, pattern, **facts):
    """Write rank file and config.json to folder `path`; returns the tokenizer as read back."""
    special_tokens = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
    order = sorted(ranks, key=ranks.get)
    rank_file = b"".join(b"%s %d\n" % (base64.b64encode(t), ranks[t]) for t in order)
    config = {
        "pattern": pattern, "special_tokens": special_tokens,
        "vocab_size": len(ranks) + len(special_tokens),
        "sha256": Tokenizer.identity(rank_file, pattern, special_tokens), **facts,
    }
    with atomic_write(Path(path) / "tokenizer.tiktoken") as temporary:
        temporary.write_bytes(rank_file)
    with atomic_write(Path(path) / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return Tokenizer.from_dir(path)


def merge_steps(piece, ranks):
    """Encode one piece (bytes) by hand: yield its parts before and after each merge.

    The neighbours whose union has the lowest rank join first, as in training. This is slow and
    says everything; tiktoken does the same fast.
    """
    parts = [piece[i : i + 1] for i in range(len(piece))]
    yield list(parts)
    while True:
        # rank, place = min over i of (rank(parts_i + parts_i+1), i)
        unions = [(ranks.get(a + b), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
        unions = [union for union in unions if union[0] is not None]
        if not unions:
            return
        place = min(unions)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
        yield list(parts)


def prove_round_trip(tokenizer):
    """Check that text and tokens survive; returns the number of texts and of tokens tried."""
    specials = range(tokenizer.get_vocab_size() - len(SPECIAL_TOKENS), tokenizer.get_vocab_size())
    for text in AWKWARD_TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode_bytes(ids) == text.encode(), (text, ids)
        assert not set(ids) & set(specials), (text, ids)
    for byte in range(BYTES):  # each alone: no text, if not UTF-8, but ids bring it back
        (token,) = tokenizer.encoding._encode_single_piece(bytes([byte]))
        assert tokenizer.decode_bytes([token]) == bytes([byte]), byte
    for i in range(specials.start):
        token = tokenizer.decode_bytes([i])
        assert tokenizer.encoding._encode_single_piece(token) == [i], (i, token)
    for special, i in zip(SPECIAL_TOKENS, specials):
        assert tokenizer.encode_special(special) == i and tokenizer.decode([i]) == special, special
    return len(AWKWARD_TEXTS), tokenizer.get_vocab_size()


def bytes_per_token(encoding, texts):
    """How much text one token carries: UTF-8 bytes of `texts` (list of str) over tokens."""
    tokens = sum(map(len, encoding.encode_ordinary_batch(texts)))
    return sum(len(text.encode()) for text in texts) / max(tokens, 1)


def print_comparison(tokenizer, train, val, config):
    """The table of bytes per token; returns ours on validation text."""
    print(f"{'tokenizer':<10} {'vocab':>6}  bytes/token: train    val")
    print(f"{'bytes':<10} {BYTES:>6} {1:>19.2f} {1:>6.2f}")
    ours = bytes_per_token(tokenizer.encoding, val)
    rows = [("this one", tokenizer.encoding)]
    if config.gpt2:
        gpt2, reason = fetch_gpt2(config.gpt2_patience)
        rows += [("gpt2", gpt2)] if gpt2 else []
    for name, encoding in rows:
        on_train, on_val = bytes_per_token(encoding, train), bytes_per_token(encoding, val)
        print(f"{name:<10} {encoding.n_vocab:>6} {on_train:>19.2f} {on_val:>6.2f}")
    if config.gpt2 and not gpt2:
        print(f"gpt2 not compared ({reason})")
    return ours


# ---- the loop -----------------------------------------------------------------------------------

def run(config):
    if not 1 <= config.digits <= 9:
        raise UserError(f"--digits {config.digits} is not in 1..9; nanochat takes 2, tiny models 1")
    if min(config.max_chars, config.doc_cap, config.eval_chars) < 1:
        raise UserError("--max-chars, --doc-cap and --eval-chars must be 1 or more")
    train_paths, val_paths = (list_shards(config.data_dir, split) for split in ("train", "val"))
    print(f"11 tokenizer - cpu - {config.vocab_size} tokens - numbers split after {config.digits} "
          f"digit{'s' * (config.digits > 1)} - {len(train_paths)} training shards")

    # 1. train  2. save and load  3. prove  4. measure
    began = time.perf_counter()
    pattern = split_pattern(config.digits)
    texts = training_texts(train_paths, config.max_chars, config.doc_cap)
    ranks = train_bpe(texts, config.vocab_size, pattern)
    print(f"trained {len(ranks) - BYTES} merges in {time.perf_counter() - began:.1f} s")

    folder = config.data_dir / "tokenizer"
    tokenizer = save_tokenizer(folder, ranks, pattern, digits=config.digits,
                               max_chars=config.max_chars, doc_cap=config.doc_cap)

    tried = prove_round_trip(tokenizer)
    print(f"round trip: {tried[0]} awkward texts and {tried[1]} tokens come back byte for byte")
    in_order = sorted(ranks, key=ranks.get)[BYTES:]
    show = [token.decode("utf-8", "replace") for token in in_order]
    print(f"first merges: {' '.join(map(repr, show[:8]))}")
    print(f"longest tokens: {' '.join(map(repr, sorted(show, key=len)[-5:]))}")
    plain = [token for token in in_order[:500] if token.isascii()]
    word = max(plain or in_order[:500], key=len)  # a text may have no ASCII at all
    steps = ["|".join(part.decode("utf-8", "replace") for part in parts)
             for parts in merge_steps(word, ranks)]
    print(f"how a word grows: {' -> '.join(steps)}")

    train = list(training_texts(train_paths, config.eval_chars, config.doc_cap))
    val = list(training_texts(val_paths, config.eval_chars, config.doc_cap))
    ours = print_comparison(tokenizer, train, val, config)

    print(f"wrote {folder / 'tokenizer.tiktoken'}")
    print(f"wrote {folder / 'config.json'} (sha256 {tokenizer.sha256[:12]})")
    print(f"result: val bytes per token 1.00 -> {ours:.2f} (n={sum(len(t.encode()) for t in val)})")
    print("next: python edu/12_pretrain.py")
    return 0


# ---- the command line ---------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> int:
    return run_script(run, Config, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
