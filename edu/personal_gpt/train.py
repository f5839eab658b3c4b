"""Train a GPT on a plain text file, character by character.

    python train.py --text examples/data.txt --epochs 5 --output gpt.pth

The text is cut in two: the model learns from the start and is measured on the end, which it never
sees. An epoch shows it every character once, in windows of block_size that do not overlap, in a new
order and cut at a new place each time; a text too short for 100 updates is gone through several
times an epoch. What is kept is the model of the best validation loss.

Read beside nanoGPT's train.py: the same optimizer and schedule, without its configuration.
"""

import argparse
import contextlib
import hashlib
import io
import math
import os
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from model import (
    GPT,
    UserError,
    load_gpt,
    read_settings,
    save_gpt,
    settings_path,
)
from tqdm import tqdm

IGNORE = -1  # a target that is no target: padding
UPDATES = 100  # an epoch has at least this many windows, and an update takes the 100th part
LEAST_ROWS = 4  # no fewer: AdamW's step is as long whatever a single row is weighted with
ROW_UPDATES = 80  # for rows that are lines: they are shorter, and more alike
VAL_ROWS = 128  # rows to measure on while training: the loss of more would hardly be another

# ---- text to numbers -----------------------------------------------------------------------------


def read_text(path, flag):
    """The text of a UTF-8 file, with line breaks as \\n. Raises UserError."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path} is not UTF-8 text (byte {error.start} is "
                        f"0x{error.object[error.start]:02x}); convert it, for example:\n"
                        f"  iconv -f LATIN1 -t UTF-8 {path} > utf8.txt") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise UserError(f"{flag} {path} is empty: there is nothing to learn from")
    return text


def encode(text, stoi):
    """The numbers of the characters: (n,). Raises KeyError for a character without one."""
    return torch.tensor([stoi[character] for character in text], dtype=torch.long)


def decode(ids, itos):
    return "".join(itos[i] for i in ids.tolist())


def windows(ids, block_size):
    """ids (n,) -> inputs, targets (N, T): pieces that do not overlap, targets one character on.

    Every character but the first is a target exactly once; the last window is padded.
    """
    n = len(ids) - 1
    N = math.ceil(n / block_size)
    inputs = torch.zeros(N * block_size, dtype=torch.long)
    targets = torch.full_like(inputs, IGNORE)
    inputs[:n], targets[:n] = ids[:-1], ids[1:]
    return inputs.view(N, block_size), targets.view(N, block_size)


def lines_to_rows(lines, stoi, block_size):
    """(inputs, targets (N, T), line (N,)): each line between line breaks, in pieces if too long.

    The line break before a line tells the model that one begins, the one after it that it ended.
    line[i] is the number of the line that row i is a piece of.
    """
    pieces, line = [], []
    for number, text in enumerate(lines):
        ids = encode(f"\n{text}\n", stoi)
        for start in range(0, len(ids) - 1, block_size):
            pieces.append(ids[start : start + block_size + 1])
            line.append(number)
    T = max(len(piece) for piece in pieces) - 1
    inputs = torch.zeros(len(pieces), T, dtype=torch.long)
    targets = torch.full_like(inputs, IGNORE)
    for i, piece in enumerate(pieces):
        inputs[i, : len(piece) - 1], targets[i, : len(piece) - 1] = piece[:-1], piece[1:]
    return inputs, targets, torch.tensor(line)


# ---- how good is a guess? ------------------------------------------------------------------------


def token_losses(model, inputs, targets):
    """-log p of each target, in nats, 0 where there is none: (B, T) from (B, T), (B, T)."""
    logits = model(inputs)  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE,
                           reduction="none").view(targets.shape)


@torch.no_grad()
def row_losses(model, inputs, targets, batch_size=64):
    """token_losses of any number of rows, without dropout, on the CPU: (N, T)."""
    was_training, device = model.training, model.wte.weight.device
    model.eval()
    parts = [token_losses(model, x.to(device), y.to(device)).cpu()
             for x, y in zip(inputs.split(batch_size), targets.split(batch_size))]
    model.train(was_training)
    return torch.cat(parts)


def mean_loss(model, inputs, targets):
    """Nats per character over all targets."""
    total = row_losses(model, inputs, targets).sum(dtype=torch.float64)
    return (total / (targets != IGNORE).sum()).item()


def ladder(train, val, V):
    """{name: nats per character on val} of guessers that only count; train, val: (inputs, targets).

    What a model must beat, from the bottom up: knowing nothing, how common each character is, and
    which character follows which.
    """
    (x, y), (val_x, val_y) = ((rows[0][rows[1] != IGNORE], rows[1][rows[1] != IGNORE])
                              for rows in (train, val))
    pairs = torch.bincount(x * V + y, minlength=V * V).view(V, V).double()
    # p(c) = (n(c) + 1) / (n + V): one more of each, or an unseen one would cost infinitely much
    single = (pairs.sum(0) + 1) / (pairs.sum() + V)
    # p(c | b) = (n(b, c) + 2 p(c)) / (n(b) + 2): the rarer b is, the more p(c) counts
    pairs = (pairs + 2 * single) / (pairs.sum(1, keepdim=True) + 2)
    return {"uniform": math.log(V), "unigram": -single[val_y].log().mean().item(),
            "bigram": -pairs[val_x, val_y].log().mean().item()}


# ---- the loop ------------------------------------------------------------------------------------


def make_optimizer(model, lr):
    """AdamW as in nanoGPT: weight decay on matrices, none on biases and normalisation gains."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)


