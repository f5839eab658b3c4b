"""tp leaderboard: runs ranked, with mean and spread over seeds.

One seed tells little: two runs that differ in nothing else can lie further apart than two
architectures. Runs of the same config but for the seed are one group here, and the best group is
only called better if the difference is larger than what the seeds alone do.
"""

import csv
import io
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np

from tp.errors import UserError
from tp.files import write_bytes
from tp.tables import (
    count,
    differences,
    flat,
    is_number,
    number,
    read_object,
    run_ids,
    short_names,
    spell,
    table,
    visible,
)

# What can be ranked by: the less the better, all of them.
UNITS = {
    "best_val_loss": "nats per token",
    "final_val_loss": "nats per token",
    "best_val_bpb": "bits per byte",
    "seconds": "seconds",
    "seconds_to_best": "seconds",
}


def add_arguments(parser):
    parser.add_argument("--runs-dir", default="runs", help="folder of all runs")
    parser.add_argument("--sweep", metavar="NAME", help="only the runs of this sweep")
    parser.add_argument("--by", choices=UNITS, default="best_val_loss", help="rank by")
    for kind in ("csv", "json"):
        parser.add_argument(f"--{kind}", nargs="?", const="", metavar="PATH",
                            help=f"write it too (default PATH: RUNS_DIR/leaderboard.{kind})")


def main(args):
    boards = show(args.runs_dir, args.sweep, args.by)
    for kind, render in (("csv", as_csv), ("json", as_json)):
        path = getattr(args, kind)
        if path is not None:
            path = Path(path or Path(args.runs_dir) / f"leaderboard.{kind}")
            try:
                write_bytes(path, render(boards).encode())
            except OSError as error:
                raise UserError(f"cannot write {path} ({error.strerror}); name another: --{kind} "
                                "PATH") from None
            print(f"wrote {path}")
    return 0


# ---- which runs ----------------------------------------------------------------------------------


def survey(runs_dir, sweep=None):
    """(runs, left_out): finished runs [{"run_id", "seed", "config": flat, "summary"}, ...] and
    [(folder's name, why it is not ranked), ...]. Reads every folder, and no folder stops it."""
    runs, left_out = [], []
    known = set(run_ids(runs_dir))  # raises UserError if there is no such folder
    for folder in sorted(path for path in Path(runs_dir).iterdir() if path.is_dir()):
        if sweep is not None and sweep_of(folder) != sweep:
            continue
        if folder.name not in known:
            left_out.append((folder.name, "holds no config.json: not a run, or not begun"))
            continue
        try:
            runs.append(read_run(folder))
        except UserError as error:
            left_out.append((folder.name, str(error)))
    return runs, left_out


def sweep_of(folder):
    """Name of the sweep that began the run in this folder; None if it was begun alone."""
    try:
        return read_object(Path(folder) / "sweep.json").get("sweep")
    except UserError:
        return None


def read_run(folder):
    """One finished run. Raises UserError with the reason why it cannot be ranked."""
    config = flat(read_object(folder / "config.json"))
    if not (folder / "summary.json").exists():
        raise UserError("unfinished: it has no summary.json yet")
    summary = read_object(folder / "summary.json")
    status = summary.get("status")
    if status != "done":
        why = summary.get("error") or summary.get("reason")
        first = str(why).partition("\n")[0]
        raise UserError(f"not finished: its status is {status}" + (f" ({first})" if why else ""))
    return {"run_id": folder.name, "seed": config.pop("seed", summary.get("seed")),
            "config": config, "summary": summary}


# ---- groups --------------------------------------------------------------------------------------


def data_key(run):
    """What a loss was measured on. The phrases' hash, or else the settings that chose them."""
    summary = run["summary"]
    chosen = {key: value for key, value in run["config"].items() if key.startswith("data.")}
    counted = [summary.get("train_phrases"), summary.get("val_phrases")]
    return json.dumps([summary.get("data_hash") or chosen, counted], sort_keys=True)


