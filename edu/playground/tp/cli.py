"""The `tp` command: one sub-command per module, imported only when it is called."""

import argparse
import importlib
import os
import sys

from tp.errors import UserError

# command: (module with add_arguments(parser) and main(args), what it does)
COMMANDS = {
    "train": ("tp.train", "train a model from a config, or go on with a run"),
    "generate": ("tp.sample", "draw text from a run"),
    "compare": ("tp.compare", "runs side by side: settings, results, samples"),
    "report": ("tp.report", "losses, novelty, copies, calibration of a checkpoint"),
    "plot-loss": ("tp.plot", "the losses of a run, or several, as SVG"),
    "sweep": ("tp.sweep", "train every combination of a grid, in parallel processes"),
    "leaderboard": ("tp.leaderboard", "runs ranked, with mean and spread over seeds"),
}


def make_parser(command):
    """The parser, with the arguments of `command` only: torch is slow to import."""
    parser = argparse.ArgumentParser(prog="tp", description="transformer-playground")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, meaning) in COMMANDS.items():
        sub = commands.add_parser(name, help=meaning, description=meaning)
        if name == command:
            importlib.import_module(module).add_arguments(sub)
    return parser


def main(argv=None):
    """Run one command; returns the exit code: 0, 2 for a user's mistake, 130 for Ctrl-C, 141
    when nobody reads on."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = make_parser(argv[0] if argv else None).parse_args(argv)
        code = importlib.import_module(COMMANDS[args.command][0]).main(args) or 0
        sys.stdout.flush()  # here, where a reader that has gone can still be met
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has enough, as `head` has after its lines
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
