"""What can be done with a trained GPT and a number that says what is good, or how sure it may be.

Five modes, one at a time:

    python advanced.py --offline-data examples/reward_data.txt --epochs 3 --output gpt_offline.pth
        Offline RL: lines of text|reward; the better a line, the more it counts.
    python advanced.py --decode-beta 0,0.5,1,2 --wanted g --init gpt.pth
        Reward-augmented decoding: the weights stay, the choice of each character is tilted. Less of
        a character: --decode-beta=-1,0 (with =, or the minus is taken for a flag).
    python advanced.py --self-align --domain-terms bee,honey --init gpt.pth --output gpt_bees.pth
        Self-alignment: the model writes, its texts are scored, it learns from the better ones.
    python advanced.py --calibrate examples/data.txt --init gpt.pth
        Calibration: one temperature that makes its confidence mean what it says.

Sources: advantage-weighted regression (Peng et al. 2019, arXiv:1910.00177); temperature scaling and
expected calibration error (Guo et al. 2017, arXiv:1706.04599).
"""

import argparse
import math
import re
import sys
from pathlib import Path

import torch
from model import (
    UserError,
    load_gpt,
    read_settings,
    save_gpt,
    save_settings,
    settings_path,
    write_whole,
)
from train import (
    IGNORE,
    ROW_UPDATES,
    add_training_flags,
    check_folder,
    check_output,
    copy_of,
    decode,
    digest,
    encode,
    fit,
    headline,
    lines_to_rows,
    model_for,
    pick_device,
    read_text,
    row_losses,
    run_cli,
    say_ladder,
    say_stopped,
    say_wrote,
    seen_now,
    seen_texts,
)

# ---- offline RL: text|reward ---------------------------------------------------------------------


def parse_rewards(text, path):
    """Lines of text|reward as (texts, rewards (N,)); the last | of a line separates.

    Empty lines are skipped. Raises UserError that names every bad line (the first five of them).
    """
    texts, rewards, wrong = [], [], []
    for number, line in enumerate(text.split("\n"), 1):
        said, bar, reward = line.rpartition("|")
        if not line.strip():
            continue
        complaint = "no | in it" if not bar else "no text before the |" if not said.strip() else ""
        try:
            value = float(reward)
        except ValueError:
            value = math.nan
        if not complaint and not abs(value) < 1e100:  # larger ones cannot be squared
            complaint = f"the reward {reward.strip()!r} is not a number below 1e100"
        if complaint:
            wrong.append(f"  line {number}: {complaint}: {line.strip()[:60]!r}")
        texts.append(said.strip())
        rewards.append(value)
    if wrong:
        more = f"\n  and {len(wrong) - 5:,} more" if len(wrong) > 5 else ""
        raise UserError(f"--offline-data {path}: {len(wrong):,} of {len(texts):,} lines cannot be "
                        "used; each must be text|reward, such as thank you|1\n" +
                        "\n".join(wrong[:5]) + more)
    return texts, torch.tensor(rewards, dtype=torch.float64)


def advantage_weights(rewards, temperature):
    """rewards (N,) -> weights (N,) >= 0 with mean 1: how much each text counts.

    Only differences count: the same amount on top of every reward changes nothing. So a negative
    reward does not push a text away; it counts less than the others, and next to nothing where it
    lies several temperatures below the mean. (Pushing away has no lower bound: a loss that may
    become minus infinity would wreck the model.) temperature: in units of the reward.
    """
    # w_i = N softmax(A / temperature)_i,  A_i = r_i - mean(r)
    advantages = rewards - rewards.mean()
    return len(rewards) * torch.softmax(advantages / temperature, 0)


def effective_size(weights):
    """How many equally weighted texts would be as informative: (sum w)^2 / sum w^2 (Kish)."""
    return (weights.sum() ** 2 / (weights**2).sum()).item()


