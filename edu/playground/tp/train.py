"""`tp train`: one run from config to checkpoints, and going on with one that was stopped.

Reproducible: every random number comes from config.seed, and the order of the batches from
(seed, epoch). As the number of threads is in the config too, the same config gives the same bits on
one machine; last.pt holds all that a resumed run needs to give them as well.
"""

import contextlib
import math
import platform
import random
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass

import sentencepiece
import torch
from tqdm import tqdm

from tp import data
from tp.config import (
    apply_overrides,
    check,
    config_hash,
    describe_keys,
    flatten,
    load_config,
    to_dict,
)
from tp.errors import UserError
from tp.files import append_row, lock, write_json
from tp.model import Transformer
from tp.optim import lr_factor, make_optimizers, set_lr
from tp.runs import Run
from tp.sample import generate
from tp.tokenizer import load_tokenizer, train_tokenizer

HEADER = ("  step   epoch   train loss     val loss   val bpb         lr   grad norm   tokens/s\n"
          "               nats/token   nats/token      bits                               1/s")


@dataclass
class Progress:
    """How far the run has come. Plain values: it goes into last.pt as a dictionary."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    grad_norm: float | None = None
    reported: int = -1  # the step of the newest row of metrics.jsonl
    train_loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    best_val_bpb: float | None = None
    best_step: int | None = None
    seconds_to_best: float | None = None


class Session:
    """All that one run works with. Built the same way for a new run and for a resumed one."""

    def __init__(self, run, config):
        torch.set_num_threads(config.train.threads)  # not the machine's: sums depend on it
        self.run, self.config, self.progress = run, config, Progress()
        train, val = data.load_split(config.data)
        self.phrases = {"train": len(train), "val": len(val)}
        self.data_sha256 = data.fingerprint(train + val)
        self.tokenizer = (load_tokenizer(run.tokenizer_path) if run.tokenizer_path.exists() else
                          train_tokenizer(train, run.tokenizer_path, config.tokenizer))
        T = config.model.block_size
        self.rows, val_rows = (data.to_rows(part, self.tokenizer, T) for part in (train, val))
        self.ladder = data.ladder(self.rows, val_rows, self.tokenizer.vocab_size)
        self.val_batches = data.ordered_batches(val_rows)
        self.val_bytes = data.count_bytes(val)
        # As many training phrases, always the same: two losses that compare.
        sample = random.Random(config.data.split_seed).sample(train, min(len(val), len(train)))
        self.train_batches = data.ordered_batches(data.to_rows(sample, self.tokenizer, T))
        torch.manual_seed(config.seed)  # for the weights, and from there on for dropout
        try:
            self.model = Transformer(config.model, self.tokenizer.vocab_size)
        except RuntimeError as error:  # torch's word for too little memory
            raise UserError("there is not the memory for this model; make model.n_embd, n_layer or "
                            f"block_size smaller\n  {str(error).splitlines()[0]}") from error
        self.optimizers = make_optimizers(self.model, config.train)
        self.clock, self.tokens_then = time.perf_counter(), 0  # at the newest row

    def tick(self):
        """Seconds since the last tick; they are added to the run's."""
        now = time.perf_counter()
        passed, self.clock = now - self.clock, now
        self.progress.seconds += passed
        return passed

    def state(self):
        """What best_val.pt holds: enough to generate and evaluate."""
        return {"model": self.model.state_dict(), "step": self.progress.step,
                "val_loss": self.progress.val_loss, "config": to_dict(self.config),
                "tokenizer_sha256": self.tokenizer.sha256, "data_sha256": self.data_sha256}

    def save(self):
        """last.pt: best_val.pt's contents and whatever the next step depends on."""
        self.run.save_checkpoint("last", {
            **self.state(), "progress": asdict(self.progress),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": torch.get_rng_state()})

    def restore(self):
        """Go back to where last.pt was saved; a run killed before that begins anew."""
        if self.run.checkpoint_path("last").exists():
            state = self.run.load_checkpoint("last")
            self.require_same(state)
            try:
                self.progress = Progress(**state["progress"])
                self.model.load_state_dict(state["model"])
                for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                    optimizer.load_state_dict(saved)
                torch.set_rng_state(state["rng"])
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"{self.run.checkpoint_path('last')} is damaged: "
                                f"{str(error).splitlines()[0]}") from error
        self.run.keep_rows_until(self.progress.reported)

    def require_same(self, state):
        """Raises UserError if what last.pt was saved with is no longer what lies in the folder."""
        now = {"config": to_dict(self.config), "tokenizer_sha256": self.tokenizer.sha256,
               "data_sha256": self.data_sha256}
        names = {"config": self.run.config_path, "tokenizer_sha256": self.run.tokenizer_path,
                 "data_sha256": self.config.data.path}
        for key, name in names.items():
            if state.get(key) != now[key]:
                raise UserError(f"{name} is not what run {self.run.run_id} was trained with so "
                                "far; going on would mix two runs. Start a new one")

    def write_summary(self, status, **more):
        """summary.json; returns what it holds."""
        p = self.progress
        summary = {
            "run_id": self.run.run_id, "status": status, "best_val_loss": p.best_val_loss,
            "best_step": p.best_step, "final_train_loss": p.train_loss,
            "final_val_loss": p.val_loss, "best_val_bpb": p.best_val_bpb, "steps": p.step,
            "parameters": self.model.count_parameters(), "vocab_size": self.tokenizer.vocab_size,
            "train_phrases": self.phrases["train"], "val_phrases": self.phrases["val"],
            "seconds": round(p.seconds, 2), "seconds_to_best": p.seconds_to_best,
            "ladder": self.ladder, "versions": versions(),
            "config_hash": config_hash(self.config), "data_hash": self.data_sha256[:12],
            "val_bytes": self.val_bytes, "seed": self.config.seed, **more}
        write_json(self.run.summary_path, summary)
        return summary


def versions():
    """What the numbers were made with; another processor may give other last bits all the same."""
    return {"python": platform.python_version(), "torch": torch.__version__,
            "sentencepiece": sentencepiece.__version__}


# ---- one report, one step ------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, batches):
    """(nats in sum, tokens) over all batches, without dropout."""
    was_training = model.training
    model.eval()
    nats = tokens = 0
    for inputs, targets in batches:
        nats += model(inputs, targets, reduction="sum").item()
        tokens += (targets != data.IGNORED).sum().item()
    model.train(was_training)
    return nats, tokens


def report(session):
    """Evaluate, print and append a row, draw samples, save the checkpoints."""
    s, p = session, session.progress
    learning, tokens_learned = s.tick(), p.tokens - s.tokens_then
    nats, tokens = evaluate(s.model, s.train_batches)
    train_loss = require_finite(nats / tokens, "the training loss", s)
    nats, tokens = evaluate(s.model, s.val_batches)
    p.val_loss = require_finite(nats / tokens, "the validation loss", s)
    p.train_loss = train_loss
    # bits per byte = nats / (ln 2 * bytes): comparable between tokenizers, as losses are not
    bpb = nats / (math.log(2) * s.val_bytes)
    s.tick()
    p.reported, s.tokens_then = p.step, p.tokens
    row = {"step": p.step, "epoch": p.step / batches_per_epoch(s), "train_loss": p.train_loss,
           "val_loss": p.val_loss, "val_bpb": bpb, "lr": current_lr(s),
           "grad_norm": p.grad_norm, "tokens": p.tokens, "seconds": round(p.seconds, 3),
           "tokens_per_second": round(tokens_learned / learning) if tokens_learned else None}
    append_row(s.run.metrics_path, row)
    print_row(row)
    draw_samples(s)
    if p.best_val_loss is None or p.val_loss < p.best_val_loss:
        p.best_val_loss, p.best_val_bpb, p.best_step = p.val_loss, bpb, p.step
        p.seconds_to_best = round(p.seconds, 2)
        s.run.save_checkpoint("best_val", s.state())
    s.save()  # last: what it says must already be on disk


def draw_samples(session):
    """A few texts into samples.jsonl, with the same random numbers each time, to compare."""
    options = vars(session.config.sample)
    for text in generate(session.model, session.tokenizer, seed=session.config.seed, **options):
        append_row(session.run.samples_path, {"step": session.progress.step,
                                              "prompt": options["prompt"], "text": text})


def print_row(row):
    grad, speed = row["grad_norm"], row["tokens_per_second"]
    tqdm.write(f"{row['step']:6d} {row['epoch']:7.2f} {row['train_loss']:12.4f} "
               f"{row['val_loss']:12.4f} {row['val_bpb']:9.4f} {row['lr']:10.2e} "
               + (f"{grad:11.3f}" if grad is not None else f"{'-':>11}")
               + (f"{speed:11,d}" if speed is not None else f"{'-':>11}"))
    sys.stdout.flush()


def learn(session, inputs, targets):
    """One update from a batch (B, T)."""
    s, p = session, session.progress
    set_lr(s.optimizers, lr_factor(p.step, s.config.train))
    loss = s.model(inputs, targets)
    require_finite(loss.item(), "the training loss", s)
    for optimizer in s.optimizers:
        optimizer.zero_grad()
    loss.backward()
    longest = s.config.train.grad_clip or math.inf
    norm = torch.nn.utils.clip_grad_norm_(s.model.parameters(), longest).item()
    p.grad_norm = require_finite(norm, "the gradient", s)
    for optimizer in s.optimizers:
        optimizer.step()
    p.step += 1
    p.tokens += int((targets != data.IGNORED).sum())


def require_finite(value, what, session):
    """The value. Raises UserError, with the likely cause, for NaN and infinity."""
    if math.isfinite(value):
        return value
    p, t = session.progress, session.config.train
    kept = (f"best_val.pt of step {p.best_step} (loss {p.best_val_loss:.4f}) is kept"
            if p.best_step is not None else "nothing was learned yet")
    raise UserError(
        f"{what} is {value} at step {p.step}, so the run ends here; {kept}.\n"
        f"  Usual cause: steps too large. The learning rate was {current_lr(session):.2e}, the "
        f"gradient's length before {p.grad_norm}, the norm {session.config.model.norm}.\n"
        f"  Try  --set train.lr={t.lr / 10:g}"
        + (f" --set train.muon_lr={t.muon_lr / 10:g}" if t.optimizer == "muon" else ""))


def current_lr(session):
    """The rate of the next step, for all but Muon's matrices."""
    t = session.config.train
    return t.lr * lr_factor(min(session.progress.step, t.steps - 1), t)


# ---- the loop ------------------------------------------------------------------------------------


def batches_per_epoch(session):
    return math.ceil(len(session.rows) / session.config.train.batch_size)


def batches_from(session, step):
    """(inputs, targets) for step, step + 1, ..., without end."""
    while True:
        epoch, first = divmod(step, batches_per_epoch(session))
        order = data.batches_of_epoch(session.rows, session.config.train.batch_size,
                                      session.config.seed, epoch)
        for chosen in order[first:]:
            yield data.collate([session.rows[i] for i in chosen])
            step += 1


@contextlib.contextmanager
def ctrl_c_waits():
    """Within it Ctrl-C only sets the yielded event, so that no step is cut in two.

    A second one interrupts at once. SIGTERM, which ends a background job, counts as Ctrl-C.
    """
    asked = threading.Event()

    def on_signal(number, frame):
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may have a handler
        return
    before = {number: signal.signal(number, on_signal)
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def out_of_patience(session):
    """Whether train.patience evaluations in a row brought nothing."""
    p, t = session.progress, session.config.train
    return t.patience is not None and (p.reported - p.best_step) / t.eval_every >= t.patience


def loop(session):
    """Evaluate and learn in turns until the end; returns "done" or "stopped"."""
    s, p, t = session, session.progress, session.config.train
    s.model.train()
    s.clock, s.tokens_then = time.perf_counter(), p.tokens
    batches = batches_from(s, p.step)
    with ctrl_c_waits() as asked, tqdm(total=t.steps, initial=p.step, unit="step", leave=False,
                                       disable=None) as bar:
        while True:
            # 1. report and save
            if p.step != p.reported and (p.step % t.eval_every == 0 or p.step == t.steps):
                report(s)
            # 2. enough?
            if p.step == t.steps or out_of_patience(s):
                return "done"
            if asked.is_set():
                s.tick()
                s.save()
                return "stopped"
            # 3. learn
            learn(s, *next(batches))
            bar.update()


# ---- a whole run ---------------------------------------------------------------------------------


def train(config, runs_dir="runs", run_id=None, resume=False):
    """Train, write runs_dir/run_id/, print the progress; returns the summary (see Session).

    resume: go on with run_id; config may then be None, and if given must be the run's own. A run
    that is finished stays as it is.
    Raises UserError for settings that make no sense, data out of reach, an existing run_id, a run
    that another process trains, and a loss that is no longer finite; KeyboardInterrupt, after
    saving, for Ctrl-C.
    """
    if not resume:
        session = begin(config, runs_dir, run_id)
        run = session.run
    else:
        run = reopen(config, runs_dir, run_id)
        summary = run.load_summary() if run.summary_path.exists() else {"status": "killed"}
        if summary.get("status") == "done":
            print(f"run {run_id} is finished: {summary['steps']} steps, best validation loss "
                  f"{summary['best_val_loss']:.4f} at step {summary['best_step']}\n"
                  f"next: tp generate --runs-dir {runs_dir} --run-id {run_id}")
            return summary
    with open(run.config_path) as alone:
        if not lock(alone):
            raise UserError(f"another process is training run {run.run_id}; two would write into "
                            "each other's files")
        if resume:
            session = Session(run, run.load_config())
            session.restore()
        return to_the_end(session)


def to_the_end(session):
    """Train from where the session stands; see train."""
    announce(session)
    session.write_summary("running")
    try:
        status = loop(session)
    except UserError as error:
        session.write_summary("failed", error=str(error))
        raise
    except KeyboardInterrupt:  # the second Ctrl-C; the newest last.pt stands
        session.write_summary("stopped")
        raise
    summary = session.write_summary(status)
    if status == "stopped":
        run = session.run
        print(f"stopped at step {session.progress.step}; go on with\n"
              f"  tp train --runs-dir {run.runs_dir} --resume {run.run_id}", flush=True)
        raise KeyboardInterrupt
    conclude(session)
    return summary


def begin(config, runs_dir, run_id):
    """The Session of a new run; what cannot begin leaves no folder behind."""
    check(config)
    data.load_split(config.data)  # before the folder is made
    run = Run.create(runs_dir, config, run_id)
    try:
        return Session(run, config)
    except UserError:
        run.remove()
        raise


def reopen(config, runs_dir, run_id):
    """The Run to go on with. Raises UserError for other settings and for a run that failed."""
    run = Run.open(runs_dir, run_id)
    own = run.load_config()
    if config is not None and config != own:
        now, then = flatten(config), flatten(own)
        changes = [f"{k}: {then[k]} in the run, {now[k]} now" for k in now if now[k] != then[k]]
        raise UserError(f"run {run_id} was made with other settings, and a run with two is neither:"
                        "\n  " + "\n  ".join(changes) + "\n  Resume it without --config and --set,"
                        " or start a new run")
    if run.summary_path.exists() and run.load_summary().get("status") == "failed":
        raise UserError(f"run {run_id} failed, and would again: {run.load_summary().get('error')}")
    return run


def announce(session):
    """The first lines: what runs, on what, and what counting alone achieves."""
    s, p, threads = session, session.progress, session.config.train.threads
    print(f"tp train - cpu - {threads} thread{'s' * (threads > 1)} - "
          f"{s.model.count_parameters() / 1e6:.2f}M params - seed {s.config.seed}\n"
          f"run {s.run.run_id}: {s.phrases['train']} phrases to train on, {s.phrases['val']} to "
          f"validate with, {s.tokenizer.vocab_size} pieces")
    print("without a network (nats/token): "
          + ", ".join(f"{name} {nats:.3f}" for name, nats in s.ladder.items()))
    if p.step:
        print(f"resumed at step {p.step} of {s.config.train.steps}")
    print(HEADER, flush=True)


def conclude(session):
    """The last lines: where it stands on the ladder, what was written, what to do next."""
    p, run = session.progress, session.run
    steps = [*session.ladder.items(), ("best", p.best_val_loss)]
    print("ladder: " + " > ".join(f"{name} {nats:.3f}" for name, nats in steps)
          + f" nats/token at step {p.best_step}, after {p.seconds_to_best:.0f} s"
          if p.best_val_loss < session.ladder["bigram"] else
          f"best {p.best_val_loss:.3f} is not below the bigram's {session.ladder['bigram']:.3f}: "
          "this model has not learned to use its context")
    for path in (run.config_path, run.metrics_path, run.samples_path,
                 run.checkpoint_path("best_val"), run.checkpoint_path("last"),
                 run.tokenizer_path, run.summary_path):
        print(f"wrote {path}")
    print(f'next: tp generate --runs-dir {run.runs_dir} --run-id {run.run_id} --prompt "a"')


# ---- command line --------------------------------------------------------------------------------


def add_arguments(parser):
    parser.add_argument("--config", metavar="FILE",
                        help="config file, or a run's config.json (default: configs/default.py)")
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE",
                        help="override a setting, e.g. --set model.n_layer=4; repeatable")
    parser.add_argument("--runs-dir", default="runs", metavar="DIR")
    parser.add_argument("--run-id", metavar="ID", help="name of the new run (default: the time)")
    parser.add_argument("--resume", metavar="ID", help="go on with a run that was stopped")
    parser.add_argument("--list-keys", action="store_true", help="print every setting, and end")


def main(args):
    if args.list_keys:
        print(describe_keys())
        return
    resume = args.resume is not None  # --resume "" is a variable left empty, and no new run
    if resume and args.run_id is not None:
        raise UserError("--resume names the run; leave out --run-id")
    config = None
    if args.config is not None or not resume:
        config = load_config("configs/default.py" if args.config is None else args.config)
    elif args.set:
        config = Run.open(args.runs_dir, args.resume).load_config()
    if config is not None:
        config = apply_overrides(config, args.set)
    train(config, args.runs_dir, args.resume if resume else args.run_id, resume)
