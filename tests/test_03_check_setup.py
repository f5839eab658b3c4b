"""Challenge 3: device, seed, ranks. GPUs are played by stand-ins; two gloo ranks are real."""

import inspect
import os
import re
import socket
import sys
import time

import pytest
import torch
import torch.distributed as dist
from conftest import load

setup03 = load("03_check_setup")
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def ours_only(name):
    """The helper of ours called `name`; a learner's version need not have it."""
    if not hasattr(setup03, name):
        pytest.skip(f"this version has no {name}")
    return getattr(setup03, name)


@pytest.fixture(autouse=True)
def clean_process(monkeypatch):
    """No torchrun variables before; no process group and the old thread count after."""
    for name in (*TORCHRUN, "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_num_threads(threads)


def have_devices(monkeypatch, cuda=0, mps=False):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def pretend_torchrun(monkeypatch, rank=0, world_size=1, local_rank=None, **more):
    values = (rank, rank if local_rank is None else local_rank, world_size, "127.0.0.1")
    for name, value in zip(TORCHRUN, (*values, free_port()), strict=True):
        monkeypatch.setenv(name, str(value))
    for name, value in more.items():
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def joined(monkeypatch):
    """What init_process_group was called with, one dict per call; no group is made."""
    calls = []
    signature = inspect.signature(dist.init_process_group)

    def record(*args, **kwargs):
        calls.append(signature.bind(*args, **kwargs).arguments)

    monkeypatch.setattr(dist, "init_process_group", record)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append({"set": device}))
    return calls


# ---- device --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuda", "mps", "best"),
    [(2, True, "cuda"), (1, False, "cuda"), (0, True, "mps"), (0, False, "cpu")],
)
def test_cuda_is_preferred_to_mps_and_mps_to_the_cpu(monkeypatch, cuda, mps, best):
    have_devices(monkeypatch, cuda, mps)
    assert setup03.autodetect_device_type() == best


def test_alone_there_is_one_rank_and_no_process_group(monkeypatch):
    have_devices(monkeypatch)
    assert setup03.compute_init() == (False, 0, 0, 1, torch.device("cpu"))
    assert not dist.is_initialized()


def test_a_device_type_that_is_asked_for_wins_over_autodetection(monkeypatch, joined):
    have_devices(monkeypatch, cuda=1)
    assert setup03.compute_init("cpu")[-1] == torch.device("cpu")
    assert setup03.compute_init("cuda")[-1].type == "cuda"


@pytest.mark.parametrize("device_type", ["cuda", "mps", "tpu"])
def test_a_device_that_is_not_there_is_an_error_and_not_a_fallback(monkeypatch, device_type):
    error = ours_only("UserError")
    have_devices(monkeypatch)
    with pytest.raises(error, match=f"no {device_type} device.*--device-type cpu"):
        setup03.compute_init(device_type)


# ---- seed ----------------------------------------------------------------------------------------


def test_the_seed_makes_random_numbers_repeat():
    setup03.compute_init("cpu")
    first = torch.rand(5)
    torch.rand(3)
    setup03.compute_init("cpu")
    assert torch.equal(torch.rand(5), first)
    ours_only("UserError")
    setup03.compute_init("cpu", seed=7)
    got = torch.rand(5)
    torch.manual_seed(7)
    assert torch.equal(got, torch.rand(5)) and not torch.equal(got, first)


# ---- ranks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "present",
    [["RANK"], ["WORLD_SIZE"], ["LOCAL_RANK"], ["RANK", "WORLD_SIZE"], list(TORCHRUN[:3]),
     list(TORCHRUN[:4]), list(TORCHRUN[1:])],
)  # fmt: skip
def test_half_a_torchrun_environment_is_refused_and_names_what_is_missing(monkeypatch, present):
    error = ours_only("UserError")
    pretend_torchrun(monkeypatch)
    missing = [name for name in TORCHRUN if name not in present]
    for name in missing:
        monkeypatch.delenv(name)
    with pytest.raises(error) as caught:
        setup03.compute_init("cpu")
    message = str(caught.value)
    assert f"{', '.join(missing)} not set" in message
    assert "torchrun --nproc_per_node=2" in message and "unset RANK" in message
    assert not dist.is_initialized()


def test_an_empty_variable_counts_as_missing(monkeypatch):
    error = ours_only("UserError")
    pretend_torchrun(monkeypatch)
    monkeypatch.setenv("WORLD_SIZE", "")
    with pytest.raises(error, match="WORLD_SIZE not set"):
        setup03.compute_init("cpu")