def hold_out(texts, rewards, share, generator):
    """Boolean (N,): which texts are held out, a share of the high rewards and of the others.

    A text that occurs twice is on one side only.
    """
    chosen = set()
    for part in high_and_low(texts, rewards):
        different = sorted(set(part))
        order = torch.randperm(len(different), generator=generator).tolist()
        chosen |= {different[i] for i in order[: round(share * len(different) + 0.4)]}
    return torch.tensor([text in chosen for text in texts])


def nats_per_character(model, lines, stoi):
    """Mean -log p per character over all lines together, line breaks included."""
    inputs, targets, _ = lines_to_rows(lines, stoi, model.block_size)
    return (row_losses(model, inputs, targets).sum() / (targets != IGNORE).sum()).item()


def high_and_low(texts, rewards):
    """The texts with a reward above the mean, and the others."""
    mean = max(rewards.mean(), rewards.min())  # of equal ones it may be less, by rounding
    return ([t for t, r in zip(texts, rewards) if r > mean],
            [t for t, r in zip(texts, rewards) if r <= mean])


def reward_temperature(rewards, given):
    """--reward-temperature, or half of the rewards' standard deviation: any unit will do."""
    if rewards.min() == rewards.max():  # by rounding their deviation need not be 0
        return given or 1.0
    return given or rewards.std(correction=0).item() / 2


def train_weighted(model, texts, weights, held_out_lines, stoi, args):
    """fit() on weighted lines, measured on held-out lines of high reward.

    No best moment is picked: two runs that are to be compared must have had the same updates.
    """
    inputs, targets, line = lines_to_rows(texts, stoi, model.block_size)
    rows = (inputs, targets, weights.float()[line])
    val = lines_to_rows(held_out_lines, stoi, model.block_size)[:2]
    result = fit(model, lambda generator: rows, val, epochs=args.epochs,
                 batch_size=args.batch_size, lr=args.lr, seed=args.seed, keep_best=False,
                 updates=ROW_UPDATES)
    return result, (inputs, targets), val


def split_rewarded(texts, rewards, args):
    """((texts, rewards) to train on, held-out (high, low)). Raises UserError."""
    out = hold_out(texts, rewards, 0.2, torch.Generator().manual_seed(args.seed))
    kept = [text for text, is_out in zip(texts, out) if not is_out]
    high, low = high_and_low([t for t, is_out in zip(texts, out) if is_out], rewards[out])
    if not kept or not low or not high and len(set(rewards.tolist())) > 1:
        raise UserError(f"--offline-data {args.offline_data}: {len(texts)} lines are too few to "
                        "hold some out with high and some with low rewards; ten different ones are "
                        "the least")
    return (kept, rewards[~out]), (high or low, low)


def run_offline(args):
    # 1. lines and what they are worth
    source = read_text(args.offline_data, "--offline-data")
    texts, rewards = parse_rewards(source, args.offline_data)
    (kept, kept_rewards), (high, low) = split_rewarded(texts, rewards, args)
    temperature = reward_temperature(kept_rewards, args.reward_temperature)
    weights = advantage_weights(kept_rewards, temperature)
    model, stoi, itos = model_for("".join(texts), args)
    device = pick_device()
    headline("offline RL", model.to(device), device, args.seed)
    say_weights(texts, kept, kept_rewards, weights, temperature)
    before = [nats_per_character(model, lines, stoi) for lines in (high, low)]
    untrained = copy_of(model)

    # 2. learn from each as much as it is worth
    result, train, val = train_weighted(model, kept, weights, high, stoi, args)
    after = [nats_per_character(model, lines, stoi) for lines in (high, low)]
    say_ladder(train, val, len(itos), result["after"])

    # 3. what has become likelier?
    rows = {"before": before, "after": after}
    if args.control and not result["stopped"]:
        rows["unweighted"] = run_control(model, untrained, kept, high, low, stoi, args)
    say_likelier(rows, len(high), len(low))
    return finish(model, itos, result, args, seen_now(args, source),
                  val_loss=round(result["after"], 6))


