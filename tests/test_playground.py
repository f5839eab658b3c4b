"""edu/playground: config, tokenizer, data, model, optimizers, sampling, and `tp train|generate`.

Oracles: GPT-2 and Llama of `transformers`, Bloom's ALiBi slopes, torch's own Muon, the sampling
filters of `transformers`, and numbers worked out by hand.
"""

import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import EDU, ROOT, run_process, wait_for

PLAYGROUND = EDU / "playground"
sys.path.insert(0, str(PLAYGROUND))

from tp import cli, config, data, model, optim, runs, sample, tokenizer, train  # noqa: E402
from tp.errors import UserError  # noqa: E402

# The smallest run that still has all its parts; the seed's commands work on it as on the real one.
TINY = """
seed = 7
tokenizer = {"vocab_size": 320}
model = {"n_layer": 2, "n_embd": 24, "block_size": 16, "n_head": 3}
train = {"steps": 6, "batch_size": 16, "warmup_steps": 1, "eval_every": 2}
sample = {"n_samples": 2, "max_new_tokens": 5, "top_k": 50}
"""


def make_phrases(count=120, seed=1):
    """Phrases of a tiny grammar, in which a word depends on the one two before it."""
    rng = random.Random(seed)
    nouns = {"red": "apple", "old": "house", "loud": "drum", "wet": "dog"}
    verbs = ["holds", "sees", "finds", "wants"]
    lines = []
    for _ in range(count):
        adjective, other = rng.choice(list(nouns)), rng.choice(list(nouns))
        lines.append(f"the {adjective} very {nouns[adjective]} {rng.choice(verbs)} "
                     f"{rng.randint(2, 9)} {other} very {nouns[other]}s")
    return lines


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder laid out as edu/playground is, and the working directory."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "default.py").write_text(TINY, "utf-8")
    (tmp_path / "phrases.txt").write_text("\n".join(make_phrases()) + "\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tiny(*overrides):
    """The config of `place`, with --set overrides."""
    return config.apply_overrides(config.load_config("configs/default.py"), overrides)


def small_model(*overrides, vocab_size=41, seed=0):
    """A Transformer of a few thousand parameters, in eval mode."""
    base = ["model.n_layer=2", "model.n_embd=24", "model.n_head=3", "model.block_size=13",
            "model.dropout=0"]
    made = config.apply_overrides(config.RunConfig(), [*base, *overrides])
    config.check(made)
    torch.manual_seed(seed)
    return model.Transformer(made.model, vocab_size).eval()


def tp_process(line, cwd, **options):
    """Run a `tp ...` command line as a process: the installed script, or the module."""
    script = Path(sys.executable).with_name("tp")
    start = [script] if script.exists() else [sys.executable, "-m", "tp"]
    env = {"PYTHONPATH": PLAYGROUND, **options.pop("env", {})}
    return run_process([*start, *shlex.split(line)[1:]], cwd=cwd, env=env, **options)


def without_times(rows):
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")}
            for row in rows]


def results(run):
    """All that must be equal between two equal runs: metrics, samples, final weights as bytes."""
    weights = run.load_checkpoint("last")["model"]
    return (without_times(run.load_metrics()), run.load_samples(),
            {name: tensor.numpy().tobytes() for name, tensor in weights.items()})


# ---- the config is data --------------------------------------------------------------------------


