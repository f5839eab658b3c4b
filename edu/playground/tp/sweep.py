"""tp sweep: every combination of a grid, each for every seed, trained in parallel processes.

Processes and not threads: each run then has the interpreter, the random numbers and the memory to
itself, and one that dies takes no other along. The cores are shared out, because two runs that both
want all of them are slower than one after the other.

A run's id is made of the sweep's name and its place in the grid. So the same command, given again,
finds what it began: finished runs stay, half-done ones go on from their last checkpoint.
"""

import contextlib
import csv
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tp.config import apply_overrides, check, flatten, load_config, to_dict
from tp.errors import UserError
from tp.files import lock, write_json
from tp.leaderboard import UNITS, read_run, show
from tp.tables import count, flat, number, read_object, short_names, spell, table, visible

EXAMPLE = ("tp sweep --config configs/default.py --grid model.positional_encoding=rope,alibi,none "
           "--seeds 1,2,3")
PATIENCE = 30  # seconds that a run has for its last checkpoint when it is told to stop


def add_arguments(parser):
    parser.add_argument("--config", default="configs/default.py", metavar="PATH",
                        help="config file of all runs (default: configs/default.py)")
    parser.add_argument("--grid", action="extend", nargs="+", default=[], metavar="KEY=V1,V2",
                        help="values of a key; of several, every combination is trained. A value "
                        'that holds a comma stands in double quotes: \'data.path="a,b.txt",c.txt\'')
    parser.add_argument("--seeds", metavar="1,2,3", help="train each combination with each of "
                        "these (default: the config's seed)")
    parser.add_argument("--set", action="extend", nargs="+", default=[], dest="overrides",
                        metavar="KEY=VALUE", help="change a key of the config for all runs")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: as many as "
                        "the cores have room for, at train.threads each)")
    parser.add_argument("--runs-dir", default="runs", help="folder of all runs")
    parser.add_argument("--name", help="begins every run id (default: made of config and grid)")
    parser.add_argument("--by", choices=UNITS, default="best_val_loss", help="rank by")


def main(args):
    base = apply_overrides(load_config(args.config), args.overrides)
    grid = read_grid(args.grid, base)
    seeds = read_seeds(args.seeds) or [base.seed]
    name = check_name(default_name(base, grid) if args.name is None else args.name)
    points = plan(base, grid, seeds, name)
    allowed = [point for point in points if point.reason is None]
    for path in dict.fromkeys(point.config["data.path"] for point in allowed):
        if not Path(path).is_file():
            raise UserError(f"data.path={path}: there is no such file, and every run would fail "
                            "for want of it")
    jobs, threads = share_cores(args.jobs, allowed)
    runs_dir = Path(args.runs_dir)
    for point in allowed:
        point.state, point.why = state_of(runs_dir / point.run_id, point.config)
    announce(name, points, len(seeds), jobs, threads)
    if not allowed:
        raise UserError("every combination of this grid is refused, for the reasons above")
    sweep = Sweep(name, runs_dir, jobs, threads)
    require_same(sweep.config_path, base, grid)
    # The children read this copy: the config file may be edited while they wait for their turn.
    runs_dir.mkdir(parents=True, exist_ok=True)
    write_json(sweep.config_path, to_dict(base))
    stopped = sweep.run([point for point in allowed if point.state in ("new", "resume")])
    return conclude(sweep, allowed, stopped, args)


# ---- the grid ------------------------------------------------------------------------------------


@dataclass
class Point:
    """One run to be: where it stands in the grid, and what has become of it."""

    run_id: str
    settings: dict  # {"model.n_layer": 2, ..., "seed": 1}: what sets it apart
    config: dict  # all its settings, flat
    reason: str | None = None  # why this combination is refused
    state: str = "new"  # new, resume, done; then failed, stopped, busy
    why: str = ""

    def overrides(self):
        return [f"{key}={spell(value)}" for key, value in self.settings.items()]