def run_control(model, untrained, kept, high, low, stoi, args):
    """The same training with every line counting the same: [nats on high, nats on low].

    The model is as before afterwards: the weighted one is what the user asked for and gets.
    """
    weighted = copy_of(model)
    model.load_state_dict(untrained)
    print("\nthe same once more, with every line counting the same")
    result, *_ = train_weighted(model, kept, torch.ones(len(kept)), high, stoi, args)
    losses = [nats_per_character(model, lines, stoi) for lines in (high, low)]
    model.load_state_dict(weighted)
    if result["stopped"]:
        print("the control was stopped by Ctrl-C: its numbers are those of a shorter training")
    return losses


def say_weights(texts, kept, rewards, weights, temperature):
    print(f"{len(texts)} lines, {len(texts) - len(kept)} of them held out (val: those of high "
          f"reward); rewards {rewards.min():g} to {rewards.max():g}, mean {rewards.mean():.3f}")
    size = effective_size(weights)
    print(f"weights exp((reward - mean) / {temperature:.3g}), mean 1: {weights.min():.2f} to "
          f"{weights.max():.2f}; as informative as {size:.0f} of the {len(kept)} lines")
    if weights.max() - weights.min() < 1e-9:
        print("note: all weights are the same, so nothing is preferred: this is plain training")
    elif size < 0.1 * len(kept):
        print("note: a few lines take nearly all of the weight; a larger --reward-temperature "
              "spreads it")


def say_likelier(rows, n_high, n_low):
    print(f"\nheld-out lines, log-likelihood in nats per character (high reward n={n_high}, "
          f"others n={n_low})")
    print("             high reward   others   high reward ahead by")
    for name, (high, low) in rows.items():
        print(f"{name:<12} {-high:11.3f} {-low:8.3f} {low - high:+13.3f}")
    (high, low), (now_high, now_low) = rows["before"], rows["after"]
    print(f"result: high-reward text ahead of the rest {low - high:+.3f} -> "
          f"{now_low - now_high:+.3f} nats per character (n={n_high + n_low})")


def finish(model, itos, result, args, trained_on, **about):
    """Write the model if asked to, and say what comes next. The exit code."""
    if args.output:
        save_gpt(args.output, model, "".join(itos), trained_on=trained_on, **about)
        say_wrote(args.output)
        print(f"next: python advanced.py --decode-beta 0,0.5,1,2 --wanted g --init {args.output}")
    else:
        print("nothing was written, for want of --output")
    return say_stopped(result, args.output)


# ---- reward-augmented decoding -------------------------------------------------------------------


def char_reward_fn(chars, stoi):
    """reward_fn for GPT.generate_reward_augmented: 1 for each of chars, 0 for all others.

    Raises UserError for a character that the model does not know.
    """
    unknown = sorted(set(chars) - set(stoi))
    if unknown:
        raise UserError(f"the model has never seen {''.join(unknown)!r}, so it cannot write it; it "
                        f"knows {''.join(stoi)!r}")
    reward = torch.zeros(len(stoi))
    reward[[stoi[c] for c in chars]] = 1.0
    return lambda idx: reward  # (V,), whatever the text so far


