"""Train a small GPT on a table, on JSON lines or on plain text, and ask it what it has learned.

    python explore.py --data examples/data.csv --epochs 2 --output gpt_knowledge.pth
    python explore.py --data examples/data.csv --ask gpt_knowledge.pth --complete "bird: owl; "

Every row becomes a line, `field: value; field: value`, and the model learns the lines. Then:
    most surprising rows    those it would least have expected, each judged by a model that has not
                            seen it
    next values             what it expects in a field, given others; checked on unseen rows
    terms                   the words, how often and how unevenly they occur
    co-occurrences          pairs that come together more often than chance has it (counted)
On the terminal and, with --output or --report, as an HTML page that needs nothing but itself.
--ask puts questions to a model that is there already, at once; without it, one is trained.
"""

import argparse
import codecs
import contextlib
import csv
import html
import itertools
import json
import math
import re
import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from model import UserError, load_gpt, save_gpt, settings_path, write_whole
from train import (
    IGNORE,
    ROW_UPDATES,
    add_training_flags,
    check_folder,
    check_output,
    decode,
    digest,
    encode,
    fit,
    headline,
    lines_to_rows,
    model_for,
    pick_device,
    row_losses,
    run_cli,
    say_ladder,
    say_result,
    say_stopped,
    seen_now,
    seen_texts,
)

SHOWN = 10  # rows of each table on the terminal
# What a terminal would obey rather than show, and halves of characters, which no file can hold
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")


@dataclass
class Row:
    """One row of the data: the line it stands on, its values by field, and its text."""

    number: int
    values: dict
    text: str


# ---- bytes to text -------------------------------------------------------------------------------

MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"),
         (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
         (codecs.BOM_UTF16_BE, "utf-16"))  # UTF-32's little-endian mark begins with UTF-16's


def read_any_text(path):
    """(text, encoding, note) of a file in UTF-8, UTF-16, UTF-32 or Windows' Latin alphabet.

    The last is a guess, made aloud in note: any bytes at all are text in it. Line breaks come as
    \\n. Raises UserError.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--data {path} cannot be read: {error.strerror}") from None
    encoding = next((name for mark, name in MARKS if raw.startswith(mark)), "utf-8")
    note = ""
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            raise UserError(f"--data {path} begins as {encoding}, but is damaged at byte "
                            f"{error.start}") from None
        text, encoding = decode_latin(raw)
        note = (f"not UTF-8 (byte {error.start} is 0x{raw[error.start]:02x}): read as {encoding}, "
                "which is a guess; look at the accents below")
    if "\0" in text:
        raise UserError(f"--data {path} holds zero bytes: it is no text, or UTF-16 without its "
                        f"mark; convert it:\n  iconv -f UTF-16LE -t UTF-8 {path} > utf8.txt")
    if not text.strip():
        raise UserError(f"--data {path} is empty: there is nothing to learn from")
    return text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n"), encoding, note


def decode_latin(raw):
    """(text, encoding): Windows' 1252 leaves five bytes undefined, ISO's Latin-1 none."""
    try:
        return raw.decode("cp1252"), "cp1252"
    except UnicodeDecodeError:
        return raw.decode("latin-1"), "latin-1"


# ---- text to rows --------------------------------------------------------------------------------


def one_line(text):
    return " ".join(CONTROL.sub(" ", text).split())


def clean(value):
    """A value on one line, without the ; that ends it in a row's text."""
    return one_line(str(value).replace(";", ","))


def fields_of(rows):
    """The names of all fields, in the order in which they first occur."""
    return list(dict.fromkeys(field for row in rows for field in row.values))


def row_text(values):
    """The template: `field: value; field: value`, empty values left out."""
    return "; ".join(f"{field}: {value}" for field, value in values.items())


def sniff_delimiter(lines):
    """Which of , ; tab | cuts most of the first lines into the same number of cells, over 1.

    (csv.Sniffer also takes letters and spaces for delimiters.)
    """
    def agreement(delimiter):
        widths = Counter()
        with contextlib.suppress(csv.Error):  # a cell that is too long; csv_records names it
            widths.update(len(cells) for cells in csv.reader(lines[:50], delimiter=delimiter))
        widths.pop(0, None)  # empty lines
        width, count = widths.most_common(1)[0] if widths else (1, 0)
        return (count if width > 1 else 0, width)

    return max(",;\t|", key=agreement)


