"""What holds for every script in edu/, whoever writes it and whatever it is about.

Three parts: what its source says (read, not run), how it behaves when imported and asked for help
(all scripts in one child process), and whether its docstring is true: each line under Run is run,
in the order of the pipeline and in the smallest setting (SMALLEST), and what it prints and leaves
behind is compared with Expect and Writes.

A new script needs no line here unless its Run line takes more than a second or two.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
from conftest import EDU, ROOT, run_process

# In this order each finds what it needs. Scripts that are not named come last, sorted.
ORDER = [
    "train_tiny_chat", "03_check_setup", "04_block", "00_tiny_world", "01_download", "11_tokenizer",
    "02_dataloader", "12_pretrain", "05_engine", "06_identity", "07_sft_data", "13_midtrain",
    "08_sft", "09_gsm8k", "10_rl", "14_evaluate", "15_chat", "16_serve", "17_report",
]  # fmt: skip
# Flags that make a Run line cheap; they come after its own, so they win.
SMALLEST = {
    "train_tiny_chat": "--steps 40 --max-new-tokens 20",
    "00_tiny_world": "--size-mb 1 --num-chats 400 --num-problems 100 --num-eval 20",
    "11_tokenizer": "--vocab-size 512 --no-gpt2 --eval-chars 100000",
    "02_dataloader": "--timed-chars 100000",
    "12_pretrain": "--depth 1 --num-iterations 4 --eval-every 2 --save-every 4 --compile off "
    "--sequence-len 192 --total-batch-size 1536 --device-batch-size 8 --eval-tokens 1024",
    "05_engine": "--bench-tokens 16",
    "08_sft": "--identity-rows 100 --num-epochs 0.2 --eval-prompts 4 --eval-rows 8 --eval-every 8",
    "10_rl": "--num-steps 2 --num-samples 8 --prompts-per-step 2 --eval-problems 4 "
    "--probe-prompts 4 --max-new-tokens 24 --reward hackable --stage rl",
    "13_midtrain": "--num-iterations 4 --total-batch-size 1536 --eval-questions 8",
    "14_evaluate": "--bpb-tokens 1024 --max-per-task 4 --chat-per-task 4 --max-new-tokens 8",
    "16_serve": "--measure 2 --measure-tokens 8",
}
SCRIPTS = sorted(path.stem for path in EDU.glob("*.py"))
NAMES = sorted(SCRIPTS, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
HEADINGS = ["Goal", "You will learn", "Read beside", "Run", "Expect", "Writes"]
SECTIONS = ["settings", "shared blocks", "the idea", "the loop", "the command line"]
OWN_SECTIONS = {"train_tiny_chat"}  # the first sitting is told in its own order


# ---- what the source says ------------------------------------------------------------------------


def docstring_sections(text):
    """{heading: its lines, stripped} of a script's docstring."""
    sections, heading = {}, None
    for line in (ast.get_docstring(ast.parse(text)) or "").splitlines():
        found = re.fullmatch(r"([A-Z][\w ]*):", line)
        if found:
            heading = found[1]
            sections[heading] = []
        elif heading and line.strip():
            sections[heading].append(line.strip())
    return sections


def source_problems(name, text):
    """What is wrong with the source of edu/<name>.py, one string each."""
    wrong = [
        f"line {number} has {len(line)} columns, two scripts side by side leave 100"
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > 100
    ]
    sections = docstring_sections(text)
    if list(sections) != HEADINGS or not all(sections.values()):
        wrong.append(f"the docstring's headings are {list(sections)}, they should be {HEADINGS}")
    for line in sections.get("Run", []):
        if not re.match(rf"(python|torchrun( --?\S+)*) edu/{name}\.py( |$)", line):
            wrong.append(f"a Run line is no command of this script: {line}")
    if name not in OWN_SECTIONS:
        titles = re.findall(r"^# ---- (.+?)(?:: .*?)? -+$", text, re.MULTILINE)
        in_order = [title for i, title in enumerate(titles) if title not in titles[:i]]
        if in_order != SECTIONS:
            wrong.append(f"its sections are {in_order}, they should be {SECTIONS}")
    if not text.endswith('\n\nif __name__ == "__main__":\n    sys.exit(main())\n'):
        wrong.append("it does not end with the guard that calls sys.exit(main())")
    for node in ast.walk(ast.parse(text)):
        wrong += [f"line {node.lineno}: {complaint}" for complaint in node_problems(node)]
    return wrong