def run_decode(args):
    betas = numbers(args.decode_beta, "--decode-beta")
    if not args.wanted:
        raise UserError("--decode-beta needs the characters that are wanted, such as --wanted g")
    model, stoi, itos = load_gpt(require_init(args))
    reward_fn = char_reward_fn(args.wanted, stoi)
    device = pick_device()
    headline("decoding", model.to(device), device, args.seed)
    print(f"q(c) ~ p(c) exp(beta r(c)), r(c) = 1 for each of {args.wanted!r}, else 0")
    print(f"{'beta':>6} {'wanted, %':>10} {'model nats/char':>16}   end of a sample")
    shares, n = [], args.samples * args.sample_chars
    for beta in betas:
        torch.manual_seed(args.seed)
        start = encode("\n", stoi)[None].repeat(args.samples, 1).to(device)
        ids = model.generate_reward_augmented(start, args.sample_chars, reward_fn, beta).cpu()
        text = [decode(row[1:], itos) for row in ids]
        shares.append(100 * sum(c in set(args.wanted) for t in text for c in t) / n)
        # what the tilt costs: how unlikely the model itself finds the text
        loss = row_losses(model, *in_context(ids, model.block_size))
        shown = " ".join(text[0].split())[-44:]  # the end: all begin from the same random numbers
        print(f"{beta:6g} {shares[-1]:10.2f} {loss.mean():16.3f}   {shown}")
    print(f"result: wanted characters {shares[0]:.2f} -> {shares[-1]:.2f} % "
          f"(beta {betas[0]:g} -> {betas[-1]:g}, n={n:,} each)")
    print(f"next: python advanced.py --self-align --domain-terms bee,honey --init {args.init}")


def in_context(ids, block_size):
    """inputs, targets of sampled ids (B, n): the first block_size of each."""
    return ids[:, :-1][:, :block_size], ids[:, 1:][:, :block_size]


def numbers(text, flag):
    """"0,0.5" -> [0.0, 0.5]. Raises UserError."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(math.isfinite(value) for value in values):
        raise UserError(f"{flag} {text}: must be finite numbers between commas, such as 0,0.5,1,2")
    return values


def require_init(args):
    if not args.init:
        raise UserError("this mode needs a trained model: --init gpt.pth (make one: python "
                        "train.py --text examples/data.txt --epochs 5 --output gpt.pth)")
    return args.init


# ---- self-alignment ------------------------------------------------------------------------------


def term_reward(text, terms):
    """How many of the terms occur in text, as whole words, upper or lower case.

    Each counts once: were every occurrence paid, the model would learn to say one word for ever.
    """
    return sum(re.search(rf"(?<!\w){re.escape(t)}(?!\w)", text, re.I) is not None for t in terms)


def write_texts(model, stoi, itos, args):
    """--samples texts of the model's own, each from a line break on, whole lines where it can."""
    device = model.wte.weight.device
    start = encode("\n", stoi)[None].repeat(args.samples, 1).to(device)
    ids = model.generate(start, min(args.sample_chars, model.block_size)).cpu()
    return [decode(row[1:], itos) for row in ids]


def measure_texts(texts, terms):
    """(share of texts with a term in %, terms per text, different lines as a share)."""
    rewards = [term_reward(text, terms) for text in texts]
    lines = [line for text in texts for line in text.split("\n")[:-1]] or texts
    return (100 * sum(r > 0 for r in rewards) / len(texts), sum(rewards) / len(texts),
            len(set(lines)) / len(lines))


def text_rows(texts, stoi):
    """inputs, targets (N, T) of texts that begin after a line break and stop anywhere."""
    ids = torch.stack([encode("\n" + text, stoi) for text in texts])
    return ids[:, :-1], ids[:, 1:]