def read_grid(specs, base):
    """{"model.n_layer": [2, 4], ...} of ["model.n_layer=2,4", ...]. Raises UserError.

    Each value is tried by itself, so that a typing mistake ends the sweep before it begins.
    """
    grid = {}
    for spec in specs:
        key, equals, text = spec.partition("=")
        key = key.strip()
        words = next(csv.reader([text], skipinitialspace=True), [])
        if not equals or not all(word.strip() for word in words) or not words:
            raise UserError(f"--grid {spec}: write it as --grid KEY=VALUE,VALUE\n  {EXAMPLE}")
        if key == "seed":
            raise UserError(f"--grid {spec}: seeds are given by --seeds, because runs that differ "
                            f"in nothing else are averaged\n  {EXAMPLE}")
        if key in grid:
            raise UserError(f"--grid gives {key} twice; put all its values into one: "
                            f"--grid {key}=VALUE,VALUE")
        values = [flatten(apply_overrides(base, [f"{key}={word}"], "--grid"))[key]
                  for word in words]
        if len({spell(value) for value in values}) < len(values):
            raise UserError(f"--grid {spec}: one value stands there twice")
        grid[key] = values
    return grid


def read_seeds(text):
    """[1, 2, 3] of "1,2,3"; [] of None. Raises UserError."""
    if text is None:
        return []
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"\d{1,10}", word) for word in words):
        raise UserError(f"--seeds {text}: write whole numbers with commas between, as in "
                        "--seeds 1,2,3")
    if len(set(map(int, words))) < len(words):
        raise UserError(f"--seeds {text}: a seed stands there twice, and would give the same run")
    return [int(word) for word in words]


def default_name(base, grid):
    """The same config and grid give the same name; seeds do not count, so more can be added."""
    settings = {key: value for key, value in flatten(base).items() if key != "seed"}
    content = json.dumps([settings, grid], sort_keys=True)
    return "sweep-" + hashlib.sha256(content.encode()).hexdigest()[:6]


def check_name(name):
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}", name):
        raise UserError(f"--name {name!r}: it begins the names of folders, so use letters, digits, "
                        "dots, - and _, at most 60 of them")
    return name


def plan(base, grid, seeds, name):
    """The Points of the whole cross product, seeds last. A combination that the config's rules
    refuse keeps its place, with the reason."""
    points = []
    for values in itertools.product(*grid.values()):
        for seed in seeds:
            settings = {**dict(zip(grid, values)), "seed": seed}
            point = Point(run_id_of(name, settings), settings, {})
            config = apply_overrides(base, point.overrides())
            point.config = flatten(config)
            try:
                check(config)
            except UserError as error:
                point.reason = str(error)
            points.append(point)
    return points


def run_id_of(name, settings):
    """"pos-positional_encoding=rope-s1". What no folder's name should hold becomes "_", and then,
    as for a name too long, eight digits of a hash keep two points from sharing a folder."""
    short = short_names(list(settings))
    parts = [f"{short[key]}={spell(value)}" for key, value in settings.items() if key != "seed"]
    said = "-".join([name, *parts, f"s{settings['seed']}"])
    safe = re.sub(r"[^A-Za-z0-9._+=-]", "_", said)
    if safe == said and len(said) <= 120:
        return said
    mark = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"{safe[:100]}-{mark}-s{settings['seed']}"


# ---- what is there already -----------------------------------------------------------------------


def state_of(folder, config):
    """("new", "resume", "done" or "failed", why). Raises UserError if the folder holds a run of
    other settings."""
    if not (folder / "config.json").exists():
        return "new", ""
    there = flat(read_object(folder / "config.json"))
    changed = [key for key in config if there.get(key) != config[key]]
    if changed:
        key = changed[0]
        raise UserError(
            f"{folder} was trained with {key}={there.get(key)}, and this sweep wants {config[key]}:"
            " the same name would mean two things. Give this sweep another --name, or remove the "
            "folder")
    if is_finished(folder):
        return "done", ""
    try:
        summary = read_object(folder / "summary.json")
    except UserError:  # killed before it was written
        return "resume", ""
    if summary.get("status") == "failed":
        why = str(summary.get("error", "")).partition("\n")[0]
        return "failed", f"failed before, and would again: {why}"
    return "resume", ""


def require_same(path, base, grid):
    """Raises UserError if a sweep of this name has left other settings for its runs: it may be
    under way, and those that still wait would be trained with ours."""
    if not path.exists():
        return
    there, here = flat(read_object(path)), flatten(base)
    changed = [key for key in here if key != "seed" and key not in grid
               and there.get(key) != here[key]]
    if changed:
        key = changed[0]
        raise UserError(f"{path}: the sweep of this name has {key}={spell(there.get(key))}, and "
                        f"here it is {spell(here[key])}. Give this sweep another --name, or, if "
                        "the other is over and done with, remove that file")


def is_finished(folder):
    try:
        return bool(read_run(folder))
    except UserError:
        return False