def test_a_master_address_alone_does_not_make_a_distributed_run(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    assert setup03.compute_init("cpu")[0] is False


def test_a_world_of_one_rank_is_joined_by_gloo_and_left_again(monkeypatch):
    pretend_torchrun(monkeypatch)
    assert setup03.compute_init("cpu") == (True, 0, 0, 1, torch.device("cpu"))
    assert dist.get_backend() == "gloo" and dist.get_world_size() == 1
    ours_only("compute_cleanup")()
    assert not dist.is_initialized()
    setup03.compute_cleanup()  # with nothing to leave, it does nothing


def test_on_cuda_each_rank_takes_the_gpu_of_its_local_rank_and_nccl(monkeypatch, joined):
    ours_only("UserError")
    have_devices(monkeypatch, cuda=4)
    pretend_torchrun(monkeypatch, rank=6, local_rank=2, world_size=8)
    assert setup03.compute_init() == (True, 6, 2, 8, torch.device("cuda", 2))
    assert joined[0] == {"set": torch.device("cuda", 2)}, "before any rank allocates on GPU 0"
    assert joined[1]["backend"] == "nccl" and joined[1]["device_id"] == torch.device("cuda", 2)


def test_more_local_ranks_than_gpus_are_refused(monkeypatch, joined):
    error = ours_only("UserError")
    have_devices(monkeypatch, cuda=2)
    pretend_torchrun(monkeypatch, rank=2, world_size=3)
    with pytest.raises(error, match=r"local rank 2 .*cuda.*there are 2"):
        setup03.compute_init()
    assert joined == []


def test_ranks_on_a_mac_fall_back_to_the_cpu_and_say_so(monkeypatch, joined, capsys):
    ours_only("print0")
    have_devices(monkeypatch, mps=True)
    pretend_torchrun(monkeypatch, world_size=2)
    assert setup03.compute_init()[-1] == torch.device("cpu")
    assert joined[0]["backend"] == "gloo"
    assert "CPU instead" in capsys.readouterr().out
    monkeypatch.delenv("RANK"), monkeypatch.delenv("LOCAL_RANK"), monkeypatch.delenv("WORLD_SIZE")
    assert setup03.compute_init()[-1] == torch.device("mps"), "one process alone may use it"


@pytest.mark.parametrize(
    ("omp", "ranks_here", "threads"),
    [
        ("1", 2, 4),  # torchrun's own value: the 8 cores are shared out
        (None, 4, 2),
        ("1", 16, 1),  # never none
        ("3", 2, None),  # the user's own value: left alone
    ],
)
def test_ranks_on_one_machine_share_out_its_cores(monkeypatch, joined, omp, ranks_here, threads):
    ours_only("UserError")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    pretend_torchrun(monkeypatch, world_size=32, LOCAL_WORLD_SIZE=ranks_here)
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    setup03.compute_init("cpu")
    assert set_to == ([] if threads is None else [threads])


def test_alone_torchs_own_choice_of_threads_is_left_alone(monkeypatch):
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    setup03.compute_init("cpu")
    assert set_to == []


def test_only_rank_0_prints(monkeypatch, capsys):
    print0 = ours_only("print0")
    for rank in ("1", "0", ""):
        monkeypatch.setenv("RANK", rank)
        print0("from", rank or "a lone process")
    assert capsys.readouterr().out == "from 0\nfrom a lone process\n"


# ---- number format and compiler ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True}, torch.float32),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_tile": True, "amx_bf16": True}, torch.bfloat16),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, torch.float32),
    ],
)
def test_the_cpu_gets_bfloat16_only_with_units_that_multiply_it(
    monkeypatch, capabilities, expected
):
    pick_dtype = ours_only("pick_dtype")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    dtype, why = pick_dtype(torch.device("cpu"))
    assert dtype == expected and ("no bf16 units" in why) == (expected == torch.float32)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_a_gpu_gets_bfloat16_from_compute_capability_8_on(monkeypatch, capability, expected):
    pick_dtype = ours_only("pick_dtype")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dtype, why = pick_dtype(torch.device("cuda", 0))
    assert dtype == expected and f"{capability[0]}.{capability[1]}" in why


def test_mps_stays_with_float32():
    dtype, why = ours_only("pick_dtype")(torch.device("mps"))
    assert dtype == torch.float32 and "mps" in why


