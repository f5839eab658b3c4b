"""Rule 2: code that must be the same in several scripts is the same, to the letter.

A shared block stands between two marker lines,

    # --- shared: NAME (home: 05_engine.py) ---
    # --- end shared ---

and its home holds the master. `python tests/test_shared_blocks.py --fix` copies the masters over
the copies; without --fix it lists what is wrong. `problems(folder)` is the whole rule.
"""

import argparse
import ast
import builtins
import difflib
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

EDU = Path(__file__).resolve().parent.parent / "edu"
ALLOWED_TWICE = {"main", "run", "Config", "train"}  # every script has its own

OPEN = re.compile(r"# --- shared: ([a-z0-9-]+) \(home: ([\w/]+\.py)\) ---")
CLOSE = "# --- end shared ---"
# Anything that was meant as a marker: a typing error must not silently free a copy from the rule.
MEANT_AS_MARKER = re.compile(r"\s*#[\s#-]*(end\s+)?shared\b(\s*:|\s*-|\s*$)", re.IGNORECASE)


# ---- reading the scripts -------------------------------------------------------------------------


@dataclass
class Block:
    """One shared block in one script; lines are counted from 1 and include both markers."""

    name: str
    home: str
    script: str
    first: int
    last: int
    lines: list[str]

    def where(self):
        return f"edu/{self.script}:{self.first}: block `{self.name}`"


def read_scripts(folder):
    """{name: lines, line ends kept} of the scripts; systems in folders of their own are none."""
    return {
        path.relative_to(folder).as_posix(): path.read_text("utf-8").splitlines(keepends=True)
        for path in sorted(folder.glob("*.py"))
    }


def find_blocks(script, lines):
    """(blocks, problems) of one script."""
    blocks, wrong, opened = [], [], None
    for number, line in enumerate(lines, 1):
        here, text = f"edu/{script}:{number}", line.rstrip("\r\n")
        start = OPEN.fullmatch(text)
        if start:
            if opened:
                wrong.append(f"{here}: opens `{start[1]}` inside {opened.where()}")
            opened = Block(start[1], start[2], script, number, number, [])
        elif text == CLOSE:
            if not opened:
                wrong.append(f"{here}: closes a block, but none is open")
                continue
            opened.last, opened.lines = number, lines[opened.first - 1 : number]
            blocks.append(opened)
            opened = None
        elif MEANT_AS_MARKER.match(text):
            wrong.append(f"{here}: looks like a marker, but is not spelled like one: {text}")
    if opened:
        wrong.append(f"{opened.where()} is never closed by `{CLOSE}`")
    return blocks, wrong