def tokenizer_key(run):
    """What a token is. A loss per token falls by itself when tokens become shorter."""
    chosen = {key: value for key, value in run["config"].items() if key.startswith("tokenizer.")}
    return json.dumps([chosen, run["summary"].get("vocab_size")], sort_keys=True)


def groups_of(runs, by):
    """(groups, left_out): runs of one config but for the seed, the best mean first.

    A seed counts once: its twin would be equal to the bit, and make the spread look smaller.
    """
    found, left_out = defaultdict(dict), []
    for run in runs:
        value = run["summary"].get(by)
        group = found[json.dumps(run["config"], sort_keys=True)]
        seed = json.dumps(run["seed"])
        if not is_number(value) or not math.isfinite(value):
            left_out.append((run["run_id"], f"its {by} is {value}"))
        elif seed in group:
            twin = group[seed]["run_id"]
            left_out.append((run["run_id"], f"same config and seed as {twin}, which is counted"))
        else:
            group[seed] = run
    groups = [summarise(list(group.values()), by) for group in found.values() if group]
    return sorted(groups, key=lambda group: group["mean"]), left_out


def summarise(runs, by):
    """Mean and spread of one group; sd (n - 1 in the denominator) is None for a single seed."""
    values = [run["summary"][by] for run in runs]

    def mean_of(key):
        known = [run["summary"][key] for run in runs
                 if is_number(run["summary"].get(key))]
        return statistics.fmean(known) if known else None

    return {
        "config": runs[0]["config"], "values": values, "n": len(values),
        "mean": statistics.fmean(values), "low": min(values), "high": max(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "bpb": mean_of("best_val_bpb"), "seconds": mean_of("seconds"),
        "best_step": mean_of("best_step"), "parameters": runs[0]["summary"].get("parameters"),
        "seeds": [run["seed"] for run in runs], "run_ids": [run["run_id"] for run in runs],
    }


# ---- is the first better than the second? --------------------------------------------------------


def t_quantile(p, df):
    """The t for which a Student t variable with df degrees of freedom lies below with chance p.

    With t = sqrt(df) tan(angle) the density becomes cos(angle)^(df - 1) on a bounded range, where
    adding up the area is exact enough: four digits from df = 1 on.
    """
    cells = 200_000
    angle = ((np.arange(cells) + 0.5) / cells - 0.5) * np.pi  # the middle of each cell
    density = np.cos(angle) ** (df - 1)
    below = np.cumsum(density) - density / 2
    return float(math.sqrt(df) * np.tan(np.interp(p * density.sum(), below, angle)))


def welch(a, b):
    """(difference of means b - a, low, high): its 95% interval, spreads of a and b not assumed
    equal. None if a list has fewer than two values. Source: Welch 1947, Biometrika 34.
    """
    if min(len(a), len(b)) < 2:
        return None
    # se^2 = s_a^2/n_a + s_b^2/n_b;  df = se^4 / sum (s^2/n)^2 / (n - 1)
    parts = [statistics.variance(values) / len(values) for values in (a, b)]
    difference = statistics.fmean(b) - statistics.fmean(a)
    if not sum(parts):
        return difference, difference, difference
    df = sum(parts) ** 2 / sum(part**2 / (len(v) - 1) for part, v in zip(parts, (a, b)))
    reach = t_quantile(0.975, df) * math.sqrt(sum(parts))
    return difference, difference - reach, difference + reach


def verdicts(groups, most=6):
    """One line for each of the next groups: does it lie further from the first than seeds do?"""
    if len(groups) < 2:
        return ["one group: nothing to compare it with"]
    lines = []
    for place, group in enumerate(groups[1:most], 2):
        interval = welch(groups[0]["values"], group["values"])
        if interval is None:
            lines.append(f"{place} lies {group['mean'] - groups[0]['mean']:.4f} above 1; with one "
                         "seed the spread is not known: tp sweep --seeds 1,2,3")
            continue
        difference, low, high = interval
        said = "more than the seeds' spread" if low > 0 else "within the seeds' spread, no winner"
        lines.append(f"{place} lies {difference:.4f} above 1, 95% interval {low:.4f} to {high:.4f} "
                     f"(Welch, {groups[0]['n']} and {group['n']} seeds): {said}")
    return lines


# ---- what is printed and written -----------------------------------------------------------------


def rank(runs_dir, sweep=None, by="best_val_loss"):
    """(boards, left_out): one board for each set of validation phrases.

    A board: {"by", "note", "groups", "keys": what differs between its groups, "phrases"}.
    """
    runs, left_out = survey(runs_dir, sweep)
    by_data = defaultdict(list)
    for run in runs:
        by_data[data_key(run)].append(run)
    boards = []
    for same_data in by_data.values():
        measure, note = by, None
        if UNITS[by] == "nats per token" and len({tokenizer_key(run) for run in same_data}) > 1:
            measure = "best_val_bpb"
            note = (f"their tokenizers differ, and {by} counts per token: ranked by bits per byte "
                    "of text instead")
        groups, unusable = groups_of(same_data, measure)
        left_out += unusable
        keys = differences([group["config"] for group in groups])
        boards.append({"by": measure, "note": note, "groups": groups, "keys": keys})
    return boards, left_out


def show(runs_dir, sweep=None, by="best_val_loss"):
    """Print the leaderboard; return its boards. Raises UserError if nothing belongs to `sweep`."""
    boards, left_out = rank(runs_dir, sweep, by)
    if not boards and not left_out:
        which = f"of the sweep {sweep!r} " if sweep else ""
        raise UserError(f"there is no run {which}in {runs_dir}{sweeps_there(runs_dir, sweep)}\n"
                        f"  tp train --config configs/default.py --runs-dir {runs_dir}")
    runs = [run_id for board in boards for group in board["groups"] for run_id in group["run_ids"]]
    name = f" - sweep {sweep}" if sweep else ""
    print(f"tp leaderboard - {runs_dir}{name} - {count(runs, 'finished run')}, "
          f"{len(left_out)} left out")
    if len(boards) > 1:
        print(f"they were measured on {len(boards)} different sets of phrases, which no number "
              "compares: one table for each")
    for board in boards:
        print_board(board)
    if left_out:
        print("\nnot ranked:")
        for line in table(["run", "why"], [[visible(n), visible(w)] for n, w in left_out])[1:]:
            print("  " + line)
    return boards


def sweeps_there(runs_dir, sweep):
    names = sorted({name for run_id in run_ids(runs_dir)
                    if (name := sweep_of(Path(runs_dir) / run_id))})
    return f"; there are: {', '.join(names)}" if sweep and names else ""


def print_board(board):
    groups, names = board["groups"], short_names(board["keys"])
    if board["note"]:
        print(board["note"])
    if not groups:
        return
    print()
    header = ["rank", *names.values(), "seeds", "mean", "sd", "range", "bpb",
              "parameters", "best step", "seconds"]
    rows = []
    for place, group in enumerate(groups, 1):
        rows.append([
            place, *[visible(spell(group["config"].get(key, "-"))) for key in names], group["n"],
            number(group["mean"]), number(group["sd"]),
            f"{group['low']:.4f}..{group['high']:.4f}", number(group["bpb"]),
            number(group["parameters"]), number(group["best_step"], 0),
            number(group["seconds"], 1)])
    print("\n".join(table(header, rows)))
    print(f"mean, sd, range: {board['by']} in {UNITS[board['by']]}, less is better")
    print("\n".join(verdicts(groups)))


def as_rows(boards):
    """One flat dict per group, for CSV and JSON."""
    for number_of, board in enumerate(boards, 1):
        for place, group in enumerate(board["groups"], 1):
            told = {key: value for key, value in group.items() if key != "config"}
            yield {"board": number_of, "rank": place, "by": board["by"], **told,
                   **{key: group["config"].get(key) for key in board["keys"]}}


def as_json(boards):
    return json.dumps(list(as_rows(boards)), indent=2) + "\n"


def as_csv(boards):
    """Lists (values, seeds, run ids) are joined by spaces."""
    rows = [{key: " ".join(map(str, value)) if isinstance(value, list) else value
             for key, value in row.items()} for row in as_rows(boards)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)),
                            lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
