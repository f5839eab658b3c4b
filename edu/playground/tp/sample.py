"""Drawing text from a model: temperature, top-k, top-p, many samples at a time."""

import re

import torch

from tp.errors import UserError
from tp.runs import CHECKPOINTS, Run
from tp.tables import visible


def keep_top_k(logits, k):
    """logits (B, V) with all but the k highest of each row at -inf."""
    lowest = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < lowest, -torch.inf)


def keep_top_p(logits, p):
    """logits (B, V) with all outside the nucleus at -inf: the fewest tokens that make up p.

    A token stays when those above it have less than p in sum; the likeliest always stays.
    Source: Holtzman et al. 2020, section 3.1.
    """
    probs, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)  # (B, V)
    above = probs.cumsum(-1) - probs  # what the likelier ones make up
    drop = torch.zeros_like(above, dtype=torch.bool).scatter(
        -1, order, (above >= p) & (above > 0))
    return logits.masked_fill(drop, -torch.inf)


def pick(logits, temperature, top_k, top_p, generator):
    """One id per row of logits (B, V), as (B, 1). Temperature first, then top-k, then top-p."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    # From the highest down, in float64: no temperature, be it 1e-46, makes inf - inf of them.
    highest = logits.max(-1, keepdim=True).values
    logits = ((logits - highest).double() / temperature).float()
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p < 1:
        logits = keep_top_p(logits, top_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


@torch.no_grad()
def generate_ids(model, tokenizer, prompt=None, n_samples=1, max_new_tokens=24, temperature=0.8,
                 top_k=None, top_p=1.0, seed=1337):
    """n_samples id lists [BOS, prompt, new tokens], the last one EOS where the text has ended.

    All rows are decoded together, and leave the batch when they end. A text longer than
    block_size goes on with the last block_size tokens in sight. The same seed gives the same ids.
    Each new token costs a pass over the whole text, as nothing is cached. Raises UserError.
    """
    check_sampling(n_samples, max_new_tokens, temperature, top_k, top_p, seed)
    start = [tokenizer.bos_id, *tokenizer.encode(prompt or "")]
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    ids = torch.tensor([start] * n_samples, dtype=torch.long).view(n_samples, len(start))
    rows, done = torch.arange(n_samples), [start] * n_samples  # rows: which sample ids[i] is
    for _ in range(max_new_tokens if n_samples else 0):
        features = model.features(ids[:, -model.config.block_size :])
        logits = model.head(features[:, -1])  # (B, V)
        if not logits.isfinite().all():
            raise UserError("the model's logits are not finite: its training had gone wrong when "
                            "this checkpoint was saved. Take another:  --checkpoint best_val")
        logits[:, : tokenizer.eos_id] = -torch.inf  # pad, unk and bos are no text
        ids = torch.cat((ids, pick(logits, temperature, top_k, top_p, generator)), dim=1)
        going = ids[:, -1] != tokenizer.eos_id
        for i in (~going).nonzero().flatten().tolist():
            done[rows[i]] = ids[i].tolist()
        ids, rows = ids[going], rows[going]
        if not len(rows):
            break
    for i, row in zip(rows.tolist(), ids.tolist()):
        done[i] = row
    model.train(was_training)
    return done


def generate(model, tokenizer, prompt=None, **options):
    """The texts of generate_ids, which takes the same arguments, each with its prompt."""
    return [tokenizer.decode(row) for row in generate_ids(model, tokenizer, prompt, **options)]


def check_sampling(n_samples, max_new_tokens, temperature, top_k, top_p, seed):
    """Raises UserError for a value outside its range."""
    faults = ((n_samples < 0, "--n-samples", n_samples, "at least 0"),
              (max_new_tokens < 1, "--max-new-tokens", max_new_tokens, "at least 1"),
              (not 0 <= temperature < float("inf"), "--temperature", temperature,
               "0 (the likeliest token always) or above"),
              (top_k is not None and top_k < 1, "--top-k", top_k, "at least 1, or 0 for all"),
              (not 0 < top_p <= 1, "--top-p", top_p, "above 0 and at most 1"),
              (not 0 <= seed < 2**63, "--seed", seed, "at least 0 and below 2^63"))
    for is_wrong, flag, value, range_ in faults:
        if is_wrong:
            raise UserError(f"{flag} {value}: it must be {range_}")


# ---- command line --------------------------------------------------------------------------------


def add_sampling_arguments(parser):
    """The flags that every command has that samples; left out, the run's config.json says it."""
    how = parser.add_argument_group("sampling (left out: as the run's config.json says)")
    prompt = how.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="what the samples begin with")
    prompt.add_argument("--unconditional", action="store_true", help="begin with nothing")
    how.add_argument("--max-new-tokens", type=int, metavar="N")
    how.add_argument("--temperature", type=float, metavar="T", help="0: the likeliest token")
    how.add_argument("--top-p", type=float, metavar="P", help="1: all tokens")
    how.add_argument("--top-k", type=int, metavar="K", help="0: all tokens")
    how.add_argument("--n-samples", type=int, metavar="N")
    how.add_argument("--seed", type=int, metavar="N")


def sampling_options(args, config):
    """The keyword arguments for generate: the flags, and for those left out the RunConfig."""
    saved = config.sample
    options = {"prompt": None if args.unconditional else
               args.prompt if args.prompt is not None else saved.prompt,
               "seed": config.seed if args.seed is None else args.seed}
    for name in ("n_samples", "max_new_tokens", "temperature", "top_k", "top_p"):
        given = getattr(args, name)
        options[name] = getattr(saved, name) if given is None else given
    options["top_k"] = options["top_k"] or None
    if "\0" in (options["prompt"] or "") or re.search("[\ud800-\udfff]", options["prompt"] or ""):
        raise UserError(f"--prompt {options['prompt']!r} is not text in UTF-8")
    return options


def add_arguments(parser):
    parser.add_argument("--runs-dir", default="runs", metavar="DIR")
    parser.add_argument("--run-id", required=True, metavar="ID")
    parser.add_argument("--checkpoint", default="best_val", choices=CHECKPOINTS)
    add_sampling_arguments(parser)


def open_run(args):
    """What a command that samples from one run begins with: its headline, and
    (run, model, tokenizer, config, state, sampling options). Raises UserError."""
    run = Run.open(args.runs_dir, args.run_id)
    model, tokenizer, config, state = run.load_model(args.checkpoint)
    torch.set_num_threads(config.train.threads)  # to the bit, whatever the machine
    options = sampling_options(args, config)
    check_sampling(**{k: v for k, v in options.items() if k != "prompt"})
    print(f"tp {args.command} - cpu - {model.count_parameters() / 1e6:.2f}M params - "
          f"{args.checkpoint} of {run.run_id}, step {state['step']} - seed {options['seed']}")
    return run, model, tokenizer, config, state, options


def main(args):
    """`tp generate`."""
    _, model, tokenizer, _, _, options = open_run(args)
    for text in generate(model, tokenizer, **options):
        print(visible(text))  # each on a line, whatever bytes the model has put together