def run_self_align(args):
    terms = [term.strip() for term in (args.domain_terms or "").split(",") if term.strip()]
    if not terms:
        raise UserError("--self-align needs words to be rewarded: --domain-terms bee,honey")
    model, stoi, itos = load_gpt(require_init(args))
    unknown = sorted(set("".join(terms)) - set(stoi) - {c.swapcase() for c in stoi})
    if unknown:
        raise UserError(f"--domain-terms {args.domain_terms}: the model has no {''.join(unknown)!r}"
                        ", so it can never write these words; choose others")
    device = pick_device()
    headline("self-alignment", model.to(device), device, args.seed)
    print(f"reward: how many of {', '.join(terms)} a text of "
          f"{min(args.sample_chars, model.block_size)} characters has")
    print(f"{'round':>5} {'texts with one, %':>18} {'terms per text':>15} {'different lines':>16} "
          f"{'nats/char of the first model':>29}")
    torch.manual_seed(args.seed)
    first = load_gpt(args.init)[0].to(device)
    shares, stopped = [], False
    try:
        for number in range(args.rounds + 1):
            # 1. write  2. score
            texts = write_texts(model, stoi, itos, args)
            shares.append(say_round(number, texts, terms, first, stoi))
            if number == args.rounds:
                break
            # 3. learn from each as much as it is worth
            stopped = learn_from_own(model, texts, terms, stoi, args, args.seed + number)
            if stopped:
                break
    except KeyboardInterrupt:  # while it writes
        stopped = True
        if not shares:
            raise
    print("a sample\n" + max(texts[:8], key=lambda t: term_reward(t, terms)).strip() + "\n")
    print(f"result: texts with a wanted term {shares[0]:.1f} -> {shares[-1]:.1f} % "
          f"(n={args.samples} each)")
    return finish(model, itos, {"stopped": stopped}, args, seen_texts(args.init))


def say_round(number, texts, terms, first, stoi):
    """Print a row of the table; the share of texts with a term, in %."""
    share, per_text, different = measure_texts(texts, terms)
    cost = row_losses(first, *text_rows(texts, stoi)).mean()  # how strange the first model finds it
    print(f"{number:5} {share:18.1f} {per_text:15.2f} {different:16.2f} {cost:29.3f}", flush=True)
    return share


def learn_from_own(model, texts, terms, stoi, args, seed):
    """One round on texts, each weighted by its reward; whether Ctrl-C stopped it.

    Raises UserError where no text has a reward.
    """
    rewards = torch.tensor([term_reward(text, terms) for text in texts], dtype=torch.float64)
    if rewards.max() == 0:
        raise UserError(f"none of {len(texts)} texts has any of {', '.join(terms)}: there is "
                        "nothing to prefer. Use words of the training text, or more --samples")
    weights = advantage_weights(rewards, reward_temperature(rewards, args.reward_temperature))
    rows = text_rows(texts, stoi)
    weighted = (*rows, weights.float())
    return fit(model, lambda generator: weighted, rows, epochs=1, batch_size=16, lr=args.lr / 4,
               seed=seed, show=False, keep_best=False, updates=20)["stopped"]


# ---- calibration ---------------------------------------------------------------------------------


def calibration_error(confidence, correct, bins=10):
    """(ECE, table): how far confidence (n,) is from the share that is correct (n,), 0 to 1.

    table: (mean confidence, share correct, count) for each bin that is not empty.
    """
    # ECE = sum_b n_b / n |share correct_b - mean confidence_b|, bins of equal width
    where = (confidence * bins).long().clamp(max=bins - 1)
    table = [(confidence[where == b].mean().item(), correct[where == b].double().mean().item(),
              int((where == b).sum())) for b in range(bins) if (where == b).any()]
    return sum(n * abs(c - right) for c, right, n in table) / len(confidence), table


def scores_at(logits, targets, temperature):
    """{"nll", "ece", "table"} of logits (n, V) / temperature, targets (n,)."""
    log_p = (logits / temperature).log_softmax(-1)
    confidence, guess = log_p.max(-1)
    ece, table = calibration_error(confidence.exp(), guess == targets)
    nll = -log_p.gather(1, targets[:, None]).mean().item()
    return {"nll": nll, "ece": ece, "table": table}


def fit_temperature(logits, targets):
    """The T > 0 that makes logits (n, V) / T likeliest for targets (n,): one number, by NLL.

    The NLL is convex in 1/T, so there is one minimum between 1/20 and 20; golden-section search in
    log T closes in on it, and needs no gradient and no step size.
    """
    ratio = (math.sqrt(5) - 1) / 2
    low, high = math.log(1 / 20), math.log(20)

    def nll(log_t):
        return -(logits / math.exp(log_t)).log_softmax(-1).gather(1, targets[:, None]).mean().item()

    while high - low > 1e-4:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if nll(a) < nll(b) else (a, high)
    return math.exp((low + high) / 2)