def csv_records(lines, delimiter):
    """Yield (line number, cells, complaint) of each record; cells in quotes may span lines.

    An unclosed quote would swallow the rest of the file. So a record over several lines that does
    not fit counts as one bad line, and reading goes on with the next.
    """
    at, width = 0, None
    while at < len(lines):
        reader = csv.reader(lines[at : at + 100], delimiter=delimiter, strict=True)
        try:
            cells, complaint = next(reader), ""
        except csv.Error as error:
            cells, complaint = [], f"not CSV: {error}"
        while width and len(cells) > width and not cells[-1].strip():
            cells.pop()  # delimiters at the end of a line, a habit of spreadsheets
        if cells and width and len(cells) != width:
            complaint = f"{len(cells)} cells, but the header has {width}"
        if cells and not complaint:
            width = width or len(cells)
        if any(cell.strip() for cell in cells) or complaint:
            yield at + 1, cells, complaint
        at += 1 if complaint else max(1, reader.line_num)


def header_names(cells):
    """Names for the columns: unique, and column 3 for one that has none."""
    names = []
    for i, cell in enumerate(cells, 1):
        name = clean(cell.replace(":", " ")) or f"column {i}"
        while name in names:
            name = f"{name} {i}"
        names.append(name)
    return names


def rows_of_csv(text):
    """(rows, bad, note): bad is a list of (line number, reason)."""
    lines = [line + "\n" for line in text.split("\n")]  # splitlines would cut at U+2028 as well
    delimiter = sniff_delimiter(lines)
    records = list(csv_records(lines, delimiter))
    bad = [(number, complaint) for number, _, complaint in records if complaint]
    good = [(number, cells) for number, cells, complaint in records if not complaint]
    if not good:
        return [], bad, "no header"
    names, rows = header_names(good[0][1]), []
    for number, cells in good[1:]:
        values = {n: clean(cell) for n, cell in zip(names, cells) if clean(cell)}
        rows.append(Row(number, values, row_text(values)))
    shown = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}[delimiter]
    doubt = "; the first line looks like data: if it is, put one with the columns' names above it"
    return rows, bad, (f"delimiter {shown}, columns {', '.join(names)}" +
                       doubt * any(re.fullmatch(r"[-+]?\d[\d.,]*", name) for name in names))