def test_a_compiler_counts_only_when_torch_would_find_it_and_python_h_too(monkeypatch, tmp_path):
    has_compiler = ours_only("has_compiler")
    monkeypatch.setattr(sys, "platform", "linux")
    include, tools = tmp_path / "include", tmp_path / "bin"
    include.mkdir(), tools.mkdir()
    monkeypatch.setattr(setup03.sysconfig, "get_path", lambda name: str(include))
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("CXX", raising=False)
    (include / "Python.h").touch()
    assert has_compiler() is None
    for name in ("clang++", "g++"):  # on Linux torch looks for g++, or for what CXX says
        assert has_compiler() is None
        (tools / name).touch(0o755)
    assert has_compiler() == str(tools / "g++")
    monkeypatch.setenv("CXX", "clang++")
    assert has_compiler() == str(tools / "clang++")
    monkeypatch.setenv("CXX", "nowhere++")
    assert has_compiler() is None
    monkeypatch.delenv("CXX")
    (include / "Python.h").unlink()
    assert has_compiler() is None


# ---- the script ----------------------------------------------------------------------------------

ROW = re.compile(r" +(\d+) +(\d+) +(\d+)  (\S+) +(\d+) +([\d.]+) +([\d.]+) +([\d.]+)")


def rank_rows(out):
    """The table of ranks: [(rank, local rank, world size, device, threads, f32, bf16, random)]."""
    return [found.groups() for line in out.splitlines() if (found := ROW.fullmatch(line))]


def test_alone_it_reports_one_rank(monkeypatch, capsys, tmp_path):
    ours_only("gather_rows")
    have_devices(monkeypatch)
    assert setup03.main(["--data-dir", str(tmp_path / "no" / "such"), "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("03 check setup - cpu - ")
    ((rank, local, world, device, threads, float32, bfloat16, _),) = rank_rows(out)
    assert (rank, local, world, device, threads) == ("0", "0", "1", "cpu", "1")
    assert float(float32) > 0 and float(bfloat16) >= 0
    for word in ("cores", "GB of memory", "GB free", "number format: ", "torch.compile: "):
        assert word in out
    assert "result: ranks that answered - -> 1 (n=1)\nnext: python edu/04_block.py\n" in out
    assert list(tmp_path.iterdir()) == [], "it must not even make the data folder"


def test_two_ranks_under_torchrun_talk_and_print_once(run_script):
    done = run_script("03_check_setup", nproc=2, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    if not hasattr(setup03, "gather_rows"):
        return
    out = done.stdout
    assert out.startswith("03 check setup - cpu - ") and out.count("03 check setup") == 1
    rows = rank_rows(out)
    assert [row[:4] for row in rows] == [("0", "0", "2", "cpu"), ("1", "1", "2", "cpu")]
    assert rows[0][-1] == rows[1][-1], "both ranks start from the same seed"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert {row[4] for row in rows} == {str(max(1, cores // 2))}
    assert "the ranks talk: all-reduce of rank + 1 gives 3, W (W + 1) / 2 = 3\n" in out
    assert "result: ranks that answered - -> 2 (n=2)\n" in out


def test_a_rank_that_never_comes_ends_the_wait_with_a_message(monkeypatch, capsys):
    ours_only("join_ranks")
    pretend_torchrun(monkeypatch, rank=0, world_size=2)
    assert setup03.main(["--wait-seconds", "1", "--device-type", "cpu"]) == 2
    err = capsys.readouterr().err
    assert "error: no contact with the other ranks (RANK=0 WORLD_SIZE=2" in err
    assert "torchrun --nproc_per_node=2" in err


def test_a_sum_that_is_wrong_ends_with_exit_code_1(monkeypatch, capsys):
    ours_only("all_reduce_sum")
    monkeypatch.setattr(setup03, "all_reduce_sum", lambda number, device, world_size: 5.0)
    monkeypatch.setattr(setup03, "measure_gflops", lambda *args, **options: 1.0)
    assert setup03.main(["--device-type", "cpu"]) == 1
    assert "BROKEN: the ranks do not add up" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "environment", "complaint"),
    [
        ([], {"RANK": "0"}, "LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set"),
        ([], dict.fromkeys(TORCHRUN, "two"), "must be whole numbers"),
        (["--device-type", "gpu"], {}, "no gpu device"),
        (["--threads", "-1"], {}, "--threads -1"),
        (["--wait-seconds", "0"], {}, "--wait-seconds 0"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    monkeypatch, capsys, argv, environment, complaint
):
    ours_only("join_ranks")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert setup03.main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and complaint in err and out == ""


def test_the_speed_is_measured_in_well_under_a_second():
    measure = ours_only("measure_gflops")
    start = time.process_time()  # CPU time of this process: other programs do not count
    torch.set_num_threads(1)
    assert measure(torch.device("cpu"), torch.float32) > 0
    assert time.process_time() - start < 3


def test_memory_is_known_where_the_system_tells(monkeypatch):
    memory_bytes = ours_only("memory_bytes")
    assert memory_bytes() > 1e8

    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", unknown, raising=False)
    assert memory_bytes() is None