def node_problems(node):
    """What a script must not say, for one node of its syntax tree."""
    if isinstance(node, ast.ExceptHandler) and node.type is None:
        yield "a bare except also catches Ctrl-C and every typing error: name what you expect"
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        modules = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            modules.append(node.module or "")
        for module in modules:
            if module.split(".")[0] in {"importlib", "runpy", "edu", "conftest", *SCRIPTS}:
                yield f"imports {module}: a script stands alone (shared blocks are for the rest)"
            if module == "annotations":
                yield "tyro reads the real types: no `from __future__ import annotations`"
    if isinstance(node, ast.Call):
        yield from call_problems(node)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        if re.match(r"/(tmp|home|root|Users)\b", node.value):
            yield f"{node.value!r} is a place on one machine"
    if isinstance(node, ast.Attribute) and node.attr in {"SIGALRM", "fork"}:
        yield f"{node.attr} does not exist on Windows"


def call_problems(node):
    called = ast.unparse(node.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    positional = [ast.unparse(argument) for argument in node.args]
    last = called.rpartition(".")[2]
    if called in {"eval", "exec", "__import__", "compile", "os.system", "os.popen"}:
        yield f"{called}() runs text as code"
    if re.match(r"(c?[pP]ickle|dill|joblib|shelve|marshal)\.\w*(load|open|Unpickler)", called):
        yield f"{called} runs whatever code a file contains: use safetensors or JSON"
    if "shell" in given:
        yield "shell=True hands text to a shell: give a list of words"
    if called == "torch.load" and given.get("weights_only") != "True":
        yield "torch.load without weights_only=True unpickles, which runs code in the file"
    if last == "cuda" and not called.startswith("torch."):
        yield ".cuda() fails where there is none: .to(device)"
    if "'cuda'" in (given.get("device"), *(positional if last in {"to", "device"} else ())):
        yield "a fixed device: take the one that compute_init chose"
    if "encoding" in given or any(word.startswith("'utf', 'ascii'") for word in positional):
        return
    mode = given.get("mode") or (positional[1:2] or ["'r'"])[0]
    if called in {"open", "os.fdopen"} and "b" not in mode:
        yield f"{called}() of a text without encoding=: it differs from machine to machine"
    if last == "open" and called.count(".") and called not in {"os.open", "Image.open"}:
        if not re.match(r"'\w*b\w*'$", given.get("mode") or (positional or ["'r'"])[0]):
            yield f"{called}() of a text without encoding=: it differs from machine to machine"
    if (last == "read_text" and not positional) or (last == "write_text" and len(positional) < 2):
        yield f"{last}() without an encoding: it differs from machine to machine"
    if given.get("text") == "True" and last in {"run", "Popen", "check_output"}:
        yield f"{last}(text=True) without encoding=: it differs from machine to machine"


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_source_keeps_the_house_rules(name):
    wrong = source_problems(name, (EDU / f"{name}.py").read_text("utf-8"))
    assert not wrong, f"edu/{name}.py\n" + "\n".join(wrong)


GOOD = '''"""A script.

Goal:
    What it is for.

You will learn:
    - this

Read beside:
    nanochat/gpt.py

Run:
    python edu/20_good.py
    torchrun --nproc_per_node=2 edu/20_good.py --steps 3

Expect:
    20 good - cpu

Writes:
    nothing
"""
import sys

# ---- settings ---------------
# ---- shared blocks ----------
# ---- the idea: one ----------
# ---- the idea: two ----------
# ---- the loop ---------------
# ---- the command line -------


def main(argv: list[str] | None = None) -> int:
    CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
'''


def test_a_script_that_keeps_the_rules_has_no_problem():
    assert source_problems("20_good", GOOD.replace("CODE", "pass")) == []


@pytest.mark.parametrize(
    "code",
    [
        "open(path, encoding='utf-8')", "open(path, 'rb')", "path.open('wb')", "os.open(path, 0)",
        "path.read_text('utf-8')", "path.write_text(text, encoding='utf-8')", "model.eval()",
        "path.write_text(text, 'utf-8')", "torch.load(path, weights_only=True)",
        "torch.cuda.synchronize()", "re.compile(text)", "x.to(device)",
    ],
)  # fmt: skip
def test_what_is_allowed_is_not_complained_about(code):
    assert source_problems("20_good", GOOD.replace("CODE", code)) == []


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("CODE", "x = '" + "x" * 100 + "'", "columns"),
        ("Read beside:\n    nanochat/gpt.py\n\n", "", "headings"),
        ("    - this\n", "", "headings"),
        ("Goal:", "Aim:", "headings"),
        ("python edu/20_good.py\n", "python edu/21_other.py\n", "no command of this script"),
        ("python edu/20_good.py\n", "just start it\n", "no command of this script"),
        ("# ---- the loop ---------------\n", "", "sections"),
        ("# ---- settings", "# ---- numbers", "sections"),
        ("sys.exit(main())", "main()", "guard"),
        ("CODE", "try: pass\n    except: pass", "bare except"),
        ("CODE", "eval(x)", "runs text as code"),
        ("CODE", "exec(x)", "runs text as code"),
        ("CODE", "os.system(x)", "runs text as code"),
        ("CODE", "subprocess.run(x, shell=True)", "shell"),
        ("CODE", "pickle.load(file)", "pickle.load runs"),
        ("CODE", "x = pickle.Unpickler(file).load()", "Unpickler runs"),
        ("CODE", "torch.load(x)", "weights_only"),
        ("CODE", "torch.load(x, weights_only=False)", "weights_only"),
        ("CODE", "model.cuda()", "to(device)"),
        ("CODE", "torch.zeros(3, device='cuda')", "fixed device"),
        ("CODE", "model.to('cuda')", "fixed device"),
        ("CODE", "open(x)", "without encoding"),
        ("CODE", "open(x, 'w')", "without encoding"),
        ("CODE", "open(x, mode='a')", "without encoding"),
        ("CODE", "path.open()", "without encoding"),
        ("CODE", "path.open('w')", "without encoding"),
        ("CODE", "path.read_text()", "without an encoding"),
        ("CODE", "path.write_text(x)", "without an encoding"),
        ("CODE", "subprocess.run(x, text=True)", "without encoding"),
        ("CODE", "import train_tiny_chat", "stands alone"),
        ("CODE", "from edu import x", "stands alone"),
        ("CODE", "import importlib", "stands alone"),
        ("CODE", "signal.SIGALRM", "Windows"),
        ("CODE", "x = '/tmp/x'", "one machine"),
    ],
)
def test_each_breach_is_named(old, new, complaint):
    text = GOOD.replace(old, new).replace("CODE", "pass")
    assert any(complaint in wrong for wrong in source_problems("20_good", text))


