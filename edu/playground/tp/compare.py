"""tp compare: what sets runs apart, what came of it, and what they write, side by side."""

import torch

from tp.errors import UserError
from tp.runs import CHECKPOINTS, Run
from tp.sample import add_sampling_arguments, generate, sampling_options
from tp.tables import (
    as_dict,
    columns,
    differences,
    find_run,
    flat,
    is_number,
    number,
    read_object,
    spell,
    table,
    visible,
)

# (what it is, its key in summary.json, digits)
MEASURES = (
    ("status", "status", 0),
    ("parameters", "parameters", 0),
    ("best val loss (nats/token)", "best_val_loss", 4),
    ("  at step", "best_step", 0),
    ("best val bits/byte", "best_val_bpb", 4),
    ("last val loss", "final_val_loss", 4),
    ("last train loss", "final_train_loss", 4),
    ("last gap, val - train", "gap", 4),
    ("bigram, val loss", "bigram", 4),
    ("steps", "steps", 0),
    ("seconds", "seconds", 1),
    ("seconds to best", "seconds_to_best", 1),
    ("tokens/s", "tokens_per_second", 0),
)


def add_arguments(parser):
    parser.add_argument("--runs-dir", default="runs", metavar="DIR")
    parser.add_argument("--run-ids", required=True, metavar="A,B", help="two runs, or more")
    parser.add_argument("--checkpoint", default="best_val", choices=CHECKPOINTS)
    add_sampling_arguments(parser)


def main(args):
    ids = list(dict.fromkeys(name.strip() for name in args.run_ids.split(",") if name.strip()))
    if len(ids) < 2:
        raise UserError(f"--run-ids {args.run_ids}: give two different runs or more, with commas "
                        "between: --run-ids A,B")
    runs = [Run(args.runs_dir, find_run(args.runs_dir, name).name) for name in ids]
    print(f"tp compare - cpu - {len(runs)} runs of {args.runs_dir} - {args.checkpoint}\n")
    names = short_labels(ids)
    if names != ids:
        print("\n".join(f"{name} = {run_id}" for name, run_id in zip(names, ids)) + "\n")
    print("\n".join(config_lines(runs, names)) + "\n")
    print("\n".join(metric_lines(runs, names)) + "\n", flush=True)
    for line in sample_lines(runs, names, args):
        print(line)
    print(f"next: tp plot-loss --runs-dir {args.runs_dir} --run-ids {','.join(ids)}")
    return 0


def short_labels(ids):
    """The run ids, or A, B, C, ... if they would make the tables wider than a page."""
    if max(map(len, ids)) <= 24:
        return ids
    return [chr(ord("A") + i) if i < 26 else f"run {i + 1}" for i in range(len(ids))]


def config_lines(runs, names):
    """The settings that differ, one to a row; a config that cannot be read is named."""
    configs, problems = [], []
    for run in runs:
        try:
            configs.append(flat(read_object(run.config_path)))
        except UserError as error:
            configs.append({})
            problems.append(str(error))
    readable = [config for config in configs if config]
    keys = differences(readable)
    if not keys:
        return [*problems, "their configs are the same"] if len(readable) > 1 else problems
    rows = [[key, *[visible(spell(config.get(key, "-"))) for config in configs]]
            for key in keys]
    same = len(set().union(*configs)) - len(keys)
    return [*table(["setting", *names], rows), f"{same} settings are equal", *problems]


def metric_lines(runs, names):
    """summary.json of each, and what follows from it. A run without one is named."""
    told = [summary_of(run) for run in runs]
    rows = []
    for measure, key, digits in MEASURES:
        cells = [number(summary.get(key), digits) for summary in told]
        if any(cell != "-" for cell in cells):
            rows.append([measure, *cells])
    lines = table(["result", *names], rows)
    lines += [f"{name}: {summary['problem']}" for name, summary in zip(names, told)
              if "problem" in summary]
    if len({f"{s.get('vocab_size')} {s.get('bigram')}" for s in told if "problem" not in s}) > 1:
        lines.append("their tokenizers or phrases differ: losses per token do not compare; bits "
                     "per byte do, on the same validation phrases")
    return lines


def summary_of(run):
    """Its summary with gap, bigram and tokens_per_second added; {"problem": why} without one."""
    try:
        summary = read_object(run.summary_path)
        speeds = [row.get("tokens_per_second") for row in run.load_metrics()]
    except UserError as error:
        return {"problem": str(error)}
    speeds = sorted(filter(is_number, speeds))
    losses = [summary.get("final_val_loss"), summary.get("final_train_loss")]
    return {**summary, "gap": losses[0] - losses[1] if all(map(is_number, losses)) else None,
            "bigram": as_dict(summary.get("ladder")).get("bigram"),
            "tokens_per_second": speeds[len(speeds) // 2] if speeds else None}


def sample_lines(runs, names, args):
    """Lines: the samples of all runs in columns.

    Every run is sampled as the flags say, and where they are silent, as its own config does; but
    with one seed for all, the first run's, so that chance is no difference between them.
    """
    drawn, used, seed = [], [], args.seed
    for run in runs:
        try:
            model, tokenizer, config, _ = run.load_model(args.checkpoint)
            torch.set_num_threads(config.train.threads)  # to the bit, whatever the machine
        except UserError as error:
            drawn.append([f"({error})"])
            continue
        seed = config.seed if seed is None else seed
        options = {**sampling_options(args, config), "seed": seed}
        used.append(", ".join("unconditional" if (key, value) == ("prompt", None) else
                              f"{key} {spell(value) if value is None else repr(value)}"
                              for key, value in options.items()))
        drawn.append([visible(text) or "(empty)" for text in generate(model, tokenizer, **options)])
    for line in dict.fromkeys(used):
        yield f"samples: {line}"
    rows = [[texts[i] if i < len(texts) else "" for texts in drawn]
            for i in range(max(map(len, drawn)))]
    yield from columns(names, rows)