def schedule(done):
    """Share of the learning rate when `done` (0..1) of the run is over."""
    if done < 0.1:  # Adam's first steps rest on few gradients: small ones
        return (done + 0.01) / 0.11
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (done - 0.1) / 0.9))


def epoch_plan(N, batch_size, updates=UPDATES):
    """(passes, rows per update) of an epoch over N rows.

    An update takes N / updates of them, between LEAST_ROWS and batch_size, so that little text
    still means many updates; fewer than `updates` rows are gone through several times.
    """
    fewest = min(LEAST_ROWS, batch_size, N)
    return math.ceil(updates / N), max(fewest, min(batch_size, N // updates))


class Table:
    """One row per report, below a header with units."""

    def __init__(self, show):
        self.show, self.start = show, time.perf_counter()
        if show:
            print("epoch    step   train     val        lr   tok/s     s   (losses in nats per "
                  "character)")

    def row(self, epoch, step, train, val, lr, tokens):
        seconds = time.perf_counter() - self.start
        if self.show:
            tqdm.write(f"{epoch:5.1f} {step:7,} {train:7.4f} {val:7.4f} {lr:9.1e} "
                       f"{tokens / max(seconds, 1e-9):7,.0f} {seconds:5.1f}")
            sys.stdout.flush()


def fit(model, make_pass, val, *, epochs, batch_size, lr, seed, show=True, keep_best=True,
        updates=UPDATES):
    """Train model on the rows that make_pass(generator) gives, (inputs, targets, weights).

    weights (N,) multiply the loss of each row; val: (inputs, targets) to measure on. Afterwards the
    model is the one of the lowest validation loss, also after Ctrl-C; with keep_best=False, the
    last. Returns {"before", "after": nats per character on val, "stopped": by Ctrl-C}. Raises
    UserError when the loss is not finite.
    """
    generator, optimizer = torch.Generator().manual_seed(seed), make_optimizer(model, lr)
    device, table = model.wte.weight.device, Table(show)
    val = tuple(part[:VAL_ROWS] for part in val)
    before = mean_loss(model, *val)
    best = (before, copy_of(model))
    step = tokens = 0
    stopped, reports, losses = False, 0, []
    model.train()
    progress = tqdm(total=epochs, unit="epoch", leave=False, disable=None if show else True,
                    bar_format="{l_bar}{bar}| {n:.1f}/{total} epochs, {remaining} left{postfix}")
    try:
        for epoch in range(epochs):
            # 1. all rows, in a new order
            one = make_pass(generator)
            passes, per_update = epoch_plan(len(one[0]), batch_size, updates)
            every = [one] + [make_pass(generator) for _ in range(passes - 1)]
            inputs, targets, weights = (torch.cat(part) for part in zip(*every))
            order = torch.randperm(len(inputs), generator=generator)
            steps = math.ceil(len(inputs) / per_update)
            report_every = math.ceil(epochs * steps / 10)
            for i, rows in enumerate(order.split(per_update), 1):
                x, y = trimmed(inputs[rows], targets[rows])
                # 2. loss = sum_i w_i sum_t -log p(target_it) / number of targets
                count = (y != IGNORE).sum()
                each = token_losses(model, x.to(device), y.to(device)).sum(1)  # (B,)
                loss = (each * weights[rows].to(device)).sum() / count
                optimizer.zero_grad()
                loss.backward()
                # 3. a step, no longer than 1 whatever the gradient
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                done = epoch + i / steps
                for group in optimizer.param_groups:
                    group["lr"] = lr * schedule(done / epochs)
                optimizer.step()
                losses.append(loss.item())
                check_finite(losses[-1], step, lr)
                step, tokens = step + 1, tokens + count.item()
                progress.update(1 / steps)
                # 4. report, and keep the best
                if len(losses) >= report_every or done == epochs:
                    now, reports = mean_loss(model, *val), reports + 1
                    table.row(done, step, sum(losses) / len(losses), now, group["lr"], tokens)
                    losses = []
                    if now < best[0] or not keep_best:
                        best = (now, copy_of(model))
    except KeyboardInterrupt:
        stopped = True
    progress.close()
    if stopped and not reports:
        best = (mean_loss(model, *val), copy_of(model))  # better than nothing
    model.load_state_dict(best[1])
    model.eval()
    return {"before": before, "after": best[0], "stopped": stopped}


def copy_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def trimmed(inputs, targets):
    """Without the columns that are padding in every row."""
    T = int((targets != IGNORE).sum(1).max())
    return inputs[:, :T], targets[:, :T]


def check_finite(loss, step, lr):
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} at step {step}: the updates overshoot, and nothing "
                        f"has been written; use a smaller learning rate: --lr {lr / 10:g}")


