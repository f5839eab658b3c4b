"""Find out what this machine can do, and whether several processes on it can work as one.

Goal:
    Report rank, world size and device, alone or under torchrun, and prove with one all-reduce that
    the ranks talk. Show by measurement which number format is fast here, and whether torch.compile
    can work.

You will learn:
    - how four numbers in the environment turn copies of one script into ranks of one job
    - what a collective is: every rank gives a number, every rank gets the sum
    - why all ranks start from one seed, and why they must share out the cores
    - why "supports bfloat16" says nothing: emulated, it can be 100 times slower than float32

Read beside:
    nanochat/common.py::compute_init, autodetect_device_type, compute_cleanup, print0. There the
    process group is for CUDA alone; here gloo does the same on a CPU, so that the distributed path
    can be run and tested on a laptop. Better here: half a torchrun environment is refused, where
    silently running as one process would train the same thing once per rank.

Run:
    python edu/03_check_setup.py
    torchrun --nproc_per_node=2 edu/03_check_setup.py

Expect:
    03 check setup - cpu - float32 - ... - seed 1337
    rank  local  world  device   threads  float32  bfloat16  first random
    the ranks talk: ...
    result: ranks that answered - -> 1 (n=1)
    next: python edu/04_block.py

Writes:
    nothing
"""
import os
import platform
import shutil
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import tyro


# ---- settings ------------------------------------------------------------------------------------
@dataclass
class Config:
    data_dir: Path = field(default_factory=lambda: Path(os.environ.get("EDU_DATA", "data")))
    """where later scripts will write; its free space is reported"""
    device_type: str = ""
    """cuda, mps or cpu; empty: the fastest there is"""
    threads: int = 0
    """CPU threads per rank; 0: torch's own choice, or the cores shared out among the ranks"""
    seed: int = 1337
    """the same on every rank"""
    wait_seconds: int = 60
    """how long to wait for a rank that does not answer"""


# ---- shared blocks -------------------------------------------------------------------------------
# --- shared: cli (home: 00_tiny_world.py) ---
class UserError(Exception):
    """A mistake the user can mend: what is wrong, why it matters, the command that fixes it."""


def run_script(run, config_class, argv, description):
    """Turn argv into a config_class, call run(config), and return the exit code.

    0 or whatever run returns; 2 for a UserError, shown as one message without a traceback;
    130 for Ctrl-C; 141 when nobody reads on. tyro itself exits with 2 on a flag it does not know.
    """
    config = tyro.cli(config_class, args=argv, description=description)
    try:
        code = run(config) or 0
        sys.stdout.flush()  # here, where a reader that has gone can still be met
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has enough, as `head` has after its lines
        # what is still to be printed goes nowhere: else Python would complain of it at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
# --- end shared ---


# --- shared: compute-init (home: 03_check_setup.py) ---
def autodetect_device_type():
    """The fastest kind of device present: "cuda", else "mps" (Apple), else "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def compute_init(device_type=None, seed=1337, timeout=None):
    """Seed, pick the device, join the other ranks: (ddp, rank, local_rank, world_size, device).

    Under torchrun the ranks talk by nccl on CUDA, by gloo on CPU, and share out the CPU's cores.
    All get the same seed, so that models start equal; sample with seed + rank. timeout: timedelta
    to wait for a rank. Raises UserError. Source: nanochat/common.py::compute_init.
    """
    torch.manual_seed(seed)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    ddp = any(name not in missing for name in names[:3])
    if ddp and missing:
        raise UserError(f"half a torchrun environment: {', '.join(missing)} not set. Start with\n"
                        f"  torchrun --nproc_per_node=2 {sys.argv[0]}\n"
                        "or, for one process: unset RANK LOCAL_RANK WORLD_SIZE")
    rank, local_rank, world_size = (int(os.environ[n]) for n in names[:3]) if ddp else (0, 0, 1)
    device_type = device_type or autodetect_device_type()
    if ddp and device_type == "mps":
        print0("mps cannot exchange tensors between ranks: running on the CPU instead")
        device_type = "cpu"
    present = {"cpu": world_size, "mps": int(torch.backends.mps.is_available()),
               "cuda": torch.cuda.device_count()}
    if local_rank >= present.get(device_type, 0):
        raise UserError(f"local rank {local_rank} finds no {device_type} device of its own (there "
                        f"are {present.get(device_type, 0)}); use --device-type cpu or fewer ranks")
    device = torch.device(device_type, local_rank if device_type == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ddp and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        # torchrun sets 1 where it is unset, and most cores would idle; any other value is yours.
        affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        torch.set_num_threads(max(1, len(affinity(0)) // ranks_here))
    if ddp:
        backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timeout, device_id=bound)
    return ddp, rank, local_rank, world_size, device


def compute_cleanup():
    """Leave the process group, if there is one; torch warns of leaked resources otherwise."""
    if dist.is_initialized():
        dist.destroy_process_group()


def print0(*args):
    """Print at once, on rank 0 only."""
    if int(os.environ.get("RANK") or 0) == 0:
        print(*args, flush=True)


def pick_dtype(device):
    """(dtype, why): bfloat16 only where the hardware multiplies it; emulated it is a crawl."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        fast, why = major >= 8, f"compute capability {major}.{minor}; bf16 units came with 8.0"
    elif device.type == "cpu":
        wanted, has = ("amx_bf16", "avx512_bf16"), torch.cpu.get_capabilities()
        fast = any(has.get(name) for name in wanted)
        why = f"the CPU has {'' if fast else 'no '}bf16 units ({' or '.join(wanted)})"
    else:
        fast, why = False, f"float32 is the safe choice on {device.type}"
    return (torch.bfloat16 if fast else torch.float32), why


