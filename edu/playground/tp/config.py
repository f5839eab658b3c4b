"""What a run is made of: typed settings, the file they are read from, and what makes no sense.

A config file looks like Python and is never executed. `ast.parse` turns it into a syntax tree, and
only assignments of literals are taken from that: a call, an import or a name is refused with its
line number. So a config from a stranger can be wrong, but it cannot do anything.

    model = {"n_layer": 2, "positional_encoding": "rope"}     # a section at a time, or
    model.n_layer = 2                                         # one key, as --set names it

Every key exists as a field below, with its type, its range and its meaning.
"""

import ast
import difflib
import hashlib
import json
import math
import os
import re
import types
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path

from tp.errors import UserError

# ---- the settings --------------------------------------------------------------------------------


def option(default, meaning, *, choices=None, low=None, high=None, above=None):
    """A field with its limits: low <= value <= high, or value > above, or one of choices."""
    limits = {"choices": choices, "low": low, "high": high, "above": above}
    return field(default=default, metadata={"meaning": meaning, **limits})


@dataclass(frozen=True)
class DataConfig:
    path: str = option("phrases.txt", "text file, one phrase per line")
    val_fraction: float = option(0.1, "share of the phrases kept for validation", above=0, high=0.5)
    split_seed: int = option(0, "decides which ones; not `seed`, so that seeds compare", low=0)


@dataclass(frozen=True)
class TokenizerConfig:
    kind: str = option("unigram", "sentencepiece model", choices=("unigram", "bpe"))
    vocab_size: int = option(2048, "pieces, 256 bytes and 4 specials among them", low=261)


@dataclass(frozen=True)
class ModelConfig:
    n_layer: int = option(3, "blocks", low=1, high=64)
    n_embd: int = option(96, "C, the width of the residual stream", low=1, high=16384)
    block_size: int = option(32, "longest context, in tokens", low=2, high=65536)
    dropout: float = option(0.1, "on the embeddings and on what a block adds", low=0, high=0.9)

    attention_enabled: bool = option(True, "false leaves out every attention layer")
    n_head: int = option(4, "H, query heads", low=1)
    n_kv_head: int | None = option(None, "key/value heads (GQA); none: as many as n_head", low=1)
    qk_norm: bool = option(False, "RMS-normalise queries and keys, after RoPE")
    window: int | None = option(None, "a token sees this many, itself among them; none: all", low=1)

    mlp_enabled: bool = option(True, "false leaves out every feed-forward layer")
    mlp_kind: str = option("gelu", "its nonlinearity", choices=("gelu", "relu2", "swiglu"))
    mlp_ratio: float = option(4.0, "hidden width / C; swiglu takes 2/3 of it, as it has three "
                              "matrices where the others have two", above=0, high=64)

    norm: str = option("layernorm", "", choices=("layernorm", "rmsnorm", "none"))
    norm_position: str = option("pre", "before each layer, or after the sum",
                                choices=("pre", "post"))
    residual: bool = option(True, "x + layer(x); false: layer(x)")
    positional_encoding: str = option(
        "learned", "", choices=("learned", "sinusoidal", "rope", "alibi", "none"))
    tied_embeddings: bool = option(True, "one matrix reads tokens and writes logits")
    logit_softcap: float | None = option(None, "logits become s*tanh(logits/s)", above=0)
    init: str = option("scaled", "normal; scaled: what feeds the residual stream is divided by "
                       "sqrt(2 n_layer); zero_projection: it begins at zero",
                       choices=("normal", "scaled", "zero_projection"))
    init_std: float = option(0.05, "standard deviation of the initial weights", above=0, high=1)


