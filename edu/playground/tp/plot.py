"""tp plot-loss: the losses of one run, or of several, as an SVG picture.

The picture is text that we write ourselves: a polyline is one line of it. A drawing library would
take longer to import than the rest takes altogether, would put ids drawn at random into the file,
and could not follow the reader's light or dark theme, which a style sheet does in six lines. The
same metrics give the same bytes.
"""

import html
import math
from pathlib import Path

from tp.errors import UserError
from tp.files import read_rows, write_bytes
from tp.tables import as_dict, find_run, is_number, read_object

WIDTH, PLOT_HEIGHT, LEFT, RIGHT, BOTTOM = 760, 340, 64, 24, 52
MOST_RUNS = 8  # more lines than that nobody can tell apart
LIGHT = ("#1f66cc", "#b8560a", "#1a7f4b", "#8b3fb5", "#b3243c", "#0b7a8a", "#7a6a00", "#5c6470")
DARK = ("#79aeff", "#f2a45c", "#67cf97", "#cf9bf0", "#ff8a98", "#5fd0e0", "#d9c85a", "#aab3c0")


def add_arguments(parser):
    parser.add_argument("--runs-dir", default="runs", metavar="DIR")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run-id", metavar="ID", help="one run")
    which.add_argument("--run-ids", metavar="A,B", help="several, in one picture")
    parser.add_argument("--out", metavar="PATH", help="the picture (default: loss.svg in the run's "
                        "folder; of several runs in --runs-dir)")
    parser.add_argument("--log-y", action="store_true", help="log scale, for losses that explode")


def main(args):
    given = args.run_id if args.run_id is not None else args.run_ids
    ids = [given] if args.run_id is not None else given.split(",")
    ids = list(dict.fromkeys(name.strip() for name in ids if name.strip()))
    if not 1 <= len(ids) <= MOST_RUNS:
        raise UserError(f"{given!r} names {len(ids)} runs, and one picture shows 1 to {MOST_RUNS}, "
                        "because more colours cannot be told apart")
    folders = [find_run(args.runs_dir, name) for name in ids]
    runs = [read_curves(folder, args.log_y) for folder in folders]
    out = Path(args.out or (folders[0] if len(ids) == 1 else Path(args.runs_dir)) / "loss.svg")
    print(f"tp plot-loss - {', '.join(ids)} - {'log' if args.log_y else 'linear'} scale")
    for run in runs:
        print(spoken_run(run))
        for note in run["notes"]:
            print(f"  {note}")
    try:
        picture = draw(runs, args.log_y, marks=ladder_of(folders[0]) if len(ids) == 1 else ())
    except ValueError as error:
        raise UserError(f"{', '.join(ids)}: {error}; has it come to its first evaluation?"
                        ) from None
    highest = max(loss for run in runs for point in run["train"] + run["val"] if point
                  for loss in point[1:])
    lowest = min(best_of(run["val"] + run["train"])[1] for run in runs
                 if best_of(run["val"] + run["train"]))
    if not args.log_y and highest > 20 * lowest > 0:
        print(f"the highest loss is {highest / lowest:.0f} times the lowest: --log-y shows both")
    save(out, picture)
    print(f"wrote {out}")
    return 0


def save(path, picture):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, picture.encode())
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); name another with --out"
                        ) from None


def read_curves(folder, log_y):
    """{"run_id", "train", "val", "notes"} of one run folder, as draw wants it."""
    metrics = read_rows(folder / "metrics.jsonl")
    run = {"run_id": folder.name, "notes": []}
    for key in ("train", "val"):
        run[key], left_out = points_of(metrics, f"{key}_loss", log_y)
        if left_out:
            steps = ", ".join(f"{step:g}" for step in left_out[:6])
            more = f" and {len(left_out) - 6} more" if len(left_out) > 6 else ""
            run["notes"].append(f"{folder.name}: {key} loss not {'above 0' if log_y else 'finite'} "
                                f"and left out at step {steps}{more}")
    return run


def ladder_of(folder):
    """[("bigram", nats per token), ...] of the run's summary; [] without one."""
    try:
        ladder = as_dict(read_object(folder / "summary.json").get("ladder"))
    except UserError:
        return []
    return [(name, loss) for name, loss in ladder.items() if is_number(loss)]