def flatten(value, path=""):
    """Yield (path, text) of a nested JSON value: {"a": {"b": 1}} -> a.b, 1.

    A list of plain values is one value, "x, y"; objects in a list are numbered from 1; null and
    empty ones are left out.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        for i, inner in enumerate(value, 1):
            yield from flatten(inner, f"{path}.{i}")
    else:
        items = value if isinstance(value, list) else [value]
        texts = [clean(json.dumps(item) if isinstance(item, bool) else item)
                 for item in items if item is not None]
        if any(texts):
            yield clean(path).replace(":", " ") or "value", ", ".join(filter(None, texts))


def rows_of_jsonl(text):
    rows, bad = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            values = dict(flatten(record)) if isinstance(record, dict) else None
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            bad.append((number, f"not JSON: {reason}"))
            continue
        if values:
            rows.append(Row(number, values, row_text(values)))
        else:
            bad.append((number, "an object without values" if values == {} else
                        f"no object in braces, but {line.strip()[:30]}"))
    fields = fields_of(rows)
    return rows, bad, f"fields {', '.join(fields)}"


def rows_of_text(text):
    lines = enumerate(text.split("\n"), 1)
    return [Row(i, {}, one_line(line)) for i, line in lines if line.strip()], [], "lines"


READERS = {".csv": rows_of_csv, ".tsv": rows_of_csv, ".jsonl": rows_of_jsonl,
           ".ndjson": rows_of_jsonl, ".txt": rows_of_text}


def read_rows(path):
    """(rows, bad, notes) of a .csv, .jsonl or .txt file. Raises UserError."""
    reader = READERS.get(Path(path).suffix.lower())
    if reader is None:
        raise UserError(f"--data {path}: the ending says how to read it, and must be one of "
                        f"{', '.join(READERS)}")
    text, encoding, note = read_any_text(path)
    rows, bad, described = reader(text)
    rows = [row for row in rows if row.text]
    if len(rows) < 8:
        first = f"; line {bad[0][0]}: {bad[0][1]}" if bad else ""
        raise UserError(f"--data {path} has {len(rows)} usable rows and {len(bad)} bad ones{first}"
                        "; 8 are the least, some hundreds make sense")
    return rows, bad, [f"{encoding}, {described}"] + [note] * bool(note)


# ---- counted, without a model --------------------------------------------------------------------


def term_statistics(rows):
    """[(term, count, rows it is in, distinctiveness)], the most distinctive first.

    Names of fields are no terms, their values are. distinctiveness is tf-idf with a logarithm, or
    "a" and "the" would lead: (1 + ln count) ln(N / rows). A word in every row has 0.
    """
    counts, in_rows = Counter(), Counter()
    for row in rows:
        terms = [t.lower() for t in WORD.findall(" ".join(row.values.values()) or row.text)]
        counts.update(terms)
        in_rows.update(set(terms))
    # (1 + ln n) ln(N / N_t)
    table = [(t, n, in_rows[t], (1 + math.log(n)) * math.log(len(rows) / in_rows[t]))
             for t, n in counts.items()]
    return sorted(table, key=lambda entry: (-entry[3], entry[0]))


def items_of(row):
    """What can co-occur: field = value, or in plain text the different words of a line."""
    if row.values:
        return [f"{field} = {value}" for field, value in row.values.items()]
    return sorted({term.lower() for term in WORD.findall(row.text)})


def co_occurrences(rows, min_count=5, most=1000):
    """[(a, b, count, expected, lift)] of pairs in the same row, strongest evidence first.

    lift = how many times more often than if a and b had nothing to do with each other. A rare pair
    has a great lift by chance, so pairs seen less than min_count times are left out, and the order
    is by count * ln(lift), which is both often and unexpected. ln(lift) is the pair's pointwise
    mutual information (Church and Hanks 1990). Only the `most` commonest items are paired: a text
    of 10,000 different words has 50 million pairs, more than fit into memory.
    """
    each = [items_of(row) for row in rows]
    single = Counter(itertools.chain.from_iterable(each))
    frequent = {item for item, n in single.most_common(most) if n >= min_count}
    pairs = Counter(pair for items in each for pair in
                    itertools.combinations([i for i in items if i in frequent], 2))
    table = []
    for (a, b), n in pairs.items():
        # expected = n(a) n(b) / N,  lift = n(a, b) / expected
        expected = single[a] * single[b] / len(rows)
        if n >= min_count and n > expected:
            table.append((a, b, n, expected, n / expected))
    return sorted(table, key=lambda entry: (-entry[2] * math.log(entry[4]), entry[:2]))


# ---- learned: rows -------------------------------------------------------------------------------


def partial_rows(texts, rows, generator):
    """texts, each also once with some fields missing, so that partial rows are nothing new."""
    if not rows[0].values:
        return texts
    thinned = []
    for row in rows:
        keep = torch.rand(len(row.values), generator=generator) < 0.6
        fields = [f for f, is_kept in zip(row.values, keep) if is_kept] or list(row.values)[-1:]
        thinned.append(row_text({field: row.values[field] for field in fields}))
    return texts + thinned


def deal(count, parts, seed):
    """The numbers 0..count-1 in `parts` shares, at random."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return [sorted(order[part::parts]) for part in range(parts)]


def learn(rows, args, alphabet, show):
    """{"model", "stoi", "itos", "train", "val", "before", "after", "stopped"} from rows.

    A tenth of the rows is held out to choose the best moment: never the rows to be judged later.
    """
    held_out = set(deal(len(rows), min(10, len(rows)), args.seed)[0])
    kept = [row for i, row in enumerate(rows) if i not in held_out]
    model, stoi, itos = model_for(alphabet, args)
    model.to(pick_device())
    if show:
        headline("explore", model, pick_device(), args.seed)

    def make_pass(generator):
        lines = partial_rows([row.text for row in kept], kept, generator)
        inputs, targets, _ = lines_to_rows(lines, stoi, model.block_size)
        return inputs, targets, torch.ones(len(inputs))

    train, val = (lines_to_rows(lines, stoi, model.block_size)[:2] for lines in
                  ([row.text for row in kept], [rows[i].text for i in sorted(held_out)]))
    result = fit(model, make_pass, val, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr,
                 seed=args.seed, show=show, updates=ROW_UPDATES)
    return {"model": model, "stoi": stoi, "itos": itos, "train": train, "val": val, **result}


def character_losses(model, rows, stoi):
    """For each row a list: nats for each character of its text and for the line break after it."""
    inputs, targets, line = lines_to_rows([row.text for row in rows], stoi, model.block_size)
    losses = row_losses(model, inputs, targets)
    each = [[] for _ in rows]
    for i, number in enumerate(line.tolist()):
        each[number] += losses[i][targets[i] != IGNORE].tolist()
    return each


