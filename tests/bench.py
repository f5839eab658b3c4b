"""Measure what the README claims, beside the peers, in one run on one machine.

    python tests/bench.py all --nanochat DIR --nanogpt DIR --shards DIR
    python tests/bench.py shakespeare decode        only these
    python tests/bench.py table                     only rewrite README.md from data/bench.json

DIR: source folders of nanochat (November 2025) and nanoGPT, and a folder with tinyshakespeare as
shard_00000.parquet (the first 90%) and shard_00001.parquet (the rest). A peer that is not there is
skipped by name. Contenders take turns, the median of many turns counts, and a ratio above 1 always
says that ours is better. Writes data/bench.json and the table in README.md.
"""

import contextlib
import dataclasses
import datetime
import itertools
import json
import lzma
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal
from unittest import mock

import psutil
import tyro
from conftest import EDU, ROOT, load

# ---- settings ------------------------------------------------------------------------------------

# name in bench.json: (what, at least); the order is the README's.
ROWS = {
    "pipeline": ("`bash my_pipeline.sh` whole, installation aside", "540 s"),
    "rlhf": ("of it, up to base, SFT and RL model side by side", "480 s"),
    "base": ("of it, up to the samples of the base model", "300 s"),
    "bigram": ("tiny world, bits per byte on validation, beside counted token pairs", "2x"),
    "xz": ("the same beside a packer that has the training text as its prefix", "1x"),
    "shakespeare": ("tinyshakespeare to 2.712 bits per byte, both processes from their start",
                    "10 s"),
    "shakespeare bpb": ("what that run reaches, worst of the seeds", "2.712"),
    "train": ("training, compiled", "2.5x"),
    "train eager": ("training, eager", ""),
    "train as it is": ("training, compiled", ""),
    "train mfu": ("share of the matmul peak, training, compiled", ""),
    "decode 1": ("decoding, one row", "2x"),
    "decode 1 nanochat": ("decoding, one row", "1x"),
    "decode 16": ("decoding, 16 rows", "2x"),
    "decode 16 nanochat": ("decoding, 16 rows", "1x"),
    "cache": ("256 new tokens with the cache, and without", "8x"),
    "rl": ("RL, rollout and update, 8 prompts x 16 samples decoded together", "3x"),
    "rl nanochat": ("the same step", "1x"),
    "loader": ("loader, and raw tiktoken on the same text", "0.85x"),
    "loader memory": ("resident growth while streaming a parquet file of 1 GB", "50 MB"),
    "serve first token": ("server, first token of an answer while nobody else asks", "300 ms"),
    "serve first token, worst": ("the same, worst of 30", "300 ms"),
    "serve POST /v1/chat/completions": ("server, `POST /v1/chat/completions`, one token", ""),
    "serve GET /v1/models": ("server, `GET /v1/models`", ""),
    "serve GET /": ("server, `GET /`", ""),
    "serve GET /health": ("server, `GET /health`", ""),
    "serve GET /metrics": ("server, `GET /metrics`", ""),
    **{f"serve {n}{what}": (f"server, {n} client{'s' * (n > 1)}{what and ',' + what}",
                            "4x" if n == 16 and not what else "")
       for n in (1, 2, 4, 8, 16) for what in ("", " first token")},
    "playground": ("playground, `tp train` of the default config, from its start to its best "
                   "validation loss", "60 s"),
    "playground bpb": ("what that run reaches on phrases it has not seen, beside counted token "
                       "pairs", ""),
    "playground sweep": ("playground, `tp sweep` of 12 such runs", "360 s"),
    "suite": ("`bash tests/run.sh`, installation aside", "420 s"),
}
LESS_IS_MORE = ("s", "ms", "MB", "bits per byte")  # units

# How 1.1 MB of Shakespeare is learned in seconds: many small steps of a small model.
SHAKESPEARE_BPB = 2.712  # 1.88 nats per character, where nanoGPT's run on a CPU ends
TOKENIZER_FLAGS = "--vocab-size 1024 --no-gpt2"
PRETRAIN_FLAGS = ("--depth 1 --n-embd 64 --n-head 1 --sequence-len 64 --device-batch-size 16 "
                  "--total-batch-size 1024 --num-iterations 210 --matrix-lr 0.03 "
                  "--embedding-lr 0.17 --unembedding-lr 0.0045 --warmdown-ratio 0.8 "
                  "--eval-every 1000 --save-every 1000 --no-plot")