def style_sheet():
    """Colours for a light page and for a dark one; the reader's own setting decides."""
    def colours(palette):
        return " ".join(f".c{i} {{ stroke: {colour}; }} .dot.c{i} {{ fill: {colour}; }}"
                        for i, colour in enumerate(palette))

    return (
        "text { font: 13px system-ui, sans-serif; fill: #1c2430; } .page { fill: #ffffff; }\n"
        ".faint { opacity: .75; } .title { font-weight: 600; font-size: 15px; }\n"
        ".grid { stroke: #1c2430; stroke-opacity: .14; } .rule { stroke-dasharray: 1 4; "
        "stroke: #1c2430; stroke-opacity: .7; }\n"
        ".line { fill: none; stroke-width: 2.2; stroke-linejoin: round; }\n"
        ".train { stroke-width: 1.4; stroke-dasharray: 5 3; } "
        ".best { fill: none; stroke-width: 2; }\n"
        f"{colours(LIGHT)}\n"
        "@media (prefers-color-scheme: dark) {\n"
        "text { fill: #dfe4ec; } .page { fill: #14181f; }\n"
        ".grid, .rule { stroke: #dfe4ec; }\n"
        f"{colours(DARK)}\n"
        "}"
    )


# ---- from metrics to points ----------------------------------------------------------------------


def points_of(metrics, key, log_y=False):
    """(points, left_out) of one column: points [(step, value), ...] in the order of steps, None
    where a value cannot be drawn; left_out: the steps of those.

    None breaks the line: a stroke across the hole would show a loss that nobody measured.
    """
    points, left_out = [], []
    rows = [row for row in metrics if is_number(as_dict(row).get("step")) and key in row]
    for row in sorted(rows, key=lambda row: row["step"]):
        value = row[key]
        if is_number(value) and math.isfinite(value) and (value > 0 or not log_y):
            points.append((row["step"], value))
        else:
            points.append(None)
            left_out.append(row["step"])
    return points, left_out


def best_of(points):
    """The lowest point, the first of equals; None if there is none."""
    return min((point for point in points if point), key=lambda point: point[1], default=None)


# ---- axes ----------------------------------------------------------------------------------------


def nice_ticks(low, high, count=5):
    """About `count` round numbers, 1, 2 or 5 times a power of ten apart, that enclose low..high."""
    if not low < high:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    gap = next(power * m for m in (1, 2, 5, 10) if (high - low) / (power * m) <= count)
    first, last = math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9)
    return [float(f"{i * gap:.12g}") for i in range(first, last + 1)]


def log_ticks(low, high):
    """Numbers that enclose low..high on a log scale: 1, 2, 5, 10, ...; all of 1 to 10 for a narrow
    range, powers of ten for a wide one."""
    if not low < high:
        low, high = low / 2, high * 2
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = range(1, 10) if high < 6 * low else (1, 2, 5) if last - first <= 4 else (1,)
    ticks = [float(f"{m}e{k}") for k in range(first - 1, last + 2) for m in steps]
    begin = max(i for i, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    end = min(i for i, tick in enumerate(ticks) if tick >= high * (1 - 1e-9))
    return ticks[begin : end + 1]


class Axis:
    """Turns a value into a place in the picture; start is where the first tick stands."""

    def __init__(self, ticks, start, end, log=False):
        self.ticks, self.start, self.end = ticks, start, end
        self.scale = math.log10 if log else float

    def at(self, value):
        low, high = self.scale(self.ticks[0]), self.scale(self.ticks[-1])
        return self.start + (self.scale(value) - low) / (high - low) * (self.end - self.start)


# ---- the picture ---------------------------------------------------------------------------------


def draw(runs, log_y=False, marks=()):
    """SVG text of runs [{"run_id", "train": points, "val": points, "notes": [text]}, ...].

    Points as points_of gives them. marks: [(label, loss)], drawn as dotted lines where they lie
    within the data. Raises ValueError if there is not one point to draw.
    """
    found = [point for run in runs for key in ("train", "val") for point in run[key] if point]
    if not found:
        raise ValueError("there is no finite loss to draw")
    losses = [loss for _, loss in found]
    top = 62 + 20 * len(runs)
    steps = nice_ticks(0, max(step for step, _ in found) or 1, 8)
    ticks = log_ticks(min(losses), max(losses)) if log_y else nice_ticks(min(losses), max(losses))
    x = Axis(steps, LEFT, WIDTH - RIGHT)
    y = Axis(ticks, top + PLOT_HEIGHT, top, log_y)
    notes = [note for run in runs for note in run.get("notes", ())]
    height = top + PLOT_HEIGHT + BOTTOM + 18 * len(notes)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" aria-label="{escape(spoken(runs))}">',
        f"<style>\n{style_sheet()}\n</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}"/>',
        words(LEFT, 26, "loss of " + (runs[0]["run_id"] if len(runs) == 1 else f"{len(runs)} runs"),
              "title"),
        *draw_axes(x, y, log_y), *draw_marks(x, y, marks, min(losses), max(losses)),
    ]
    for i, run in enumerate(runs):
        lines += draw_run(run, i, x, y, single=len(runs) == 1) + draw_legend(run, i, len(runs))
    for i, note in enumerate(notes):
        lines.append(words(LEFT, height - 12 - 18 * (len(notes) - 1 - i), note, "faint"))
    return "\n".join([*lines, "</svg>"]) + "\n"


