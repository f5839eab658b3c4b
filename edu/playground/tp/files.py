"""Writing files so that a crash leaves the old one or the new one; reading JSON back."""

import json
import os
from pathlib import Path

from tp.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has none: two processes at one run are not kept apart there
    fcntl = None


def write_bytes(path, content):
    """Write under a temporary name in the same folder, then put in place.

    os.replace is atomic within one folder; without the flush to disk a power cut could leave the
    new name on an empty file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """The value as indented JSON. Raises ValueError for NaN and infinity, which JSON lacks."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
                       + "\n").encode())


def write_lines(path, rows):
    """One JSON object per line."""
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_bytes(path, "".join(lines).encode())


def append_row(path, row):
    """Add one line of JSON."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def lock(file):
    """Whether nobody else holds this open file; if so, it is ours until it is closed. Children
    that are given the file keep the lock, even if their parent has been killed."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def read_json(path):
    """The content of a JSON file. Raises UserError."""
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def read_rows(path):
    """The objects of a JSONL file; no file: []. A last line cut short by a crash is left out."""
    path = Path(path)
    if not path.exists():
        return []
    # Without its line end the last line is not whole: the end is written last.
    lines = path.read_text("utf-8", errors="replace").split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is damaged: {error}") from error
        if not isinstance(rows[-1], dict):
            raise UserError(f"{path}, line {number} is damaged: it holds no JSON object")
    return rows