@torch.no_grad()
def logits_of(model, ids):
    """(logits (n, V), targets (n,), window (n,)) over ids (m,), in float64 on the CPU.

    Windows overlap by half and only the second half of each is taken, so that every guess rests on
    at least half a context. window[i] says which window guess i comes from.
    """
    half = max(1, model.block_size // 2)
    parts, device = [], model.wte.weight.device
    for number, start in enumerate(range(0, len(ids) - 1, half)):
        x = ids[max(0, start - half) : min(start + half, len(ids) - 1)]
        new = min(start + half, len(ids) - 1) - start
        logits = model(x[None].to(device))[0, -new:].cpu().double()
        parts.append((logits, ids[start + 1 : start + 1 + new], torch.full((new,), number)))
    return tuple(torch.cat(part) for part in zip(*parts))


def unseen_part(text, seen, path):
    """What of the text the model was not trained on: its end, if it is a training text.

    seen: see seen_texts(). Raises UserError for a text that was trained on as a whole.
    """
    trained = [one.get("characters") for one in seen if one.get("sha256") == digest(text)]
    if not trained:
        print(f"{path} is no file that the model was trained on: all of it is used")
        return text
    if None in trained:
        raise UserError(f"--calibrate {path}: the model was trained on all of it, and looks surer "
                        "there than it is anywhere else; use another text")
    unseen = text[max(trained) :]
    print(f"{path} is what the model was trained on: only its held-out end is used, "
          f"{len(unseen):,} characters")
    return unseen


MOST_LOGITS = 10_000_000  # guesses x vocabulary, 8 bytes each and several copies of them
MARK = "personal_gpt calibration"  # an older picture of ours may be replaced, no other file


def draw_reliability(path, before, after, temperature):
    """A PNG: share correct against confidence, before and after, and how many guesses each has."""
    import matplotlib

    matplotlib.use("Agg")  # a file, no window
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(8, 4.4), sharey=True, layout="constrained")
    largest = max(n for scores in (before, after) for *_, n in scores["table"])
    named = (("before, T = 1", before), (f"after, T = {temperature:.2f}", after))
    for panel, (name, scores) in zip(panels, named):
        confidence, correct, counts = zip(*scores["table"])
        panel.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="confidence = share correct")
        panel.plot(confidence, correct, color="#1f6fb4", zorder=2)
        panel.scatter(confidence, correct, [20 + 200 * n / largest for n in counts],
                      color="#1f6fb4", zorder=3, label="guesses (area: how many)")
        panel.set(title=f"{name}: ECE {scores['ece']:.3f}", xlabel="confidence of the guess",
                  xlim=(0, 1.03), ylim=(0, 1.03))
    panels[0].set_ylabel("share of guesses that are correct")
    panels[0].legend(loc="upper left", frameon=False, fontsize=8, markerscale=0.5)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120,
                                                  metadata={"Title": MARK}))
    plt.close(figure)


def check_plot(path):
    """Raises UserError where the picture would take the place of something else."""
    check_folder("--plot", path)
    if path.is_dir() or path.exists() and MARK.encode() not in path.read_bytes()[:1000]:
        raise UserError(f"--plot {path} exists and is no picture of this program; delete it or "
                        "choose another name: --plot other.png")