def field_spans(row):
    """Yield (field, start, end): where in row.text the value of each field stands."""
    start = 0
    for field, value in row.values.items():
        start += len(field) + 2
        yield field, start, start + len(value)
        start += len(value) + 2


def least_expected(row, losses, usual):
    """The value of a row that costs most beyond what its field usually does: (text, nats)."""
    excess = [(sum(losses[a : b + 1]) - usual[field], f"{field} = {row.values[field]}")
              for field, a, b in field_spans(row)]
    return max(excess)[::-1] if excess else ("", 0.0)


def usual_costs(rows, losses):
    """{field: mean nats of its values, the character that ends them included}."""
    sums, counts = Counter(), Counter()
    for row, each in zip(rows, losses):
        for field, a, b in field_spans(row):
            sums[field] += sum(each[a : b + 1])
            counts[field] += 1
    return {field: sums[field] / counts[field] for field in sums}


def surprising_rows(rows, losses):
    """[(nats per character, row, its character losses, least expected value, its excess)].

    The most surprising first, and each text once: the first of equal rows stands for all.
    """
    usual = usual_costs(rows, losses)
    table = {}
    for row, each in zip(rows, losses):
        entry = (sum(each) / len(each), row, each, *least_expected(row, each, usual))
        table.setdefault(row.text, entry)
    return sorted(table.values(), key=lambda entry: -entry[0])


# ---- learned: values -----------------------------------------------------------------------------


def columns_of(rows, most=30):
    """{field: its values, commonest first} where a value occurs again and there are few of them."""
    fields = fields_of(rows)
    counted = {f: Counter(r.values[f] for r in rows if f in r.values) for f in fields}
    return {f: [value for value, _ in c.most_common(most)] for f, c in counted.items()
            if 1 < len(c) and c.most_common(1)[0][1] > 1}


@torch.no_grad()
def score_values(model, stoi, prefix, candidates):
    """How the model shares its belief among the candidates after prefix: they sum to 1.

    Each is scored with the end of the value after it: else a short one would win.
    """
    # a text longer than the context loses its start
    ids = [encode(f"\n{prefix}{value}", stoi)[-model.block_size :] for value in candidates]
    inputs = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
    for i, row in enumerate(ids):
        inputs[i, : len(row)] = row
    log_p = model(inputs.to(model.wte.weight.device)).log_softmax(-1).cpu()  # (N, T, V)
    ends = [stoi[c] for c in ";\n" if c in stoi]
    scores = []
    for i, (row, value) in enumerate(zip(ids, candidates)):
        n = len(row)
        at = torch.arange(max(0, n - len(value) - 1), n - 1)  # these positions guess the value
        # log p(value, end) = sum_t log p(value_t) + log(p(;) + p(line break))
        scores.append(log_p[i, at, row[at + 1]].sum() + log_p[i, n - 1, ends].logsumexp(0))
    return torch.stack(scores).softmax(0).tolist()


def parse_partial(prompt, fields, columns):
    """(given, field, begun) of "bird: owl; place: mi": {"bird": "owl"}, "place", "mi".

    "bird: owl; " asks for the field after bird. Raises UserError for a field that is not in the
    data, and where it cannot be told which is asked for, or its values are all different.
    """
    *head, tail = prompt.split(";")
    pairs = [[clean(piece) for piece in part.partition(":")[::2]] for part in head]
    given = {name: value for name, value in pairs if name}
    if unknown := [name for name in given if name not in fields]:
        raise UserError(f"--complete {prompt!r}: there is no field {unknown[0]!r}; the fields are "
                        f"{', '.join(fields)}")
    field, colon, begun = (clean(piece) for piece in tail.partition(":"))
    if not field and not colon:  # which field follows those given?
        last = max((i for i, f in enumerate(fields) if f in given), default=-1)
        field, colon = next((f for f in fields[last + 1 :] if f in columns), None), ":"
    if not colon or field not in columns:
        some = next(iter(columns), "field")
        raise UserError(f"--complete {prompt!r}: no field with a choice of values is asked for. "
                        f"End it in one, a colon and a space, such as '{some}: '; fields with "
                        f"a choice are {', '.join(columns) or 'none'}")
    return {f: value for f, value in given.items() if value and f != field}, field, begun