def has_compiler():
    """Path of the C++ compiler that torch.compile would use on the CPU; None if it cannot work."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    header = os.path.join(sysconfig.get_path("include"), "Python.h")  # its output includes this
    return shutil.which(os.environ.get("CXX", usual)) if os.path.exists(header) else None
# --- end shared ---


# ---- the idea ------------------------------------------------------------------------------------
def join_ranks(cfg):
    """compute_init, with what can go wrong between processes told as one message."""
    try:
        return compute_init(cfg.device_type or None, cfg.seed, timedelta(seconds=cfg.wait_seconds))
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE and the like must be whole numbers ({error}). Let "
                        f"torchrun set them: torchrun --nproc_per_node=2 {sys.argv[0]}") from None
    except RuntimeError as error:  # torch's DistError and gloo's own errors both derive from it
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        given = " ".join(f"{name}={os.environ.get(name)}" for name in names)
        raise UserError(f"no contact with the other ranks ({given}): {str(error).splitlines()[0]}\n"
                        "Every rank must be started, each with its own RANK below WORLD_SIZE: "
                        f"torchrun --nproc_per_node=2 {sys.argv[0]}\nOn one machine whose own name "
                        "cannot be resolved, GLOO_SOCKET_IFNAME=lo helps.") from None


def gather_rows(row, device, world_size):
    """Each rank gives a list of numbers; every rank gets all of them, ordered by rank."""
    mine = torch.tensor(row, dtype=torch.float32, device=device)  # (number of columns,)
    if world_size == 1:
        return [mine.tolist()]
    all_rows = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(all_rows, mine)
    return [row.tolist() for row in all_rows]


def all_reduce_sum(number, device, world_size):
    """The sum of every rank's number, known to every rank: what averages gradients in training."""
    total = torch.tensor(float(number), device=device)
    if world_size > 1:
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total.item()


def measure_gflops(device, dtype, budget=0.25):
    """Billions of multiplications and additions per second in a square matmul; well under 1 s.

    The size doubles until `budget` seconds are over, since what takes 20 ms here takes 20 s
    elsewhere; the best rate of all counts, as the one that other programs disturbed least.
    """
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    best, n, start = 0.0, 256, time.perf_counter()
    while time.perf_counter() - start < budget:
        a, b = torch.randn(2, n, n, device=device).to(dtype)  # (n, n) each
        a @ b  # the first call also pays for setting up
        wait()
        began = time.perf_counter()
        a @ b
        wait()  # a GPU call returns at once: without this, only the call is timed
        # n x n outputs, each n multiplications and n additions
        best = max(best, 2 * n ** 3 / (time.perf_counter() - began) / 1e9)
        n = min(2 * n, 4096)
    return best