NANOGPT_FLAGS = (  # of nanoGPT's README, for a machine without a GPU
    "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 "
    "--dropout=0.0")

Benchmark = Literal["all", "table", "shakespeare", "train", "decode", "cache", "rl", "loader",
                    "xz", "pipeline", "serve", "playground", "suite"]


def folder_from(variable):
    return field(default_factory=lambda: Path(os.environ[variable])
                 if os.environ.get(variable) else None)


@dataclass
class Config:
    what: tyro.conf.Positional[tuple[Benchmark, ...]] = ("all",)
    """Which benchmarks."""
    nanochat: Path | None = folder_from("NANOCHAT_DIR")
    """Source folder of nanochat; also $NANOCHAT_DIR."""
    nanogpt: Path | None = folder_from("NANOGPT_DIR")
    """Source folder of nanoGPT; also $NANOGPT_DIR."""
    shards: Path = ROOT / "data" / "shakespeare"
    """Two shards of tinyshakespeare."""
    data_dir: Path = field(default_factory=lambda: Path(os.environ.get("EDU_DATA", ROOT / "data")))
    """What my_pipeline.sh has made: for xz, bigram, loader and pipeline."""
    out: Path = ROOT / "data" / "bench.json"
    """Results; those of benchmarks that do not run now stay."""
    seeds: int = 5
    """Runs of shakespeare, each with another seed."""
    rounds: int = 7
    """Turns of each contender in train, decode and cache."""
    new_tokens: int = 128
    """Length of the text in decode."""
    megabytes: int = 1000
    """Size of the file in loader."""


class Skipped(Exception):
    """A benchmark or a peer that cannot run here, and what would change that."""


# ---- results -------------------------------------------------------------------------------------


def entry(ours, unit, peer=None, peer_name=None):
    """One line of bench.json; ratio: how many times better ours is, whatever the unit."""
    ratio = None
    if peer is not None:
        ratio = round(peer / ours if unit in LESS_IS_MORE else ours / peer, 3)
    return {"ours": ours, "peer": peer, "peer_name": peer_name, "ratio": ratio, "unit": unit}