def around(given, field, fields):
    """What stands before the value of field in a row's text, and what after it.

    In the order of the data, whatever that of the question: the model knows no other.
    """
    at = fields.index(field)
    before = {f: given[f] for f in fields[:at] if f in given}
    after = row_text({f: given[f] for f in fields[at + 1 :] if f in given})
    return row_text({**before, field: ""}), f"; {after}" if after else ""


def question(prompt, fields, columns, known):
    """(prefix, values, suffix): what the model is to choose from, and the row around it.

    Raises UserError for a prompt that asks for no field, and for letters that are not known.
    """
    given, field, begun = parse_partial(prompt, fields, columns)
    prefix, suffix = around(given, field, fields)
    refuse_unknown(prefix + suffix, known)
    values = [value for value in columns[field] if value.startswith(begun)]
    if not values:
        raise UserError(f"--complete {prompt!r}: none of the {len(columns[field])} commonest "
                        f"values of {field} begins with {begun!r}; there are "
                        f"{', '.join(columns[field][:12])}")
    return prefix, values, suffix


def suggest(model, stoi, fields, columns, prompt):
    """(question, [(value, share)]): the values that the model expects, likeliest first."""
    prefix, values, suffix = question(prompt, fields, columns, stoi)
    # p(value | before, after) ~ p(value | before) p(after | before, value)
    shares = score_values(model, stoi, prefix, [value + suffix for value in values])
    return prefix + f"?{suffix}" * bool(suffix), sorted(zip(values, shares), key=lambda p: -p[1])


def refuse_unknown(prompt, stoi):
    unknown = sorted(set(prompt) - set(stoi))
    if unknown:
        raise UserError(f"--complete {prompt!r}: the data have no {''.join(unknown)!r} in them, so "
                        "the model knows nothing of it")


def check_values(folds, rows, columns, learned, most=20):
    """[(field, n, share right, share right of the commonest value)], on rows not trained on.

    learned[f] is a model that has not seen the rows of folds[f]. Each value is guessed from those
    before it in its row, so the first is not asked for.
    """
    table = []
    for field, values in columns.items():
        right = common = n = 0
        for fold, one in zip(folds, learned):
            for row in [rows[i] for i in fold if rows[i].values.get(field) in values][:most]:
                before = dict(itertools.takewhile(lambda kv: kv[0] != field, row.values.items()))
                if not before:
                    continue
                prefix = row_text({**before, field: ""})
                shares = score_values(one["model"], one["stoi"], prefix, values)
                right += values[shares.index(max(shares))] == row.values[field]
                common += values[0] == row.values[field]
                n += 1
        if n:
            table.append((field, n, right / n, common / n))
    return table


def default_prompts(rows, columns):
    """Some questions to ask of the model where the user has none."""
    if not rows[0].values:
        words = Counter(WORD.findall(row.text)[0] for row in rows if WORD.search(row.text))
        return [word for word, _ in words.most_common(3)]
    names = list(columns)
    if len(names) < 2:
        return [f"{name}: " for name in names]
    asked = max(names[:-1], key=lambda name: len(columns[name]))  # tells most about the others
    follows = names[names.index(asked) + 1]
    return [f"{asked}: {value}; {follows}: " for value in columns[asked][:3]]


def continuations(one, prompt, seed, n=3):
    """For plain text: n ways in which the model goes on, up to the end of the line."""
    stoi, itos, model = one["stoi"], one["itos"], one["model"]
    refuse_unknown(prompt, stoi)
    torch.manual_seed(seed)
    start = encode("\n" + prompt, stoi)[None].repeat(n, 1).to(model.wte.weight.device)
    ids = model.generate(start, 60, temperature=0.7).cpu()
    return [decode(row[start.size(1) :], itos).split("\n")[0] for row in ids]


# ---- what was found, as tables -------------------------------------------------------------------


def columns_text(header, table):
    """header and rows of strings, under each other; numbers to the right."""
    rows = [header, *table]
    widths = [min(60, max(len(row[i]) for row in rows)) for i in range(len(header))]
    is_number = [all(re.fullmatch(r"[-+\d.,%]*", row[i]) for row in table)
                 for i in range(len(header))]
    lines = []
    for row in rows:
        cells = [cell if len(cell) <= 60 else cell[:57] + "..." for cell in row]
        padded = [c.rjust(w) if right else c.ljust(w)
                  for c, w, right in zip(cells, widths, is_number)]
        lines.append("  " + "  ".join(padded).rstrip())
    return "\n".join(lines)