@dataclass(frozen=True)
class TrainConfig:
    steps: int = option(400, "updates", low=1)
    batch_size: int = option(64, "phrases in a batch", low=1)
    optimizer: str = option("muon", "muon: for the matrices of the blocks, adamw for the rest",
                            choices=("adamw", "muon", "sgd"))
    lr: float = option(5e-3, "peak learning rate", above=0)
    muon_lr: float = option(0.03, "that of Muon's matrices", above=0)
    weight_decay: float = option(0.1, "on matrices only; decoupled, but for sgd", low=0)
    momentum: float = option(0.9, "beta 1 of adamw; momentum of muon and sgd", low=0, high=0.999)
    beta2: float = option(0.99, "of adamw", above=0, high=0.9999)
    grad_clip: float | None = option(1.0, "longest gradient; none: no clipping", above=0)
    schedule: str = option("cosine", "wsd: warm up, stay, go down in a line at the end",
                           choices=("constant", "cosine", "linear", "wsd"))
    warmup_steps: int = option(20, "the rate climbs in a line to its peak", low=0)
    decay_fraction: float = option(0.3, "share of the steps that wsd goes down in", above=0, high=1)
    min_lr_fraction: float = option(0.1, "where the rate ends, as a share of the peak",
                                    low=0, high=1)
    eval_every: int = option(40, "steps from one evaluation (and checkpoint) to the next", low=1)
    patience: int | None = option(None, "stop after this many evaluations without a better "
                                  "validation loss; none: never", low=1)
    threads: int = option(1, "cores used; more would help larger models only, and the number "
                          "changes the last bits", low=1, high=1024)


@dataclass(frozen=True)
class SampleConfig:
    prompt: str | None = option(None, "what the samples begin with; none: unconditional")
    n_samples: int = option(3, "how many at each evaluation", low=0)
    max_new_tokens: int = option(24, "length limit of a sample", low=1)
    temperature: float = option(0.8, "0 takes the likeliest token", low=0)
    top_k: int | None = option(None, "only the k likeliest tokens; none: all", low=1)
    top_p: float = option(0.95, "only the likeliest tokens that make up this much", above=0, high=1)


@dataclass(frozen=True)
class RunConfig:
    seed: int = option(1337, "of weights, batch order, dropout and samples", low=0, high=2**31 - 1)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)


# ---- as dictionaries -----------------------------------------------------------------------------


def to_dict(config):
    """{"seed": 1337, "model": {"n_layer": 3, ...}, ...}, as config.json holds it."""
    return asdict(config)


def flatten(config):
    """{"seed": 1337, "model.n_layer": 3, ...}: the keys as --set takes them."""
    flat = {}
    for name, value in to_dict(config).items():
        inner = value.items() if isinstance(value, dict) else ()
        flat.update({f"{name}.{key}": v for key, v in inner} or {name: value})
    return flat


def from_dict(nested, source="config"):
    """The RunConfig of a nested dictionary; what it leaves out keeps its default.

    Raises UserError for an unknown key and for a value of the wrong type, naming `source`.
    """
    if not isinstance(nested, dict):
        raise UserError(f"{source}: this should be a table of settings, not {nested!r}")
    flat = {}
    for name, value in nested.items():
        # An empty table sets nothing, but its name must be one that there is.
        is_section = isinstance(value, dict) and (value or name in sections())
        flat.update({f"{name}.{k}": v for k, v in value.items()} if is_section else {name: value})
    return with_values(RunConfig(), {key: (value, source) for key, value in flat.items()})


def config_hash(config, with_seed=False):
    """12 hex digits that name the settings; runs that differ in the seed only share theirs."""
    flat = {k: v for k, v in flatten(config).items() if with_seed or k != "seed"}
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:12]


# ---- one value -----------------------------------------------------------------------------------


def specification():
    """{"model.n_layer": Field, ...}: every key there is, in the order of the classes above."""
    keys = {}
    for outer in fields(RunConfig):
        if is_dataclass(outer.type):
            keys.update({f"{outer.name}.{inner.name}": inner for inner in fields(outer.type)})
        else:
            keys[outer.name] = outer
    return keys


def sections():
    """["data", "tokenizer", ...]"""
    return [f.name for f in fields(RunConfig) if is_dataclass(f.type)]