# ---- the model to begin with ---------------------------------------------------------------------


def new_model(vocabulary, args):
    """A model with random weights: (model, stoi, itos). Raises UserError."""
    try:
        model = GPT(len(vocabulary), args.block_size or 128, args.n_embd, args.n_layer, args.n_head,
                    args.dropout)
    except (ValueError, RuntimeError) as error:  # the latter: more than the memory holds
        raise UserError(f"{error} (--block-size, --n-embd, --n-layer, --n-head, "
                        "--dropout)") from None
    return model, {c: i for i, c in enumerate(vocabulary)}, list(vocabulary)


@torch.no_grad()
def grow_vocabulary(model, itos, new):
    """The same model with more characters at the end of its table: (model, stoi, itos).

    A new character begins as the mean of the known ones, so that it is neither likely nor unlikely,
    with some noise, so that two new ones can become different.
    """
    h = dict(model.hyperparameters, vocab_size=len(itos) + len(new))
    grown, known = GPT(**h), model.wte.weight
    state = model.state_dict()
    noise = 0.02 * torch.randn(len(new), known.size(1))
    state["wte.weight"] = torch.cat((known, known.mean(0) + noise))
    state["lm_head.weight"] = state["wte.weight"]
    grown.load_state_dict(state)
    itos = itos + list(new)
    return grown, {c: i for i, c in enumerate(itos)}, itos


def model_for(texts, args):
    """The model that --init names, or a new one, that knows every character of texts (str).

    Returns (model, stoi, itos). The line break is always known: it separates texts.
    """
    needed = set(texts) | {"\n"}
    if not args.init:
        return new_model("".join(sorted(needed)), args)
    model, stoi, itos = load_gpt(args.init)
    if args.block_size not in (None, model.block_size):
        raise UserError(f"--block-size {args.block_size}: the model in {args.init} was made for "
                        f"{model.block_size}; leave the flag out")
    new = sorted(needed - set(stoi))
    if new:
        shown = "".join(new[:50]) + "..." * (len(new) > 50)
        print(f"{args.init} has never seen {shown!r}: {len(new)} new in its vocabulary")
        model, stoi, itos = grow_vocabulary(model, itos, new)
    return model, stoi, itos


# ---- files ---------------------------------------------------------------------------------------


