"""Writing files so that a crash leaves the old one or the new one, never half of one."""

import json
import os
from pathlib import Path


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
