"""Phrases: read, split, turned into rows of ids, put into batches; and what counting alone gives.

A phrase is one sequence: BOS, its tokens, EOS. A row holds one phrase, so phrases never see each
other. Rows of about the same length go into one batch, and padding stands on the right, where
causal attention never looks back from; its targets are -1, which the loss leaves out.

B phrases in a batch, T tokens in the longest, V vocabulary.
"""

import hashlib
import math
import random
from collections import Counter
from pathlib import Path

import torch

from tp.errors import UserError

IGNORED = -1  # a target that is not trained: padding


def read_phrases(path):
    """The phrases of a text file, one per line; spaces at the ends and empty lines are dropped.

    Raises UserError for a file that is missing, not UTF-8, or too short to split.
    """
    try:
        text = Path(path).read_text("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read data.path={path}: {error.strerror}\n"
                        "  start tp in the folder that holds it, or tp train --set data.path=FILE"
                        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start} is "
                        f"{error.object[error.start]:#04x}); save it as UTF-8") from error
    # Not splitlines(): it also cuts at rare separators, which then would be neither here nor there.
    phrases = [line.strip() for line in text.split("\n")]
    phrases = [phrase for phrase in phrases if phrase]
    if len(set(phrases)) < 2:
        raise UserError(f"{path} has {len(set(phrases))} different phrase(s): at least 2 are "
                        "needed, one to train on and one to validate with")
    return phrases


def split(phrases, val_fraction, seed):
    """(train, val): whole phrases, all copies of one on the same side, in the order of the file.

    Which side depends on the set of phrases and the seed, not on their order in the file.
    """
    unique = sorted(set(phrases))
    random.Random(seed).shuffle(unique)
    count = min(max(1, round(val_fraction * len(unique))), len(unique) - 1)
    held_out = set(unique[:count])
    return ([p for p in phrases if p not in held_out], [p for p in phrases if p in held_out])


def load_split(config):
    """(train, val) phrases of a DataConfig. Raises UserError."""
    return split(read_phrases(config.path), config.val_fraction, config.split_seed)


def fingerprint(phrases):
    """sha256 of the phrases in order: a resumed run must see the same ones."""
    return hashlib.sha256("\n".join(phrases).encode()).hexdigest()


def to_rows(phrases, tokenizer, block_size):
    """A list of id lists, each of 2 to block_size + 1 ids: BOS, the phrase, EOS.

    A phrase too long for the block becomes several rows, each of which begins with the last id of
    the one before: every token is predicted exactly once, the later ones with less context.
    """
    rows = []
    for phrase in phrases:
        ids = [tokenizer.bos_id, *tokenizer.encode(phrase), tokenizer.eos_id]
        rows += [ids[i : i + block_size + 1] for i in range(0, len(ids) - 1, block_size)]
    return rows


def collate(rows):
    """(inputs, targets), LongTensors (B, T): targets are the inputs' next ids, -1 on padding."""
    longest = max(map(len, rows)) - 1
    inputs = torch.zeros(len(rows), longest, dtype=torch.long)
    targets = torch.full((len(rows), longest), IGNORED)
    for i, row in enumerate(rows):
        inputs[i, : len(row) - 1] = torch.tensor(row[:-1])
        targets[i, : len(row) - 1] = torch.tensor(row[1:])
    return inputs, targets


def batches_of_epoch(rows, batch_size, seed, epoch):
    """All rows once, as lists of batch_size row indices (the last may be shorter), shuffled anew.

    The order depends on (seed, epoch) alone, so that a resumed run need not replay anything.
    Sorting pools of 16 batches by length keeps padding small and the order random enough.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(rows)))
    rng.shuffle(order)
    pool, batches = 16 * batch_size, []
    for start in range(0, len(order), pool):
        by_length = sorted(order[start : start + pool], key=lambda i: len(rows[i]))
        batches += [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    rng.shuffle(batches)
    return batches


def ordered_batches(rows, batch_size=128):
    """(inputs, targets) of all rows, shortest first, for evaluation."""
    rows = sorted(rows, key=len)
    return [collate(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]


def count_bytes(phrases):
    """UTF-8 bytes of the phrases, one more for each line's end: that is what EOS stands for."""
    return sum(len(phrase.encode()) + 1 for phrase in phrases)


def ladder(train_rows, val_rows, vocab_size):
    """Nats per token on val_rows of three models made by counting: uniform, unigram, bigram.

    A network that is not below "bigram" has not learned to use context. The unigram adds one to
    each count. The bigram falls back on it, p(b|a) = (n_ab + m p(b)) / (n_a + m), with the best m
    of six on the validation rows themselves: a hard rung, on purpose.
    """
    following = Counter(id for row in train_rows for id in row[1:])
    total = sum(following.values()) + vocab_size
    pairs = Counter(pair for row in train_rows for pair in zip(row, row[1:]))
    before = Counter(id for row in train_rows for id in row[:-1])
    test = Counter(pair for row in val_rows for pair in zip(row, row[1:]))
    unigram = {b: (following[b] + 1) / total for _, b in test}

    def nats(probability):
        return -sum(n * math.log(probability(a, b)) for (a, b), n in test.items()) / test.total()

    bigrams = [nats(lambda a, b: (pairs[a, b] + m * unigram[b]) / (before[a] + m))
               for m in (1, 2, 5, 10, 20, 50)]
    return {"uniform": math.log(vocab_size), "unigram": nats(lambda a, b: unigram[b]),
            "bigram": min(bigrams)}
