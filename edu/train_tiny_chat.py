"""Train the smallest chat model of all, in one file that can be read in one sitting.

Goal:
    See every step of training a language model once: text to numbers, a model that guesses the
    next character, a loss, an update, and a reply written one character at a time.

You will learn:
    - that learning to chat is guessing the next character, over and over
    - what a loss of 2.4 means: how it compares with knowing nothing and with counting pairs
    - why text is held out, and what one attention block adds to a table of pairs

Read beside:
    Nothing, this comes first. 04_block.py is where the same idea grows up.

Run:
    python edu/train_tiny_chat.py
    python edu/train_tiny_chat.py --model transformer --max-new-tokens 40

Expect:
    tiny chat - cpu - float32 - bigram - 1,089 params - seed 1337
      step    train      val
    bigram counts ...
    result: val loss 4.16 -> 2.52 (n=113)
    next: python edu/train_tiny_chat.py --model transformer

Writes:
    nothing
"""
import argparse
import math
import os
import pickle
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

# Shapes: B rows in a batch, T = CONTEXT characters in a row, C = WIDTH, V different characters.
CONTEXT = 64  # characters that a model is shown at a time
WIDTH, HEADS = 64, 4  # of the transformer
LEARNING_RATE = {"bigram": 0.05, "transformer": 0.002}
CHAT = """\
User: hi
Assistant: hello! how are you today?
User: i am fine, thanks
Assistant: good to hear. what shall we talk about?
User: what is your name?
Assistant: i have no name yet. i am a very small model.
User: how small are you?
Assistant: so small that you can read all of me today.
User: what can you do?
Assistant: i guess the next letter, then the next one.
User: is that all?
Assistant: yes. big models do the same, only better.
User: what color is the sky?
Assistant: the sky is blue, and at night it is black.
User: how many legs has a cat?
Assistant: a cat has four legs and one long tail.
User: what do bees make?
Assistant: bees make honey. bears like it too.
User: what is two and three?
Assistant: two and three is five.
User: tell me a story
Assistant: once there was a frog. it sat in the rain and sang.
User: tell me a joke
Assistant: why did the model stop? it ran out of letters!
User: are you alive?
Assistant: no. i am a table of numbers.
User: where do you live?
Assistant: in the memory of your computer.
User: hi again
Assistant: hello again! it is good to see you.
User: good night
Assistant: good night. sleep well!
"""


def give_up(message):
    """End the program because of something that the user can mend."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---- two models ----------------------------------------------------------------------------------
class BigramModel(nn.Module):
    """A table of V x V scores: row = this character, column = the next. It sees nothing else."""

    def __init__(self, V):
        super().__init__()
        self.table = nn.Embedding(V, V)

    def forward(self, x):  # (B, T) character numbers -> (B, T, V) scores, called logits
        return self.table(x)


class TinyTransformer(nn.Module):
    """One block: every character looks back at those before it, then thinks, then guesses."""

    def __init__(self, V):
        super().__init__()
        self.token, self.position = nn.Embedding(V, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.qkv, self.mix = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, V)

    def forward(self, x):  # (B, T) -> (B, T, V)
        B, T = x.shape
        h = self.token(x) + self.position(torch.arange(T))  # (B, T, C): what it is + where it is
        q, k, v = (part.view(B, T, HEADS, -1).transpose(1, 2)  # each (B, HEADS, T, C / HEADS)
                   for part in self.qkv(self.norm1(h)).chunk(3, dim=-1))
        # is_causal: nobody sees a later character, or guessing the next one would be copying it
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.mix(seen.transpose(1, 2).reshape(B, T, WIDTH))
        h = h + self.down(F.relu(self.up(self.norm2(h))))
        return self.head(self.norm3(h))


MODELS = {"bigram": BigramModel, "transformer": TinyTransformer}


# ---- how good is a guess? ------------------------------------------------------------------------
@torch.no_grad()
def mean_loss(model, data):
    """Loss in nats per character, over every character of data (n,) but the first."""
    total = 0.0
    for start in range(0, len(data) - 1, CONTEXT):
        piece = data[start:start + CONTEXT + 1]  # targets are the inputs shifted by one
        total += F.cross_entropy(model(piece[None, :-1])[0], piece[1:], reduction="sum").item()
    return total / (len(data) - 1)


def count_losses(train_data, data, V):
    """(single, pairs): loss on data of guessing by how often a character or pair is in train_data.

    On train_data itself, no bigram can beat the pairs. On other text every count is one higher,
    since a pair that was never seen would cost infinitely much.
    """
    pairs = torch.bincount(train_data[:-1] * V + train_data[1:], minlength=V * V).view(V, V)
    pairs = pairs.double() + (data is not train_data)
    single = pairs.sum(0)  # (V,)
    # loss = mean of -log p,  p(y) = n(y) / n,  p(y after x) = n(x, y) / n(x)
    p_single, p_pairs = single / single.sum(), pairs / pairs.sum(1, keepdim=True)
    return (-p_single[data[1:]].log().mean().item(),
            -p_pairs[data[:-1], data[1:]].log().mean().item())


# ---- training and talking ------------------------------------------------------------------------
def train(model, train_data, val_data, steps, batch_size, lr):
    """Fit model to train_data, printing both losses; returns val_data's loss before training."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    print(f"{'step':>6} {'train':>8} {'val':>8}")
    for step in range(steps + 1):
        if step % math.ceil(steps / 10) == 0 or step == steps:
            on_train, on_val = (mean_loss(model, part[:5000]) for part in (train_data, val_data))
            if step == 0:
                before = mean_loss(model, val_data)
            print(f"{step:>6} {on_train:>8.4f} {on_val:>8.4f}", flush=True)
            if not math.isfinite(on_train):
                give_up(f"the loss is {on_train}: updates overshoot; use less than --lr {lr:g}")
        if step == steps:
            return before
        # 1. windows of text from random places, and the same shifted by one: what to guess
        starts = torch.randint(len(train_data) - CONTEXT, (batch_size, 1))
        windows = train_data[starts + torch.arange(CONTEXT + 1)]  # (B, T + 1)
        # 2. how wrong is the model?  loss = mean of -log p(next character)
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        # 3. which way would each weight make it less wrong?
        optimizer.zero_grad()
        loss.backward()
        # 4. move each weight that way, by less and less
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.step()