# ---- the loop ------------------------------------------------------------------------------------
def memory_bytes():
    """Main memory that this process may use, or None where the system does not tell."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's limit, else the word "max"
    text = limit.read_text("ascii").strip() if limit.is_file() else ""
    return min(total, int(text)) if text.isdigit() else total


def print_machine(cfg, device):
    """What there is: versions, processor, memory, disk."""
    print0(f"software: torch {torch.__version__}, python {platform.python_version()}, "
           f"{platform.system()}")
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or "unknown"
    memory = memory_bytes()
    print0(f"cpu: {name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, "
           + (f"{memory / 1e9:.1f} GB of memory" if memory else "memory unknown"))
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        print0(f"gpu: {card.name}, {card.total_memory / 1e9:.1f} GB, "
               f"{torch.cuda.device_count()} of them")
    folder = next(path for path in (cfg.data_dir.absolute(), *cfg.data_dir.absolute().parents)
                  if path.is_dir())
    free = shutil.disk_usage(folder).free
    print0(f"disk: {free / 1e9:.1f} GB free for --data-dir {cfg.data_dir}")


def print_choices(dtype, why, float32, bfloat16):
    """What later scripts will choose on this machine, why, and the number behind it."""
    print0(f"number format: {str(dtype)[6:]}, as {why};\n"
           f"  measured, bfloat16 has {bfloat16 / float32:.2g} x the speed of float32")
    compiler = has_compiler()
    if compiler:
        print0(f"torch.compile: possible, with {compiler};\n"
               "  each new shape costs up to half a minute on two cores, so only long runs use it")
    else:
        print0("torch.compile: not possible, so everything runs eagerly: just as right, but slower;"
               "\n  it needs a C++ compiler and Python.h (on Debian: apt install g++ python3-dev)")


def run(cfg):
    # 1. join  2. measure, all ranks at once  3. gather  4. all-reduce  5. report
    if cfg.threads < 0 or cfg.wait_seconds < 1:
        raise UserError(f"--threads {cfg.threads} --wait-seconds {cfg.wait_seconds}: threads must "
                        "be 0 (automatic) or more, seconds 1 or more")
    ddp, rank, local_rank, world_size, device = join_ranks(cfg)
    first_random = torch.rand(1).item()  # equal on all ranks, since the seed is
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    dtype, why = pick_dtype(device)
    print0(f"03 check setup - {device.type} - {str(dtype)[6:]} - {world_size} "
           f"{'rank' if world_size == 1 else 'ranks'} - seed {cfg.seed}")
    print_machine(cfg, device)
    all_reduce_sum(0, device, world_size)  # a barrier: measure at the same time, as in training
    measure_gflops(device, torch.float32, budget=0.01)  # wakes up a GPU; not counted
    float32, bfloat16 = (measure_gflops(device, d) for d in (torch.float32, torch.bfloat16))
    rows = gather_rows([rank, local_rank, torch.get_num_threads(), float32, bfloat16, first_random],
                       device, world_size)
    print_choices(dtype, why, float32, bfloat16)
    print0("matmul speed in GFLOP/s, all ranks at once:")
    print0("rank  local  world  device   threads  float32  bfloat16  first random")
    for r, local, threads, f32, bf16, random in rows:
        name = f"{device.type}:{local:.0f}" if device.type == "cuda" else device.type
        print0(f"{r:>4.0f}  {local:>5.0f}  {world_size:>5}  {name:<7}  {threads:>7.0f}  "
               f"{f32:>7.1f}  {bf16:>8.1f}  {random:>12.6f}")
    # sum over r of (r + 1) = W (W + 1) / 2 only if every rank gave its own number exactly once
    expected = world_size * (world_size + 1) / 2
    total = all_reduce_sum(rank + 1, device, world_size)
    compute_cleanup()
    talk = "the ranks talk" if total == expected else "BROKEN: the ranks do not add up"
    print0(f"{talk}: all-reduce of rank + 1 gives {total:g}, W (W + 1) / 2 = {expected:g}")
    if not ddp:
        print0("  (this one talks to itself; for two: torchrun --nproc_per_node=2 "
               "edu/03_check_setup.py)")
    answered = len({row[0] for row in rows})
    print0(f"result: ranks that answered - -> {answered} (n={world_size})")
    print0("next: python edu/04_block.py")
    return 0 if total == expected and answered == world_size else 1


# ---- the command line ----------------------------------------------------------------------------
def main(argv: list[str] | None = None) -> int:
    return run_script(run, Config, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
