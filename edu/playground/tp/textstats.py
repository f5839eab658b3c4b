"""Measures of sampled text and of predictions: pure functions, no model and no torch.

A word is what stands between white space. Every share comes with its n, and with a 95% interval
that fits what was drawn: samples are independent of each other, n-grams of one sample are not.
"""

import math
from collections import Counter

import numpy as np

Z95 = 1.959964  # 95% of a normal distribution lie within so many standard deviations


# ---- shares and their intervals ------------------------------------------------------------------


def wilson(hits, n):
    """95% interval (low, high) of a share hits / n of independent draws; (0, 1) for n = 0.

    Unlike hits/n +- 1.96 s it stays within 0..1 and has a width at 0 and at n hits.
    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    if n == 0:
        return 0.0, 1.0
    # (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    p, z2 = hits / n, Z95 * Z95
    middle = p + z2 / (2 * n)
    reach = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low, high = (middle - reach) / (1 + z2 / n), (middle + reach) / (1 + z2 / n)
    return max(0.0, low) if hits else 0.0, min(1.0, high) if hits < n else 1.0


def share(hits, n):
    """{"share", "n", "low", "high"}; the share of nothing is None."""
    low, high = wilson(hits, n)
    return {"share": hits / n if n else None, "n": n, "low": low, "high": high}


def clustered_share(hits, totals, draws=2000, seed=0):
    """The same for sum(hits) / sum(totals), where what comes from one text hangs together.

    hits, totals: one count per text. The interval is the bootstrap's: whole texts are drawn again
    with replacement, because n-grams that overlap are no independent draws. Where all or none are
    hits, every such draw looks the same, and the interval is that of as many shares as there are
    texts. Source: Efron 1979.
    """
    hits, totals = np.asarray(hits, dtype=float), np.asarray(totals, dtype=float)
    if not totals.sum():
        return share(0, 0)
    if hits.sum() in (0, totals.sum()):
        texts = int((totals > 0).sum())
        return {**share(texts if hits.sum() else 0, texts), "n": int(totals.sum())}
    rows = np.random.default_rng(seed).integers(len(totals), size=(draws, len(totals)))
    below = totals[rows].sum(axis=1)
    means = hits[rows].sum(axis=1)[below > 0] / below[below > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return {"share": float(hits.sum() / totals.sum()), "n": int(totals.sum()),
            "low": float(low), "high": float(high)}


# ---- how varied, how new -------------------------------------------------------------------------


def tidy(text):
    """White space made single, so that a stray blank does not make an old phrase a new one."""
    return " ".join(text.split())


def ngrams(text, n):
    """The word n-grams of a text, in order: "a b c", 2 -> [("a", "b"), ("b", "c")]."""
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def distinct(texts, n):
    """{"share": different n-grams / all n-grams of all texts, "n": how many there are}.

    It falls as more text is drawn, from anybody: compare only equal numbers of texts.
    Source: Li et al. 2016, arXiv:1510.03055 (distinct-1, distinct-2).
    """
    found = [gram for text in texts for gram in ngrams(text, n)]
    return {"share": len(set(found)) / len(found) if found else None, "n": len(found)}


def novelty(texts, training):
    """Share of the texts that are no training phrase. Empty texts are left out: they are nothing,
    and would count as new."""
    known = {tidy(phrase) for phrase in training}
    told = [tidy(text) for text in texts if text.strip()]
    return share(sum(text not in known for text in told), len(told))


def ngram_novelty(texts, training, n):
    """Share of the texts' word n-grams that no training phrase holds."""
    known = {gram for phrase in training for gram in ngrams(phrase, n)}
    found = [ngrams(text, n) for text in texts]
    return clustered_share([sum(gram not in known for gram in grams) for grams in found],
                           [len(grams) for grams in found])


def duplicates(texts):
    """Share of the texts that repeat an earlier one, and the text that comes most often."""
    counts = Counter(tidy(text) for text in texts if text.strip())
    n = sum(counts.values())
    text, times = max(counts.items(), key=lambda item: item[1], default=("", 0))
    return {"share": 1 - len(counts) / n if n else None, "n": n, "most_repeated": text,
            "times": times}


# ---- how much is copied --------------------------------------------------------------------------