def sections_of(found):
    """[(title, explanation, header, table of strings)] for the terminal and the page."""
    surprising = [(f"{score:.3f}", str(row.number),
                   *([f"{least} ({excess:+.1f})"] if least else []), row.text)
                  for score, row, _, least, excess in found["surprising"]]
    is_table = len(surprising[0]) == 4  # else lines of text, which have no fields
    pairs = [(a, b, str(n), f"{expected:.1f}", f"{lift:.1f}")
             for a, b, n, expected, lift in found["pairs"]]
    checks = [(field, str(n), f"{right:.0%}", f"{common:.0%}")
              for field, n, right, common in found["checks"]]
    terms = [(term, str(n), str(in_rows), f"{score:.1f}")
             for term, n, in_rows, score in found["terms"]]
    return [
        ("most surprising rows", "nats per character, from a model that was trained on other rows" +
         "; in brackets, nats beyond what the field usually costs" * is_table,
         ("nats/char", "line", *["least expected"] * is_table, "row"), surprising),
        suggested_section(found["suggested"]),
        ("does it know?", "values guessed from those before them in rows not trained on, and how "
         "often the commonest value would be right", ("field", "n", "right", "commonest"), checks),
        ("co-occurrences", "counted: lift is how many times more often than by chance; strongest "
         "evidence first", ("this", "with", "rows", "by chance", "lift"), pairs),
        ("terms", "distinctive: often, in few rows: (1 + ln count) x ln(rows / rows with it)",
         ("term", "count", "in rows", "distinctive"), terms),
    ]


def suggested_section(suggested):
    """The answers to --complete: shares of the values, or for plain text how it goes on."""
    table = [(prompt, value) if share is None else (prompt, f"{share:.0%}", value)
             for prompt, pairs in suggested for value, share in pairs]
    if table and len(table[0]) == 2:
        return "next values", "how the model goes on, temperature 0.7", ("after", "text"), table
    return ("next values", "what the model expects in a partial row", ("after", "share", "value"),
            table)


def say_found(sections):
    for title, explanation, header, table in sections:
        if table:
            print(f"\n{title} ({explanation})")
            print(columns_text(header, table if title == "next values" else table[:SHOWN]))


# ---- the page ------------------------------------------------------------------------------------

MARK = "personal_gpt explore"  # an older page of ours may be replaced, no other file
STYLE = """
:root { color-scheme: light dark; --line: #8884; --hot: 214, 69, 65; --bar: #3a7bd5; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 0; }
p { margin: .2rem 0 .8rem; opacity: .85; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: break-word; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.row { font-family: ui-monospace, monospace; font-size: .85rem; white-space: pre-wrap;
  min-width: 18rem; }
meter { width: 6rem; vertical-align: middle; }
"""


def heat_style():
    """Nine shades for how surprising a character is."""
    return "".join(f".h{i} {{ background: rgba(var(--hot), {i * 0.09:.2f}); }}\n"
                   for i in range(1, 10))


def heat(text, losses, most=2000):
    """The first characters of a row, shaded: h1 from 1 nat on, h9 from 9 on. Escaped."""
    shades = [min(9, int(loss)) for loss in losses[:most]]
    parts = []
    for shade, group in itertools.groupby(zip(text, shades), key=lambda pair: pair[1]):
        piece = html.escape("".join(c for c, _ in group))
        parts.append(f'<span class="h{shade}">{piece}</span>' if shade else piece)
    return "".join(parts) + "..." * (len(text) > most)


def html_cell(cell, is_number, title):
    if title in ("share", "right", "commonest"):  # a 50% in the data gets no bar
        share = int(cell[:-1]) / 100
        return f'<td class="n">{cell} <meter value="{share}"></meter></td>'
    return f'<td class="n">{cell}</td>' if is_number else f"<td>{html.escape(cell)}</td>"