def share_cores(jobs, points):
    """(runs at a time, threads that each takes). Raises UserError for fewer than one job.

    The threads are the config's, train.threads, and no matter of how many cores there are: sums
    over other numbers of threads are rounded otherwise, and the runs would not repeat to the bit.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs}: at least one run must be under way at a time")
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    threads = max((point.config["train.threads"] for point in points), default=1)
    return min(jobs or max(1, len(affinity(0)) // threads), len(points) or 1), threads


# ---- the processes -------------------------------------------------------------------------------


class Sweep:
    """Keeps `jobs` training processes busy until all points have been tried."""

    def __init__(self, name, runs_dir, jobs, threads):
        self.name, self.runs_dir, self.jobs, self.threads = name, runs_dir, jobs, threads
        self.config_path = runs_dir / f"{name}.config.json"
        self.running = {}  # point's run id: (point, process, time of its start, log)
        self.seconds, self.count, self.total = [], 0, 0
        self.interrupts = 0

    def run(self, points):
        """Train all points. True if Ctrl-C (or SIGTERM) ended it before that."""
        waiting, self.total = deque(points), len(points)
        # Only counted, so that no child can be begun and not yet noted. Set also where a shell has
        # put us in the background, because ignored signals are inherited.
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, self.note_interrupt)
        if points:
            print(self.line("run", "became", "best val", "step", "seconds", "eta"), flush=True)
        while (waiting or self.running) and not self.interrupts:
            while waiting and len(self.running) < self.jobs:
                self.start(waiting.popleft())
            time.sleep(0.05)
            self.collect(len(waiting))
        if self.running:
            self.stop()
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, signal.default_int_handler)
        return bool(self.interrupts)

    def note_interrupt(self, kind, frame):
        self.interrupts += 1

    def start(self, point):
        """Begin or resume one run; all that it prints goes to train.log in its folder."""
        folder = self.runs_dir / point.run_id
        folder.mkdir(parents=True, exist_ok=True)
        log = open(folder / "train.log", "a+", encoding="utf-8", errors="replace")
        if not lock(log):  # the child keeps the lock, as it keeps the file
            log.close()
            self.finish(point, "busy", "another process is training it", 0, 0)
            return
        point.state, _ = state_of(folder, point.config)  # as it is now, when nobody else can write
        if point.state == "new":
            remove_empty(folder)
        write_json(folder / "sweep.json", {"sweep": self.name, "settings": point.settings})
        log.write(f"\n---- {datetime.now().isoformat(timespec='seconds')} {point.state}\n")
        log.flush()
        process = subprocess.Popen(
            self.command(point), env=self.environment(), stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True)  # Ctrl-C reaches us alone
        self.running[point.run_id] = (point, process, time.monotonic(), log)

    def command(self, point):
        words = [sys.executable, "-m", "tp", "train", "--runs-dir", str(self.runs_dir)]
        if point.state != "new":  # also of a finished run, which train leaves as it is
            return [*words, "--resume", point.run_id]
        return [*words, "--run-id", point.run_id, "--config", str(self.config_path), "--set",
                *point.overrides()]

    def environment(self):
        """The threads (of what torch is not asked to count), and where this very package lies."""
        package = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        return {**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": path,
                "PYTHONUNBUFFERED": "1"}

    def collect(self, waiting):
        """Note which runs have ended, and how."""
        for point, process, begun, log in list(self.running.values()):
            if process.poll() is None:
                continue
            del self.running[point.run_id]
            seconds = time.monotonic() - begun
            if process.returncode == 0 and is_finished(self.runs_dir / point.run_id):
                self.seconds.append(seconds)
                self.finish(point, "done", "", seconds, waiting)
            else:
                why = why_it_ended(process.returncode, log)
                self.finish(point, "failed", why, seconds, waiting)
            log.close()

    def finish(self, point, state, why, seconds, waiting):
        self.count += 1
        point.state, point.why = state, why
        summary = {}
        if state == "done":
            summary = read_run(self.runs_dir / point.run_id)["summary"]
        print(self.line(point.run_id, state, number(summary.get("best_val_loss")),
                        number(summary.get("best_step")), f"{seconds:.0f}", self.eta(waiting)),
              flush=True)
        if why:
            print(f"           {visible(why)}", flush=True)

    def line(self, run, became, loss, step, seconds, eta):
        place = f"{self.count}/{self.total}" if self.count else ""
        return f"{place:>7}  {became:7} {loss:>9} {step:>6} {seconds:>8} {eta:>9}  {run}"

    def eta(self, waiting):
        """What is left, if all runs take as long as those that are done."""
        if not self.seconds:
            return "-"
        each, now = sum(self.seconds) / len(self.seconds), time.monotonic()
        under_way = [max(0, each - (now - begun)) for _, _, begun, _ in self.running.values()]
        left = max([waiting * each / self.jobs + sum(under_way) / self.jobs, *under_way])
        return f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"

    def stop(self):
        """Tell all runs to save and end; end those that do not."""
        print(f"\nstopping: {len(self.running)} under way, each saves its last checkpoint "
              "(Ctrl-C again: at once)", flush=True)
        processes = [process for _, process, _, _ in self.running.values()]
        for process in processes:
            send(process, signal.SIGINT)
        deadline = time.monotonic() + PATIENCE
        while any(process.poll() is None for process in processes):
            if time.monotonic() > deadline or self.interrupts > 1:
                for process in processes:
                    process.kill()
            time.sleep(0.05)
        for point, _, _, _ in self.running.values():
            point.state = "done" if is_finished(self.runs_dir / point.run_id) else "stopped"


def remove_empty(folder):
    """Take away the empty folders of a run that was killed before it wrote its config.json: tp
    train would take them for a run that is under way."""
    for name in ("checkpoints", "tokenizer", "reports"):
        with contextlib.suppress(OSError):  # not there, or not empty
            (folder / name).rmdir()


def send(process, kind):
    """A signal to the child, unless it has just ended."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(kind if os.name == "posix" else signal.SIGTERM)