class Spans:
    """Finds the longest stretch that a sequence shares with any of many others.

    A suffix array: all starting points in the order of what follows them, so that one bisection
    tells whether a stretch occurs. N log N to build and log N a look-up, for N items in all; trying
    every pair of positions is N times the sample's length. Works on str and on lists of words.
    Source: Manber and Myers 1990, Suffix arrays: a new method for on-line string searches.
    """

    def __init__(self, sequences, end, limit):
        """end: an item that no sample holds, put after each sequence, so that no stretch runs from
        one into the next. limit: no stretch longer than this is ever asked for."""
        self.items = end[:0]
        if isinstance(end, str):
            self.items = "".join(sequence + end for sequence in sequences)
        else:
            self.items = [item for sequence in sequences for item in [*sequence, *end]]
        self.starts = sorted(range(len(self.items)), key=lambda i: self.items[i : i + limit])

    def holds(self, stretch):
        """Whether any of the sequences holds this stretch (at most `limit` long)."""
        size, low, high = len(stretch), 0, len(self.starts)
        while low < high:
            middle = (low + high) // 2
            start = self.starts[middle]
            if self.items[start : start + size] < stretch:
                low = middle + 1
            else:
                high = middle
        found = self.starts[low] if low < len(self.starts) else len(self.items)
        return size == 0 or self.items[found : found + size] == stretch

    def longest(self, sample):
        """The longest stretch of the sample that occurs; the first of equals."""
        begin = size = 0
        for i in range(len(sample)):
            # Part of a stretch that occurs, occurs: only what is longer than the best is tried.
            while i + size < len(sample) and self.holds(sample[i : i + size + 1]):
                begin, size = i, size + 1
        return sample[begin : begin + size]


def copied_spans(texts, training):
    """For each text the longest stretch found in one training phrase: [{"characters", "words",
    "copied": the characters, "of": characters of the text}, ...]."""
    texts, training = [tidy(text) for text in texts], [tidy(phrase) for phrase in training]
    by_character = Spans(training, "\n", max((len(text) for text in texts), default=0))
    by_word = Spans([phrase.split() for phrase in training], ["\n"],
                    max((len(text.split()) for text in texts), default=0))
    found = []
    for text in texts:
        copied, words = by_character.longest(text), by_word.longest(text.split())
        found.append({"characters": len(copied), "words": len(words), "copied": copied,
                      "copied_words": " ".join(words), "of": len(text)})
    return found


# ---- lengths -------------------------------------------------------------------------------------

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def quantiles(values):
    """{"0.5": the smallest value that half of all do not exceed, ...}; None for no values."""
    ordered = sorted(values)
    return {f"{q:g}": ordered[max(0, math.ceil(q * len(ordered)) - 1)] if ordered else None
            for q in QUANTILES}


def earth_mover(a, b):
    """How far, on average, the values of one list must be moved to become those of the other.

    In the values' own unit: 1.5 words, say. None if a list is empty.
    Source: Vallender 1974, the Wasserstein distance of distributions on the line.
    """
    if not len(a) or not len(b):
        return None
    a, b = np.sort(a), np.sort(b)
    # W = integral over x of |F_a(x) - F_b(x)|
    x = np.union1d(a, b)
    F_a = np.searchsorted(a, x, side="right") / len(a)
    F_b = np.searchsorted(b, x, side="right") / len(b)
    return float(np.sum(np.abs(F_a - F_b)[:-1] * np.diff(x)))


# ---- calibration ---------------------------------------------------------------------------------


def calibration(confidence, right, bins=10):
    """Whether a prediction made with confidence 0.7 is right 7 times in 10.

    confidence: (N,) probability of the likeliest token; right: (N,) whether it was the next one.
    Returns {"ece", "n", "bins": [{"low", "high", "n", "confidence", "accuracy", interval}, ...]}.
    ECE is 0 for a model that knows what it does not know. Source: Guo et al. 2017,
    arXiv:1706.04599.
    """
    confidence, right = np.asarray(confidence, dtype=float), np.asarray(right, dtype=bool)
    place = np.minimum((confidence * bins).astype(int), bins - 1)  # confidence 1 is in the last
    rows, ece = [], 0.0
    for b in range(bins):
        here = place == b
        n, hits = int(here.sum()), int(right[here].sum())
        low, high = wilson(hits, n)
        row = {"low": b / bins, "high": (b + 1) / bins, "n": n, "confidence": None,
               "accuracy": None, "accuracy_low": low, "accuracy_high": high}
        if n:
            row["confidence"], row["accuracy"] = float(confidence[here].mean()), hits / n
            # ECE = sum_b n_b / N |accuracy_b - confidence_b|
            ece += n / len(right) * abs(row["accuracy"] - row["confidence"])
        rows.append(row)
    return {"ece": ece if len(right) else None, "n": len(right), "bins": rows}