def html_table(header, table, heats=None):
    """A table; heats: ready-made HTML for the last cell of each row."""
    numeric = [all(re.fullmatch(r"[-+\d.,%]*", row[i]) for row in table)
               for i in range(len(header))]
    head = "".join(f"<th{' class=n' if n else ''}>{html.escape(h)}</th>"
                   for h, n in zip(header, numeric))
    body = []
    for i, row in enumerate(table):
        cells = [html_cell(*triple) for triple in zip(row, numeric, header)]
        if heats:
            cells[-1] = f'<td class="row">{heats[i]}</td>'
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def page(name, facts, sections, found, bad):
    """The whole page as text. Everything from the data is escaped; no script, nothing loaded."""
    parts = [f"<h1>What a small GPT learned from {html.escape(name)}</h1>"]
    parts += [f"<p>{html.escape(fact)}</p>" for fact in facts]
    for title, explanation, header, table in sections:
        if not table:
            continue
        heats = [heat(row.text, losses) for _, row, losses, *_ in found["surprising"]] \
            if title == "most surprising rows" else None
        parts.append(f"<h2>{html.escape(title)}</h2><p>{html.escape(explanation)}"
                     f"{'; the redder a character, the less it was expected' if heats else ''}</p>")
        parts.append(html_table(header, table, heats))
    if bad:
        parts.append(f"<h2>bad rows</h2><p>{len(bad):,} left out</p>")
        parts.append(html_table(("line", "reason"), [(str(n), why) for n, why in bad[:200]]))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="generator" content="{MARK}">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(name)}</title><style>{STYLE}{heat_style()}</style></head>