def find_field(key, where):
    """The Field called key. Raises UserError with the nearest key there is."""
    known = specification()
    if key in known:
        return known[key]
    if key in sections():
        inside = [name for name in known if name.startswith(key + ".")]
        raise UserError(f"{where}: {key} is a whole section; set one of its keys:\n  "
                        + "\n  ".join(inside))
    # "n_layers" should find model.n_layer: compare with and without the section.
    last = {name.split(".")[-1]: name for name in reversed(known)}
    near = (difflib.get_close_matches(key, [*known, *sections()], 1, 0.7)
            or [last[n] for n in difflib.get_close_matches(key.split(".")[-1], last, 1, 0.6)]
            or difflib.get_close_matches(key, known, 1, 0))
    raise UserError(f"{where}: there is no setting {key!r}. The nearest is {near[0]}\n"
                    "  every key with its meaning: tp train --list-keys")


def wanted(spec):
    """In words: what a field takes, e.g. "a whole number from 1 to 64"."""
    kinds, limits = allowed_types(spec), spec.metadata
    words = {bool: "true or false", int: "a whole number", float: "a number",
             str: "text in UTF-8"}
    text = next(words[kind] for kind in kinds if kind in words)
    if limits["choices"]:
        text = "one of " + ", ".join(limits["choices"])
    low, high, above = limits["low"], limits["high"], limits["above"]
    if low is not None and high is not None:
        text += f" from {low} to {high}"
    else:
        bounds = ((above, "above"), (low, "of at least"), (high, "of at most"))
        said = [f"{word} {bound}" for bound, word in bounds if bound is not None]
        text = " ".join((text, " and ".join(said))).rstrip()
    return text + (", or none" if type(None) in kinds else "")


def allowed_types(spec):
    """(int, NoneType) for int | None, (int,) for int."""
    return typing.get_args(spec.type) if isinstance(spec.type, types.UnionType) else (spec.type,)