def top_level(tree):
    """Statements that run at import, those under a top-level `if`, `try` or `with` included."""
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        yield node
        for field in ("body", "orelse", "finalbody", "handlers"):
            if isinstance(node, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
                waiting += getattr(node, field, [])


def definitions(tree):
    """(name, line) of every top-level class and function."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [(node.name, node.lineno) for node in top_level(tree) if isinstance(node, kinds)]


def block_of(line, blocks):
    return next((block for block in blocks if block.first <= line <= block.last), None)


# ---- the rule ------------------------------------------------------------------------------------


def problems(folder):
    """What breaks rule 2 in the scripts under `folder`, one string each; empty when all is well."""
    scripts, blocks, wrong = read_scripts(folder), {}, []
    for script, lines in scripts.items():
        blocks[script], bad_markers = find_blocks(script, lines)
        wrong += bad_markers
    wrong += [str(difference) for difference in compare_with_homes(blocks)]
    trees = {script: ast.parse("".join(lines), script) for script, lines in scripts.items()}
    wrong += names_defined_twice(trees, blocks)
    wrong += globals_read_by_blocks(trees, blocks)
    return wrong


@dataclass
class Difference:
    """What is wrong with a copy; `master` when copying it over would mend that."""

    copy: Block
    text: str
    master: Block | None = None

    def __str__(self):
        return f"{self.copy.where()} {self.text}"


def compare_with_homes(blocks):
    """Differences of copies from their masters, and blocks that lack a home or a copy."""
    found, homes = [], {}
    for script, in_script in blocks.items():
        for block in in_script:
            if sum(other.name == block.name for other in in_script) > 1:
                found.append(Difference(block, "stands twice in this script"))
            if block.home == script:
                if block.name in homes and homes[block.name].home != script:
                    other = homes[block.name]
                    found.append(Difference(block, f"has a second home in edu/{other.script}"))
                homes.setdefault(block.name, block)
    copied = set()
    for in_script in blocks.values():
        for block in in_script:
            if block.home == block.script:
                continue
            master = homes.get(block.name)
            if master is None or master.home != block.home:
                found.append(Difference(block, f"is not in its home edu/{block.home}"))
                continue
            copied.add(block.name)
            if block.lines != master.lines:
                found.append(Difference(block, "differs:\n" + diff(master, block), master))
    for name, master in homes.items():
        if name not in copied:
            found.append(Difference(master, "has no copy, so it need not be shared"))
    return found


def diff(master, copy):
    """Unified diff from the master to the copy, with line numbers of the two files."""
    lines = difflib.unified_diff(
        master.lines,
        copy.lines,
        f"edu/{master.script} (home, from line {master.first})",
        f"edu/{copy.script} (copy, from line {copy.first})",
    )
    return "".join(lines) + "mend with: python tests/test_shared_blocks.py --fix"


def names_defined_twice(trees, blocks):
    """A class or function name that means two things in two scripts, or in one."""
    places = {}
    for script, tree in trees.items():
        for name, line in definitions(tree):
            block = block_of(line, blocks[script])
            places.setdefault(name, []).append((block and block.name, f"edu/{script}:{line}"))
    wrong = []
    for name, found in places.items():
        shared_by_all = {block for block, _ in found} == {found[0][0]} and found[0][0] is not None
        if len(found) > 1 and name not in ALLOWED_TWICE and not shared_by_all:
            where = ", ".join(f"{place} ({block or 'no block'})" for block, place in found)
            wrong.append(f"`{name}` is defined in {where}: share it in a block, or rename one")
    return wrong


def globals_read_by_blocks(trees, blocks):
    """Names that a block takes from the script around it: a copy elsewhere would not find them.

    A block may read its own names, imports of its script, and names of other shared blocks there.
    """
    wrong = []
    for script, tree in trees.items():
        known = set(dir(builtins)) | {"__file__", "__name__", "__doc__"}
        for node in top_level(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                known |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            elif block_of(node.lineno, blocks[script]):
                known |= names_bound(node)
        for block in blocks[script]:
            for node in tree.body:
                if not block.first <= node.lineno <= block.last:
                    continue
                for name in sorted(names_read(node) - names_bound(node) - known):
                    wrong.append(
                        f"{block.where()} reads `{name}`, which is neither defined in a block "
                        "nor imported by this script"
                    )
    return wrong


def names_read(node):
    return {
        child.id
        for child in ast.walk(node)
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Load)
    }


def names_bound(node):
    """Every name that `node` or anything inside it gives a value to."""
    bound = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Name) and not isinstance(child.ctx, ast.Load):
            bound.add(child.id)
        elif isinstance(child, ast.arg):
            bound.add(child.arg)
        elif isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            bound.add(child.name)
        elif isinstance(child, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and child.name:
            bound.add(child.name)
        elif isinstance(child, (ast.Import, ast.ImportFrom)):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in child.names}
    return bound


# ---- --fix ---------------------------------------------------------------------------------------


def fix(folder):
    """Copy every master over its differing copies. Returns the copies mended, as strings.

    A script with a broken marker is left alone: where a block ends in it is anybody's guess.
    """
    scripts, blocks, broken = read_scripts(folder), {}, set()
    for script, lines in scripts.items():
        blocks[script], bad_markers = find_blocks(script, lines)
        if bad_markers:
            broken.add(script)
    mended = []
    changes = [found for found in compare_with_homes(blocks) if found.master]
    # From the bottom up, so that the line numbers of the blocks above stay true.
    for change in sorted(changes, key=lambda change: -change.copy.first):
        copy = change.copy
        if copy.script in broken or change.master.script in broken:
            continue
        scripts[copy.script][copy.first - 1 : copy.last] = change.master.lines
        mended.append(copy.where())
    for script in {change.copy.script for change in changes} - broken:
        path = folder / script
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(scripts[script]), "utf-8")
        shutil.copymode(path, temporary)
        os.replace(temporary, path)
    return sorted(mended)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Are all copies of the shared blocks the same?")
    parser.add_argument("--fix", action="store_true", help="copy the masters over the copies")
    parser.add_argument("--edu", type=Path, default=EDU, help="folder of scripts (default: edu)")
    given = parser.parse_args(argv)
    if given.fix:
        for place in fix(given.edu):
            print(f"copied from its home: {place}")
    wrong = problems(given.edu)
    print("\n\n".join(wrong) if wrong else "all shared blocks agree")
    return 1 if wrong else 0


# ---- tests ---------------------------------------------------------------------------------------


def test_every_shared_block_of_edu_is_the_same_in_all_scripts():
    wrong = problems(EDU)
    assert not wrong, "\n\n".join(wrong)


HOME = """import os
# --- shared: greet (home: 01_home.py) ---
def greet(name):
    return os.sep + name
# --- end shared ---
def main(): pass
"""
COPY = HOME.replace("def main(): pass\n", "class Config: pass\ndef only_here(): pass\n")


def write_tree(folder, **scripts):
    """Write scripts (home=..., copy=..., third=...) as 01_home.py, 02_copy.py, 03_third.py."""
    names = {"home": "01_home.py", "copy": "02_copy.py", "third": "03_third.py"}
    for key, text in {"home": HOME, "copy": COPY, **scripts}.items():
        if text is not None:
            (folder / names[key]).write_text(text, "utf-8")
    return folder


def test_two_scripts_that_agree_raise_no_problem(tmp_path):
    assert problems(write_tree(tmp_path)) == []


@pytest.mark.parametrize(
    ("complaint", "scripts"),
    [
        ("differs", {"copy": COPY.replace("os.sep + name", "name + os.sep")}),
        ("differs", {"copy": COPY.replace("name)", "name )")}),
        ("never closed", {"copy": COPY.replace(CLOSE + "\n", "")}),
        ("none is open", {"copy": COPY + CLOSE + "\n"}),
        ("inside edu/02_copy.py:2", {"copy": COPY.replace(
            "    return", "# --- shared: inner (home: 01_home.py) ---\n    return")}),
        ("stands twice in this script", {"copy": COPY + COPY.replace("class Config: pass\n", "")}),
        ("stands twice in this script", {"home": HOME + HOME}),
        ("has no copy", {"copy": None}),
        ("is not in its home", {"home": "def main(): pass\n"}),
        ("is not in its home", {"home": None}),
        ("is not in its home", {"copy": COPY.replace("01_home", "09_nowhere")}),
        ("second home", {"third": HOME.replace("01_home", "03_third")}),
        ("not spelled like one", {"third": "# --- Shared: greet (home 01_home.py) ---\n"}),
        ("not spelled like one", {"third": "    # --- end shared ---\n"}),
        ("not spelled like one", {"third": "# -- end shared --\n"}),
        ("`only_here` is defined in", {"third": "def only_here(): pass\n"}),
        ("`only_here` is defined in", {"third": "if True:\n    class only_here: pass\n"}),
        ("`only_here` is defined in", {"third": "async def only_here(): pass\n"}),
        ("`greet` is defined in", {"third": "def greet(name): pass\n"}),
        ("reads `os`", {"home": HOME[10:], "copy": COPY[10:]}),
        ("reads `SIZE`", {
            "home": "SIZE = 3\n" + HOME.replace("os.sep", "SIZE"),
            "copy": "SIZE = 3\n" + COPY.replace("os.sep", "SIZE")}),
    ],
)  # fmt: skip
def test_each_breach_of_the_rule_is_named(tmp_path, complaint, scripts):
    assert any(complaint in wrong for wrong in problems(write_tree(tmp_path, **scripts)))


@pytest.mark.parametrize("name", sorted(ALLOWED_TWICE))
def test_names_that_every_script_has_may_stand_in_several(tmp_path, name):
    code = f"def {name}(): pass\n"
    assert problems(write_tree(tmp_path, home=HOME + code, copy=COPY + code)) == []


def test_two_breaches_are_both_reported(tmp_path):
    third = "def only_here(): pass\n"
    wrong = problems(write_tree(tmp_path, copy=COPY.replace("+", "-"), third=third))
    assert len(wrong) == 2


def test_a_difference_is_shown_as_a_unified_diff(tmp_path):
    (wrong,) = problems(write_tree(tmp_path, copy=COPY.replace("os.sep + name", "name")))
    assert "-    return os.sep + name\n+    return name\n" in wrong
    assert "--- edu/01_home.py" in wrong and "--fix" in wrong


def test_fix_copies_the_home_over_every_copy_and_touches_nothing_else(tmp_path):
    longer = COPY.replace("return os.sep + name", "x = 1\n    y = 2\n    return x + y")
    third = "# first\n" + longer.replace("only_here", "third_here") + "# last\n"
    write_tree(tmp_path, copy=longer, third=third)
    (tmp_path / "03_third.py").chmod(0o755)
    assert main(["--fix", "--edu", str(tmp_path)]) == 0
    assert (tmp_path / "01_home.py").read_text("utf-8") == HOME
    assert (tmp_path / "02_copy.py").read_text("utf-8") == COPY
    mended = "# first\n" + COPY.replace("only_here", "third_here") + "# last\n"
    assert (tmp_path / "03_third.py").read_text("utf-8") == mended
    assert (tmp_path / "03_third.py").stat().st_mode & 0o777 == 0o755
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "01_home.py", "02_copy.py", "03_third.py"]  # fmt: skip


def test_fix_mends_two_blocks_of_one_script(tmp_path):
    def with_two(first, second):
        return "".join(
            f"# --- shared: {name} (home: 01_home.py) ---\n{body}\n{CLOSE}\n\n"
            for name, body in (("one", first), ("two", second))
        )

    home = with_two("def one():\n    return 1", "def two(): return 2")
    write_tree(tmp_path, home=home, copy=with_two("def one(): pass", "def two():\n\n    return 3"))
    assert len(fix(tmp_path)) == 2
    assert (tmp_path / "02_copy.py").read_text("utf-8") == home


def test_fix_leaves_a_script_with_a_broken_marker_alone_and_fails(tmp_path, capsys):
    broken = COPY.replace("os.sep + name", "name") + CLOSE + "\n"
    write_tree(tmp_path, copy=broken)
    assert main(["--fix", "--edu", str(tmp_path)]) == 1
    assert (tmp_path / "02_copy.py").read_text("utf-8") == broken
    assert "none is open" in capsys.readouterr().out


if __name__ == "__main__":
    sys.exit(main())
