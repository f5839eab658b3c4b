"""What every test file shares: loading a script, running a script, and no network.

    from conftest import load
    engine = load("05_engine")                   # the module, with nothing run but its definitions

    def test_x(run_script, tmp_path):
        done = run_script("05_engine", "--prompt", "The sky is", data_dir=tmp_path)
        assert done.returncode == 0, done.stderr

A learner's version is tested by the same files: `pytest tests/test_05_engine.py --impl my_edu`
takes `my_edu/05_engine.py` where it exists, and ours for every other script.
"""

import contextlib
import importlib.util
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
EDU = ROOT / "edu"

# Set before anything imports the libraries that read them, and inherited by every process that a
# test starts. The proxy is a closed port: a child that tries to leave this machine is refused at
# once, as it would be with no network at all, instead of hanging in a name server's timeout.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
    PYTHONUTF8="1",
)
for scheme in ("http", "https", "all"):
    os.environ[f"{scheme}_proxy"] = os.environ[f"{scheme.upper()}_PROXY"] = "http://127.0.0.1:9"
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost,::1"
# Two tests must not share what a shell happens to export.
for variable in ("EDU_DATA", "HF_ENDPOINT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
    os.environ.pop(variable, None)


# ---- which version of a script: ours or the learner's --------------------------------------------


class Implementation:
    """Where scripts come from: the folder given by --impl, then edu/. One per session."""

    folder: Path | None = None
    modules: dict[str, object] = {}


def pytest_addoption(parser):
    parser.addoption(
        "--impl",
        metavar="DIR",
        default=None,
        help="test DIR/NN_topic.py where it exists, and edu/NN_topic.py for all others",
    )


def pytest_configure(config):
    # Before torch is imported: two test processes share the cores. (Not for tests/bench.py, which
    # imports this file too.)
    os.environ["OMP_NUM_THREADS"] = "1"
    # A suite that a shell runs in the background ignores Ctrl-C, and would hand that on to all that
    # it starts; some tests press it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    given = config.getoption("--impl")
    if given is None:
        return
    folder = (Path(config.invocation_params.dir) / given).resolve()
    if not folder.is_dir():
        raise pytest.UsageError(f"--impl {given}: no such folder; make it and put a script there")
    if not replaced_scripts(folder):
        raise pytest.UsageError(
            f"--impl {given}: it holds no file named as a script of edu/ is named, so the tests "
            f"would only test ours; name yours like {EDU.name}/05_engine.py"
        )
    Implementation.folder = folder


def pytest_report_header(config):
    if Implementation.folder is not None:
        names = ", ".join(replaced_scripts(Implementation.folder))
        return f"impl: {Implementation.folder} replaces {names}"


def replaced_scripts(folder):
    """Names (relative to edu/) of the scripts that `folder` has a version of."""
    ours = sorted(path.relative_to(EDU) for path in EDU.rglob("*.py"))
    return [str(path) for path in ours if (folder / path).is_file()]


def script_path(name):
    """Path of the script called `name` (no .py): the learner's if there is one, else ours."""
    if Implementation.folder is not None:
        theirs = Implementation.folder / f"{name}.py"
        if theirs.is_file():
            return theirs
    return EDU / f"{name}.py"


def load(name):
    """The module of edu/<name>.py, e.g. load("05_engine"); the same object for a whole session."""
    if name not in Implementation.modules:
        Implementation.modules[name] = load_path(script_path(name), "edu_" + name.replace("/", "_"))
    return Implementation.modules[name]


def load_path(path, module_name):
    """Import the file at `path` under `module_name`.

    It stands in sys.modules before it runs: dataclasses and pickling look their module up there.
    """
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


# ---- running a script as a process ---------------------------------------------------------------


def run_process(command, *, cwd, env=None, timeout=120, stdin=""):
    """Run `command`, and return subprocess.CompletedProcess with text in stdout and stderr.

    env is added to this process's. After `timeout` seconds the process and all its children are
    killed, and the test fails with what they had printed.
    """
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **{key: str(value) for key, value in (env or {}).items()}},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="backslashreplace",
        start_new_session=True,
    )
    try:
        out, err = process.communicate(stdin, timeout=timeout)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        out, err = process.communicate()
        pytest.fail(f"still running after {timeout} s: {process.args}\n{out[-4000:]}{err[-4000:]}")
    except BaseException:
        kill_tree(process.pid)
        process.wait()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def kill_tree(pid):
    """Kill a process and all that it has started, also the ranks of torchrun, each in a session
    of its own, which a signal to the process group would miss."""
    parent = psutil.Process(pid)
    for process in [*parent.children(recursive=True), parent]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def run_by_name(name, *args, cwd, data_dir=None, nproc=None, **options):
    """Run the script called `name` with `args`; nproc=2 starts it under torchrun, two ranks."""
    launcher = [sys.executable]
    if nproc is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    env = {"EDU_DATA": data_dir if data_dir is not None else Path(cwd) / "data"}
    env.update(options.pop("env", None) or {})
    return run_process([*launcher, script_path(name), *args], cwd=cwd, env=env, **options)


def flags_of(config):
    """The command line that gives this Config: --name value, --name or --no-name."""
    words = []
    for name, value in vars(config).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif value not in ("", None):
            words += [flag, str(value)]
    return words


@contextlib.contextmanager
def running(name, config, log):
    """The script as a process of its own that goes on meanwhile, its output in the file `log`."""
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen([sys.executable, "-u", script_path(name), *flags_of(config)],
                                   cwd=log.parent, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(condition, process, seconds=60):
    """Until condition() holds; fails when the process ends or the time is up before that."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "it ended, or hangs"
        time.sleep(0.01)


@pytest.fixture
def run_script(tmp_path):
    """run_script(name, *args, data_dir=None, env=None, timeout=120, stdin="", nproc=None).

    The process runs in tmp_path, and its data folder (EDU_DATA) is tmp_path/data by default.
    """

    def run(name, *args, **options):
        return run_by_name(name, *args, cwd=tmp_path, **options)

    return run


# ---- no network ----------------------------------------------------------------------------------


def is_loopback(host):
    if host in (None, "", "localhost", b"localhost"):
        return True
    try:
        return ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Loopback only: any other address behaves as it would with the cable pulled."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex
    sendto, getaddrinfo = socket.socket.sendto, socket.getaddrinfo

    def check(address):
        if isinstance(address, tuple) and not is_loopback(address[0]):
            raise OSError(f"tests reach nothing but this machine, and {address} is not on it")

    def guarded_connect(self, address):
        check(address)
        return connect(self, address)

    def guarded_connect_ex(self, address):
        check(address)
        return connect_ex(self, address)

    def guarded_sendto(self, data, *flags_and_address):
        check(flags_and_address[-1])
        return sendto(self, data, *flags_and_address)

    def guarded_getaddrinfo(host, *args, **kwargs):
        if not is_loopback(host):
            raise socket.gaierror(
                socket.EAI_NONAME, f"tests look up no name but localhost, and {host!r} is another"
            )
        return getaddrinfo(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
    monkeypatch.setattr(socket.socket, "sendto", guarded_sendto)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