def check_value(key, value, where):
    """The value, as its field takes it (2 becomes 2.0 for a float). Raises UserError."""
    spec = find_field(key, where)
    kinds, limits = allowed_types(spec), spec.metadata
    if type(value) is int and abs(value) >= 2**63:
        value = math.inf if value > 0 else -math.inf  # more than torch, or a float, can count to
    if float in kinds and type(value) is int:
        value = float(value)
    low, high, above = limits["low"], limits["high"], limits["above"]
    ok = type(value) in kinds  # exactly: True is an int to isinstance
    if ok and isinstance(value, (int, float)):
        ok = (math.isfinite(value) and (low is None or value >= low)
              and (high is None or value <= high) and (above is None or value > above))
    if ok and isinstance(value, str):
        ok = "\0" not in value and not re.search("[\ud800-\udfff]", value)  # no file could hold it
    if ok and limits["choices"]:
        ok = value in limits["choices"]
    if not ok:
        near = difflib.get_close_matches(str(value), limits["choices"] or (), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{where}: {key} is {value!r}, but must be {wanted(spec)}{hint}")
    return value


def parse_value(key, text, where):
    """The value that `text` from a command line spells, of the type that `key` has."""
    kinds, word = allowed_types(find_field(key, where)), text.strip()
    if type(None) in kinds and word.lower() in ("none", "null"):
        return None
    if bool in kinds:
        return {"true": True, "false": False}.get(word.lower(), text)
    for kind in (int, float):
        try:
            if kind in kinds:
                return kind(word)
        except ValueError:
            return text  # check_value says what is wanted
    return text


def with_values(config, values):
    """config with {"model.n_layer": (4, where it was said)} put in. Raises UserError."""
    outer, sections = {}, {}
    for key, (value, where) in values.items():
        value = check_value(key, value, where)
        section, _, name = key.rpartition(".")
        (sections.setdefault(section, {}) if section else outer)[name] = value
    for section, changed in sections.items():
        outer[section] = replace(getattr(config, section), **changed)
    return replace(config, **outer)


# ---- files and command lines ---------------------------------------------------------------------


def load_config(path):
    """The RunConfig of a config file, or of a run's config.json (name ends in .json).

    data.path is taken from the working directory; where it is not there, from the config's own
    folder or the one above it. Raises UserError with the line at fault; executes nothing.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"cannot read the config {path}: {reason}\n"
                        "  tp train --config configs/default.py") from error
    config = read_json(text, path) if path.suffix == ".json" else read_assignments(text, path)
    return beside(config, path)


def read_json(text, path):
    try:
        return from_dict(json.loads(text), path)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def beside(config, path):
    """config with data.path pointing to where the file is, seen from the working directory."""
    for place in (Path(), path.parent, path.parent / ".."):
        if (place / config.data.path).is_file():
            found = Path(os.path.normpath(place / config.data.path)).as_posix()
            return replace(config, data=replace(config.data, path=found))
    return config


def read_assignments(text, path):
    """The RunConfig of the literal assignments in text."""
    try:
        tree = ast.parse(text, str(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or "?"
        raise UserError(f"{path}, line {line}: {getattr(error, 'msg', error)}") from error
    values = {}
    for statement in tree.body:
        for key, value, line in read_statement(statement, path):
            if key in values:
                raise UserError(f"{path}, line {line}: {key} was already set, by "
                                f"{values[key][1].split(', ')[-1]}. Keep one of the two")
            values[key] = (value, f"{path}, line {line}")
    return with_values(RunConfig(), values)


def read_statement(statement, path):
    """(key, value, line) for each setting that one statement of the file makes."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return []  # a docstring
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        raise refusal(statement, path)
    return list(leaves(spelled(statement.targets[0]), statement.value, path))


def leaves(key, node, path):
    """The same for one value: a dictionary is a section, all else a literal."""
    if not isinstance(node, ast.Dict) or (not node.keys and key not in sections()):
        try:
            yield key, ast.literal_eval(node), node.lineno
        except (ValueError, TypeError, MemoryError, RecursionError) as error:
            raise refusal(node, path) from error
        return
    for name, inner in zip(node.keys, node.values):
        if not (isinstance(name, ast.Constant) and isinstance(name.value, str)):
            raise refusal(name or inner, path)
        yield from leaves(f"{key}.{name.value}", inner, path)


def spelled(node):
    """The source of a node; "..." for one so deep that Python itself cannot write it."""
    try:
        return ast.unparse(node)
    except RecursionError:
        return "..."


def refusal(node, path):
    source = spelled(node).splitlines()[0][:60]
    return UserError(
        f"{path}, line {node.lineno}: `{source}` is not an assignment of a plain value.\n"
        '  A config is data and nothing in it is executed: only lines like  model.n_layer = 4  or'
        '  model = {"n_layer": 4}  count, with numbers, text, True, False and None')


def apply_overrides(config, overrides, flag="--set"):
    """config with ["model.mlp_enabled=false", ...] put in; the last of two for one key wins."""
    values = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        key, where = key.strip(), f"{flag} {text}"
        if not equals:
            raise UserError(f"{where}: write it as --set section.key=value, "
                            "for example --set model.n_layer=4")
        values[key] = (parse_value(key, value, where), where)
    return with_values(config, values)


def describe_keys():
    """Every key, its default, its meaning and what it takes, one to a line."""
    words = {None: "none", True: "true", False: "false"}
    lines = []
    for key, spec in specification().items():
        default = words.get(spec.default) if isinstance(spec.default, (bool, type(None))) else None
        meaning = ": ".join(filter(None, (spec.metadata["meaning"], wanted(spec))))
        lines.append(f"{key:27} {default or spec.default!s:11} {meaning}")
    return "\n".join(lines)


# ---- what makes no sense -------------------------------------------------------------------------

# (is it so?, why it cannot be and what to do). `{m.x}` and `{t.x}` stand for model.x and train.x.
RULES = (
    (lambda m, t: not m.attention_enabled and not m.mlp_enabled,
     "attention and MLP are both off (model.attention_enabled, model.mlp_enabled): the blocks "
     "would be empty, and what is left is a table of bigrams. Switch one of them on"),
    (lambda m, t: not m.attention_enabled and m.positional_encoding in ("rope", "alibi"),
     "model.positional_encoding={m.positional_encoding} acts inside attention, and "
     "model.attention_enabled is false. Use learned, sinusoidal or none"),
    (lambda m, t: not m.attention_enabled and m.n_kv_head is not None,
     "model.n_kv_head={m.n_kv_head} counts heads of attention, and model.attention_enabled is "
     "false. Use --set model.n_kv_head=none"),
    (lambda m, t: not m.attention_enabled and m.window is not None,
     "model.window={m.window} limits what attention sees, and model.attention_enabled is false. "
     "Use --set model.window=none"),
    (lambda m, t: not m.attention_enabled and m.qk_norm,
     "model.qk_norm normalises queries and keys, and with model.attention_enabled=false there are "
     "none. Use --set model.qk_norm=false"),
    (lambda m, t: not m.mlp_enabled and m.mlp_kind != "gelu",
     "model.mlp_kind={m.mlp_kind} says what an MLP is like, and with model.mlp_enabled=false there "
     "is none. Use --set model.mlp_kind=gelu, the default"),
    (lambda m, t: m.attention_enabled and m.n_embd % m.n_head,
     "model.n_embd={m.n_embd} cannot be shared out among model.n_head={m.n_head} heads: it must be "
     "a multiple of it"),
    (lambda m, t: m.n_kv_head is not None and m.n_head % m.n_kv_head,
     "model.n_head={m.n_head} queries cannot share model.n_kv_head={m.n_kv_head} keys evenly: "
     "n_head must be a multiple of n_kv_head"),
    (lambda m, t: m.positional_encoding == "rope" and (m.n_embd // m.n_head) % 2,
     "rope turns pairs of numbers, and a head of n_embd/n_head = {m.n_embd}/{m.n_head} has an odd "
     "count of them. Choose an even head size"),
    (lambda m, t: m.positional_encoding == "sinusoidal" and m.n_embd % 2,
     "a sinusoidal encoding is made of pairs (sine, cosine), and model.n_embd={m.n_embd} is odd"),
    (lambda m, t: m.window is not None and m.window >= m.block_size,
     "model.window={m.window} hides nothing: no context is longer than "
     "model.block_size={m.block_size}. Use a smaller window, or none"),
    (lambda m, t: m.norm == "none" and m.norm_position == "post",
     "model.norm_position=post says where the norm stands, and model.norm is none. Use "
     "--set model.norm_position=pre, or a norm"),
    (lambda m, t: m.init == "zero_projection" and not m.residual,
     "model.init=zero_projection makes every layer begin as zero, and with model.residual=false "
     "nothing passes beside it: no gradient would ever arrive. Use --set model.init=normal"),
    (lambda m, t: (m.mlp_enabled and m.mlp_kind in ("relu2", "swiglu") and m.norm == "none"
                   and not m.residual),
     "model.mlp_kind={m.mlp_kind} multiplies small numbers with each other; with neither a norm "
     "nor a residual (model.norm=none, model.residual=false) what is left after a few blocks is "
     "zero, and no gradient arrives. Use --set model.mlp_kind=gelu, or a norm"),
    (lambda m, t: t.warmup_steps >= t.steps,
     "train.warmup_steps={t.warmup_steps} leaves nothing of train.steps={t.steps}. Use fewer, for "
     "example --set train.warmup_steps=0"),
    (lambda m, t: t.schedule == "wsd" and t.warmup_steps + t.decay_fraction * t.steps > t.steps,
     "wsd: train.warmup_steps={t.warmup_steps} and the decay ({t.decay_fraction} of the steps) "
     "overlap in train.steps={t.steps}. Make one of them shorter"),
)


def check(config):
    """Raises UserError, with the reason, for a combination of settings that makes no sense."""
    for is_wrong, reason in RULES:
        if is_wrong(config.model, config.train):
            raise UserError(reason.format(m=config.model, t=config.train))
