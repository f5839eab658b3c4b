"""What the commands print in rows, and what they read of run folders: no model and no torch."""

import difflib
import re
import shutil
import textwrap
from pathlib import Path

from tp.errors import UserError
from tp.files import read_json

NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?%?( \(.*\))?|-|nan|inf|-inf|", re.IGNORECASE)


# ---- rows ----------------------------------------------------------------------------------------


def table(header, rows):
    """Lines of a table; a column that holds numbers only is set to the right."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    right = [all(NUMBER.fullmatch(row[i]) for row in rows) for i in range(len(header))]
    return ["  ".join(cell.rjust(width) if is_right else cell.ljust(width)
                      for cell, width, is_right in zip(line, widths, right)).rstrip()
            for line in [header, *rows]]


def columns(header, rows, width=None, least=24):
    """Lines of texts side by side, each wrapped within its share of the terminal's width.

    rows: lists of texts, one for each header. Where a column would be narrower than `least`
    characters, the texts stand one under the other instead.
    """
    width = width or shutil.get_terminal_size((100, 24)).columns
    each = (width - 2 * (len(header) - 1)) // len(header)
    if each < least and len(header) > 1:
        return [f"{name}: {cell}" for row in rows for name, cell in zip(header, row)]
    lines = []
    for cells in [header, ["-" * min(each, len(name)) for name in header], *rows]:
        wrapped = [textwrap.wrap(cell, each) or [""] for cell in cells]
        for i in range(max(map(len, wrapped))):
            parts = [(cell[i] if i < len(cell) else "").ljust(each) for cell in wrapped]
            lines.append("  ".join(parts).rstrip())
    return lines


def number(value, digits=4):
    """4 digits after the point; "-" for what is not known."""
    if not is_number(value):
        return "-" if value is None else visible(str(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def is_number(value):
    """Whether JSON gave a number; True and False are none, though Python counts with them, and
    neither is one so long that no float can hold it."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def as_dict(value):
    """The value if it is a dictionary, else an empty one: anybody may have edited a file."""
    return value if isinstance(value, dict) else {}


def visible(text):
    """A text on one line, with nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def spell(value):
    """A value as --set reads it."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def count(items, name):
    """"1 run", "2 runs"."""
    return f"{len(items)} {name}{'s' * (len(items) != 1)}"


def short_names(keys):
    """{"model.n_layer": "n_layer", ...}: without the section, where that leaves no two alike."""
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends)}


# ---- configs -------------------------------------------------------------------------------------


def flat(config, prefix=""):
    """Nested dict -> {"model.n_layer": 4, ...}."""
    found = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        found.update(flat(value, name + ".") if isinstance(value, dict) else {name: value})
    return found


def differences(configs):
    """Keys whose values are not the same in all of these flat configs; absent is a value too."""
    absent, found = object(), []
    for key in dict.fromkeys(key for config in configs for key in config):
        values = [config.get(key, absent) for config in configs]
        if any(type(value) is not type(values[0]) or value != values[0] for value in values):
            found.append(key)
    return found


# ---- run folders ---------------------------------------------------------------------------------


def read_object(path):
    """The dictionary in a JSON file. Raises UserError, naming the file, if it is no such thing."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def run_ids(runs_dir):
    """Names of the folders in runs_dir that hold a config.json, sorted."""
    try:
        entries = sorted(Path(runs_dir).iterdir())
    except OSError as error:
        raise UserError(f"no runs in {runs_dir} ({error.strerror}); train one first:\n"
                        f"  tp train --config configs/default.py --runs-dir {runs_dir}") from None
    return [entry.name for entry in entries if (entry / "config.json").is_file()]


def find_run(runs_dir, run_id):
    """The run's folder. Raises UserError with the nearest run id and the list of all."""
    known = run_ids(runs_dir)
    if run_id in known:
        return Path(runs_dir) / run_id
    near = difflib.get_close_matches(run_id, known, n=1, cutoff=0)
    hint = f" Did you mean {near[0]}?" if near else ""
    listed = "\n".join(f"  {name}" for name in known[-20:]) or "  (none)"
    raise UserError(f"there is no run {run_id!r} in {runs_dir}.{hint} Its runs are:\n{listed}")