# ---- imported, and asked for help ----------------------------------------------------------------

# Imports every script once its libraries are there, so that what is counted is its own doing.
PROBE = r'''
import ast, contextlib, dataclasses, importlib, importlib.util, io, json, os, signal, sys, threading
import time
from pathlib import Path

import torch

watching, deeds = False, []
DEEDS = {"subprocess.Popen", "os.system", "socket.connect", "socket.bind", "os.mkdir", "os.rename"}
SOURCES = (".py", ".pyc", ".so")  # a library that imports another one late

def watch(event, arguments):
    if not watching:
        return
    if event in DEEDS or event == "open" and not str(arguments[0]).endswith(SOURCES):
        deeds.append(f"{event} {arguments}")

def state():
    return {"threads": threading.active_count(), "folder": os.getcwd(),
            "environment": dict(os.environ), "dtype": str(torch.get_default_dtype()),
            "torch threads": torch.get_num_threads(), "torch seed": torch.initial_seed(),
            "Ctrl-C": str(signal.getsignal(signal.SIGINT))}

def called(main, *argv):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(argv))
        except SystemExit as stop:
            code = stop.code
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}

sys.addaudithook(watch)
for path in sys.argv[1:]:
    name = "edu_" + Path(path).stem
    for node in ast.parse(Path(path).read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            importlib.import_module(node.module)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
    deeds, before, began = [], state(), time.process_time()
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        watching = True
        spec.loader.exec_module(module)
        watching = False
    after = state()
    found = {"seconds": time.process_time() - began, "printed": out.getvalue(), "deeds": deeds,
             "changed": [key for key in before if before[key] != after[key]]}
    found["fields"] = [field.name for field in dataclasses.fields(module.Config)] \
        if hasattr(module, "Config") else []
    found["help"] = called(module.main, "--help")
    found["unknown"] = called(module.main, "--no-such-flag")
    print(json.dumps(found), flush=True)
'''


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """{script: what importing it, --help and a wrong flag did}."""
    command = [sys.executable, "-c", PROBE, *(EDU / f"{name}.py" for name in SCRIPTS)]
    cwd = tmp_path_factory.mktemp("probe")
    done = run_process(command, cwd=cwd, env={"COLUMNS": 200})
    assert done.returncode == 0, done.stderr
    assert not list(cwd.iterdir()), "importing a script or asking for help leaves files behind"
    return dict(zip(SCRIPTS, map(json.loads, done.stdout.splitlines())))