@pytest.mark.parametrize("line", [
    "seed = open('ran', 'w')",
    "import os; os.mkdir('ran')",
    "model = {'n_layer': __import__('os').mkdir('ran')}",
    "model = {**open('ran', 'w')}",
    "model.n_layer = [open('ran', 'w') for _ in '1']",
    "model[open('ran', 'w')] = 3",
    "def f(): pass",
    "seed = 2 ** 3",
    "seed = other",
    "seed: int = 3",
    "seed = model.n_layer = 3",
    "open('ran', 'w')",
    "f\"{open('ran', 'w')}\"",
])
def test_a_config_with_anything_but_plain_values_is_refused_with_its_line_and_nothing_ran(
        line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.py").write_text(f'"""A docstring."""\n\n{line}\n', "utf-8")
    with pytest.raises(UserError, match="line 3"):
        config.load_config("c.py")
    assert os.listdir() == ["c.py"]


def test_a_section_and_single_keys_say_the_same():
    one = 'model = {"n_layer": 5, "window": 6, "qk_norm": True}\ntrain = {"lr": 2}\nseed = 3\n'
    two = ("seed = 3\ntrain.lr = 2.0\nmodel.n_layer = 5\nmodel.window = 6  # six\n"
           "model.qk_norm = True\n")
    first, second = (config.read_assignments(text, "c.py") for text in (one, two))
    assert first == second
    assert (first.model.n_layer, first.model.window, first.seed) == (5, 6, 3)
    assert first.train.lr == 2.0 and type(first.train.lr) is float
    assert config.from_dict(json.loads(json.dumps(config.to_dict(first)))) == first


def test_a_key_that_is_set_twice_is_refused():
    with pytest.raises(UserError, match="line 2: model.n_layer was already set, by line 1"):
        config.read_assignments('model = {"n_layer": 5}\nmodel.n_layer = 6\n', "c.py")


def test_the_default_config_spells_out_every_key_at_its_default():
    path = PLAYGROUND / "configs" / "default.py"
    loaded = config.load_config(path)
    assert replace(loaded, data=config.DataConfig()) == config.RunConfig()
    written = set(re.findall(r'^ *"?(\w+)"?(?: =|:) ', path.read_text("utf-8"), re.M))
    assert {key.split(".")[-1] for key in config.flatten(loaded)} <= written


@pytest.mark.parametrize("key, nearest", [
    ("model.n_layers", "model.n_layer"), ("n_head", "model.n_head"),
    ("modle.n_embd", "model.n_embd"), ("train.lr_", "train.lr"),
    ("model.positional_encodin", "model.positional_encoding"),
    ("mlp_enable", "model.mlp_enabled"), ("tokeniser.vocab_size", "tokenizer.vocab_size"),
    ("sead", "seed"), ("modle", "model"),
])
def test_a_mistyped_key_is_refused_with_the_nearest_valid_one(key, nearest):
    with pytest.raises(UserError, match=rf"no setting '{key}'. The nearest is {nearest}\n"):
        config.apply_overrides(config.RunConfig(), [f"{key}=1"])
    with pytest.raises(UserError, match=nearest):
        config.from_dict({key.split(".")[0]: {key.split(".")[-1]: 1}} if "." in key else {key: 1})
    for nothing in ("{}", "{'x': 1}"):  # also where nothing is set in it
        with pytest.raises(UserError, match="no setting"):
            config.read_assignments(f"{key.split('.')[0]}s = {nothing}", "c.py")
    with pytest.raises(UserError, match="no setting"):
        config.from_dict({key.split(".")[0] + "s": {}})


@pytest.mark.parametrize("override, wanted", [
    ("model.n_layer=2.5", "model.n_layer is '2.5', but must be a whole number from 1 to 64"),
    ("model.n_layer=0", "is 0, but must be a whole number from 1 to 64"),
    ("model.n_layer=none", "is 'none', but must be"),
    ("model.mlp_enabled=yes", "is 'yes', but must be true or false"),
    ("model.mlp_enabled=1", "is '1', but must be true or false"),
    ("train.lr=fast", "is 'fast', but must be a number above 0"),
    ("train.lr=nan", "is nan, but must be a number above 0"),
    ("train.lr=-1e-3", "is -0.001, but must be a number above 0"),
    ("model.norm=layernrom", "one of layernorm, rmsnorm, none; did you mean layernorm?"),
    ("model.window=-1", "a whole number of at least 1, or none"),
    ("sample.top_p=1.5", "a number above 0 and of at most 1"),
    ("model.n_layer=" + "9" * 400, "is inf, but must be a whole number from 1 to 64"),
    ("train.lr=-" + "9" * 400, "is -inf, but must be a number above 0"),
    ("data.split_seed=" + "9" * 30, "is inf, but must be a whole number of at least 0"),
    ("model.n_embd=999999999999", "a whole number from 1 to 16384"),
    ("sample.prompt=\udcff", "must be text in UTF-8, or none"),
    ("data.path=a\0b", "must be text in UTF-8"),
    ("model=4", "a whole section"),
    ("model.n_layer", "write it as --set section.key=value"),
])
def test_a_value_that_does_not_fit_is_refused_with_what_is_wanted(override, wanted):
    with pytest.raises(UserError, match=re.escape(wanted)):
        config.apply_overrides(config.RunConfig(), [override])


def test_overrides_take_the_type_of_their_key():
    made = config.apply_overrides(config.RunConfig(), [
        "model.mlp_enabled=False", "train.lr=1e-4", "model.window=8", "model.window=none",
        "sample.prompt=a = b", "train.weight_decay=0", "model.norm=none"])
    assert made.model.mlp_enabled is False and made.model.window is None
    assert (made.train.lr, made.sample.prompt, made.model.norm) == (1e-4, "a = b", "none")
    assert made.train.weight_decay == 0.0 and type(made.train.weight_decay) is float


def test_a_config_too_deep_or_with_numbers_too_long_is_refused(tmp_path):
    """What the parser takes, and what then writes or reads its tree cannot."""
    for number, text in enumerate((
            "x" + ".a" * 500 + " = 1", "seed = " + "- " * 900 + "1",
            "seed = " + "[" * 90 + "]" * 90, "seed = 0x" + "f" * 5000,
            "train.lr = 0x" + "f" * 5000, "sample.prompt = '\\ud800'")):
        path = tmp_path / f"{number}.py"
        path.write_text(text, "utf-8")
        with pytest.raises(UserError, match=f"{number}.py, line"):
            config.load_config(path)
    (tmp_path / "c.json").write_text('{"seed": ' + "9" * 400 + "}")
    with pytest.raises(UserError, match="seed is inf"):
        config.load_config(tmp_path / "c.json")


def test_a_json_value_of_another_type_is_refused_too():
    for nested in ({"seed": True}, {"model": {"n_layer": "3"}}, {"model": {"qk_norm": 1}},
                   {"model": 3}, {"model": {"n_layer": {"x": 1}}}, []):
        with pytest.raises(UserError):
            config.from_dict(nested)


def test_the_hash_of_a_config_leaves_out_the_seed_only():
    base = config.RunConfig()
    assert config.config_hash(base) == config.config_hash(replace(base, seed=1))
    assert config.config_hash(base, True) != config.config_hash(replace(base, seed=1), True)
    other = config.apply_overrides(base, ["model.n_layer=9"])
    assert config.config_hash(base) != config.config_hash(other)


# ---- what makes sense trains, what does not is refused -------------------------------------------

FACTORS = {
    "model.attention_enabled": ["true", "false"],
    "model.n_kv_head": ["none", "1", "3"],
    "model.qk_norm": ["false", "true"],
    "model.window": ["none", "3"],
    "model.mlp_enabled": ["true", "false"],
    "model.mlp_kind": ["gelu", "relu2", "swiglu"],
    "model.norm": ["layernorm", "rmsnorm", "none"],
    "model.norm_position": ["pre", "post"],
    "model.residual": ["true", "false"],
    "model.positional_encoding": ["learned", "sinusoidal", "rope", "alibi", "none"],
    "model.tied_embeddings": ["true", "false"],
    "model.logit_softcap": ["none", "9"],
    "model.init": ["normal", "scaled", "zero_projection"],
    "model.dropout": ["0", "0.2"],
    "train.optimizer": ["adamw", "muon", "sgd"],
    "train.schedule": ["constant", "cosine", "linear", "wsd"],
}


def makes_sense(choice):
    """Said a second time, from the issue's point of view: what is asked for must be there."""
    attention = choice["model.attention_enabled"] == "true"
    inside = (choice["model.n_kv_head"] != "none" or choice["model.qk_norm"] == "true"
              or choice["model.window"] != "none"
              or choice["model.positional_encoding"] in ("rope", "alibi"))
    return ((attention or not inside)
            and (attention or choice["model.mlp_enabled"] == "true")
            and (choice["model.mlp_enabled"] == "true" or choice["model.mlp_kind"] == "gelu")
            and (choice["model.norm"], choice["model.norm_position"]) != ("none", "post")
            and (choice["model.residual"], choice["model.init"]) != ("false", "zero_projection")
            and (choice["model.residual"] == "true" or choice["model.norm"] != "none"
                 or choice["model.mlp_enabled"] == "false" or choice["model.mlp_kind"] == "gelu"))


def covering_choices(seed=0):
    """Choices that make sense, until every pair of values that can go together has."""
    rng, seen, chosen = random.Random(seed), set(), []
    for _ in range(6000):
        choice = {key: rng.choice(values) for key, values in FACTORS.items()}
        pairs = set(itertools.combinations(choice.items(), 2))
        if makes_sense(choice) and pairs - seen:
            seen |= pairs
            chosen.append(choice)
    return chosen, seen


def build(choice):
    made = config.apply_overrides(config.RunConfig(), [
        "model.n_layer=2", "model.n_embd=12", "model.n_head=3", "model.block_size=8",
        "train.steps=5", "train.warmup_steps=1", *(f"{k}={v}" for k, v in choice.items())])
    config.check(made)
    torch.manual_seed(0)
    net = model.Transformer(made.model, 29)
    return made, net, optim.make_optimizers(net, made.train)


def test_every_pair_of_choices_that_goes_together_trains_and_looks_at_no_future_token():
    """One model per choice: a finite loss, a gradient in every parameter, and causality.

    The gradient is looked at in the second step: where projections begin at zero, nothing but
    them has one in the first.
    """
    chosen, seen = covering_choices()
    assert len(chosen) > 40
    values = [(key, value) for key, options in FACTORS.items() for value in options]
    for one, two in itertools.combinations(values, 2):
        apart = one[0] == two[0] or (one, two) in seen
        fixed = dict([one, two])
        rest = {key: fixed.get(key, options[0]) for key, options in FACTORS.items()}
        assert apart or not makes_sense(rest), (one, two)  # FACTORS begin with the plain values
    rng = torch.Generator().manual_seed(1)
    for choice in chosen:
        made, net, optimizers = build(choice)
        ids = torch.randint(29, (5, 8), generator=rng)
        for step in range(2):
            optim.set_lr(optimizers, optim.lr_factor(step, made.train))
            loss = net(ids[:, :-1], ids[:, 1:])
            net.zero_grad()
            loss.backward()
            assert math.isfinite(loss.item()), choice
            if step == 0:
                for optimizer in optimizers:
                    optimizer.step()
        for name, weight in net.named_parameters():
            assert weight.grad.abs().max() > 0, (name, choice)
        net.eval()
        with torch.no_grad():
            changed = ids.clone()
            changed[:, 5] = (changed[:, 5] + 1) % 29
            before, after = net(ids), net(changed)
        assert torch.equal(before[:, :5], after[:, :5]), choice
        assert not torch.equal(before[:, 5], after[:, 5]), choice


def test_choices_are_refused_exactly_where_something_is_asked_for_that_is_not_there():
    rng, refused = random.Random(3), 0
    for _ in range(300):
        choice = {key: rng.choice(values) for key, values in FACTORS.items()}
        made = config.apply_overrides(config.RunConfig(), [
            "model.n_embd=12", "model.n_head=3", *(f"{k}={v}" for k, v in choice.items())])
        try:
            config.check(made)
            assert makes_sense(choice), choice
        except UserError as error:
            refused += 1
            assert not makes_sense(choice), (choice, error)
            assert "{" not in str(error)
    assert refused > 50


@pytest.mark.parametrize("overrides, reason", [
    (["model.attention_enabled=false", "model.mlp_enabled=false"], "a table of bigrams"),
    (["model.attention_enabled=false", "model.positional_encoding=rope"], "acts inside attention"),
    (["model.attention_enabled=false", "model.positional_encoding=alibi"], "acts inside attention"),
    (["model.attention_enabled=false", "model.window=4"], "model.window=4 limits what attention"),
    (["model.attention_enabled=false", "model.n_kv_head=2"], "counts heads of attention"),
    (["model.attention_enabled=false", "model.qk_norm=true"], "there are none"),
    (["model.mlp_enabled=false", "model.mlp_kind=swiglu"], "there is none"),
    (["model.n_head=5"], "model.n_embd=128 cannot be shared out among model.n_head=5"),
    (["model.n_kv_head=3"], "model.n_head=4 queries cannot share model.n_kv_head=3"),
    (["model.n_kv_head=8"], "model.n_head=4 queries cannot share model.n_kv_head=8"),
    (["model.positional_encoding=rope", "model.n_embd=36", "model.n_head=4"], "an odd count"),
    (["model.positional_encoding=sinusoidal", "model.n_embd=33", "model.n_head=3"], "=33 is odd"),
    (["model.window=32"], "hides nothing"),
    (["model.norm=none", "model.norm_position=post"], "model.norm is none"),
    (["model.residual=false", "model.init=zero_projection"], "no gradient would ever arrive"),
    (["model.residual=false", "model.norm=none", "model.mlp_kind=swiglu"], "neither a norm nor"),
    (["train.steps=20", "train.warmup_steps=20"], "leaves nothing of train.steps=20"),
    (["train.schedule=wsd", "train.decay_fraction=0.99"], "overlap"),
])
def test_what_makes_no_sense_is_refused_with_the_reason(overrides, reason):
    base = ["train.warmup_steps=20", "model.init=scaled", "model.n_embd=128", "model.n_head=4",
            "model.block_size=32"]
    with pytest.raises(UserError, match=re.escape(reason)):
        config.check(config.apply_overrides(config.RunConfig(), base + overrides))


# ---- the model against others' -------------------------------------------------------------------


def test_with_gpt2s_switches_the_logits_are_those_of_gpt2_in_transformers():
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = small_model("model.mlp_kind=gelu", "model.norm=layernorm", "model.tied_embeddings=true",
                       "model.positional_encoding=learned", "model.init_std=0.3")
    theirs = GPT2LMHeadModel(GPT2Config(
        vocab_size=41, n_positions=13, n_embd=24, n_layer=2, n_head=3, activation_function="gelu",
        layer_norm_epsilon=1e-5)).eval()
    state = {name: torch.zeros_like(weight) if name.endswith("bias") else weight
             for name, weight in theirs.state_dict().items()}
    norms = {"ln_1": "attn_norm", "ln_2": "mlp_norm"}
    with torch.no_grad():
        for weight in (w for name, w in ours.named_parameters() if "norm" in name):
            weight.uniform_(0.5, 1.5)
    mine = ours.state_dict()
    state["transformer.wte.weight"] = state["lm_head.weight"] = mine["wte.weight"]
    state["transformer.wpe.weight"] = mine["wpe.weight"]
    for part in ("weight", "bias"):
        state[f"transformer.ln_f.{part}"] = mine[f"norm.{part}"]
        for i, (there, here) in itertools.product(range(2), norms.items()):
            state[f"transformer.h.{i}.{there}.{part}"] = mine[f"blocks.{i}.{here}.{part}"]
    for i in range(2):  # GPT-2 keeps its matrices transposed, and q, k, v in one
        here, there = f"blocks.{i}.", f"transformer.h.{i}."
        qkv = [mine[here + f"attn.c_{name}.weight"] for name in "qkv"]
        state[there + "attn.c_attn.weight"] = torch.cat(qkv).T
        for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            state[there + name + ".weight"] = mine[here + name + ".weight"].T
    theirs.load_state_dict(state)
    ids = torch.randint(41, (2, 11))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_with_llamas_switches_the_logits_are_those_of_llama_in_transformers():
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = small_model(
        "model.n_head=6", "model.n_kv_head=2", "model.mlp_kind=swiglu", "model.norm=rmsnorm",
        "model.positional_encoding=rope", "model.tied_embeddings=false", "model.init_std=0.3")
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=41, hidden_size=24, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, rms_norm_eps=1e-5,
        max_position_embeddings=13)).eval()
    names = {"wte": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
    inner = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
             "attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj",
             "attn.c_v": "self_attn.v_proj", "attn.c_proj": "self_attn.o_proj",
             "mlp.c_fc": "mlp.up_proj", "mlp.c_gate": "mlp.gate_proj",
             "mlp.c_proj": "mlp.down_proj"}
    names.update({f"blocks.{i}.{here}": f"model.layers.{i}.{there}"
                  for i in range(2) for here, there in inner.items()})
    theirs.load_state_dict({names[name.removesuffix(".weight")] + ".weight": weight
                            for name, weight in ours.state_dict().items()})
    ids = torch.randint(41, (2, 11))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_alibi_slopes_are_the_papers_and_blooms():
    """H=8: 1/2, 1/4, ..., 1/256. H=3: of 2 heads 1/16, 1/256, then the first of 4 heads, 1/4."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    assert model.alibi_slopes(8).tolist() == [2.0 ** -i for i in range(1, 9)]
    assert model.alibi_slopes(3).tolist() == [1 / 16, 1 / 256, 1 / 4]
    for heads in range(1, 20):
        theirs = build_alibi_tensor(torch.ones(1, 4), heads, torch.float32)[:, 0, 1]
        torch.testing.assert_close(model.alibi_slopes(heads), theirs)


def test_alibi_and_window_are_added_to_the_scores_before_the_softmax():
    """H=2, window 3: slopes 1/16 and 1/256, and the row of query 3 is
    [-inf, -2 slope, -1 slope, 0, -inf]. The attention itself is then worked out in a loop."""
    made = config.apply_overrides(config.RunConfig(), [
        "model.n_embd=6", "model.n_head=2", "model.block_size=5", "model.window=3",
        "model.positional_encoding=alibi"]).model
    bias, hidden = model.attention_bias(made), -math.inf
    assert bias.shape == (2, 5, 5)
    assert bias[0, 3].tolist() == [hidden, -2 / 16, -1 / 16, 0, hidden]
    assert bias[1, 3].tolist() == [hidden, -2 / 256, -1 / 256, 0, hidden]
    torch.manual_seed(2)
    layer, x = model.Attention(made), torch.randn(1, 5, 6)
    q, k, v = ((x[0] @ m.weight.T).view(5, 2, 3) for m in (layer.c_q, layer.c_k, layer.c_v))
    q, k, y = q.detach(), k.detach(), torch.zeros(5, 2, 3)
    for t, h in itertools.product(range(5), range(2)):
        seen = range(max(0, t - 2), t + 1)
        score = [float(q[t, h] @ k[s, h]) / 3**0.5 - [1 / 16, 1 / 256][h] * (t - s) for s in seen]
        total = sum(map(math.exp, score))
        y[t, h] = sum(math.exp(z) / total * v[s, h] for z, s in zip(score, seen))
    torch.testing.assert_close(layer(x, None, bias)[0], y.flatten(1) @ layer.c_proj.weight.T)


def test_a_token_sees_the_window_and_itself_and_nothing_more():
    net = small_model("model.n_layer=1", "model.window=4", "model.init_std=0.3")
    ids = torch.randint(41, (1, 12))
    with torch.no_grad():
        before = net(ids)
        for s in range(12):
            changed = ids.clone()
            changed[0, s] = (ids[0, s] + 1) % 41
            moved = (net(changed) - before).abs().amax(-1)[0] > 0
            assert moved.nonzero().flatten().tolist() == list(range(s, min(12, s + 4))), s


def test_rope_turns_by_angles_and_scores_depend_on_the_distance_alone():
    """As complex numbers: x_i + i x_(i+D/2) times exp(i t 10000^(-2i/D))."""
    cos, sin = model.rotary_table(9, 6)
    x = torch.randn(2, 3, 9, 6, generator=torch.Generator().manual_seed(0))
    rate = 10000.0 ** (-torch.arange(0, 6, 2) / 6)
    turn = torch.polar(torch.ones(9, 3), torch.outer(torch.arange(9.0), rate))
    turned = torch.complex(x[..., :3], x[..., 3:]) * turn
    ours = model.apply_rotary(x, cos, sin)
    torch.testing.assert_close(ours, torch.cat((turned.real, turned.imag), -1))
    assert torch.equal(ours[:, :, 0], x[:, :, 0])
    q, k = x[:1, :1, :1].expand(1, 1, 9, 6), x[1:, :1, :1].expand(1, 1, 9, 6)
    scores = (model.apply_rotary(q, cos, sin) @ model.apply_rotary(k, cos, sin).mT)[0, 0]
    for distance in range(-8, 9):
        line = scores.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores.diagonal(1)[:1], scores.diagonal(2)[:1], atol=1e-3)


def test_the_sinusoidal_table_is_the_formula_and_joins_the_scaled_embedding():
    """C=4: row 2 is sin 2, cos 2, sin 0.02, cos 0.02."""
    table = model.sinusoidal_table(5, 4)
    expected = [math.sin(2), math.cos(2), math.sin(0.02), math.cos(0.02)]
    assert table[2].tolist() == pytest.approx(expected, abs=1e-6)
    net = small_model("model.positional_encoding=sinusoidal", "model.norm=none")
    for block in net.blocks:  # with nothing added, the features are the input
        torch.nn.init.zeros_(block.attn.c_proj.weight)
        torch.nn.init.zeros_(block.mlp.c_proj.weight)
    ids = torch.tensor([[3, 1, 3]])
    expected = net.wte.weight[ids] * 24**0.5 + model.sinusoidal_table(13, 24)[:3]
    torch.testing.assert_close(net.features(ids), expected)


def test_without_positions_a_token_does_not_know_the_order_of_those_before_it():
    ids = torch.tensor([[5, 6, 7, 8]])
    shuffled = torch.tensor([[7, 5, 6, 8]])
    for encoding in ("none", "learned", "sinusoidal", "rope", "alibi"):
        net = small_model("model.n_layer=1", f"model.positional_encoding={encoding}",
                          "model.init_std=0.3")
        with torch.no_grad():
            same = torch.allclose(net(ids)[0, -1], net(shuffled)[0, -1], atol=1e-5)
        assert same == (encoding == "none"), encoding


def test_norms_stand_where_the_config_says():
    """post: what leaves a block has mean 0 and variance 1; pre: what is added does not depend on
    the scale of the stream; none: the norms are gone."""
    x = 5 * torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(0))
    post = small_model("model.norm_position=post")
    y = post.blocks[0](x, None, None)
    torch.testing.assert_close(y.mean(-1), torch.zeros(2, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.var(-1, correction=0), torch.ones(2, 4), rtol=1e-3, atol=1e-3)
    assert isinstance(post.norm, torch.nn.Identity)
    attn = small_model("model.mlp_enabled=false", "model.norm=rmsnorm", "model.init_std=0.3")
    block = attn.blocks[0]
    torch.testing.assert_close(block(x, None, None) - x, block(9 * x, None, None) - 9 * x,
                               rtol=1e-3, atol=1e-4)
    alone = small_model("model.residual=false", "model.mlp_enabled=false", "model.norm=none")
    block = alone.blocks[0]
    torch.testing.assert_close(block(x, None, None), block.attn(x, None, None))
    assert not [name for name, _ in alone.named_parameters() if "norm" in name]


def test_qk_norm_forgets_the_length_of_queries_and_keys_and_the_softcap_bounds_the_logits():
    net = small_model("model.qk_norm=true", "model.logit_softcap=2.5", "model.init_std=0.5")
    ids = torch.randint(41, (2, 7))
    before = net(ids)
    assert before.abs().max() <= 2.5 and before.abs().max() > 2
    raw = net.lm_head(net.features(ids))
    torch.testing.assert_close(before, 2.5 * torch.tanh(raw / 2.5))
    with torch.no_grad():
        net.blocks[0].attn.c_q.weight.mul_(7)
        net.blocks[1].attn.c_k.weight.mul_(0.5)
    torch.testing.assert_close(net(ids), before, rtol=1e-3, atol=1e-4)


def test_the_three_mlps_are_their_formulas_and_cost_the_same():
    x, sizes = torch.randn(3, 24), {}
    for kind in ("gelu", "relu2", "swiglu"):
        mlp = small_model(f"model.mlp_kind={kind}").blocks[0].mlp
        h = x @ mlp.c_fc.weight.T
        h = {"gelu": lambda: 0.5 * h * (1 + torch.erf(h / 2**0.5)),
             "relu2": lambda: h.clamp(min=0) ** 2,
             "swiglu": lambda: (g := x @ mlp.c_gate.weight.T) * g.sigmoid() * h}[kind]()
        torch.testing.assert_close(mlp(x), h @ mlp.c_proj.weight.T)
        sizes[kind] = sum(weight.numel() for weight in mlp.parameters())
    assert sizes == {"gelu": 2 * 24 * 96, "relu2": 2 * 24 * 96, "swiglu": 3 * 24 * 64}
    assert 2 * 96 == 3 * 64


def test_what_is_switched_off_has_no_parameters_and_tied_embeddings_are_one_matrix():
    full, C, V = small_model(), 24, 41
    count = full.count_parameters()
    per_attention, per_mlp, norm = 4 * C * C, 8 * C * C, 2 * C
    assert count == V * C + 13 * C + 2 * (per_attention + per_mlp + 2 * norm) + norm
    def less(*overrides):
        return count - small_model(*overrides).count_parameters()
    assert less("model.attention_enabled=false") == 2 * (per_attention + norm)
    assert less("model.mlp_enabled=false") == 2 * (per_mlp + norm)
    assert less("model.n_kv_head=1") == 2 * 2 * (C - 8) * C
    assert less("model.tied_embeddings=false") == -V * C
    assert less("model.positional_encoding=rope") == 13 * C
    assert full.lm_head.weight is full.wte.weight


def test_weights_begin_as_the_config_says_and_the_first_loss_is_near_ln_v():
    """ln 1024 = 6.931. scaled: 0.05 / sqrt(2 * 8) = 0.0125 in what feeds the stream."""
    def std(kind, name):
        net = model.Transformer(config.apply_overrides(config.RunConfig(), [
            f"model.init={kind}", "model.n_layer=8", "model.init_std=0.05"]).model, 1024)
        return float(dict(net.named_parameters())[f"blocks.5.{name}.weight"].detach().std())
    assert std("normal", "mlp.c_proj") == pytest.approx(0.05, rel=0.03)
    assert std("scaled", "mlp.c_proj") == pytest.approx(0.0125, rel=0.03)
    assert std("scaled", "attn.c_q") == pytest.approx(0.05, rel=0.03)
    assert std("zero_projection", "attn.c_proj") == 0
    ids = torch.randint(1024, (4, 25), generator=torch.Generator().manual_seed(0))
    for encoding in ("learned", "sinusoidal", "rope", "alibi", "none"):
        made = config.apply_overrides(config.RunConfig(),
                                      [f"model.positional_encoding={encoding}"])
        net = model.Transformer(made.model, 1024).eval()
        assert net(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(math.log(1024), rel=0.05)


# ---- data ----------------------------------------------------------------------------------------


def test_a_phrase_and_its_copies_are_on_one_side_and_nothing_is_lost():
    phrases = [f"phrase {i % 40}" for i in range(100)]
    train_part, val_part = data.split(phrases, 0.25, seed=3)
    assert Counter(train_part) + Counter(val_part) == Counter(phrases)
    assert not set(train_part) & set(val_part) and len(set(val_part)) == 10
    shuffled = random.Random(0).sample(phrases, 100)
    assert set(data.split(shuffled, 0.25, seed=3)[1]) == set(val_part)
    assert set(data.split(phrases, 0.25, seed=4)[1]) != set(val_part)
    assert [len(part) for part in data.split(["a", "b"], 0.01, 0)] == [1, 1]


class Letters:
    """A tokenizer of single letters: a is 4, b is 5, ..."""

    bos_id, eos_id, pad_id, vocab_size = 2, 3, 0, 30

    def encode(self, text):
        return [ord(letter) - ord("a") + 4 for letter in text]

    def decode(self, ids):
        return "".join(chr(id - 4 + ord("a")) for id in ids if id >= 4)


def test_a_long_phrase_becomes_rows_in_which_every_token_is_predicted_once():
    """abcdefg in blocks of 3: [BOS a b c] [c d e f] [f g EOS]; hi fills one block exactly."""
    rows = data.to_rows(["abcdefg", "hi"], Letters(), 3)
    assert rows == [[2, 4, 5, 6], [6, 7, 8, 9], [9, 10, 3], [2, 11, 12, 3]]
    inputs, targets = data.collate(rows)
    assert inputs.tolist() == [[2, 4, 5], [6, 7, 8], [9, 10, 0], [2, 11, 12]]
    assert targets.tolist() == [[4, 5, 6], [7, 8, 9], [10, 3, -1], [11, 12, 3]]


def test_an_epoch_holds_every_row_once_and_its_order_follows_from_seed_and_epoch():
    rows = [[0] * random.Random(i).randint(2, 17) for i in range(333)]
    first = data.batches_of_epoch(rows, 10, seed=5, epoch=0)
    assert sorted(i for batch in first for i in batch) == list(range(333))
    assert sorted(map(len, first)) == [3] + [10] * 33
    assert first == data.batches_of_epoch(rows, 10, seed=5, epoch=0)
    assert first != data.batches_of_epoch(rows, 10, seed=5, epoch=1)
    assert first != data.batches_of_epoch(rows, 10, seed=6, epoch=0)
    spread = [max(len(rows[i]) for i in b) - min(len(rows[i]) for i in b) for b in first]
    assert sum(spread) / len(spread) < 4  # of 15: little padding


def test_training_sees_every_row_once_an_epoch_and_each_epoch_in_another_order():
    """23 rows in batches of 4: 6 steps an epoch. From step 8 on: the same as the straight way."""
    settings = config.apply_overrides(config.RunConfig(), ["train.batch_size=4"])
    session = types.SimpleNamespace(rows=[[2, 4 + i, 3] for i in range(23)], config=settings)

    def rows_of(step, count):
        batches = itertools.islice(train.batches_from(session, step), count)
        return [inputs[:, 1].tolist() for inputs, _ in batches]

    first, second = rows_of(0, 6), rows_of(6, 6)
    for epoch in (first, second):
        assert sorted(itertools.chain(*epoch)) == list(range(4, 27))
    assert first != second and rows_of(0, 12) == first + second and rows_of(8, 4) == second[2:]


def test_padding_changes_nothing_and_the_loss_is_weighted_by_tokens():
    """Three phrases of 3, 6 and 2 targets: one batch gives the same as each alone, its mean is
    their sum over 11, and whatever stands in the padding does not matter."""
    net = small_model("model.init_std=0.3")
    rows = data.to_rows(["ab", "cdefg", "h"], Letters(), 13)
    inputs, targets = data.collate(rows)
    alone = sum(net(*data.collate([row]), reduction="sum").item() for row in rows)
    assert net(inputs, targets, reduction="sum").item() == pytest.approx(alone, rel=1e-5)
    assert net(inputs, targets).item() == pytest.approx(alone / 11, rel=1e-5)
    noise = torch.where(targets == -1, torch.randint(41, inputs.shape), inputs)
    assert torch.equal(net(noise, targets), net(inputs, targets))
    table = net(inputs, targets, reduction="none")
    assert table.shape == (3, 6) and (table[targets == -1] == 0).all()
    nats, tokens = train.evaluate(net, data.ordered_batches(rows, batch_size=2))
    assert tokens == 11 and nats == pytest.approx(alone, rel=1e-5)


def test_the_ladder_is_the_one_worked_out_by_hand():
    """Training rows [2 4 3] [2 4 4 3], V=6: after-counts 4:3, 3:2, of 5; unigram with one added
    4: 4/11, 3: 3/11. Validation row [2 4 3]: unigram -(ln 4/11 + ln 3/11)/2. The bigram with m=1:
    p(4|2) = (2 + 4/11)/3, p(3|4) = (2 + 3/11)/4; a greater m is worse here."""
    found = data.ladder([[2, 4, 3], [2, 4, 4, 3]], [[2, 4, 3]], 6)
    assert found["uniform"] == pytest.approx(math.log(6))
    assert found["unigram"] == pytest.approx(-(math.log(4 / 11) + math.log(3 / 11)) / 2)
    assert found["bigram"] == pytest.approx(
        -(math.log((2 + 4 / 11) / 3) + math.log((2 + 3 / 11) / 4)) / 2)


@pytest.mark.parametrize("content, message", [
    (None, "No such file"), (b"one\n\n  one \n", "1 different phrase"), (b"", "0 different"),
    (b"caf\xe9\nb\n", r"not UTF-8 text \(byte 3 is 0xe9\)"),
])
def test_data_that_cannot_be_used_is_named(content, message, tmp_path):
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        data.read_phrases(tmp_path / "p.txt")


def test_phrases_are_lines_with_no_mark_of_their_file_left(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffone\r\n\n two\u2028three \r\nfour".encode())
    assert data.read_phrases(tmp_path / "p.txt") == ["one", "two\u2028three", "four"]


# ---- tokenizer -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "spm.model"
    made = config.TokenizerConfig(vocab_size=320)
    return tokenizer.train_tokenizer(make_phrases(), path, made), path


@pytest.mark.parametrize("text", [
    "the red very apple", "", " ", "  two  spaces ", "\n\t", "\u00fc\u20ac\U0001f600",
    "</s><s><pad><unk>", "<0x41>", "\u4e2d\u6587 caf\u00e9", "\x00", "ABC 123",
])
def test_any_text_comes_back_as_it_was_and_never_makes_a_special_token(text, spm):
    ids = spm[0].encode(text)
    assert spm[0].decode(ids) == text
    assert not set(ids) & {tokenizer.PAD, tokenizer.UNK, tokenizer.BOS, tokenizer.EOS}
    assert spm[0].decode([tokenizer.BOS, *ids, tokenizer.EOS, tokenizer.PAD]) == text


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_the_same_lines_give_the_same_tokenizer_to_the_byte(kind, tmp_path):
    made = config.TokenizerConfig(kind=kind, vocab_size=300)
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tokenizer.train_tokenizer(make_phrases(), tmp_path / name / "spm.model", made)
        files.append((tmp_path / name / "spm.model").read_bytes())
    assert files[0] == files[1]
    loaded = tokenizer.load_tokenizer(tmp_path / "a" / "spm.model")
    assert 261 < loaded.vocab_size <= 300
    listed = (tmp_path / "a" / "spm.vocab").read_text("utf-8").splitlines()
    assert len(listed) == loaded.vocab_size


def test_a_vocabulary_too_small_and_a_file_that_is_no_tokenizer_are_refused(tmp_path):
    many = ["".join(map(chr, range(0x4E00, 0x4E60))), "b"]
    with pytest.raises(UserError, match="vocab_size=270 does not fit these 2 phrases"):
        tokenizer.train_tokenizer(many, tmp_path / "m", config.TokenizerConfig(vocab_size=270))
    assert not (tmp_path / "m").exists()
    (tmp_path / "x").write_bytes(b"no tokenizer")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        tokenizer.load_tokenizer(tmp_path / "x")


# ---- optimizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 24), (96, 24), (24, 96)])
def test_muons_step_is_nearly_orthogonal_and_has_the_singular_vectors_of_the_gradient(shape):
    """Singular values from 0.05 to 1 all end between 0.6 and 1.3 (Jordan: 0.7 to 1.2 for most),
    and U^T X V of G = U S V^T is diagonal."""
    noise = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    U, _, Vh = torch.linalg.svd(noise, full_matrices=False)
    G = U @ torch.diag_embed(torch.linspace(0.05, 1, 24).expand(3, 24)) @ Vh
    X = optim.newton_schulz(7 * G)
    values = torch.linalg.svdvals(X)
    assert X.shape == G.shape and values.min() > 0.6 and values.max() < 1.3
    inside = U.mT @ X @ Vh.mT
    assert (inside - torch.diag_embed(inside.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3


def test_muon_steps_as_torchs_own_muon_does():
    """Theirs works in bfloat16, with 8 bits: after 4 steps of 0.1 the weights agree to 0.01."""
    gen = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=gen) for s in ((8, 24), (24, 8), (8, 24))]
    ours = [w.clone().requires_grad_() for w in start]
    theirs = [w.clone().requires_grad_() for w in start]
    mine = optim.Muon(ours, lr=0.1, momentum=0.9, weight_decay=0.2)
    other = torch.optim.Muon(theirs, lr=0.1, momentum=0.9, weight_decay=0.2)
    for _ in range(4):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=gen)
            b.grad = a.grad.clone()
        mine.step()
        other.step()
    for a, b, w in zip(ours, theirs, start):
        assert (a - b).abs().max() < 0.01 < 0.1 < (a - w).abs().max()


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(name):
    net = small_model("model.tied_embeddings=false")
    optimizers = optim.make_optimizers(net, config.TrainConfig(optimizer=name, weight_decay=0.3))
    held = [(w, g["weight_decay"], o) for o in optimizers for g in o.param_groups
            for w in g["params"]]
    assert len(held) == len({id(w) for w, *_ in held}) == len(list(net.parameters()))
    assert all(decay == (0.3 if w.ndim == 2 else 0) for w, decay, _ in held)
    muon = {id(w) for w, _, o in held if isinstance(o, optim.Muon)}
    blocks = {id(w) for w in net.blocks.parameters() if w.ndim == 2}
    assert muon == (blocks if name == "muon" else set())


def test_schedules_are_the_ones_worked_out_by_hand():
    """Ten steps, two of warm-up (1/3, 2/3), then 8 steps; the end of the line is 0.2.

    linear, step 6: half way, 0.6. cosine, step 4: a quarter, 1 - 0.8 * (1 - cos 45)/2 = 0.8828.
    wsd with the last 0.4: 1 until step 6, then 1, 0.8, 0.6, 0.4.
    """
    def factors(schedule):
        made = config.TrainConfig(steps=10, warmup_steps=2, schedule=schedule, decay_fraction=0.4,
                                  min_lr_fraction=0.2)
        return [optim.lr_factor(step, made) for step in range(10)]
    up = [1 / 3, 2 / 3]
    assert factors("constant") == pytest.approx(up + [1] * 8)
    assert factors("linear") == pytest.approx(up + [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    assert factors("wsd") == pytest.approx(up + [1, 1, 1, 1, 1, 0.8, 0.6, 0.4])
    assert factors("cosine")[4] == pytest.approx(1 - 0.8 * (1 - math.sqrt(0.5)) / 2)
    assert factors("cosine")[6] == pytest.approx(0.6)
    net = small_model()
    made = config.TrainConfig(optimizer="muon", lr=1.0, muon_lr=4.0)
    optimizers = optim.make_optimizers(net, made)
    optim.set_lr(optimizers, 0.5)
    assert {g["lr"] for o in optimizers for g in o.param_groups} == {0.5, 2.0}


# ---- sampling ------------------------------------------------------------------------------------


def test_top_p_and_top_k_keep_what_those_of_transformers_keep():
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(50, 31, generator=torch.Generator().manual_seed(0))
    for p in (0.01, 0.3, 0.9, 0.999):
        kept = sample.keep_top_p(logits, p)
        assert torch.equal(kept, TopPLogitsWarper(p)(None, logits)), p
        assert (kept > -math.inf).any(-1).all()
    for k in (1, 7, 31, 99):
        assert torch.equal(sample.keep_top_k(logits, k), TopKLogitsWarper(k)(None, logits)), k


def test_draws_have_the_probabilities_that_temperature_and_filters_say():
    """Probabilities 0.4 0.3 0.2 0.1; 20,000 draws have a standard error of 0.0035, and 0.018 is
    five of them. At T=0.5 they are squared: 16 9 4 1 of 30. top_p=0.6: 4 and 3 of 7. top_k=3:
    4, 3 and 2 of 9."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().expand(20000, 4)
    def shares(temperature=1.0, top_k=None, top_p=1.0):
        ids = sample.pick(logits, temperature, top_k, top_p, torch.Generator().manual_seed(0))
        return (torch.bincount(ids.flatten(), minlength=4) / 20000).tolist()
    assert shares() == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.018)
    assert shares(0.5) == pytest.approx([16 / 30, 9 / 30, 4 / 30, 1 / 30], abs=0.018)
    assert shares(top_p=0.6) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=0.018)
    assert shares(top_k=3) == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0], abs=0.018)
    assert shares(0.5, top_k=2, top_p=0.6) == [1, 0, 0, 0]  # 16 of 25 alone are more than 0.6
    assert shares(0.0) == [1, 0, 0, 0]
    # The ends: so cold that float32 has no such number, so hot that all are alike (-inf is not).
    assert shares(1e-300) == shares(top_p=1e-300) == [1, 0, 0, 0]
    logits = torch.tensor([[0.4, 0.3, 0.3, 0.0]]).log().expand(20000, 4)
    assert shares(1e300) == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0], abs=0.018)