def check_output(path, inputs=()):
    """Complain before the training rather than after it. Raises UserError.

    What is there already is replaced only if it is a model of ours, weights and JSON. A JSON alone
    belongs to weights of another name, gpt.pt beside gpt.pth, whose vocabulary would be lost.
    """
    if path is None:
        return
    path = Path(path)
    if not path.name:  # "", "." and "/": no name to put .json in the place of the ending of
        raise UserError(f"--output {str(path)!r} is no name of a file; such as --output gpt.pth")
    beside = settings_path(path)
    if path == beside:
        raise UserError(f"--output {path}: the vocabulary goes to {beside}, so the weights need "
                        f"another ending: --output {path.with_suffix('.pth')}")
    check_folder("--output", path)
    for given in filter(None, inputs):
        if Path(given).resolve() in (path.resolve(), beside.resolve()):
            raise UserError(f"--output {path} would overwrite {given}, which is read in this run; "
                            "choose another name")
    if path.exists() or beside.exists():
        with contextlib.suppress(UserError):
            if read_settings(path) and is_weights(path):
                return
        raise UserError(f"--output {path}: {path if path.exists() else beside} exists and is no "
                        "model of this program; delete it or choose another name")


def is_weights(path):
    """Whether torch.save may have written the file: they are ZIP archives, as no text is."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"PK\3\4"


def check_folder(flag, path):
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise UserError(f"{flag} {path}: the folder {folder} does not exist; make it:\n"
                        f"  mkdir -p {folder}")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{flag} {path}: {folder} cannot be written to")


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def seen_texts(path):
    """What the model at path has been trained on, itself and those it went on from.

    A list of {"sha256": of a text, "characters": how many from its start on, None for all of it}.
    """
    texts = read_settings(path).get("trained_on") if path else None
    return [text for text in texts if isinstance(text, dict)] if isinstance(texts, list) else []


def seen_now(args, text, characters=None):
    """seen_texts() of a model that went on from --init with this text."""
    return [*seen_texts(args.init), {"sha256": digest(text), "characters": characters}]


# ---- the command line ----------------------------------------------------------------------------


def add_training_flags(parser, epochs, lr):
    add = parser.add_argument
    add("--epochs", type=int, default=epochs, help="times through the data; default: %(default)s")
    add("--batch-size", type=int, default=64, help="rows per update, at most: fewer where an epoch "
        "would have too few updates; default: %(default)s")
    add("--block-size", type=int, help="context length in characters; default: 128")
    add("--output", metavar="FILE", help="write the weights here, the vocabulary beside it (.json)")
    add("--init", metavar="FILE", help="go on from this model instead of from random weights")
    add("--n-embd", type=int, default=128, help="channels; default: %(default)s")
    add("--n-layer", type=int, default=3, help="blocks; default: %(default)s")
    add("--n-head", type=int, default=4, help="heads; default: %(default)s")
    add("--dropout", type=float, default=0.0, help="default: %(default)s")
    add("--lr", type=float, default=lr, help="greatest learning rate; default: %(default)s")
    add("--seed", type=int, default=1337, help="default: %(default)s")


def check_flags(args):
    """Raises UserError for a number out of its range."""
    least = {"epochs": 1, "batch_size": 1, "block_size": 2, "lr": 1e-9, "seed": 0, "folds": 2,
             "sample_chars": 1, "samples": 1, "rounds": 1, "top": 1, "min_count": 1,
             "val_fraction": 1e-9}
    for name, value in least.items():
        given = getattr(args, name, None)
        if given is not None and not value <= given < 2**31:  # not-a-number is neither
            raise UserError(f"--{name.replace('_', '-')} {given}: must be {value:g} or more" +
                            " and less than 2^31" * (given >= 2**31))
    if not getattr(args, "val_fraction", 0.1) < 1:
        raise UserError(f"--val-fraction {args.val_fraction}: must be less than 1, or nothing is "
                        "left to train on")


def run_cli(run, parser, argv):
    """Call run with the flags; the exit code: 2 for a UserError, shown without a traceback."""
    with contextlib.suppress(AttributeError, io.UnsupportedOperation):  # no real terminal or file
        sys.stdout.reconfigure(errors="replace")  # a letter it lacks is no reason to stop
    try:
        args = parser.parse_args(argv)
        check_flags(args)
        torch.manual_seed(args.seed)
        code = run(args) or 0
        sys.stdout.flush()  # here, where a reader that has gone can still be met
        return code
    except UserError as error:
        tqdm.write(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has enough, as `head` has after its lines
        # what is still to be printed goes nowhere: else Python would complain of it at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # what a shell reports of any program that ends in this way
    except OSError as error:  # a full disk, for one
        print(f"error: {error}; no file has been left half written", file=sys.stderr)
        return 2


def pick_device():
    """A GPU if there is one; Apple's is left out: at this size it is slower than its CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def headline(what, model, device, seed):
    size = sum(p.numel() for p in model.parameters())
    print(f"personal_gpt {what} - {device.type} - {size / 1e6:.2f}M params - seed {seed}")