<body>
{chr(10).join(parts)}
</body></html>
"""


def check_report(path, args):
    """Raises UserError where the page would take the place of something else."""
    if path is None:
        return
    check_folder("--report", path)
    if args.output and path.resolve() in (Path(args.output).resolve(),
                                          settings_path(args.output).resolve()):
        raise UserError(f"the page {path} would take the place of the model in {args.output}; "
                        "choose another name: --report other.html")
    if path.is_dir() or path.exists() and MARK.encode() not in path.read_bytes()[:1000]:
        raise UserError(f"--report {path} exists and is no page of this program; delete it or "
                        "choose another name: --report other.html")


# ---- the command line ----------------------------------------------------------------------------


def say_data(path, rows, bad, notes):
    """Facts about the data, printed, and returned for the page."""
    facts = [f"{len(rows):,} rows from {Path(path).name} ({notes[0]}), {len(bad):,} bad ones left "
             "out", *(f"note: {note}" for note in notes[1:])]
    if rows[0].values:
        facts.append("template: field: value; field: value (line breaks in a value become spaces, "
                     "; becomes a comma, empty values are left out)")
    else:
        facts.append("template: each line as it is")
    facts.append(f"for example: {rows[0].text[:150]}")
    print("\n".join(facts))
    for number, reason in bad[:5]:
        print(f"  line {number}: {reason}")
    if len(bad) > 5:
        print(f"  and {len(bad) - 5:,} more; a page (--report FILE) names up to 200")
    return facts


def judge_unseen(rows, args, alphabet):
    """(folds, models, character losses of each row): each row judged by a model that never saw it.

    A model is less surprised by a row that it has been trained on. So the rows are dealt into
    folds, and those of one are judged by a model of the others. The same text elsewhere in the data
    is no cheating here: what has happened before is less surprising.
    """
    folds, learned, losses = deal(len(rows), args.folds, args.seed), [], {}
    for number, fold in enumerate(folds, 1):
        print(f"judging fold {number} of {len(folds)} by a model of the other rows", flush=True)
        inside = set(fold)
        one = learn([r for i, r in enumerate(rows) if i not in inside], args, alphabet, show=False)
        if one["stopped"]:
            raise KeyboardInterrupt
        learned.append(one)
        judged = character_losses(one["model"], [rows[i] for i in fold], one["stoi"])
        losses.update(zip(fold, judged))
    return folds, learned, [losses[i] for i in range(len(rows))]


def suggestions(one, rows, columns, prompts, seed):
    """[(prompt, [(value, share or None)])]."""
    fields = fields_of(rows)
    if not fields:
        return [(p, [(text, None) for text in continuations(one, p, seed)]) for p in prompts]
    return [(prefix, found[:4]) for prefix, found in
            (suggest(one["model"], one["stoi"], fields, columns, prompt) for prompt in prompts)]


def check_prompts(prompts, rows, columns, alphabet):
    """Raises UserError for a --complete that cannot be answered, before the training."""
    fields = fields_of(rows)
    for prompt in prompts:
        if not fields:
            refuse_unknown(prompt, alphabet)
            continue
        question(prompt, fields, columns, alphabet)
        for name, value in parse_partial(prompt, fields, columns)[0].items():
            if all(row.values.get(name) != value for row in rows):
                print(f"note: no row has {name}: {value}, so only its letters can tell the model "
                      "anything")


def answer(args, rows, columns, prompts):
    """--ask: the next values of a model that is there already, without any training."""
    model, stoi, itos = load_gpt(args.ask)
    other = sorted({c for row in rows for c in row.text} - set(stoi))
    if other:
        raise UserError(f"--ask {args.ask}: the model has never seen {''.join(other[:20])!r}, so "
                        f"{args.data} is not what it was trained on; train one that was:\n"
                        f"  python explore.py --data {shlex.quote(args.data)} --output other.pth")
    device = pick_device()
    headline("explore", model.to(device), device, args.seed)
    sha256 = digest(read_any_text(args.data)[0])
    if all(text.get("sha256") != sha256 for text in seen_texts(args.ask)):
        print(f"note: {args.data} is not the file that the model was trained on, or has changed")
    one = {"model": model, "stoi": stoi, "itos": itos}
    say_found([suggested_section(suggestions(one, rows, columns, prompts, args.seed))])
    print(f"\nnext: python explore.py --data {shlex.quote(args.data)} --report report.html")


def run_explore(args):
    # 1. rows, and what can be counted in them
    if args.ask and (args.output or args.report or args.init):
        raise UserError("--ask trains nothing and finds nothing new: it goes with --data and "
                        "--complete, without --output, --report and --init")
    check_output(args.output, (args.data,))
    report = args.report or (args.output and Path(args.output).with_suffix(".html"))
    report = Path(report) if report else None
    check_report(report, args)
    rows, bad, notes = read_rows(args.data)
    alphabet = "".join(sorted({c for row in rows for c in row.text} | {"\n"}))
    columns = columns_of(rows)
    prompts = args.complete or default_prompts(rows, columns)
    check_prompts(prompts, rows, columns, alphabet)
    if args.ask:
        return answer(args, rows, columns, prompts)

    # 2. learn: one model to keep, and one for each fold, to judge rows it has not seen
    facts = say_data(args.data, rows, bad, notes)
    one = learn(rows, args, alphabet, show=True)
    if args.output:  # now, so that Ctrl-C in what follows loses nothing
        save_gpt(args.output, one["model"], "".join(one["itos"]), val_loss=round(one["after"], 6),
                 trained_on=seen_now(args, read_any_text(args.data)[0]))
    say_ladder(one["train"], one["val"], len(one["itos"]), one["after"])
    try:
        if not one["stopped"]:
            explore(one, rows, bad, facts, columns, prompts, alphabet, report, args)
    except KeyboardInterrupt:
        one["stopped"] = True
    say_result(one, one["val"][1], args.output)
    # quoted for the shell, which would carry out a $(...) that stands in the data
    again = f"next: python explore.py --data {shlex.quote(args.data)}"
    print(f"{again} --ask {shlex.quote(args.output)} --complete "
          f"{shlex.quote(prompts[-1] if prompts else '')}" if args.output
          else f"{again} --output gpt_knowledge.pth")
    return say_stopped(one, args.output)


def explore(one, rows, bad, facts, columns, prompts, alphabet, report, args):
    """What did it learn? Printed, and written as a page where one is asked for."""
    folds, learned, losses = judge_unseen(rows, args, alphabet)
    found = {"surprising": surprising_rows(rows, losses)[: args.top],
             "pairs": co_occurrences(rows, args.min_count)[: args.top],
             "terms": term_statistics(rows)[: args.top],
             "checks": check_values(folds, rows, columns, learned),
             "suggested": suggestions(one, rows, columns, prompts, args.seed)}
    facts.append(f"nats per character on held-out rows: {one['before']:.3f} before the "
                 f"training, {one['after']:.3f} after")
    sections = sections_of(found)
    say_found(sections)
    print()
    if report:
        text = page(Path(args.data).name, facts, sections, found, bad)
        write_whole(report, lambda file: file.write(text.encode()))
        print(f"wrote {report} (the same as a page)")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", metavar="FILE", required=True, help="a .csv, .jsonl or .txt file")
    add_training_flags(parser, epochs=3, lr=1e-3)
    add("--complete", metavar="TEXT", action="append",
        help='a partial row to go on from, such as "bird: owl; place: " (may be repeated)')
    add("--ask", metavar="FILE",
        help="put --complete to this model, at once, instead of training one")
    add("--report", metavar="FILE", help="the HTML page; default: beside --output")
    add("--top", type=int, default=40, help="rows of each table on the page; default: %(default)s")
    add("--folds", type=int, default=3, help="models that judge the rows; default: %(default)s")
    add("--min-count", type=int, default=5, help="rows a pair must be in; default: %(default)s")
    return run_cli(run_explore, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