def test_samples_stop_at_eos_each_for_itself_and_are_the_same_for_the_same_seed():
    net = small_model("model.init_std=0.3", vocab_size=30)
    with torch.no_grad():
        net.wte.weight[3] *= 2  # EOS often, but not always
    rows = sample.generate_ids(net, Letters(), "ab", 40, 9, 1.0, seed=4)
    assert len(rows) == 40 and all(row[:3] == [2, 4, 5] for row in rows)
    assert all(set(row[3:-1]) <= set(range(4, 30)) for row in rows)
    ended = [row for row in rows if row[-1] == 3]
    assert 0 < len(ended) < 40 and len({len(row) for row in ended}) > 2
    assert all(len(row) == 12 for row in rows if row[-1] != 3)
    assert rows == sample.generate_ids(net, Letters(), "ab", 40, 9, 1.0, seed=4)
    assert rows != sample.generate_ids(net, Letters(), "ab", 40, 9, 1.0, seed=5)
    texts = sample.generate(net, Letters(), "ab", n_samples=40, max_new_tokens=9, temperature=1.0,
                            seed=4)
    assert texts == [Letters().decode(row) for row in rows]
    assert sample.generate(net, Letters(), n_samples=0) == []


def test_greedy_text_follows_the_argmax_also_beyond_the_block():
    """20 tokens with a block of 13: from there on the last 13 are in sight."""
    net, row = small_model("model.init_std=0.3", vocab_size=30), [2, 9]
    with torch.no_grad():
        for _ in range(20):
            logits = net(torch.tensor([row[-13:]]))[0, -1]
            row.append(int(logits[3:].argmax()) + 3)
            if row[-1] == 3:
                break
    assert len(row) > 15, "the model must not stop before its block is full"
    assert sample.generate_ids(net, Letters(), "f", 2, 20, 0.0) == [row, row]