@pytest.mark.parametrize("name", SCRIPTS)
def test_importing_a_script_does_nothing_but_define(probed, name):
    found = probed[name]
    assert (found["printed"], found["deeds"], found["changed"]) == ("", [], [])
    assert found["seconds"] < 5


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_every_setting_and_exits_well(probed, name):
    found = probed[name]
    assert found["help"]["code"] in (0, None), found["help"]["err"]
    flags = ["--" + field.replace("_", "-") for field in found["fields"]]
    assert flags or name in OWN_SECTIONS, "no Config dataclass"
    missing = [flag for flag in flags if not re.search(rf"{flag}\b", found["help"]["out"])]
    assert not missing


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_flag_that_does_not_exist_is_named_and_ends_with_2(probed, name):
    found = probed[name]["unknown"]
    assert found["code"] == 2 and "--no-such-flag" in found["err"] + found["out"]
    assert "Traceback" not in found["err"]


# ---- the docstring is true -----------------------------------------------------------------------

NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"
# What one machine has and another has not.
EITHER = {r"\b(?:cpu|cuda|mps)\b": "(?:cpu|cuda|mps)", r"\bb?float(?:32|16)\b": r"b?float(?:32|16)"}


def expected_pattern(line):
    """The regular expression for a line under Expect.

    Numbers match any number, `...` anything, a run of spaces any run, and cpu or float32 what
    another machine has in their place.
    """
    kinds = {NUMBER: f"[-+]?{NUMBER}", r"\.\.\.": ".*", r"\s+": r"\s+", **EITHER}
    pattern, rest = "", " ".join(line.split())
    while rest:
        for kind, becomes in reversed(kinds.items()):
            found = re.match(kind, rest)
            if found:
                break
        else:
            found, becomes = rest[0], re.escape(rest[0])
        pattern += becomes
        rest = rest[len(found[0]) if isinstance(found, re.Match) else 1 :]
    return re.compile(pattern)


def missing_lines(expected, output):
    """The first of the lines `expected` that does not follow in `output`, or None."""
    lines = iter(output.splitlines())
    for line in expected:
        pattern = expected_pattern(line)
        if not any(pattern.fullmatch(" ".join(found.split())) for found in lines):
            return line
    return None


def test_expected_lines_match_with_other_numbers_and_other_words_do_not():
    output = "05 engine - cuda - bfloat16 - 2.1M params\nstep   loss\n  10  3.21\nresult: x - -> 5"
    assert missing_lines(["05 engine - cpu - float32 - 1.0M params"], output) is None
    assert missing_lines(["05 engine - ...", "20    1.5", "result: x - -> 1,234"], output) is None
    for wrong in ("05 engin - ...", "step", "loss", "10", "x 3.21", "result: y - -> 5"):
        assert missing_lines([wrong], output) == wrong
    assert missing_lines(["10 3.2", "step loss"], output) == "step loss"  # the order counts


@dataclass
class RunLine:
    """A line under Run, what became of it, and the files in the folder before and after."""

    line: str
    code: int
    out: str
    err: str
    before: dict
    after: dict
    seconds: float


def files_in(folder):
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file()
    }