def describe_machine():
    """CPU, cores, RAM, versions of what is measured, date."""
    name = platform.processor()
    with contextlib.suppress(OSError, AttributeError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = re.search(r"model name\s*: (.+)", text)[1]
    machine = {"cpu": name or platform.machine(), "cores": os.cpu_count(),
               "ram_gb": round(psutil.virtual_memory().total / 1e9)}
    for package in ("torch", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            machine[package] = version(package)
    return machine | {"date": datetime.date.today().isoformat()}


def merge(old, new, machine):
    """old, with new in it; nothing of old from another machine or with other versions.

    date: of the oldest number that is kept."""
    was = old.get("machine", {})
    same = {**was, "date": machine["date"]} == machine
    machine = {**machine, "date": min(was["date"], machine["date"])} if same else machine
    kept = {name: old[name] for name in old if same and name != "machine"}
    merged = {**kept, **new}
    ordered = {name: merged[name] for name in ROWS if name in merged}
    return {**ordered, "machine": machine}


def shown(value, unit):
    if value is None:
        return ""
    digits = 3 if unit == "bits per byte" else 0 if abs(value) >= 100 else 1
    return f"{value:,.{digits}f}"


def table(results):
    """The results as a Markdown table, with the machine beneath."""
    lines = ["| what | ours | peer | times better | asked for |", "|---|---:|---:|---:|---:|"]
    for name, (what, least) in ROWS.items():
        if name not in results:
            continue
        row = results[name]
        peer = f"{shown(row['peer'], row['unit'])} ({row['peer_name']})" if row["peer_name"] else ""
        ratio = f"{row['ratio']:.2f}" if row["ratio"] is not None else ""
        lines.append(f"| {what} | {shown(row['ours'], row['unit'])} {row['unit']} | {peer} | "
                     f"{ratio} | {least} |")
    m = results["machine"]
    versions = ", ".join(f"{name} {m[name]}" for name in ("torch", "transformers") if name in m)
    lines += ["", f"{m['cpu']}, {m['cores']} cores, {m['ram_gb']} GB; {versions}; {m['date']}."]
    return "\n".join(lines)


def with_table(readme, results):
    """The text of the README with the table between its two marks."""
    start, end = "<!-- bench:start -->", "<!-- bench:end -->"
    pattern = re.compile(f"(?<={re.escape(start)}\n).*?(?={re.escape(end)})", re.DOTALL)
    if not pattern.search(readme):
        raise SystemExit(f"error: README.md has no lines {start} and {end}, between which to write")
    return pattern.sub(lambda _: f"\n{table(results)}\n\n", readme)


# ---- peers and clocks ----------------------------------------------------------------------------


def peer_folder(path, name):
    if path is None:
        raise Skipped(f"{name} (pass --{name.lower()} DIR)")
    if not path.is_dir():
        raise Skipped(f"{name} ({path} is no folder)")
    return path.resolve()


def import_nanochat(config):
    """(gpt, engine, muon): modules of nanochat."""
    sys.path.insert(0, str(peer_folder(config.nanochat, "nanochat")))
    try:
        import nanochat.engine
        import nanochat.gpt
        import nanochat.muon
    except ImportError as error:
        raise Skipped(f"nanochat ({error})") from error
    finally:
        sys.path.pop(0)
    return nanochat.gpt, nanochat.engine, nanochat.muon


def take_turns(contenders, rounds):
    """{name: median seconds}; one after the other, so that a busy machine slows all alike."""
    seconds = {name: [] for name in contenders}
    for run in contenders.values():  # warm up: caches, lazy imports
        run()
    for _ in range(rounds):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    for name, all_of_it in seconds.items():
        print(f"  {name}: {' '.join(f'{s:.3f}' for s in sorted(all_of_it))} s")
    return {name: statistics.median(all_of_it) for name, all_of_it in seconds.items()}


def run_checked(command, **options):
    """Run a process to its end and return its output; its last words if it fails."""
    done = subprocess.run([str(part) for part in command], text=True, encoding="utf-8",
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {done.returncode}:\n"
                           f"{done.stdout[-3000:]}")
    return done.stdout


def offer(peer):
    """peer(), or None with a word when it is skipped."""
    try:
        return peer()
    except Skipped as reason:
        print(f"skipped: {reason}")
        return None


# ---- the benchmarks: each returns {name: entry} --------------------------------------------------


def bench_shakespeare(config):
    """Tokenizer and pretraining as processes, from nothing to the claim on the whole shard."""
    shards = [config.shards / f"shard_{i:05d}.parquet" for i in (0, 1)]
    if not all(shard.is_file() for shard in shards):
        raise Skipped(f"shakespeare (no two shards in {config.shards}; pass --shards DIR)")
    seconds, bpb = [], []
    for seed in range(config.seeds):
        with tempfile.TemporaryDirectory() as folder:
            for shard in shards:
                shutil.copy(shard, folder)
            began = time.perf_counter()
            run_checked([sys.executable, EDU / "11_tokenizer.py", "--data-dir", folder,
                         *TOKENIZER_FLAGS.split()])
            out = run_checked([sys.executable, EDU / "12_pretrain.py", "--data-dir", folder,
                               *PRETRAIN_FLAGS.split(), "--seed", seed])
            seconds.append(time.perf_counter() - began)
        bpb.append(float(re.search(r"^result: .* -> (\S+) \(n=", out, re.MULTILINE)[1]))
        print(f"  seed {seed}: {bpb[-1]:.3f} bits per byte in {seconds[-1]:.1f} s")
    theirs = offer(lambda: run_nanogpt(config, shards)) or (None, None)
    name = theirs[0] and "nanoGPT, its CPU command"
    return {"shakespeare": entry(round(statistics.median(seconds), 2), "s", theirs[0], name),
            "shakespeare bpb": entry(max(bpb), "bits per byte", theirs[1], name)}


def run_nanogpt(config, shards):
    """(seconds, bits per byte) of nanoGPT's own command on the same text."""
    import pyarrow.parquet as pq

    source = peer_folder(config.nanogpt, "nanoGPT")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "nanogpt"
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns(".git", "out*", "*.bin"))
        data = copy / "data" / "shakespeare_char"
        texts = [text for shard in shards for text in pq.read_table(shard)["text"].to_pylist()]
        (data / "input.txt").write_text("".join(texts), encoding="utf-8", newline="\n")
        run_checked([sys.executable, data / "prepare.py"], cwd=copy)
        began = time.perf_counter()
        out = run_checked([sys.executable, "train.py", "config/train_shakespeare_char.py",
                           *NANOGPT_FLAGS.split()], cwd=copy)
        seconds = time.perf_counter() - began
    nats = float(re.findall(r"step \d+: train loss \S+, val loss (\S+)", out)[-1])
    bpb = nats / 0.6931471805599453  # its characters are bytes
    print(f"  nanoGPT: {bpb:.3f} bits per byte in {seconds:.1f} s")
    return round(seconds, 1), round(bpb, 3)


def bench_train(config, B=16, T=256, V=4096):
    """Tokens/s of whole steps, 4 layers, 256 wide: compiled, eager, and nanochat's."""
    import torch

    ours = load("12_pretrain")
    dtype, why = ours.pick_dtype(torch.device("cpu"))
    cfg = ours.Config(depth=4, n_embd=256, n_head=2, sequence_len=T, device_batch_size=B,
                      total_batch_size=B * T)
    torch.manual_seed(0)
    x, y = torch.randint(0, V, (2, B, T)).unbind()
    contenders = {}
    for name, compiled in (("compiled", True), ("eager", False)):
        if compiled and not ours.has_compiler():
            print("skipped: compiled (no C++ compiler)")
            continue
        model = ours.GPT(ours.model_config(cfg, V))
        step = ours.TrainStep(model, ours.build_optimizers(model, cfg, dtype), dtype, compiled)
        contenders[name] = lambda step=step: step([(x, y)])
    contenders.update(offer(lambda: nanochat_steps(config, x, y, V)) or {})
    print(f"training: {str(dtype)[6:]} ({why}), {B} x {T} tokens, vocabulary {V}")
    seconds = take_turns(contenders, config.rounds)
    speed = {name: round(B * T / s) for name, s in seconds.items()}
    flops, peak = ours.flops_per_token(model), ours.measure_peak_flops(torch.device("cpu"), dtype)
    print(f"  matmul peak {peak / 1e9:.0f} GFLOP/s in {str(dtype)[6:]}")
    fixed, as_it_is = (speed.get(name) for name in ("nanochat fp32", "nanochat as it is"))
    best = "compiled" if "compiled" in speed else "eager"
    name = fixed and "nanochat, float32"
    share = fixed and round(100 * fixed * flops / peak, 1)
    results = {
        "train eager": entry(speed["eager"], "tok/s", fixed, name),
        "train mfu": entry(round(100 * speed[best] * flops / peak, 1), "%", share, name),
    }
    if best == "compiled":
        results["train"] = entry(speed[best], "tok/s", fixed, name)
        results["train as it is"] = entry(
            speed[best], "tok/s", as_it_is, as_it_is and "nanochat, Newton-Schulz in bfloat16")
    return results


def nanochat_steps(config, x, y, V):
    """{name: step} of nanochat's model and its own optimizers.

    Its Newton-Schulz runs in bfloat16, which ruins it on a CPU that does not multiply that in
    hardware: so it is measured both as it is and, more usefully, held to float32.
    """
    import torch

    gpt, _, muon = import_nanochat(config)
    compiled = muon.zeropower_via_newtonschulz5

    def make(newton_schulz, as_float):
        model = gpt.GPT(gpt.GPTConfig(sequence_len=x.size(1), vocab_size=V, n_layer=4, n_head=2,
                                      n_kv_head=2, n_embd=256))
        model.init_weights()
        optimizers = model.setup_optimizers()

        def step():
            model(x, y).backward()
            with contextlib.ExitStack() as stack:
                stack.enter_context(mock.patch.object(
                    muon, "zeropower_via_newtonschulz5", newton_schulz))
                if as_float:
                    stack.enter_context(mock.patch.object(
                        torch.Tensor, "bfloat16", lambda tensor: tensor.float()))
                for optimizer in optimizers:
                    optimizer.step()
            model.zero_grad(set_to_none=True)

        return step

    eager = getattr(compiled, "_torchdynamo_orig_callable", compiled)
    return {"nanochat fp32": make(eager, True), "nanochat as it is": make(compiled, False)}


def random_engine(engine, V=4096):
    """An engine of 6 layers, 384 wide, whose random model never ends a text."""
    import torch

    torch.manual_seed(0)
    model = engine.GPT(engine.GPTConfig(sequence_len=512, vocab_size=V, n_layer=6, n_head=3,
                                        n_kv_head=3, n_embd=384)).eval()
    tokenizer = engine.byte_tokenizer()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "wte" not in name:
                weight.normal_(0.0, 0.05)
        for token in engine.SPECIAL_TOKENS:  # a logit of 0 is never the largest
            model.lm_head.weight[tokenizer.encode_special(token)] = 0.0
    return engine.Engine(model, tokenizer)


def transformers_twin(model):
    """NanoChatForCausalLM of the transformers library with the same weights."""
    try:
        from transformers import NanoChatConfig, NanoChatForCausalLM
    except ImportError as error:
        raise Skipped(f"transformers ({error})") from error
    c = model.config
    twin = NanoChatForCausalLM(NanoChatConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=4 * c.n_embd,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head, max_position_embeddings=c.sequence_len,
        eos_token_id=None, pad_token_id=0, bos_token_id=0)).eval()
    places = {"transformer.wte": "model.embed_tokens", "transformer.h": "model.layers",
              "attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj",
              "attn.c_v": "self_attn.v_proj", "attn.c_proj": "self_attn.o_proj",
              "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    weights = {}
    for name, weight in model.state_dict().items():
        for ours, theirs in places.items():
            name = name.replace(ours, theirs)
        weights[name] = weight
    twin.load_state_dict(weights, strict=True)
    return twin


def nanochat_twin(config, model, tokenizer):
    """nanochat's engine with the same weights."""
    import torch

    gpt, engine, _ = import_nanochat(config)
    twin = gpt.GPT(gpt.GPTConfig(**dataclasses.asdict(model.config))).eval()
    twin.init_weights()  # also makes its RoPE tables
    with torch.no_grad():
        twin.load_state_dict(model.state_dict(), strict=True)
    return engine.Engine(twin, tokenizer)


def bench_decode(config):
    """Tokens/s of greedy text, the same weights and prompt everywhere, prefill included."""
    import torch

    ours = random_engine(load("05_engine"))
    twin = offer(lambda: transformers_twin(ours.model))
    nanochat = offer(lambda: nanochat_twin(config, ours.model, ours.tokenizer))
    prompt, new = torch.randint(300, 4000, (16,)).tolist(), config.new_tokens
    results, texts = {}, {}
    for B in (1, 16):
        def run_ours(B=B):
            columns = ours.generate(prompt, B, new, temperature=0.0)
            texts["ours"] = [tokens[0] for tokens, _ in columns]

        def run_transformers(B=B):
            idx = torch.tensor([prompt] * B)
            with torch.inference_mode():
                out = twin.generate(idx, attention_mask=torch.ones_like(idx), do_sample=False,
                                    max_new_tokens=new, min_new_tokens=new, use_cache=True)
            texts["transformers"] = out[0, len(prompt):].tolist()

        def run_nanochat(B=B):
            columns = nanochat.generate(prompt, B, new, temperature=0.0)
            texts["nanochat"] = [tokens[0] for tokens, _ in columns]

        contenders = {"ours": run_ours}
        if twin:
            contenders["transformers"] = run_transformers
        if nanochat:
            contenders["nanochat"] = run_nanochat
        print(f"decoding: {B} rows x {new} tokens")
        seconds = take_turns(contenders, config.rounds)
        for name, text in texts.items():
            assert len(text) == new, (name, len(text))
            same = sum(1 for _ in itertools.takewhile(lambda ab: ab[0] == ab[1],
                                                      zip(text, texts["ours"])))
            if name != "ours":
                print(f"  {name} writes the same first {same} of {new} tokens")
        speed = {name: round(B * new / s) for name, s in seconds.items()}
        results[f"decode {B}"] = entry(speed["ours"], "tok/s", speed.get("transformers"),
                                       twin and "transformers")
        if nanochat:
            results[f"decode {B} nanochat"] = entry(speed["ours"], "tok/s", speed["nanochat"],
                                                    "nanochat's engine")
    return results


def bench_cache(config, new=256):
    """Tokens/s of the same greedy text with the cache and without."""
    module = load("05_engine")
    engine, prompt = random_engine(module), list(range(300, 316))
    seconds = take_turns({
        "with": lambda: module.generate_cached(engine, prompt, new),
        "without": lambda: module.generate_naive(engine, prompt, new)}, max(3, config.rounds // 2))
    return {"cache": entry(round(new / seconds["with"]), "tok/s", round(new / seconds["without"]),
                           "without")}


def bench_rl(config):
    """Samples/s of a step of RL: all prompts decoded together, and a group at a time."""
    import torch

    rl = load("10_rl")
    if not (config.data_dir / "sft" / "model.safetensors").is_file():
        raise Skipped(f"rl (no {config.data_dir / 'sft'}; first: bash my_pipeline.sh)")
    cfg = rl.Config(data_dir=config.data_dir)
    tokenizer = rl.Tokenizer.from_dir(cfg.data_dir / "tokenizer")
    model, _ = rl.load_checkpoint(cfg.data_dir / "sft", tokenizer, torch.device("cpu"))
    task, engine = rl.GSM8K("train", data_dir=cfg.data_dir), rl.Engine(model, tokenizer)
    optimizer = rl.AdamW([{"params": model.parameters(), "lr": 0.0}])  # each turn does the same
    chosen = rl.prompts_of_step(0, list(range(len(task))), cfg.prompts_per_step, cfg.seed)

    def step(groups):
        parts = [rl.sample_rollouts(engine, task, group, cfg, seed=1) for group in groups]
        together = {}
        for name in vars(parts[0]):
            values = [getattr(part, name) for part in parts]
            together[name] = (torch.cat(values) if isinstance(values[0], torch.Tensor) else
                              [row for value in values for row in value])
        rl.update_policy(model, optimizer, None, rl.Rollouts(**together), cfg, lr=0.0)

    contenders = {"together": lambda: step([chosen]),
                  "one group at a time": lambda: step([[i] for i in chosen])}
    twin = offer(lambda: nanochat_twin(config, model, tokenizer))
    if twin:
        prompts = [rl.render_for_completion(task.get_example(i)["messages"], tokenizer)
                   for i in chosen]
        contenders["nanochat"] = lambda: nanochat_rl_step(twin, prompts, cfg)
    seconds = take_turns(contenders, config.rounds)
    speed = {name: round(len(chosen) * cfg.num_samples / time) for name, time in seconds.items()}
    rows = {"rl": entry(speed["together"], "samples/s", speed["one group at a time"],
                        "one group at a time")}
    if twin:
        rows["rl nanochat"] = entry(speed["together"], "samples/s", speed["nanochat"],
                                    "nanochat's engine and model, one group at a time")
    return rows


def nanochat_rl_step(twin, prompts, cfg, rows_at_once=8):
    """Its way through a step: a prompt at a time, its samples 8 at a time, every token scored.

    What costs nothing (rewards, the optimizer step) is left out, in its favour.
    """
    import torch

    for prompt in prompts:
        for first in range(0, cfg.num_samples, rows_at_once):
            rows, masks = twin.generate_batch(prompt, rows_at_once, max_tokens=cfg.max_new_tokens,
                                              temperature=1.0, seed=first)
            longest = max(map(len, rows))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            chosen = torch.tensor([mask + [0] * (longest - len(mask)) for mask in masks])
            targets = ids[:, 1:].masked_fill(chosen[:, 1:] == 0, -1)
            loss = twin.model(ids[:, :-1], targets, loss_reduction="none")
            (loss.view_as(targets) * torch.randn(len(rows), 1)).sum().backward()
    twin.model.zero_grad(set_to_none=True)


def bench_loader(config):
    """Tokens/s beside raw tiktoken, and what streaming a large file adds to the process."""
    import loader_bench

    dataloader = load("02_dataloader")
    shards, tokenizer_dir = made_by_pipeline(config, "loader")
    tokenizer = dataloader.Tokenizer.from_dir(tokenizer_dir)
    speeds, n = dataloader.race_raw_tiktoken(shards, tokenizer, 16, 256, 4_000_000, 4,
                                             config.rounds)
    ours, raw = (round(statistics.median(column)) for column in zip(*speeds))
    print(f"  loader {ours:,} tok/s, raw {raw:,} tok/s, {n} tokens")
    with tempfile.TemporaryDirectory() as folder:
        path = loader_bench.write_big_parquet(Path(folder) / "big.parquet", config.megabytes)
        (grown,) = loader_bench.streaming_growth(EDU / "02_dataloader.py", (path, tokenizer_dir))
    print(f"  {grown['growth_mb']:.1f} MB grown in {grown['seconds']:.0f} s")
    return {"loader": entry(ours, "tok/s", raw, "tiktoken"),
            "loader memory": entry(round(grown["growth_mb"], 1), "MB")}


def made_by_pipeline(config, name):
    """(training shards, tokenizer folder) of data_dir."""
    shards = sorted(config.data_dir.glob("shard_*.parquet"))
    folder = config.data_dir / "tokenizer"
    if len(shards) < 2 or not (folder / "config.json").is_file():
        raise Skipped(f"{name} (nothing in {config.data_dir}; first: bash my_pipeline.sh)")
    return shards[:-1], folder


def packed_size(data):
    """Bytes of `xz -9e`, with a dictionary that reaches back to the first byte."""
    reach = max(1 << 26, 1 << (len(data) - 1).bit_length()) if data else 1 << 26
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=[
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": reach}]))


def packed_bpb(before, data):
    """Bits per byte that `data` adds to a packer that has just seen `before`."""
    return 8 * (packed_size(before + data) - packed_size(before)) / len(data)


def bench_xz(config):
    """Bits per byte on the validation text: the model, xz and counted token pairs."""
    import pyarrow.parquet as pq

    shards, _ = made_by_pipeline(config, "xz")
    try:
        about = config.data_dir / "base" / "config.json"
        metrics = json.loads(about.read_text(encoding="utf-8"))["metrics"]
        ours, bigram = metrics["val_bpb"], metrics["ladder"]["bigram"]
    except (OSError, KeyError) as error:
        raise Skipped(f"xz ({about}: {error!r}; first: bash my_pipeline.sh)") from error
    val = config.data_dir / f"shard_{len(shards):05d}.parquet"
    train_bytes, val_bytes = (
        "".join(text for path in paths for text in pq.read_table(path)["text"].to_pylist()).encode()
        for paths in (shards, [val]))
    packed = packed_bpb(train_bytes, val_bytes)
    print(f"  model {ours:.3f}, xz {packed:.3f}, bigram {bigram:.3f} bits per byte")
    return {"bigram": entry(round(ours, 4), "bits per byte", round(bigram, 4), "bigram"),
            "xz": entry(round(ours, 4), "bits per byte", round(packed, 4), "xz -9e")}


def bench_pipeline(config):
    """The closing table of the last my_pipeline.sh, added up: run it whole before (FRESH=1)."""
    path = config.data_dir / "pipeline.json"
    if not path.is_file():
        raise Skipped(f"pipeline (no {path}; first: bash my_pipeline.sh)")
    rows = json.loads(path.read_text(encoding="utf-8"))
    seconds = {row["stage"]: row["seconds"] for row in rows}
    if "report" not in seconds:
        raise Skipped("pipeline (its last run was not whole; first: FRESH=1 bash my_pipeline.sh)")
    base = [seconds.get(name, 0.0) for name in
            ("check", "world", "download", "tokenizer", "pretrain", "engine")]
    rlhf = [time for name, time in seconds.items() if name not in ("evaluate", "report")]
    return {"pipeline": entry(round(sum(seconds.values()), 1), "s"),
            "rlhf": entry(round(sum(rlhf), 1), "s"),
            "base": entry(round(sum(base), 1), "s")}


def bench_serve(config):
    """Latency of every endpoint, and tokens per second against the number of clients."""
    made_by_pipeline(config, "serve")
    said = run_checked([sys.executable, ROOT / "tests" / "serve_bench.py", "--data-dir",
                        config.data_dir])
    return json.loads(said[said.index("{") :])


def bench_playground(config):
    """The playground's default run, and twelve of them as a sweep."""
    folder = ROOT / "edu" / "playground"
    tp = [sys.executable, "-m", "tp"]
    with tempfile.TemporaryDirectory() as runs:
        common = ["--config", "configs/default.py", "--runs-dir", runs]
        began = time.perf_counter()
        run_checked([*tp, "train", *common, "--run-id", "one"], cwd=folder)
        seconds = time.perf_counter() - began
        summary = json.loads((Path(runs) / "one" / "summary.json").read_text(encoding="utf-8"))
        seconds -= summary["seconds"] - summary["seconds_to_best"]
        began = time.perf_counter()
        run_checked([*tp, "sweep", *common, "--grid", "model.positional_encoding=learned,rope,"
                     "alibi,none", "--seeds", "1,2,3"], cwd=folder)
        sweep = time.perf_counter() - began
    # losses are in nats per token, of the same tokens
    bigram = summary["best_val_bpb"] * summary["ladder"]["bigram"] / summary["best_val_loss"]
    print(f"  best after {seconds:.1f} s, 12 runs {sweep:.0f} s")
    return {"playground": entry(round(seconds, 1), "s"),
            "playground bpb": entry(round(summary["best_val_bpb"], 4), "bits per byte",
                                    round(bigram, 4), "bigram"),
            "playground sweep": entry(round(sweep, 1), "s")}


def bench_suite(config):
    """The whole test suite."""
    began = time.perf_counter()
    print("  " + run_checked(["bash", ROOT / "tests" / "run.sh"]).strip().splitlines()[-1])
    return {"suite": entry(round(time.perf_counter() - began, 1), "s")}


# ---- the command line ----------------------------------------------------------------------------

BENCHMARKS = {"shakespeare": bench_shakespeare, "train": bench_train, "decode": bench_decode,
              "cache": bench_cache, "rl": bench_rl, "loader": bench_loader, "xz": bench_xz,
              "pipeline": bench_pipeline, "serve": bench_serve, "playground": bench_playground,
              "suite": bench_suite}


def replace_text(path, text):
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def run(config, readme=ROOT / "README.md"):
    names = BENCHMARKS if "all" in config.what else [n for n in config.what if n != "table"]
    machine = describe_machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    results = json.loads(config.out.read_text(encoding="utf-8")) if config.out.is_file() else {}
    failed = []
    for name in names:
        busy = os.getloadavg()[0]
        print(f"== {name}" + (f" (the machine is busy, load {busy:.1f}: times will be too long)"
                              if busy > 0.5 * os.cpu_count() else ""), flush=True)
        try:
            new = BENCHMARKS[name](config)
        except Skipped as reason:
            print(f"skipped: {reason}")
            continue
        except Exception as error:  # one that fails, however, must not cost the others
            print(f"failed: {type(error).__name__}: {error}")
            failed.append(name)
            continue
        results = merge(results, new, machine)
        config.out.parent.mkdir(parents=True, exist_ok=True)
        replace_text(config.out, json.dumps(results, indent=1) + "\n")
        if config.out.resolve() == ROOT / "data" / "bench.json":  # the suite compares the two
            replace_text(readme, with_table(readme.read_text(encoding="utf-8"), results))
    if "machine" not in results:
        print(f"error: nothing is measured yet, so there is no table ({config.out})",
              file=sys.stderr)
        return 2
    print(table(results))
    if config.out.resolve() == ROOT / "data" / "bench.json":
        replace_text(readme, with_table(readme.read_text(encoding="utf-8"), results))
        print(f"wrote {config.out} and the table in {readme}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run(tyro.cli(Config, description=__doc__)))
