"""tp report: how good one checkpoint is, how much it has merely memorised, and whether it knows.

A low loss alone does not tell a model that writes from one that recites. So the samples are held
against the training phrases (new phrases, new n-grams, longest stretch copied) and against as many
validation phrases, which it never saw: they show what each measure is for text that is new.
"""

import math
import random
import statistics
import time

import torch

from tp.data import (
    IGNORED,
    count_bytes,
    fingerprint,
    ladder,
    load_split,
    ordered_batches,
    to_rows,
)
from tp.errors import UserError
from tp.files import write_json
from tp.sample import add_arguments, generate_ids, open_run  # noqa: F401 (cli calls the first)
from tp.tables import is_number, number, spell, table, visible
from tp.textstats import (
    calibration,
    copied_spans,
    distinct,
    duplicates,
    earth_mover,
    ngram_novelty,
    novelty,
    quantiles,
    share,
)

MOST_TRAINING = 5000  # training phrases that the training loss is taken from; more add no digit


def main(args):
    run, model, tokenizer, config, state, options = open_run(args)
    print(f"{options['n_samples']} samples - "
          + ("unconditional" if options["prompt"] is None else f"prompt {options['prompt']!r}")
          + "".join(f" - {name} {spell(options[name])}" for name in
                    ("max_new_tokens", "temperature", "top_k", "top_p")), flush=True)
    train, val = load_split(config.data)
    require_same(state, train, val, config.data.path)
    report = {
        "run_id": run.run_id, "checkpoint": args.checkpoint, "step": state["step"],
        "parameters": model.count_parameters(), "sampling": options,
        "losses": measure_losses(model, tokenizer, train, val, config),
        "since_best": since_best(run),
        **measure_samples(draw(model, tokenizer, options), train, val, options["seed"]),
    }
    print_report(report)
    path = report_path(run, args.checkpoint)
    write_json(path, report)
    print(f"wrote {path}")
    print(f"next: tp plot-loss --runs-dir {run.runs_dir} --run-id {run.run_id}")
    return 0


def require_same(state, train, val, path):
    """Raises UserError where the phrases are no longer those that the model was trained on:
    validation phrases could be among them, and neither gap nor novelty would mean a thing."""
    if state.get("data_sha256", fingerprint(train + val)) != fingerprint(train + val):
        raise UserError(f"{path} is not what this run was trained on: no measure against it would "
                        "be true. Put the old file back, or train a new run on this one")


def report_path(run, checkpoint):
    """A name with the time in it; a second report within one second gets a number too."""
    stem, extra = f"report-{checkpoint}-{time.strftime('%Y%m%d-%H%M%S')}", 1
    run.reports.mkdir(exist_ok=True)
    path = run.reports / f"{stem}.json"
    while path.exists():
        extra += 1
        path = run.reports / f"{stem}-{extra}.json"
    return path


# ---- losses and calibration ----------------------------------------------------------------------


@torch.no_grad()
def predictions(model, batches):
    """(nats, confidence, right), each (N,): for all N tokens that count, the negative log
    probability of the token that came, the highest probability, and whether the two are one."""
    nats, confidence, right = [], [], []
    for inputs, targets in batches:  # (B, T)
        log_probs = model(inputs).float().log_softmax(-1)  # (B, T, V)
        counts = targets != IGNORED
        chosen = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        highest, likeliest = log_probs.max(-1)
        nats.append(-chosen[counts])
        confidence.append(highest[counts].exp())
        right.append((likeliest == targets)[counts])
    return [torch.cat(parts).numpy() for parts in (nats, confidence, right)]


def measure_losses(model, tokenizer, train, val, config):
    """The ladder, both losses, their gap, bits per byte, and calibration on validation."""
    T = config.model.block_size
    some = random.Random(config.data.split_seed).sample(train, min(MOST_TRAINING, len(train)))
    train_rows, val_rows = to_rows(train, tokenizer, T), to_rows(val, tokenizer, T)
    measured = {"ladder": ladder(train_rows, val_rows, tokenizer.vocab_size)}
    for name, phrases, rows in (("train", some, to_rows(some, tokenizer, T)),
                                ("val", val, val_rows)):
        nats, confidence, right = predictions(model, ordered_batches(rows))
        total = float(nats.sum(dtype="float64"))
        measured[name] = {"loss": total / len(nats), "tokens": len(nats), "phrases": len(phrases),
                          "bpb": total / (math.log(2) * count_bytes(phrases))}
    measured["gap"] = measured["val"]["loss"] - measured["train"]["loss"]
    measured["calibration"] = calibration(confidence, right)  # of the last, validation
    return measured


