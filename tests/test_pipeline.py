"""my_pipeline.sh, with stub scripts in the place of the real ones, so that a run takes seconds.

The stubs are one small program (STUB): it writes what the real script of its name would write, and
adds a line to calls.txt, so that a test sees which stages ran and with which flags. The real
scripts, chained in the same order, are run by test_house.py.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, kill_tree, run_process

STAGES = ["check", "world", "download", "tokenizer", "pretrain", "engine", "identity", "sft", "rl",
          "compare", "evaluate", "report"]
SCRIPTS = {
    "check": "03_check_setup.py",
    "world": "00_tiny_world.py",
    "download": "01_download.py",
    "tokenizer": "11_tokenizer.py",
    "pretrain": "12_pretrain.py",
    "engine": "05_engine.py",
    "identity": "06_identity.py",
    "sft": "08_sft.py",
    "rl": "10_rl.py",
    "evaluate": "14_evaluate.py",
    "report": "17_report.py",
}
ALWAYS = ["check", "engine", "compare", "report"]  # not up to date, ever: nothing to compare

STUB = '''
import os, shutil, sys, time
from pathlib import Path

name, flags, data = Path(__file__).stem, sys.argv[1:], Path(os.environ["EDU_DATA"])
with open("calls.txt", "a") as file:
    print(name, *flags, file=file)

def write(path, text):
    (data / path).parent.mkdir(parents=True, exist_ok=True)
    (data / path).write_text(text)

def download(base):
    import urllib.error, urllib.request
    if base.startswith("/"):
        for path in Path(base).glob("shard_*.parquet"):
            shutil.copy(path, data)
    for i in range(9 if base.startswith("http") else 0):
        try:
            body = urllib.request.urlopen(f"{base}/shard_0000{i}.parquet").read().decode()
        except urllib.error.HTTPError:
            break
        path = data / f"shard_0000{i}.parquet"
        if not path.exists():  # as the real one: what is there is taken for whole
            path.write_text(body)
    write(".shards_from", base)

say = os.environ.get("WORLD_SAYS", "once")
if name == "00_tiny_world":
    for i in range(3):
        write(f"mirror/shard_0000{i}.parquet", say)
    write("tiny_chat_train.jsonl", "{}")
    write("tiny_eval/index.json", "{}")
elif name == "01_download" and "--base-url" in flags:
    download(flags[flags.index("--base-url") + 1])
elif name == "01_download":
    write("shard_00000.parquet", "from the hub")
elif name == "11_tokenizer":
    write("tokenizer/config.json", (data / "shard_00000.parquet").read_text())
elif name == "06_identity":
    write("my_identity.jsonl", "{}")
    write("my_identity_test.jsonl", "{}")
elif name in ("08_sft", "10_rl"):
    source, stage = ("base", "sft") if name == "08_sft" else ("sft", "rl")
    write(f"{stage}/model.safetensors", (data / source / "model.safetensors").read_text())
    write(f"{stage}/config.json", "{}")
elif name == "14_evaluate":
    for stage in ("base", "sft", "rl"):
        write(f"{stage}/eval.json", "{}")
elif name == "12_pretrain":
    print("step 1")
    if os.environ.get("KILLED"):
        time.sleep(0.02)  # a file system may stamp two files of one tick alike
        write("base/resume.pt", "half way")
        print("ready to be stopped")
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            write("base/saved.txt", "by Ctrl-C")
            sys.exit(0)  # an orderly end is not yet a finished job
    if os.environ.get("FORGETS"):
        sys.exit(0)
    write("base/model.safetensors", "w")
    write("base/config.json", "{}")
print(f"result: what {name} shows 8.25 -> 0.5 (n=1,234)" if name != "03_check_setup"
      else "result: ranks - -> 1 (n=14.0 MB)")
if os.environ.get("FAIL") == name:
    print("error: the value 7 is wrong, try 8", file=sys.stderr)
    sys.exit(3)
'''


class Clone:
    """A copy of the pipeline with stub scripts, and an environment in which pip does nothing."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "edu").mkdir(parents=True)
        (folder / "tests").mkdir()
        shutil.copy(ROOT / "my_pipeline.sh", folder)
        shutil.copy(ROOT / "tests/run.sh", folder / "tests")
        for script in SCRIPTS.values():
            (folder / "edu" / script).write_text(STUB, "utf-8")
        (folder / "requirements.txt").write_text("torch==0\n", "utf-8")
        (folder / "tests/requirements.txt").write_text("pytest==0\n", "utf-8")
        self.interpreter(folder / ".venv/bin/python")

    def interpreter(self, path):
        """A python that writes pip's arguments to pip.txt and otherwise is the one we run on."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "#!/usr/bin/env bash\n"
            'case "$*" in\n'
            f'  "-m pip install"*) echo "$*" >>"{self.folder}/pip.txt"\n'
            '    exit "${PIP_FAILS:-0}" ;;\n'
            '  "-m pip"*) exit 0 ;;\n'
            '  "-m pytest"*) printf "%s\\n" "${@:3}"; exit 5 ;;\n'
            f'esac\nexec {sys.executable} "$@"\n',
            "utf-8",
        )
        path.chmod(0o755)

    def run(self, *args, cwd=None, **env):
        env = {key: str(value) for key, value in env.items()}
        script = self.folder / "my_pipeline.sh"
        return run_process(["bash", script, *args], cwd=cwd or self.folder, env=env, timeout=60)

    def ran(self):
        """Names of the stages that ran since the last call of this, with their flags."""
        path = self.folder / "calls.txt"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        names = {script[:-3]: name for name, script in SCRIPTS.items()}
        calls = [("compare" if line.startswith("05_engine --compare") else names[line.split()[0]],
                  line.split()[1:]) for line in lines]
        self.flags = dict(calls)
        return [name for name, _ in calls]

    def pip_calls(self):
        path = self.folder / "pip.txt"
        return path.read_text("utf-8").splitlines() if path.exists() else []


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path / "a clone")  # a space in the path, as in many a home folder


@pytest.fixture(scope="module")
def finished_clone(tmp_path_factory):
    clone = Clone(tmp_path_factory.mktemp("finished") / "a clone")
    done = clone.run()
    assert done.returncode == 0, done.stderr
    clone.output, clone.first_ran = done.stdout, clone.ran()
    return clone


@pytest.fixture
def finished(finished_clone, tmp_path):
    """A clone in which everything has run once; each test gets a copy, with its times."""
    folder = tmp_path / "a clone"
    shutil.copytree(finished_clone.folder, folder)
    clone = Clone.__new__(Clone)
    clone.folder = folder
    clone.interpreter(folder / ".venv/bin/python")
    # paths of inputs are relative, so the copy is as up to date as the original was
    return clone


# ---- the stages ----------------------------------------------------------------------------------


def test_the_first_run_runs_every_stage_in_order_and_passes_their_output_on(finished_clone):
    assert finished_clone.first_ran == STAGES
    assert "result: what 11_tokenizer shows" in finished_clone.output


def test_the_download_comes_over_http_from_the_tiny_world(finished_clone):
    base = finished_clone.flags["download"][1]
    assert base.startswith("http://127.0.0.1:") and base.endswith("/mirror")
    assert (finished_clone.folder / "data/shard_00002.parquet").read_text() == "once"


def test_a_second_run_skips_all_that_is_up_to_date(finished):
    done = finished.run(FRESH=0)
    assert (done.returncode, finished.ran()) == (0, ALWAYS)
    assert done.stdout.count("up to date (") == len(STAGES) - len(ALWAYS)


def test_fresh_runs_every_stage_again(finished):
    assert finished.run(FRESH=1).returncode == 0
    assert finished.ran() == STAGES
    # 14 has a memory of its own, and to the bit the same weights as before
    assert "--fresh" in finished.flags["evaluate"]


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        # the shards come out the same, the chats and problems are new
        ("edu/00_tiny_world.py", {"world", "download", "sft", "rl", "evaluate"}),
        ("edu/12_pretrain.py", {"pretrain", "sft", "rl", "evaluate"}),
        ("edu/08_sft.py", {"sft", "rl", "evaluate"}),
        ("data/shard_00001.parquet",
         {"download", "tokenizer", "pretrain", "sft", "rl", "evaluate"}),
        ("data/tokenizer/config.json", {"tokenizer", "pretrain", "sft", "rl", "evaluate"}),
    ],
)
def test_a_changed_script_or_file_runs_its_stage_again_and_those_after_it(finished, changed, again):
    with open(finished.folder / changed, "a", encoding="utf-8") as file:
        file.write("\n# changed\n")
    assert finished.run().returncode == 0
    assert set(finished.ran()) == again | set(ALWAYS)


def test_a_missing_output_is_made_again(finished):
    (finished.folder / "data/base/config.json").unlink()
    assert finished.run().returncode == 0
    assert (finished.folder / "data/base/config.json").exists()


def test_changed_flags_run_the_stage_again_and_reach_it_in_words(finished):
    assert finished.run(PRETRAIN_FLAGS="--depth 2 --name 'two words'").returncode == 0
    assert set(finished.ran()) == {"pretrain", "sft", "rl", "evaluate", *ALWAYS}
    assert finished.flags["pretrain"] == ["--depth", "2", "--name", "two", "words"]


def test_shards_of_an_older_world_do_not_survive_a_new_one(finished):
    assert finished.run(WORLD_SAYS="twice", WORLD_FLAGS="--seed 2").returncode == 0
    shards = sorted((finished.folder / "data").glob("shard_*.parquet"))
    assert [shard.read_text() for shard in shards] == ["twice"] * 3
    # who the model is does not depend on the world
    assert finished.ran() == [stage for stage in STAGES if stage != "identity"]


def test_fewer_shards_than_before_leave_none_of_the_others_behind(finished):
    mirror = finished.folder / "data/mirror"
    (mirror / "shard_00002.parquet").unlink()
    world = json.loads((finished.folder / "data/.pipeline/world.json").read_text())
    world["outputs"].pop("data/mirror/shard_00002.parquet")
    (finished.folder / "data/.pipeline/world.json").write_text(json.dumps(world))
    assert finished.run().returncode == 0
    assert not (finished.folder / "data/shard_00002.parquet").exists()


# ---- failing and stopping ------------------------------------------------------------------------


def test_a_failing_stage_stops_the_run_with_its_own_message_and_exit_code(clone):
    done = clone.run(FAIL="11_tokenizer", NUM_SHARDS=3)
    assert (done.returncode, clone.ran()) == (3, ["check", "world", "download", "tokenizer"])
    assert "error: the value 7 is wrong, try 8" in done.stderr
    assert "stage tokenizer" in done.stderr
    assert "go on with: NUM_SHARDS=3 bash my_pipeline.sh" in done.stderr
    assert not (clone.folder / "data/pipeline.json").exists()
    assert clone.run(NUM_SHARDS=3).returncode == 0
    assert clone.ran() == ["check", *STAGES[STAGES.index("tokenizer") :]]


def test_a_stage_that_ends_well_but_writes_nothing_is_a_failure(finished):
    shutil.rmtree(finished.folder / "data/base")
    done = finished.run(FORGETS=1)
    assert done.returncode == 1
    assert "there is no data/base/model.safetensors" in done.stderr


def test_a_stage_whose_outputs_are_whole_but_which_failed_is_not_up_to_date(finished):
    (finished.folder / "edu/12_pretrain.py").write_text(STUB + "\n")
    (finished.folder / "data/.pipeline/world.json").write_text('{"made_fr')  # half a record
    assert finished.run(FAIL="12_pretrain").returncode == 3
    assert (finished.folder / "data/base/model.safetensors").exists()
    assert "world" in finished.ran()
    assert finished.run().returncode == 0
    assert finished.ran() == [
        "check", "pretrain", "engine", "sft", "rl", "compare", "evaluate", "report"]


def start_and_wait_for(clone, text, **env):
    """Start the pipeline; return the process once it has printed `text`."""
    process = subprocess.Popen(
        ["bash", "my_pipeline.sh"], cwd=clone.folder, env={**os.environ, **env},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", start_new_session=True,
    )  # fmt: skip
    for line in process.stdout:
        if text in line:
            return process
    pytest.fail(f"never printed {text!r}: {process.stderr.read()}")


@pytest.mark.parametrize(
    ("number", "to_all"),
    [(signal.SIGINT, True), (signal.SIGTERM, False)],
    ids=["Ctrl-C in the terminal", "kill of the shell alone"],
)
def test_a_stopped_stage_saves_leaves_nobody_behind_and_goes_on(finished, number, to_all):
    process = start_and_wait_for(finished, "ready to be stopped", KILLED="1", PRETRAIN_FLAGS="--x")
    (os.killpg if to_all else os.kill)(process.pid, number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert "stopped in stage pretrain; go on with: PRETRAIN_FLAGS=--x bash my_pipeline.sh" in err
    assert (finished.folder / "data/base/saved.txt").exists()
    with pytest.raises(ProcessLookupError):  # nobody of its group is left
        os.killpg(process.pid, 0)
    assert finished.run(PRETRAIN_FLAGS="--x").returncode == 0
    assert finished.ran() and finished.flags["pretrain"] == ["--x", "--resume"]


def test_a_training_killed_outright_goes_on_but_never_as_another_run(finished):
    process = start_and_wait_for(finished, "ready to be stopped", KILLED="1", PRETRAIN_FLAGS="--x")
    kill_tree(process.pid)
    process.communicate(timeout=20)
    copy = finished.folder.with_name("copy")
    shutil.copytree(finished.folder, copy)
    assert finished.run(PRETRAIN_FLAGS="--x").returncode == 0
    assert finished.ran() and finished.flags["pretrain"] == ["--x", "--resume"]
    finished.folder = copy
    assert finished.run(PRETRAIN_FLAGS="--y").returncode == 0
    assert finished.ran() and finished.flags["pretrain"] == ["--y"]


# ---- where the data come from --------------------------------------------------------------------


def own_shards(folder, count=2):
    folder.mkdir()
    for i in range(count):
        (folder / f"shard_{i:05d}.parquet").write_text(f"mine {i}")
    return folder


def test_a_folder_of_shards_is_copied_to_a_place_of_its_own_and_not_changed(finished, tmp_path):
    mine = own_shards(tmp_path / "my texts")
    before = {path: path.stat().st_mtime_ns for path in mine.iterdir()}
    done = finished.run(cwd=tmp_path, DATA="dir:my texts")  # relative to where one calls from
    assert done.returncode == 0, done.stderr
    assert finished.ran() == STAGES
    assert "--prompt" in finished.flags["engine"]  # the tiny world's questions make no sense there
    data = finished.folder / "data"
    assert (data / "dir-my texts/shard_00001.parquet").read_text() == "mine 1"
    assert (data / "shard_00001.parquet").read_text() == "once"
    assert before == {path: path.stat().st_mtime_ns for path in mine.iterdir()}
    # what has changed there is taken anew
    (mine / "shard_00000.parquet").write_text("rewritten")
    assert finished.run(DATA=f"dir:{mine}").returncode == 0
    assert (data / "dir-my texts/tokenizer/config.json").read_text() == "rewritten"
    finished.ran()
    assert finished.run().returncode == 0 and finished.ran() == ALWAYS  # back: nothing to redo


def test_the_hub_is_asked_for_shards_and_edu_data_chooses_the_folder(clone, tmp_path):
    done = clone.run(cwd=tmp_path, DATA="fineweb-edu", EDU_DATA="else where")
    assert (done.returncode, clone.ran()[:3]) == (0, ["check", "world", "download"])
    assert clone.flags["download"] == ["--num-shards", "4"]
    assert (tmp_path / "else where/pipeline.json").exists()
    assert not (clone.folder / "data").exists()


def test_shards_of_unknown_origin_are_neither_mixed_in_nor_removed(clone):
    (clone.folder / "data").mkdir()
    stranger = clone.folder / "data/shard_00000.parquet"
    stranger.write_text("copied here by hand")
    done = clone.run()
    assert done.returncode == 2 and "must not be mixed" in done.stderr
    assert stranger.read_text() == "copied here by hand"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"DATA": "wikipedia"}, "DATA=wikipedia is no source: use tiny, fineweb-edu or dir:PATH"),
        ({"DATA": "dir:"}, "is no source"),
        ({"DATA": "dir:nowhere"}, "nowhere: there is no such folder"),
        ({"DATA": "dir:empty"}, "0 of the 2 shards needed"),
        ({"DATA": "dir:one"}, "1 of the 2 shards needed"),
        ({"DATA": "dir:gap"}, "after the first 2 the next number is missing"),
        ({"DATA": "dir:two", "EDU_DATA": "two"}, "your shards are never changed"),
        ({"NUM_SHARDS": "1"}, "NUM_SHARDS=1: it must be a number of at least 2"),
        ({"NUM_SHARDS": "many"}, "NUM_SHARDS=many"),
        ({"CHECK_FLAGS": "it's"}, "CHECK_FLAGS cannot be split"),
        ({"EDU_DATA": "one/shard_00000.parquet"}, "cannot make the data folder"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_runs(clone, env, message):
    (clone.folder / "empty").mkdir()
    own_shards(clone.folder / "one", 1)
    own_shards(clone.folder / "two", 2)
    own_shards(clone.folder / "gap", 4)
    (clone.folder / "gap/shard_00002.parquet").unlink()
    done = clone.run(**env)
    assert (done.returncode, clone.ran()) == (2, [])
    assert message in done.stderr


# ---- the table -----------------------------------------------------------------------------------


def test_the_closing_table_has_a_row_per_stage_with_what_its_result_line_says(finished_clone):
    lines = finished_clone.output.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("stage "))
    assert lines[head].split("  ")[0] == "stage" and "peak MB" in lines[head]
    rows = [line.split() for line in lines[head + 1 : head + 1 + len(STAGES)]]
    assert [row[0] for row in rows] == STAGES
    assert rows[1][3:] == ["what", "00_tiny_world", "shows", "8.25", "0.5", "1,234"]
    assert rows[0][3:] == ["ranks", "-", "1", "14.0", "MB"]


def test_pipeline_json_holds_the_same_rows(finished_clone):
    rows = json.loads((finished_clone.folder / "data/pipeline.json").read_text("utf-8"))
    assert [row["stage"] for row in rows] == STAGES
    assert all(0 <= row.pop("seconds") < 30 and 5 < row.pop("peak_mb") < 500 for row in rows)
    assert rows[0] == {
        "stage": "check", "metric": "ranks", "before": None, "after": 1, "n": "14.0 MB"
    }  # fmt: skip
    assert rows[4] == {
        "stage": "pretrain", "metric": "what 12_pretrain shows", "before": 8.25, "after": 0.5,
        "n": 1234,
    }  # fmt: skip


def test_skipped_stages_keep_their_row_and_are_marked(finished):
    before = json.loads((finished.folder / "data/pipeline.json").read_text("utf-8"))
    done = finished.run()
    after = json.loads((finished.folder / "data/pipeline.json").read_text("utf-8"))
    kept = [stage for stage in STAGES if stage not in ALWAYS]
    assert [row for row in after if row["stage"] in kept] == [
        row for row in before if row["stage"] in kept]
    assert [stage for stage in STAGES if f"\n{stage} * " in done.stdout] == kept


def test_peak_memory_and_time_are_those_of_the_stage(finished):
    path = finished.folder / "edu/11_tokenizer.py"
    path.write_text(STUB + "\nx = bytearray(300_000_000); x[::4096] = x[::4096]; time.sleep(1)\n")
    assert finished.run().returncode == 0
    rows = json.loads((finished.folder / "data/pipeline.json").read_text("utf-8"))
    assert 300 < rows[3]["peak_mb"] < 400 and rows[3]["seconds"] > 1
    assert rows[4]["peak_mb"] < 200 and rows[4]["seconds"] < rows[3]["seconds"]


# ---- set-up and the command line -----------------------------------------------------------------


def test_packages_are_installed_once_for_each_state_of_the_list(clone):
    assert clone.run("setup").returncode == 0 and len(clone.pip_calls()) == 1
    assert clone.run("setup").returncode == 0 and len(clone.pip_calls()) == 1
    (clone.folder / "requirements.txt").write_text("torch==1\n", "utf-8")
    assert clone.run("setup").returncode == 0 and len(clone.pip_calls()) == 2
    assert clone.run("setup", "tests").returncode == 0
    assert clone.pip_calls()[2].endswith("-r tests/requirements.txt")
    assert clone.run("setup", "tests").returncode == 0 and len(clone.pip_calls()) == 3


def test_an_install_that_failed_is_tried_again(clone):
    done = clone.run("setup", PIP_FAILS=7)
    assert done.returncode == 7 and "could not install requirements.txt" in done.stderr
    assert clone.run("setup").returncode == 0 and len(clone.pip_calls()) == 2


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ("exit 127", "install Python 3.10 or newer"),
        ('case "$2" in *split*) echo 3.9.18 ;; *) exit 1 ;; esac', "is Python 3.9.18"),
        ('case "$2" in *ensurepip*) exit 1 ;; *) echo 3.12.1 ;; esac', "python3-venv"),
    ],
    ids=["absent", "too old", "no venv"],
)
def test_a_python_that_will_not_do_is_refused_with_the_remedy(clone, answers, message):
    shutil.rmtree(clone.folder / ".venv")
    fake = clone.folder / "fake python"
    fake.write_text(f"#!/usr/bin/env bash\n{answers}\n", "utf-8")
    fake.chmod(0o755)
    done = clone.run(PYTHON=fake)
    assert done.returncode == 2 and message in done.stderr
    assert not (clone.folder / ".venv").exists()


@pytest.mark.parametrize(
    ("arguments", "whole_suite"),
    [
        ([], True),
        (["-k", "cache", "--impl", "my_edu"], True),  # a folder, but not one of tests
        (["test_x.py::test_one", "-x"], False),
        ([".", "-x"], False),
    ],
)
def test_run_sh_sets_up_and_hands_its_arguments_to_pytest(clone, arguments, whole_suite):
    tests = clone.folder / "tests"
    (tests / "test_x.py").touch()
    (clone.folder / "my_edu").mkdir()
    cwd = clone.folder if whole_suite else tests
    done = run_process(["bash", tests / "run.sh", *arguments], cwd=cwd)
    assert done.returncode == 5  # pytest's own
    assert clone.pip_calls()[0].endswith("-r tests/requirements.txt")
    words = done.stdout[done.stdout.index("-q\n") :].splitlines()
    two = ["-n", "2", "--dist", "loadfile"]
    folder = [*two, str(tests.resolve())] if whole_suite else []
    config = str(clone.folder.resolve() / "pyproject.toml")
    assert words == ["-q", "-c", config, *folder, *arguments]


def test_help_names_every_setting(clone):
    done = clone.run("--help")
    assert done.returncode == 0
    for word in ("DATA=fineweb-edu", "DATA=dir:PATH", "FRESH=1", "NUM_SHARDS", "PRETRAIN_FLAGS"):
        assert word in done.stdout


def test_an_argument_it_does_not_know_is_refused(clone):
    done = clone.run("--fresh")
    assert done.returncode == 2 and "'--fresh' is no argument" in done.stderr


def test_the_pipeline_calls_no_script_that_does_not_exist():
    text = (ROOT / "my_pipeline.sh").read_text("utf-8")
    called = {word for word in text.split() if word[:2].isdigit() and word.endswith(".py")}
    assert called == set(SCRIPTS.values())
    assert all(Path(ROOT / "edu" / script).is_file() for script in called)