@torch.no_grad()
def write_reply(model, ids, length, seed):
    """ids (n,) -> (n + length,): draw a character from the model's odds, append it, repeat."""
    torch.manual_seed(seed)
    for _ in range(length):
        logits = model(ids[None, -CONTEXT:])[0, -1]  # (V,): scores after the last character
        ids = torch.cat((ids, torch.multinomial(logits.softmax(0), 1)))
    return ids


# ---- text and files ------------------------------------------------------------------------------
def read_text(path):
    try:
        return Path(path).read_text("utf-8-sig")
    except (OSError, ValueError) as error:  # a UnicodeDecodeError is a ValueError
        give_up(f"--data {path} cannot be read as UTF-8 text: {error}")


def encode(text, vocabulary):
    """Each character becomes its place in the vocabulary: (n,)."""
    unknown = sorted(set(text) - set(vocabulary))
    if unknown or not text:
        give_up(f"--prompt {text!r}: the model has never seen {unknown or 'an empty prompt'}; "
                f"it knows {vocabulary!r}")
    places = {character: i for i, character in enumerate(vocabulary)}
    return torch.tensor([places[character] for character in text])


def check_save_path(path):
    """Complain before the training rather than after it."""
    if Path(path).exists():
        load_chat_model(path, "--save")  # gives up unless an older model: spare all other files
    folder = Path(path).absolute().parent
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        give_up(f"--save {path}: {folder} is not a folder that can be written to")