def since_best(run):
    """How the two losses have moved from the best step to the last; None if that is the best."""
    rows = [row for row in run.load_metrics()
            if is_number(row.get("val_loss")) and is_number(row.get("train_loss"))]
    if not rows:
        return None
    best, last = min(rows, key=lambda row: row["val_loss"]), rows[-1]
    if best["step"] == last["step"]:
        return None
    return {"best_step": best["step"], "last_step": last["step"],
            "val": last["val_loss"] - best["val_loss"],
            "train": last["train_loss"] - best["train_loss"]}


# ---- samples -------------------------------------------------------------------------------------


def draw(model, tokenizer, options):
    """[{"text", "ended": whether the model ended it before the length limit did}, ...]."""
    rows = generate_ids(model, tokenizer, **options)
    return [{"text": tokenizer.decode(row), "ended": row[-1] == tokenizer.eos_id} for row in rows]


def measure_samples(samples, train, val, seed):
    """Every measure of the samples, and of as many validation phrases beside it."""
    texts = [sample["text"] for sample in samples]
    yardstick = random.Random(seed).sample(val, min(len(texts), len(val)))
    known = {" ".join(phrase.split()) for phrase in train}
    for sample, span in zip(samples, copied_spans(texts, train)):
        sample.update(new=" ".join(sample["text"].split()) not in known, longest_copy=span)
    return {
        "measures": {**measure_texts(texts, train),
                     "ended": share(sum(sample["ended"] for sample in samples), len(samples))},
        "validation_phrases": measure_texts(yardstick, train),
        "lengths_of_training": {"words": quantiles([len(text.split()) for text in train]),
                                "characters": quantiles([len(text) for text in train])},
        "samples": samples,
    }


def measure_texts(texts, train):
    """What a list of texts is like, and how much of it stands in the training phrases."""
    spans = copied_spans(texts, train)
    copied = [span["characters"] / span["of"] for span in spans if span["of"]]
    measured = {f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)}
    measured["new_phrases"] = novelty(texts, train)
    measured.update({f"new_{n}grams": ngram_novelty(texts, train, n) for n in (1, 2, 3)})
    measured.update(
        longest_copy=max(spans, key=lambda span: span["characters"], default=None),
        longest_copy_words=max(spans, key=lambda span: span["words"], default=None),
        median_copied_share=statistics.median(copied) if copied else None,
        duplicates=duplicates(texts),
        empty=share(sum(not text.strip() for text in texts), len(texts)))
    for unit, length in (("words", lambda text: len(text.split())), ("characters", len)):
        mine, theirs = [length(text) for text in texts], [length(text) for text in train]
        measured[f"length_{unit}"] = {**quantiles(mine), "mean": statistics.fmean(mine or [0]),
                                      "distance_to_training": earth_mover(mine, theirs)}
    return measured


# ---- what is printed -----------------------------------------------------------------------------


def print_report(report):
    print()
    print("\n".join(loss_lines(report["losses"], report["since_best"])))
    if report["samples"]:
        print()
        print("\n".join(sample_lines(report)))
        print()
        print("\n".join(length_lines(report)))
    print()
    print("\n".join(calibration_lines(report["losses"])))
    if report["samples"]:
        print("\nthe first samples")
        for sample in report["samples"][:5]:
            kind = "new" if sample["new"] else "a training phrase"
            print(f"  {visible(sample['text'])!s}  [{kind}]" if sample["text"].strip()
                  else "  [empty]")
        print()


