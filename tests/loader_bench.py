"""What 02_dataloader.py costs in memory and time; tests/bench.py and test_02_dataloader.py use it.

    python tests/loader_bench.py              a 1 GB parquet file, read and tokenized: minutes
    python tests/loader_bench.py --megabytes 100 --read-only
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

GROUP = 1024  # documents per row group, as in nanochat's shards


def write_big_parquet(path, megabytes, one_group=False):
    """Write a file of at least that size on disk: documents of about 4 kB, uncompressed."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 8))) for _ in range(3000)]
    texts = [" ".join(rng.choices(words, k=700)) for _ in range(GROUP // 8)]
    table = pa.table({"text": texts * 8})
    copies = int(megabytes * 1e6 / table.nbytes) + 1
    with pq.ParquetWriter(path, table.schema, compression="none", use_dictionary=False) as writer:
        if one_group:
            writer.write_table(pa.concat_tables([table] * copies), row_group_size=GROUP * copies)
        for _ in range(0 if one_group else copies):
            writer.write_table(table, row_group_size=GROUP)
    return Path(path)


def streaming_growth(script, *jobs, B=32, T=1024):
    """Stream files one after the other in one fresh process; {"growth_mb", "seconds", ...} each.

    A job is (path, tokenizer_dir): through tokenizing_data_loader, or through parquet_texts alone
    where tokenizer_dir is None. "units" are tokens or characters. growth_mb: highest resident size
    so far above that before anything was opened; imports and tokenizer are there already.
    """
    jobs = [[str(path), str(where) if where else None] for path, where in jobs]
    command = [sys.executable, __file__, "--child", str(script), json.dumps(jobs), str(B), str(T)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


def stream_here(script, jobs, B, T):
    from conftest import load_path

    dataloader = load_path(Path(script), "edu_02_dataloader")
    process = psutil.Process()
    tokenizers = [where and dataloader.Tokenizer.from_dir(where) for _, where in jobs]
    before = peak = process.memory_info().rss
    results = []
    for (path, _), tokenizer in zip(jobs, tokenizers):
        if tokenizer:
            stream = dataloader.tokenizing_data_loader([path], tokenizer, B, T, epochs=1)
            sizes = (inputs.numel() for inputs, _, _ in stream)
        else:
            sizes = (len(text) for text in dataloader.parquet_texts([path]))
        began, units = time.perf_counter(), 0
        for look, size in enumerate(sizes):
            units += size
            if look % (4 if tokenizer else 64) == 0:
                peak = max(peak, process.memory_info().rss)
        results.append({
            "growth_mb": (peak - before) / 1e6, "seconds": time.perf_counter() - began,
            "units": units, "unit": "tokens" if tokenizer else "characters",
        })
    return results


def speed_ratios(dataloader, paths, tokenizer, B=16, T=256, chars=4_000_000, threads=4, rounds=7):
    """Loader's tokens/s over raw tiktoken's on the same text and threads: (median, all ratios)."""
    speeds, _ = dataloader.race_raw_tiktoken(paths, tokenizer, B, T, chars, threads, rounds)
    ratios = [ours / raw for ours, raw in speeds]
    return statistics.median(ratios), ratios


def main():
    if sys.argv[1:2] == ["--child"]:
        script, jobs, B, T = sys.argv[2:]
        print(json.dumps(stream_here(script, json.loads(jobs), int(B), int(T))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=1000)
    parser.add_argument("--read-only", action="store_true", help="do not tokenize")
    args = parser.parse_args()
    from conftest import EDU, load

    with tempfile.TemporaryDirectory() as folder:
        path = write_big_parquet(Path(folder) / "shard_00000.parquet", args.megabytes)
        bpe = load("11_tokenizer")
        pattern = bpe.split_pattern(1)
        ranks = bpe.train_bpe(bpe.training_texts([path], 2_000_000, 10_000), 2048, pattern)
        tokenizer = bpe.save_tokenizer(Path(folder) / "tokenizer", ranks, pattern)
        print(f"file: {path.stat().st_size / 1e6:.0f} MB")
        where = None if args.read_only else Path(folder) / "tokenizer"
        (grown,) = streaming_growth(EDU / "02_dataloader.py", (path, where))
        print(f"streaming: {grown['growth_mb']:.1f} MB grown in {grown['seconds']:.1f} s, "
              f"{grown['units']} {grown['unit']}")
        median, ratios = speed_ratios(load("02_dataloader"), [path], tokenizer)
        print(f"speed over raw tiktoken: median {median:.2f}, {min(ratios):.2f}-{max(ratios):.2f}")


if __name__ == "__main__":
    main()
