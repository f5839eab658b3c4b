"""tests/bench.py: what turns measurements into claims. The measurements themselves take minutes.

    pytest tests/test_bench.py
"""

import json
import lzma
import os
import random
import subprocess
import sys

import bench
import pytest
from conftest import ROOT


def test_the_table_of_the_readme_is_that_of_the_results():
    path = ROOT / "data" / "bench.json"
    if not path.is_file():
        pytest.skip("nothing measured: python tests/bench.py all")
    results = json.loads(path.read_text(encoding="utf-8"))
    assert set(results) <= {*bench.ROWS, "machine"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert bench.with_table(readme, results) == readme, "run: python tests/bench.py table"


def test_a_ratio_above_one_says_that_ours_is_better_in_any_unit():
    assert bench.entry(200, "tok/s", 100, "x")["ratio"] == 2.0
    assert bench.entry(10.0, "s", 100.0, "x")["ratio"] == 10.0
    assert bench.entry(0.6, "bits per byte", 1.2, "x")["ratio"] == 2.0
    assert bench.entry(3.0, "s") == {
        "ours": 3.0, "peer": None, "peer_name": None, "ratio": None, "unit": "s"
    }


def test_results_of_another_machine_or_version_are_dropped():
    machine = {"cpu": "a", "torch": "2", "date": "2026-02-02"}
    old = {"cache": 1, "xz": 2, "machine": {**machine, "date": "2026-01-01"}}
    assert bench.merge(old, {"xz": 3}, machine) == {
        "xz": 3, "cache": 1, "machine": {**machine, "date": "2026-01-01"}}
    for key in ("cpu", "torch"):
        new = {**machine, key: "other"}
        assert bench.merge(old, {"xz": 3}, new) == {"xz": 3, "machine": new}


def test_the_table_stands_between_its_marks_and_nothing_else_moves():
    readme = "before\n<!-- bench:start -->\nold\n<!-- bench:end -->\nafter\n"
    machine = {"cpu": "abacus", "cores": 1, "ram_gb": 2, "torch": "2.0", "date": "2026-01-01"}
    results = {"cache": bench.entry(900, "tok/s", 100, "without"), "machine": machine}
    text = bench.with_table(readme, results)
    assert text.startswith("before\n<!-- bench:start -->\n\n| what |")
    assert text.endswith("2026-01-01.\n\n<!-- bench:end -->\nafter\n") and "old" not in text
    assert "| 900 tok/s | 100 (without) | 9.00 | 8x |" in text
    assert bench.with_table(text, results) == text
    with pytest.raises(SystemExit):
        bench.with_table("no marks", results)


def test_the_packer_pays_only_for_what_the_prefix_does_not_say():
    rng = random.Random(0)
    text = bytes(rng.randrange(256) for _ in range(4000))
    assert bench.packed_bpb(text, text) < 0.2  # said before
    assert 7.9 < bench.packed_bpb(b"", text) < 8.3  # noise
    assert abs(bench.packed_size(text) - len(lzma.compress(text, preset=9))) < 100


def test_a_peer_that_is_not_there_is_skipped_by_name(tmp_path):
    # decode would find transformers: the cheap ones only
    out = tmp_path / "bench.json"
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "bench.py", "xz", "shakespeare", "--out", out,
         "--data-dir", tmp_path, "--shards", tmp_path],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2 and "nothing is measured yet" in done.stderr
    assert "skipped: xz (" in done.stdout and "skipped: shakespeare (" in done.stdout
    assert not out.exists()
    with pytest.raises(bench.Skipped, match=r"nanochat \(pass --nanochat DIR\)"):
        bench.import_nanochat(bench.Config(nanochat=None))
    with pytest.raises(bench.Skipped, match="nanoGPT .*is no folder"):
        bench.run_nanogpt(bench.Config(nanogpt=tmp_path / "absent"), [])


def test_bits_per_byte_of_the_pipeline_come_from_its_own_files(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for i, text in enumerate(["the cat sat. " * 50, "the cat sat. " * 10]):
        pq.write_table(pa.table({"text": [text]}), tmp_path / f"shard_{i:05d}.parquet")
    for name, content in (("tokenizer", {}), ("base", {"metrics": {
            "val_bpb": 0.5, "ladder": {"bigram": 1.5}}})):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    results = bench.bench_xz(bench.Config(data_dir=tmp_path))
    assert results["bigram"]["ratio"] == 3.0
    assert results["xz"]["ours"] == 0.5 and 0 <= results["xz"]["peer"] < 1
    rows = [{"stage": "check", "seconds": 1.5}, {"stage": "compare", "seconds": 2.0},
            {"stage": "report", "seconds": 4.0}]
    (tmp_path / "pipeline.json").write_text(json.dumps(rows))
    times = bench.bench_pipeline(bench.Config(data_dir=tmp_path))
    assert [times[name]["ours"] for name in ("pipeline", "rlhf", "base")] == [7.5, 3.5, 1.5]
    (tmp_path / "pipeline.json").write_text(json.dumps(rows[:1]))
    with pytest.raises(bench.Skipped, match="not whole"):
        bench.bench_pipeline(bench.Config(data_dir=tmp_path))


def test_contenders_take_turns():
    turns = []
    bench.take_turns({name: lambda name=name: turns.append(name) for name in "ab"}, rounds=3)
    assert turns == list("ab" * 4)  # the first turn warms up


@pytest.mark.skipif(not hasattr(os, "getloadavg"), reason="no load average here")
def test_the_machine_is_described():
    machine = bench.describe_machine()
    assert machine["cores"] == os.cpu_count() and machine["ram_gb"] >= 1
    assert machine["torch"] and machine["date"].startswith("20")