def loss_lines(losses, since):
    val = losses["val"]
    per_nat = val["bpb"] / val["loss"]  # the ladder stands on the same tokens and bytes
    rows = [[name, number(nats), number(nats * per_nat), number(val["tokens"])]
            for name, nats in losses["ladder"].items()]
    rows += [[name, number(losses[key]["loss"]), number(losses[key]["bpb"]),
              number(losses[key]["tokens"])]
             for name, key in (("validation", "val"), ("train", "train"))]
    lines = table(["loss", "nats/token", "bits/byte", "tokens"], rows)
    times = math.exp(min(losses["gap"], 50))
    lines.append(f"gap (validation - train) {losses['gap']:+.4f} nats/token: a training token is "
                 f"{times:.2f} times as likely as one of validation")
    if since:
        lines.append(f"from the best step {since['best_step']} to step {since['last_step']}: "
                     f"validation {since['val']:+.4f}, train {since['train']:+.4f}")
    return lines


def cell(measure, interval=True):
    """["0.930", "0.886..0.958", "200"]; a measure without an interval leaves it empty."""
    between = f"{measure['low']:.3f}..{measure['high']:.3f}" if "low" in measure else ""
    value = "-" if measure["share"] is None else f"{measure['share']:.3f}"
    return [value, between, f"{measure['n']:,}"] if interval else value


def sample_lines(report):
    mine, theirs = report["measures"], report["validation_phrases"]
    n = len(report["samples"])
    names = [(f"distinct-{i} (words)", f"distinct_{i}") for i in (1, 2, 3)]
    names += [("new phrases", "new_phrases")]
    names += [(f"new {i}-grams", f"new_{i}grams") for i in (1, 2, 3)]
    names += [("duplicates", "duplicates"), ("empty", "empty")]
    rows = [[name, *cell(mine[key]), cell(theirs[key], interval=False)] for name, key in names]
    rows.append(["ended by themselves", *cell(mine["ended"]), ""])
    copied = [number(part["median_copied_share"], 3) for part in (mine, theirs)]
    rows.append(["longest copy / text, median", copied[0], "", n, copied[1]])
    lines = table(["samples", "share", "95% interval", "n", "validation phrases"], rows)
    longest, words = mine["longest_copy"], mine["longest_copy_words"]
    lines.append(f"longest copy: {longest['characters']} of {longest['of']} characters "
                 f"{visible(longest['copied'])!r}; {words['words']} words "
                 f"{visible(words['copied_words'])!r}")
    if mine["duplicates"]["times"] > 1:
        lines.append(f"most repeated, {mine['duplicates']['times']} times: "
                     f"{visible(mine['duplicates']['most_repeated'])!r}")
    if report["sampling"]["prompt"]:
        lines.append("the prompt is part of every sample: what it adds to copies and repeated "
                     "words is not the model's doing")
    if n < 50:
        lines.append(f"{n} samples tell little: --n-samples 200 narrows the intervals")
    return lines


def length_lines(report):
    """Quantiles of the lengths, and how far they lie from the training phrases'."""
    mine, theirs = report["measures"], report["validation_phrases"]
    training = report["lengths_of_training"]
    rows = []
    for unit in ("words", "characters"):
        for name, values in (("samples", mine[f"length_{unit}"]),
                             ("validation", theirs[f"length_{unit}"]),
                             ("training", training[unit])):
            quarters = [number(values[q]) for q in ("0", "0.1", "0.5", "0.9", "1")]
            rows.append([unit, name, *quarters, number(values.get("distance_to_training"), 2)])
    return table(["length in", "of", "least", "10%", "median", "90%", "most",
                  "distance to training"], rows)


def calibration_lines(losses):
    measured = losses["calibration"]
    rows = [[f"{row['low']:.1f} to {row['high']:.1f}", number(row["n"]),
             number(row["confidence"], 3), number(row["accuracy"], 3),
             f"{row['accuracy_low']:.3f}..{row['accuracy_high']:.3f}"]
            for row in measured["bins"] if row["n"]]
    lines = table(["confidence", "tokens", "mean", "right", "95% interval"], rows)
    return [*lines, f"calibration on validation: ECE {measured['ece']:.4f} (0: right as often as "
            f"it is confident), negative log-likelihood {losses['val']['loss']:.4f} nats/token, "
            f"n {measured['n']:,}"]