@pytest.mark.parametrize("option, value", [("n_samples", -1), ("max_new_tokens", 0), ("top_p", 0.0),
                                           ("temperature", -0.1), ("top_k", 0), ("top_p", 1.1),
                                           ("temperature", math.nan), ("seed", -1),
                                           ("seed", 2**64)])
def test_a_sampling_flag_out_of_range_is_refused(option, value):
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} {value}"):
        sample.generate(small_model(vocab_size=30), Letters(), **{option: value})


# ---- a run: made, made again, resumed ------------------------------------------------------------


def test_the_same_config_and_seed_give_the_same_run_to_the_bit_and_another_seed_does_not(place):
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        train.train(tiny("train.optimizer=muon", f"seed={seed}"), "runs", name)
    a, b, c = (results(runs.Run("runs", name)) for name in "abc")
    assert a == b
    assert a[0][-1]["val_loss"] != c[0][-1]["val_loss"] and a[2] != c[2]
    assert [row["step"] for row in a[0]] == [0, 2, 4, 6]
    config_of = {name: runs.Run("runs", name).load_summary()["config_hash"] for name in "abc"}
    assert len(set(config_of.values())) == 1  # seeds of one setting are found by it


@pytest.mark.parametrize("optimizer, killed_in", [("adamw", 3), ("muon", 4), ("sgd", 5)])
def test_a_run_that_crashed_and_was_resumed_is_the_straight_run_to_the_bit(
        optimizer, killed_in, place, monkeypatch):
    """The crash comes within a step; 3 batches are an epoch of these rows, so one ends between."""
    made = tiny(f"train.optimizer={optimizer}", "train.batch_size=40")
    train.train(made, "runs", "straight")
    real, calls = train.learn, []

    def crash(*args):
        calls.append(1)
        if len(calls) == killed_in:
            raise RuntimeError("power cut")
        return real(*args)

    monkeypatch.setattr(train, "learn", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        train.train(made, "runs", "cut")
    cut = runs.Run("runs", "cut")
    assert cut.load_summary()["status"] == "running"
    with open(cut.metrics_path, "a") as file:
        file.write('{"step": 99, "val_lo')  # a line torn by the crash
    with open(cut.samples_path, "a") as file:
        file.write('{"step": 5, "prompt": null, "text": "written, but not saved"}\n')
    assert cut.load_metrics()[-1]["step"] == (killed_in - 1) // 2 * 2
    torch.manual_seed(99)
    summary = train.train(None, "runs", "cut", resume=True)
    assert results(cut) == results(runs.Run("runs", "straight"))
    assert summary["status"] == "done"
    straight = runs.Run("runs", "straight").load_summary()
    times = {"run_id", "seconds", "seconds_to_best"}
    assert all(summary[key] == straight[key] for key in straight if key not in times)


def run_until(rows, run, command, stop):
    """Start `tp ...`, send it the signal `stop` at that many rows; (exit code, what it said)."""
    with open("log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tp", *shlex.split(command)[1:]], stdout=log, stderr=log,
            env={**os.environ, "PYTHONPATH": str(PLAYGROUND)})
    try:
        wait_for(lambda: run.metrics_path.exists()
                 and run.metrics_path.read_bytes().count(b"\n") >= rows, process)
        process.send_signal(stop)
        return process.wait(60), Path("log").read_text("utf-8")
    finally:
        process.kill()
        process.wait()