def why_it_ended(code, log):
    """In words: the signal that killed it, or the error that it printed last."""
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; was there too little memory? try fewer --jobs" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"
    log.seek(0)
    lines = [line.rstrip() for line in log.read().rpartition("\n---- ")[2].splitlines()[1:]
             if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return f"exit code {code}: {(errors or lines or ['it printed nothing'])[-1]}"


# ---- what the user sees --------------------------------------------------------------------------


def announce(name, points, seeds, jobs, threads):
    """First line, and the combinations that are refused, once for all their seeds."""
    allowed = [point for point in points if point.reason is None]
    counts = {state: sum(point.state == state for point in allowed)
              for state in ("done", "resume", "new", "failed")}
    print(f"tp sweep - cpu - {name} - {count(allowed, 'run')}: {len(allowed) // seeds} combination"
          f"{'s' * (len(allowed) != seeds)} x {seeds} seed{'s' * (seeds > 1)} - {jobs} at a time, "
          f"{threads} thread{'s' * (threads > 1)} each")
    print(f"{counts['done']} are finished, {counts['resume']} go on, {counts['new']} begin"
          + f", {counts['failed']} failed before" * bool(counts["failed"]), flush=True)
    refused = {}
    for point in points:
        if point.reason is not None:
            label = ", ".join(f"{key}={spell(value)}" for key, value in point.settings.items()
                              if key != "seed")
            refused[label] = point.reason
    for label, reason in refused.items():
        print(f"refused: {label or 'the config'}\n  {reason}", flush=True)


def conclude(sweep, points, stopped, args):
    """The leaderboard, what is missing from it, and the exit code."""
    missing = [point for point in points if point.state != "done"]
    boards = []
    if len(missing) < len(points):
        print()
        boards = show(sweep.runs_dir, sweep.name, args.by)
    broken = [point for point in missing if point.state in ("failed", "busy")]
    if broken:
        print(f"\n{len(broken)} of {len(points)} runs did not finish:")
        rows = [[point.run_id, visible(point.why), sweep.runs_dir / point.run_id / "train.log"]
                for point in broken]
        print("\n".join("  " + line for line in table(["run", "why", "log"], rows)))
    left = [point for point in missing
            if state_of(sweep.runs_dir / point.run_id, point.config)[0] != "failed"]
    if left:
        print(f"\n{count(left, 'run')} left: the same command goes on"
              + (f" (its name: --name {sweep.name})" if not args.name else ""))
    leaders = [group["run_ids"][0] for board in boards[:1] for group in board["groups"][:2]]
    if len(leaders) > 1:
        print(f"next: tp compare --runs-dir {sweep.runs_dir} --run-ids {','.join(leaders)} "
              '--prompt "a" --n-samples 3')
    return 130 if stopped else 1 if missing else 0