# Imports the slow libraries once, then forks for each job: a process of its own, without their five
# seconds. The alarm kills a job that hangs.
FORKER = r"""
import json, os, runpy, signal, sys
import matplotlib.pyplot, requests, tiktoken, torch, torch._dynamo, torch.utils.tensorboard, tyro

for job in map(json.loads, sys.stdin):
    child = os.fork()
    if child == 0:
        signal.alarm(100)
        for number, name in enumerate((os.devnull, job["out"], job["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        sys.argv = job["command"]
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# At these sizes two threads gain nothing, and on a busy machine they wait for each other.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """{script: [RunLine]}: every Run line of every script, in one folder, in the order of NAMES."""
    folder, logs = tmp_path_factory.mktemp("house"), tmp_path_factory.mktemp("logs")
    if sys.platform != "linux":
        return {name: run_lines(name, folder, in_a_process) for name in NAMES}
    forker = subprocess.Popen(
        [sys.executable, "-c", FORKER], cwd=folder, env={**os.environ, **ONE_THREAD},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip

    def in_a_fork(command, cwd):
        if command[0] != "python":
            return in_a_process(command, cwd)
        out, err = (logs / f"{len(list(logs.iterdir()))}.{kind}" for kind in ("out", "err"))
        job = {"command": command[1:], "out": str(out), "err": str(err)}
        print(json.dumps(job), file=forker.stdin, flush=True)
        code = int(forker.stdout.readline())
        return code, out.read_text("utf-8"), err.read_text("utf-8")

    with forker:
        return {name: run_lines(name, folder, in_a_fork) for name in NAMES}


def in_a_process(command, cwd):
    """Exit code, stdout and stderr of a command that begins with python or torchrun."""
    launcher = {"python": [], "torchrun": ["-m", "torch.distributed.run", "--standalone"]}
    command = [sys.executable, *launcher[command[0]], *command[1:]]
    done = run_process(command, cwd=cwd, env=ONE_THREAD, timeout=100)
    return done.returncode, done.stdout, done.stderr


def run_lines(name, folder, run):
    done = []
    for line in docstring_sections((EDU / f"{name}.py").read_text("utf-8")).get("Run", []):
        words = [*shlex.split(line), *shlex.split(SMALLEST.get(name, ""))]
        command = [str(ROOT / word) if word.startswith("edu/") else word for word in words]
        before, began = files_in(folder), time.monotonic()
        code, out, err = run(command, folder)
        seconds = time.monotonic() - began
        done.append(RunLine(line, code, out, err, before, files_in(folder), seconds))
    return done


@pytest.mark.timeout(600)  # the first of these waits for all scripts
@pytest.mark.parametrize("name", NAMES)
def test_every_run_line_runs_and_its_output_has_the_house_form(ran, name):
    for run in ran[name]:
        assert run.code == 0, f"{run.line}\n{run.out[-3000:]}{run.err[-3000:]}"
        assert "Traceback" not in run.err and "Warning" not in run.err, run.err
        if " --show" in run.line or " -p " in run.line:
            continue  # prints something to read, instead of doing its job
        lines = run.out.strip().splitlines()
        if name[:2].isdigit():
            assert lines[0].startswith(f"{name[:2]} ") and " - " in lines[0], lines[0]
        result = [line for line in lines if line.startswith("result: ")]
        assert len(result) == 1 and re.fullmatch(r"result: .+ \S+ -> \S+ \(n=.+\)", result[0])
        following = re.match(r"next: python (edu/\w+\.py)", lines[-1])
        assert following, f"the last line is not next: python edu/...: {lines[-1]}"
        assert (ROOT / following[1]).is_file(), f"{lines[-1]}: there is no such script"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NAMES)
def test_what_a_script_prints_is_what_its_docstring_expects(ran, name):
    expected = docstring_sections((EDU / f"{name}.py").read_text("utf-8"))["Expect"]
    missing = missing_lines(expected, ran[name][0].out)
    assert missing is None, f"not printed (in this order): {missing}\n\n{ran[name][0].out}"
    assert 3 <= len(expected) <= 6


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NAMES)
def test_what_a_script_writes_is_what_its_docstring_says(ran, name):
    said = docstring_sections((EDU / f"{name}.py").read_text("utf-8"))["Writes"]
    run = ran[name][0]
    written = {path for path in run.after if run.after[path] != run.before.get(path)}
    outside = {path for path in written if not path.startswith("data/")}
    assert not outside, "written outside of the data folder"
    if said[0].split()[0].rstrip(".,;") == "nothing":
        assert not written
    for line in said:
        path = "data/" + line.split()[0].rstrip(",;")
        assert line.startswith("nothing") or path in written or any(
            other.startswith(path.rstrip("/") + "/") for other in written
        ), f"under Writes stands {line!r}, and {path} was not written"
    half = [path for path in run.after if re.search(r"\.(tmp|part|lock)$", path)]
    assert not half, "temporary files are left behind"


def test_the_tables_of_this_file_name_scripts_that_exist():
    assert set(ORDER) | set(SMALLEST) <= set(SCRIPTS)
    assert os.environ["MPLBACKEND"] == "Agg"  # no window opens