def test_ctrl_c_and_then_kill_9_and_the_end_is_that_of_a_straight_run(place):
    """21 rows. Ctrl-C after 2 saves where it is; the run goes on from there, is killed after 5,
    and goes on again from what it saved last."""
    settings, run = ["train.steps=160", "train.eval_every=8"], runs.Run("runs", "a")
    command = f"tp train --config configs/default.py --run-id a --set {' '.join(settings)}"
    code, said = run_until(2, run, command, signal.SIGINT)
    assert code == 130 and "Traceback" not in said
    assert "tp train --runs-dir runs --resume a" in said
    summary = run.load_summary()
    assert summary["status"] == "stopped" and 8 <= summary["steps"] < 160
    assert run.load_checkpoint("last")["step"] == summary["steps"]

    code, said = run_until(5, run, "tp train --resume a", signal.SIGKILL)
    assert code == -signal.SIGKILL and f"resumed at step {summary['steps']} of 160" in said
    assert run.load_summary()["status"] == "running" and len(run.load_metrics()) < 20

    assert cli.main(["train", "--resume", "a"]) == 0
    train.train(tiny(*settings), "runs", "straight")
    assert results(run) == results(runs.Run("runs", "straight"))


def test_a_run_is_resumed_only_as_it_was(place, capsys):
    train.train(tiny("train.lr=0.003"), "runs", "a")
    assert cli.main(["train", "--resume", "a", "--set", "train.lr=1"]) == 2
    assert "train.lr: 0.003 in the run, 1.0 now" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "a", "--config", "configs/default.py", "--set",
                     "train.lr=0.003"]) == 0
    assert "run a is finished: 6 steps" in capsys.readouterr().out
    run = runs.Run("runs", "a")
    summary = run.load_summary()
    run.summary_path.write_text(json.dumps({**summary, "status": "running"}))
    with open("phrases.txt", "a") as file:
        file.write("one more phrase\n")
    before = run.metrics_path.read_bytes()
    assert cli.main(["train", "--resume", "a"]) == 2
    assert "phrases.txt is not what run a was trained with" in capsys.readouterr().err
    assert run.metrics_path.read_bytes() == before
    shutil.copytree("runs/a", "runs/c")
    assert cli.main(["report", "--run-id", "a"]) == 2  # its validation phrases may be others now
    assert "phrases.txt is not what this run was trained on" in capsys.readouterr().err
    assert not any(run.reports.iterdir())
    Path("phrases.txt").write_text("\n".join(make_phrases()) + "\n", "utf-8")
    train.train(tiny("tokenizer.kind=bpe"), "runs", "bpe")
    shutil.copy("runs/bpe/tokenizer/spm.model", "runs/c/tokenizer/spm.model")
    edited = run.config_path.read_text().replace('"lr": 0.003', '"lr": 0.004')
    run.config_path.write_text(edited)
    for name, file in (("a", "config.json"), ("c", "tokenizer/spm.model")):
        assert cli.main(["train", "--resume", name]) == 2
        assert f"{file} is not what run {name} was trained with" in capsys.readouterr().err
    assert cli.main(["train", "--resume", "b"]) == 2
    assert "runs has no run 'b'" in capsys.readouterr().err