def escape(text):
    return html.escape(text, quote=True)


def words(x, y, text, classes="", anchor="start"):
    return (f'<text x="{x:.2f}" y="{y:.2f}" class="{classes}" text-anchor="{anchor}">'
            f"{escape(text)}</text>")


def spoken(runs):
    """What a screen reader says: each run and its lowest validation loss."""
    return "loss by step; " + "; ".join(map(spoken_run, runs))


def spoken_run(run):
    best = best_of(run["val"])
    return f"{run['run_id']}: " + ("best validation loss {1:.4f} at step {0:g}".format(*best)
                                   if best else "no validation loss")


def draw_axes(x, y, log_y):
    lines = []
    for tick in y.ticks:
        lines.append(f'<path class="grid" d="M{x.start:.2f} {y.at(tick):.2f}H{x.end:.2f}"/>')
        lines.append(words(x.start - 8, y.at(tick) + 4, f"{tick:g}", "tick-y", "end"))
    for tick in x.ticks:
        lines.append(f'<path class="grid" d="M{x.at(tick):.2f} {y.start:.2f}v5"/>')
        lines.append(words(x.at(tick), y.start + 20, f"{tick:g}", "tick-x", "middle"))
    lines.append(words((x.start + x.end) / 2, y.start + 40, "step (optimizer updates)", "faint",
                       "middle"))
    middle = (y.start + y.end) / 2
    unit = "loss (nats per token" + (", log scale)" if log_y else ")")
    lines.append(f'<text transform="translate(16 {middle:.2f}) rotate(-90)" class="faint" '
                 f'text-anchor="middle">{unit}</text>')
    return lines


def draw_marks(x, y, marks, low, high):
    lines = []
    for label, loss in marks:
        if low <= loss <= high:
            lines.append(f'<path class="rule" d="M{x.start:.2f} {y.at(loss):.2f}H{x.end:.2f}"/>')
            lines.append(words(x.end, y.at(loss) - 5, f"{label} {loss:.3f}", "faint", "end"))
    return lines


def draw_run(run, i, x, y, single):
    """Training dashed, validation solid, a ring around the best step. One run alone has a colour
    for each of the two; of several, each has its own."""
    lines = []
    for key, colour in (("train", 1 if single else i), ("val", 0 if single else i)):
        path = path_of(run[key], x, y)
        if path:
            lines.append(f'<path class="line {key} c{colour}" d="{path}"/>')
        alone = [point for point in run[key] if point]
        if len(alone) <= 12:  # few, or one with nothing to join: without marks it could be nothing
            lines += [f'<circle class="dot c{colour}" cx="{x.at(step):.2f}" cy="{y.at(loss):.2f}" '
                      'r="2.6"/>' for step, loss in alone]
    if best := best_of(run["val"]):
        step, loss = best
        lines.append(f'<circle class="best c{0 if single else i}" cx="{x.at(step):.2f}" '
                     f'cy="{y.at(loss):.2f}" r="6"><title>{escape(run["run_id"])}: best validation '
                     f"loss {loss:.4f} at step {step:g}</title></circle>")
    return lines


def path_of(points, x, y):
    """SVG path of the points; it starts anew behind each None."""
    path, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
        else:
            path.append(f"{pen}{x.at(point[0]):.2f} {y.at(point[1]):.2f}")
            pen = "L"
    return "".join(path)


def draw_legend(run, i, count):
    """One line under the title: what each stroke is, and where the best step lies."""
    height, best = 52 + 20 * i, best_of(run["val"])
    said = "best {1:.4f} at step {0:g}".format(*best) if best else "no validation loss"
    entries = [("val", f"validation: {said}", 0), ("train", "train", 1)]
    if count > 1:
        name = run["run_id"] if len(run["run_id"]) <= 64 else run["run_id"][:61] + "..."
        entries = [("val", f"{name}: {said}", i)]
    lines, left = [], LEFT
    for kind, text, colour in entries:
        lines.append(f'<path class="line {kind} c{colour}" d="M{left} {height - 4}h26"/>')
        lines.append(words(left + 34, height, text))
        left = WIDTH - RIGHT - 130
    if count > 1 and i == 0:
        lines.append(words(WIDTH - RIGHT, 26, "dashed: train", "faint", "end"))
    return lines