def say_ladder(train, val, V, loss):
    """The ladder with the model's own loss as its top step."""
    val = tuple(part[:VAL_ROWS] for part in val)
    steps = {**ladder(train, val, V), "now": loss}
    n = int((val[1] != IGNORE).sum())
    print("ladder, nats per character: " +
          ", ".join(f"{name} {value:.3f}" for name, value in steps.items()) + f" (n={n:,})")


def say_wrote(path):
    print(f"wrote {path} (weights), {settings_path(path)} (vocabulary, hyperparameters)")


def say_result(result, val_targets, output):
    """The closing lines of a training; val_targets (N, T) are what its loss was measured on."""
    if output:
        say_wrote(output)
    print(f"result: val loss {result['before']:.3f} -> {result['after']:.3f} nats per character "
          f"(n={int((val_targets != IGNORE).sum()):,})")


def say_stopped(result, output):
    """After Ctrl-C: what is there, and how to go on. The exit code."""
    if not result["stopped"]:
        return 0
    where = f"the best so far is in {output}; go on from it with --init {output}" if output else \
        "nothing was written, for want of --output"
    print(f"stopped by Ctrl-C: {where}", file=sys.stderr)
    return 130


def split_text(text, stoi, block_size, val_fraction, path):
    """(training ids, validation ids): the end of the text is held out. Raises UserError."""
    ids = encode(text, stoi)
    cut = int(len(ids) * (1 - val_fraction))
    if cut <= block_size or len(ids) - cut < 2:
        raise UserError(f"--text {path} has {len(ids):,} characters, {max(cut, 0):,} of them to "
                        f"train on: not one window of {block_size}. Use a longer text, or a "
                        f"shorter context: --block-size {max(2, cut // 4)}")
    return ids[:cut], ids[cut:]


def run_train(args):
    # 1. text to numbers
    check_output(args.output, (args.text,))
    text = read_text(args.text, "--text")
    model, stoi, itos = model_for(text, args)
    train_ids, val_ids = split_text(text, stoi, model.block_size, args.val_fraction, args.text)
    device, T = pick_device(), model.block_size
    model.to(device)
    headline("train", model, device, args.seed)
    train, val = windows(train_ids, T), windows(val_ids, T)
    N = len(train[0])
    passes, per_update = epoch_plan(N, args.batch_size)
    print(f"{args.text}: {len(text):,} characters, {len(itos)} different ones in the vocabulary; "
          f"the last {len(val_ids):,} are held out")
    print(f"an epoch is {passes} x {N:,} windows of {T} characters, {per_update} per update")

    # 2. learn: each time through the text is cut at another place
    def make_pass(generator):
        start = torch.randint(min(T, len(train_ids) - T), (1,), generator=generator).item()
        inputs, targets = windows(train_ids[start:], T)
        return inputs, targets, torch.ones(len(inputs))

    result = fit(model, make_pass, val, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr,
                 seed=args.seed)

    # 3. keep, and show, in this order: Ctrl-C while it writes a sample loses nothing
    if args.output:
        save_gpt(args.output, model, "".join(itos), val_loss=round(result["after"], 6),
                 trained_on=seen_now(args, text, len(train_ids)))
    say_ladder(train, val, len(itos), result["after"])
    try:
        start = encode("\n", stoi)[None].to(device)
        sample = model.generate(start, args.sample_chars, temperature=0.8)
        print(f"a sample (temperature 0.8)\n{decode(sample[0], itos).rstrip()}\n")
    except KeyboardInterrupt:
        result["stopped"] = True
    say_result(result, val[1][:VAL_ROWS], args.output)
    text = shlex.quote(args.text)
    print(f"next: python advanced.py --calibrate {text} --init {shlex.quote(args.output)}"
          if args.output else
          f"next: keep the model: python train.py --text {text} --output gpt.pth")
    return say_stopped(result, args.output)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", metavar="FILE", required=True, help="UTF-8 text to learn")
    add_training_flags(parser, epochs=1, lr=4e-3)
    parser.add_argument("--val-fraction", type=float, default=0.1,
                        help="end of the text, held out; default: %(default)s")
    parser.add_argument("--sample-chars", type=int, default=300,
                        help="characters to write at the end; default: %(default)s")
    return run_cli(run_train, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