def test_a_run_killed_before_its_first_checkpoint_begins_anew(place):
    train.train(tiny(), "runs", "a")
    made = runs.Run.create("runs", tiny(), "b")  # as far as a process may have come
    train.train(None, "runs", "b", resume=True)
    assert results(made) == results(runs.Run("runs", "a"))


def test_a_loss_that_is_not_finite_ends_the_run_with_its_cause_and_keeps_the_best(place, capsys):
    code = cli.main(["train", "--run-id", "x", "--set", "train.lr=1e30", "train.optimizer=sgd",
                     "train.grad_clip=none", "model.norm=none"])
    said = capsys.readouterr().err
    assert code == 2 and re.search(r"(loss|gradient) is (nan|inf) at step \d", said)
    assert "The learning rate was" in said and "--set train.lr=1e+29" in said
    summary = runs.Run("runs", "x").load_summary()
    assert summary["status"] == "failed" and summary["error"] in said
    assert cli.main(["generate", "--run-id", "x"]) == 0
    assert cli.main(["train", "--resume", "x"]) == 2
    assert "would again" in capsys.readouterr().err


def test_a_loss_that_is_first_found_out_by_an_evaluation_ends_the_run_just_so(place, capsys):
    assert cli.main(["train", "--run-id", "x", "--set", "train.lr=1e30", "train.optimizer=sgd",
                     "train.grad_clip=none", "train.eval_every=1"]) == 2
    assert "best_val.pt of step 0" in capsys.readouterr().err
    run = runs.Run("runs", "x")
    assert run.load_summary()["status"] == "failed" and len(run.load_metrics()) == 1