def run_calibrate(args):
    # 1. text that the model has not seen
    model, stoi, itos = load_gpt(require_init(args))
    settings = read_settings(args.init)
    picture = Path(args.plot or f"{Path(args.init).with_suffix('')}_reliability.png")
    check_plot(picture)
    text = read_text(args.calibrate, "--calibrate")
    device = pick_device()
    headline("calibration", model.to(device), device, args.seed)
    text = unseen_part(text, seen_texts(args.init), args.calibrate)
    known = "".join(c for c in text if c in stoi)
    if len(known) < len(text):
        print(f"left out: {len(text) - len(known):,} characters that the model does not know")
    if len(known) < 200:
        raise UserError(f"--calibrate {args.calibrate}: {len(known)} characters that the model has "
                        "not seen are too few to fit on one half and measure on the other; 200 are "
                        "the least, thousands are better")

    most = max(200, MOST_LOGITS // len(itos))
    if len(known) > most:
        print(f"its first {most:,} characters are used: more would hardly change one number")
        known = known[:most]

    # 2. T on every other window, measured on those between
    logits, targets, window = logits_of(model, encode(known, stoi))
    fitting, measuring = window % 2 == 0, window % 2 == 1
    temperature = fit_temperature(logits[fitting], targets[fitting])
    before = scores_at(logits[measuring], targets[measuring], 1.0)
    after = scores_at(logits[measuring], targets[measuring], temperature)

    # 3. report, and keep
    n = int(measuring.sum())
    print(f"temperature {temperature:.3f}, fitted on {int(fitting.sum()):,} guesses; measured on "
          f"{n:,} others")
    print(f"{'':<8} {'NLL, nats':>10} {'ECE':>7}")
    for name, scores in (("before", before), ("after", after)):
        print(f"{name:<8} {scores['nll']:10.4f} {scores['ece']:7.4f}")
    if after["ece"] >= before["ece"]:
        print("note: the ECE did not fall. The model was about as sure as it may be already, and "
              f"with {n:,} guesses such small differences are chance")
    draw_reliability(picture, before, after, temperature)
    save_settings(args.init, {**settings, "calibration_temperature": temperature})
    print(f"wrote {settings_path(args.init)} (calibration_temperature), {picture}")
    print(f"result: ECE {before['ece']:.4f} -> {after['ece']:.4f} (n={n:,})")
    print("next: python explore.py --data examples/data.csv --output gpt_knowledge.pth")


# ---- the command line ----------------------------------------------------------------------------


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="\n".join(
        __doc__.splitlines()[2:]), formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--offline-data", metavar="FILE", help="lines of text|reward to learn from")
    mode.add_argument("--decode-beta", metavar="LIST", help="strengths to compare, such as 0,0.5,1")
    mode.add_argument("--self-align", action="store_true", help="learn from own, scored texts")
    mode.add_argument("--calibrate", metavar="FILE", help="text to fit a temperature on")
    add_training_flags(parser, epochs=3, lr=1e-3)
    add = parser.add_argument
    add("--reward-temperature", type=float, help="how much a better reward counts: the smaller, "
        "the more; default: half of the rewards' standard deviation")
    add("--control", action="store_true", help="--offline-data: also train without weights")
    add("--wanted", metavar="CHARS", help="--decode-beta: the characters that are rewarded")
    add("--domain-terms", metavar="LIST", help="--self-align: words that are rewarded")
    add("--rounds", type=int, default=4, help="--self-align; default: %(default)s")
    add("--samples", type=int, default=128, help="texts to write each time; default: %(default)s")
    add("--sample-chars", type=int, default=100, help="length of each; default: %(default)s")
    add("--plot", metavar="FILE", help="--calibrate: picture; default: <model>_reliability.png")
    return parser


def run_advanced(args):
    if args.reward_temperature is not None and not 0 < args.reward_temperature < math.inf:
        raise UserError(f"--reward-temperature {args.reward_temperature}: must be more than 0 and "
                        "finite")
    if args.output and (args.decode_beta is not None or args.calibrate is not None):
        raise UserError(f"--output {args.output}: this mode changes no weights; leave the flag out")
    check_output(args.output, (args.offline_data,))
    if args.offline_data is not None:
        return run_offline(args)
    if args.decode_beta is not None:
        return run_decode(args)
    return run_self_align(args) if args.self_align else run_calibrate(args)


def main(argv=None):
    return run_cli(run_advanced, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