def save_chat_model(path, **contents):
    """Write a whole new file first, then give it its name: never half a model."""
    torch.save(contents, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load_chat_model(path, flag="--load"):
    """(kind, model, vocabulary). weights_only: a stranger's file can run no code on loading."""
    try:
        saved = dict(torch.load(path, weights_only=True))
        kind, vocabulary = saved["kind"], "".join(saved["vocabulary"])
        model = MODELS[kind](len(vocabulary))
        model.load_state_dict(saved["weights"])
        return kind, model, vocabulary
    except (OSError, EOFError, pickle.UnpicklingError, RuntimeError, LookupError, TypeError,
            ValueError, AttributeError) as error:
        give_up(f"{flag} {path}: not a model that --save wrote, or damaged: {str(error)[:99]}")


# ---- the command line ----------------------------------------------------------------------------
def read_flags(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", metavar="FILE", help="UTF-8 text to learn; default: the chat in this script")
    add("--model", choices=MODELS, default="bigram", help="default: bigram")
    add("--steps", type=int, default=200, help="updates; default: %(default)s")
    add("--lr", type=float, help=f"learning rate; default: {LEARNING_RATE}")
    add("--batch-size", type=int, default=32, help="windows per update; default: %(default)s")
    add("--val-fraction", type=float, default=0.1, help="end of the text, held out; default: 0.1")
    add("--prompt", default=r"User: hi\nAssistant:", help=r"default: %(default)s (\n: new line)")
    add("--max-new-tokens", type=int, default=120, help="characters to write; default: 120")
    add("--seed", type=int, default=1337, help="default: 1337")
    add("--save", metavar="FILE", help="write the trained model here")
    add("--load", metavar="FILE", help="reply with a saved model; nothing is trained or saved")
    args = parser.parse_args(argv)
    for flag in ("data", "save", "load"):
        if getattr(args, flag) == "":  # as from an unset variable of the shell
            give_up(f"--{flag} is empty: name a file")
    for flag in ("data", "model", "steps", "lr", "batch_size", "val_fraction", "save"):
        if args.load and getattr(args, flag) != parser.get_default(flag):
            give_up(f"--load does not train, so --{flag.replace('_', '-')} cannot go with it")
    args.prompt = args.prompt.replace(r"\n", "\n")
    args.lr = LEARNING_RATE[args.model] if args.lr is None else args.lr
    for flag, least in (("steps", 1), ("batch_size", 1), ("max_new_tokens", 1), ("seed", 0),
                        ("lr", 1e-9), ("val_fraction", 1e-9)):
        if not least <= getattr(args, flag) < 2 ** 31:  # not-a-number is neither
            give_up(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be {least} or more")
    return args


def learn(args):
    """Text to numbers, split, train, compare, save: (model, vocabulary, line with the result)."""
    text = read_text(args.data) if args.data else CHAT
    vocabulary = "".join(sorted(set(text)))
    V, cut = len(vocabulary), int(len(text) * (1 - args.val_fraction))
    if cut <= CONTEXT or len(text) - cut < 2:
        give_up(f"the text has {len(text)} characters, {cut} of them to train on: too few; "
                f"{CONTEXT + 1} to train on and 2 to check with are the least")
    encode(args.prompt, vocabulary)  # complain now, not after the training
    if args.save:
        check_save_path(args.save)
    data = encode(text, vocabulary)
    train_data, val_data = data[:cut], data[cut:]  # the model never sees the end of the text
    model = MODELS[args.model](V)
    size = sum(weight.numel() for weight in model.parameters())
    print(f"tiny chat - cpu - float32 - {args.model} - {size:,} params - seed {args.seed}")
    print(f"{len(text):,} characters, {V} different ones; {len(val_data):,} of them held out")
    before = train(model, train_data, val_data, args.steps, args.batch_size, args.lr)
    after = mean_loss(model, train_data), mean_loss(model, val_data)
    single, pairs = zip(*(count_losses(train_data, part, V) for part in (train_data, val_data)))
    print(f"\n{'nats per character':<22} {'train':>8} {'val':>8}")
    for name, (on_train, on_val) in {"knows nothing: ln V": (math.log(V), math.log(V)),
                                     "single counts": single, "bigram counts": pairs,
                                     f"this {args.model}": after}.items():
        print(f"{name:<22} {on_train:>8.4f} {on_val:>8.4f}")
    if args.save:
        save_chat_model(args.save, kind=args.model, vocabulary=vocabulary,
                        weights=model.state_dict())
    return model, vocabulary, (
        f"result: val loss {before:.2f} -> {after[1]:.2f} (n={len(val_data) - 1})")


def run(args):
    torch.set_num_threads(1)  # matrices this small: two threads only wait for each other
    torch.manual_seed(args.seed)
    if args.load:
        kind, model, vocabulary = load_chat_model(args.load)
        print(f"tiny chat - cpu - float32 - {kind} of {args.load} - seed {args.seed}")
    else:
        model, vocabulary, result = learn(args)
    ids = write_reply(model, encode(args.prompt, vocabulary), args.max_new_tokens, args.seed)
    print("\n" + "".join(vocabulary[i] for i in ids) + "\n")
    if args.save:
        print(f"wrote {args.save} (the same reply again: --load {args.save} --seed {args.seed})")
    if not args.load:
        print(result)
    print("next: python edu/" + ("train_tiny_chat.py --model transformer" if not args.load and
                                 args.model == "bigram" else "00_tiny_world.py"))
    return 0


def main(argv: list[str] | None = None) -> int:
    try:
        code = run(read_flags(argv))
        sys.stdout.flush()  # here, where a reader that has gone can still be met
        return code
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has enough, as `head` has after its lines
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