def test_weights_that_are_not_finite_give_no_text():
    net = small_model(vocab_size=30)
    with torch.no_grad():
        net.wte.weight[7] = math.nan
    with pytest.raises(UserError, match="logits are not finite"):
        sample.generate(net, Letters())


def test_patience_ends_a_run_that_no_longer_gets_better(place):
    summary = train.train(tiny("train.patience=2", "train.steps=40", "train.lr=1e-9",
                               "train.schedule=constant", "model.dropout=0",
                               "train.eval_every=3", "train.batch_size=1"), "runs", "a")
    steps = [row["step"] for row in runs.Run("runs", "a").load_metrics()]
    assert summary["status"] == "done" and steps[-1] == summary["steps"]
    assert summary["steps"] == 40 or summary["steps"] - summary["best_step"] == 6


def test_no_run_is_overwritten_and_what_cannot_begin_leaves_nothing(place, capsys, monkeypatch):
    train.train(tiny(), "runs", "a")
    before = results(runs.Run("runs", "a"))
    assert cli.main(["train", "--run-id", "a"]) == 2
    assert "no run is overwritten" in capsys.readouterr().err
    assert results(runs.Run("runs", "a")) == before
    for wrong in ("data.path=no.txt", "model.n_head=5", "tokenizer.vocab_size=262"):
        assert cli.main(["train", "--run-id", "b", "--set", wrong]) == 2
        assert os.listdir("runs") == ["a"], wrong
    Path("runs/b").mkdir()
    Path("runs/b/train.log").write_text("a sweep's")
    assert cli.main(["train", "--run-id", "b", "--set", "tokenizer.vocab_size=262"]) == 2
    assert os.listdir("runs/b") == ["train.log"]
    assert cli.main(["train", "--run-id", "b"]) == 0
    assert cli.main(["train", "--run-id", "../b"]) == 2

    def no_memory(*arguments):
        raise RuntimeError("can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(train, "Transformer", no_memory)
    # Names left empty, by a variable that is not set, are no wish for the default.
    for words in (["--run-id", "c"], ["--run-id", ""], ["--resume", ""], ["--config", ""]):
        assert cli.main(["train", *words]) == 2
    assert "tried to allocate 9 bytes" in capsys.readouterr().err
    assert sorted(os.listdir("runs")) == ["a", "b"]


def test_a_checkpoint_is_read_without_executing_it_and_only_with_its_own_tokenizer(place, capsys):
    train.train(tiny(), "runs", "a")
    train.train(tiny("tokenizer.kind=bpe"), "runs", "b")
    run = runs.Run("runs", "a")
    shutil.copy("runs/b/tokenizer/spm.model", "runs/a/tokenizer/spm.model")
    with pytest.raises(UserError, match="is not the tokenizer of best_val.pt"):
        run.load_model()

    class Evil:
        def __reduce__(self):
            return os.mkdir, ("ran",)

    run.checkpoint_path("best_val").write_bytes(pickle.dumps(Evil(), protocol=2))
    torch.save(Evil(), run.checkpoint_path("last"))
    for checkpoint in runs.CHECKPOINTS:
        assert cli.main(["generate", "--run-id", "a", "--checkpoint", checkpoint]) == 2
        assert "is damaged, or no checkpoint" in capsys.readouterr().err
    assert not Path("ran").exists()

    state = runs.Run("runs", "b").load_checkpoint("last")
    other = runs.Run("runs", "b").checkpoint_path("last")
    for wrong in (None, [1], {}, torch.ones(2), {**state, "model": [1]}, {**state, "rng": 3},
                  {**state, "progress": {"x": 1}}, {**state, "optimizers": []}):
        other.write_bytes(b"") if wrong is None else torch.save(wrong, other)
        runs.Run("runs", "b").summary_path.write_text("{}")
        assert cli.main(["train", "--resume", "b"]) == 2
        assert "last.pt is" in capsys.readouterr().err
    edited = runs.Run("runs", "b").config_path
    edited.write_text(edited.read_text().replace('"learned"', '"alibi"'))
    assert cli.main(["generate", "--run-id", "b"]) == 2  # its weights would load all the same
    assert "is not the one that best_val.pt holds the weights of" in capsys.readouterr().err


def test_the_tokenizer_is_trained_on_the_training_phrases_alone(place):
    """Each phrase has a sign of its own; those of the others must be spelled in bytes."""
    signs = [chr(0x4E00 + i) for i in range(60)]
    Path("phrases.txt").write_text("\n".join(f"a {sign}" for sign in signs), "utf-8")
    train.train(tiny("tokenizer.vocab_size=400", "data.val_fraction=0.4"), "runs", "a")
    _, spm, made, _ = runs.Run("runs", "a").load_model()
    kept, held_out = data.load_split(made.data)
    assert len(held_out) == 24
    in_bytes = {sign for sign in signs if any(map(spm.processor.is_byte, spm.encode(sign)))}
    assert in_bytes == {phrase[-1] for phrase in held_out}


def test_metrics_hold_what_an_evaluation_by_hand_gives(place):
    """bits per byte = nats / (ln 2 * bytes), with one byte for each line's end."""
    summary = train.train(tiny(), "runs", "a")
    run = runs.Run("runs", "a")
    net, spm, made, state = run.load_model("last")
    kept, held_out = data.load_split(made.data)
    nats, tokens = 0, 0
    for phrase in held_out:
        ids = [spm.bos_id, *spm.encode(phrase), spm.eos_id]
        for i in range(0, len(ids) - 1, 16):  # block_size 16
            piece = torch.tensor([ids[i : i + 17]])
            logits = net(piece[:, :-1])[0].log_softmax(-1)
            nats -= logits.gather(1, piece[0, 1:, None]).sum().item()
            tokens += piece.shape[1] - 1
    row = run.load_metrics()[-1]
    assert row["val_loss"] == pytest.approx(nats / tokens, rel=1e-4)
    size = len("\n".join(held_out).encode()) + 1
    assert row["val_bpb"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert state["step"] == 6 and state["val_loss"] == row["val_loss"] == summary["final_val_loss"]
    best = min(run.load_metrics(), key=lambda row: row["val_loss"])
    assert (best["step"], best["val_loss"]) == (summary["best_step"], summary["best_val_loss"])
    assert run.load_model()[3]["step"] == best["step"]
    assert row["lr"] == pytest.approx(made.train.lr * optim.lr_factor(5, made.train))


def test_a_model_with_attention_learns_what_no_bigram_can_know_and_without_it_does_not(place):
    """In these phrases the noun follows from the word two before it (red very -> apple), so a
    bigram must guess among four: about ln 4 = 1.39 nats at two places of a phrase."""
    Path("phrases.txt").write_text("\n".join(make_phrases(500)), "utf-8")
    size = ["train.steps=70", "train.lr=1e-2", "train.eval_every=70", "train.batch_size=64",
            "model.dropout=0", "model.n_embd=36"]
    full = train.train(tiny(*size), "runs", "full")
    alone = train.train(tiny(*size, "model.attention_enabled=false",
                             "model.positional_encoding=none"), "runs", "alone")
    assert full["best_val_loss"] < full["ladder"]["bigram"] - 0.15
    assert alone["best_val_loss"] > full["ladder"]["bigram"] - 0.02
    assert full["ladder"]["bigram"] < full["ladder"]["unigram"] < full["ladder"]["uniform"]


# ---- the seed's commands, as processes -----------------------------------------------------------


def test_the_seeds_commands_run_as_they_are_written(place):
    done = tp_process("tp train --config configs/default.py", place)
    assert done.returncode == 0, done.stderr
    run_id, = os.listdir("runs")
    first = done.stdout.splitlines()[0]
    assert re.fullmatch(r"tp train - cpu - 1 thread - 0\.0\dM params - seed 7", first)
    for name in ("config.json", "metrics.jsonl", "samples.jsonl", "checkpoints/best_val.pt",
                 "checkpoints/last.pt", "tokenizer/spm.model", "summary.json"):
        assert Path("runs", run_id, name).is_file()
        assert f"wrote runs/{run_id}/{name}" in done.stdout
    assert not list(Path("runs").rglob("*.tmp"))
    assert done.stdout.splitlines()[-1].startswith("next: tp generate --runs-dir runs --run-id")

    done = tp_process("tp train --config configs/default.py --set model.mlp_enabled=false "
                      "--set model.positional_encoding=rope", place)
    assert done.returncode == 0, done.stderr
    other, = set(os.listdir("runs")) - {run_id}
    saved = runs.Run("runs", other).load_config().model
    assert (saved.mlp_enabled, saved.positional_encoding) == (False, "rope")

    done = tp_process(f'tp generate --runs-dir runs --run-id {run_id} --prompt "a" '
                      "--max-new-tokens 24 --temperature 0.9 --top-p 0.9", place)
    assert done.returncode == 0, done.stderr
    head, *texts = done.stdout.rstrip("\n").split("\n")
    assert f"best_val of {run_id}" in head and texts[0].startswith("a")
    done = tp_process(f"tp generate --runs-dir runs --run-id {run_id} --unconditional "
                      "--max-new-tokens 24 --temperature 0.9 --top-p 0.9", place)
    assert done.returncode == 0, done.stderr


def test_flags_left_out_of_generate_come_from_the_runs_config(place, monkeypatch):
    train.train(tiny("sample.prompt=the red", "sample.temperature=0.3"), "runs", "a")
    asked = []
    monkeypatch.setattr(sample, "generate", lambda *args, **options: asked.append(options) or [])
    for flags in ([], ["--unconditional", "--top-k", "0", "--seed", "3"],
                  ["--prompt", "x", "--n-samples", "4", "--temperature", "0", "--top-p", "0.5",
                   "--max-new-tokens", "9"]):
        assert cli.main(["generate", "--run-id", "a", *flags]) == 0
    saved = {"prompt": "the red", "seed": 7, "n_samples": 2, "max_new_tokens": 5,
             "temperature": 0.3, "top_k": 50, "top_p": config.SampleConfig().top_p}
    assert asked[0] == saved
    assert asked[1] == {**saved, "prompt": None, "top_k": None, "seed": 3}
    assert asked[2] == {**saved, "prompt": "x", "n_samples": 4, "temperature": 0.0, "top_p": 0.5,
                        "max_new_tokens": 9}


def test_a_users_mistake_is_one_message_and_exit_code_2(place, capsys):
    for line, message in (
        ("train --config configs/default.py --set model.n_layers=3", "there is no setting"),
        ("train --config configs/other.py", "cannot read the config configs/other.py: No such"),
        ("train --set model.n_head=5", "cannot be shared out among model.n_head=5"),
        ("train --run-id a --resume a", "leave out --run-id"),
        ("train --runs-dir phrases.txt", "cannot make the folder phrases.txt"),
        ("generate --run-id nobody", "runs has no run 'nobody'. Its runs, newest last:\n  none"),
    ):
        assert cli.main(shlex.split(line)) == 2, line
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and message in err, (line, err)
    for line in ("", "nothing", "train --no-such-flag", "generate", "generate --run-id a --top-p x",
                 "generate --run-id a --prompt a --unconditional"):
        with pytest.raises(SystemExit) as ended:
            cli.main(shlex.split(line))
        assert ended.value.code == 2 and "usage: tp" in capsys.readouterr().err
    assert sorted(os.listdir()) == ["configs", "phrases.txt"]


def test_every_key_is_listed_with_its_default_and_what_it_takes(place, capsys):
    assert cli.main(["train", "--list-keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(config.flatten(config.RunConfig()))
    assert re.search(r"^model.n_layer +3 +blocks: a whole number from 1 to 64$", "\n".join(lines),
                     re.M)


def test_the_configs_data_is_found_from_elsewhere_and_a_runs_config_makes_the_run_again(place):
    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    os.chdir("configs")
    assert config.load_config("default.py").data.path == "../phrases.txt"
    os.chdir(elsewhere)
    assert cli.main(["train", "--config", "../configs/default.py", "--run-id", "a"]) == 0
    assert cli.main(["train", "--config", "runs/a/config.json", "--run-id", "b"]) == 0
    assert results(runs.Run("runs", "a")) == results(runs.Run("runs", "b"))


# ---- the package ---------------------------------------------------------------------------------


def test_the_packages_pins_are_those_of_the_project():
    """Read line by line: Python 3.10 has no TOML reader."""
    text = (PLAYGROUND / "pyproject.toml").read_text("utf-8")
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.M | re.S)[1]
    pins = [line.strip().strip('",').replace("'", '"') for line in listed.splitlines()]
    required = [re.split(r"\s+#", line)[0].strip()
                for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines()]
    assert len(pins) >= 4 and set(pins) <= set(required)
    imported = {name for path in (PLAYGROUND / "tp").glob("*.py") for name in
                re.findall(r"^\s*(?:import|from) (\w+)", path.read_text("utf-8"), re.M)}
    outside = imported - set(sys.stdlib_module_names) - {"tp"}
    assert outside <= {pin.split("==")[0] for pin in pins}


def test_every_command_in_the_readme_is_one_that_the_parser_takes():
    blocks = re.findall(r"```bash\n(.*?)```", (PLAYGROUND / "README.md").read_text("utf-8"), re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()
             if re.match(r"tp (train|generate) ", line)]
    assert len(lines) >= 4
    for line in lines:
        _, command, *rest = shlex.split(line, comments=True)
        cli.make_parser(command).parse_args([command, *rest])


def test_metrics_can_be_read_without_waiting_for_torch():
    code = "import sys, tp.runs, tp.config, tp.cli; sys.exit('torch' in sys.modules)"
    done = run_process([sys.executable, "-c", code], cwd=PLAYGROUND)
    assert done.returncode == 0, done.stderr
