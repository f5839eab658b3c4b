"""edu/playground: what looks at runs. `tp compare`, `report`, `plot-loss`, `sweep`, `leaderboard`.

Oracles: numbers worked out by hand, brute force over all pairs of positions, the statistics module,
printed tables of Student's t, and the ticks of a picture against its points.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import psutil
import pytest
from conftest import EDU, run_process, wait_for

PLAYGROUND = EDU / "playground"
sys.path.insert(0, str(PLAYGROUND))

from tp import (  # noqa: E402
    cli,
    compare,
    config,
    data,
    files,
    leaderboard,
    plot,
    report,
    runs,
    sample,
    sweep,
    tables,
)
from tp import textstats as text  # noqa: E402
from tp import train as training  # noqa: E402
from tp.errors import UserError  # noqa: E402

TINY = """
seed = 7
tokenizer = {"vocab_size": 330}
model = {"n_layer": 1, "n_embd": 24, "block_size": 16, "n_head": 3}
train = {"steps": 6, "batch_size": 16, "warmup_steps": 1, "eval_every": 2}
sample = {"n_samples": 2, "max_new_tokens": 5}
"""


def make_phrases(count=150):
    rng = random.Random(3)
    who, what = ["the cat", "a bird", "my aunt", "the rain"], ["sleeps", "sings", "waits", "falls"]
    where = ["at noon", "in the old barn", "by the sea", "under a tree", "again and again"]
    return [f"{rng.choice(who)} {rng.choice(what)} {rng.choice(where)} {i % 9}"
            for i in range(count)]


def lay_out(folder):
    (folder / "configs").mkdir()
    (folder / "configs" / "default.py").write_text(TINY, "utf-8")
    (folder / "phrases.txt").write_text("\n".join(make_phrases()) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder laid out as edu/playground is, with two runs: one (rope) and two (no MLP)."""
    folder = lay_out(tmp_path_factory.mktemp("playground"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        base = config.load_config("configs/default.py")
        for name, change in (("one", "model.positional_encoding=rope"),
                             ("two", "model.mlp_enabled=false")):
            training.train(config.apply_overrides(base, [change]), "runs", name)
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def tp(*words, cwd, **options):
    """`python -m tp ...` as a process of its own."""
    return run_process([sys.executable, "-m", "tp", *words], cwd=cwd,
                       env={"PYTHONPATH": PLAYGROUND, "COLUMNS": "90"}, **options)


def refused(capsys, *words):
    """What the command says on stderr when it ends with exit code 2."""
    assert cli.main([str(word) for word in words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Traceback" not in said
    return said


# ---- measures of text ----------------------------------------------------------------------------


def test_wilson_is_right_for_3_of_10_and_has_a_width_at_the_ends():
    """p = .3, z^2 = 3.8415: middle (.3 + .19207)/1.38415 = .35551, reach 1.96 sqrt(.021 + .0096036)
    / 1.38415 = .24772, so .1078 to .6032. For 0 of n the upper end is z^2 / (n + z^2)."""
    assert text.wilson(3, 10) == pytest.approx((0.1078, 0.6032), abs=1e-4)
    assert text.wilson(0, 20) == pytest.approx((0, 3.84146 / 23.84146), abs=1e-5)
    assert text.wilson(20, 20) == pytest.approx((1 - 3.84146 / 23.84146, 1), abs=1e-5)
    assert text.wilson(0, 0) == (0, 1)


def test_n_grams_that_come_in_clusters_widen_the_interval():
    """30 texts of 10 n-grams each, half of all n-grams new. Spread evenly, the texts are all alike
    and the interval is nearly a point; all in 15 of the texts, it is that of 30 draws, not 300."""
    even = text.clustered_share([5] * 30, [10] * 30)
    clustered = text.clustered_share([10] * 15 + [0] * 15, [10] * 30)
    low, high = text.wilson(15, 30)
    assert even["share"] == clustered["share"] == 0.5 and even["n"] == clustered["n"] == 300
    assert even["high"] - even["low"] < 1e-9
    assert clustered["high"] - clustered["low"] == pytest.approx(high - low, rel=0.15)
    # All new: no resampling shows any other, yet 30 texts do not prove it for all that could come.
    sure = text.clustered_share([10] * 30, [10] * 30)
    assert sure["low"] == text.wilson(30, 30)[0] and sure["n"] == 300
    assert text.clustered_share([], [])["share"] is None


def test_distinct_counts_different_n_grams_and_none_across_two_texts():
    """ "the cat the dog" and "the cat": 3 different of 6 words; pairs the-cat, cat-the, the-dog,
    the-cat, so 3 of 4; triples the-cat-the, cat-the-dog: 2 of 2."""
    texts = ["the cat the dog", "the  cat"]
    assert [text.distinct(texts, n) for n in (1, 2, 3)] == [
        {"share": 3 / 6, "n": 6}, {"share": 3 / 4, "n": 4}, {"share": 1.0, "n": 2}]
    assert text.distinct(["one"], 2) == {"share": None, "n": 0}


def test_novelty_leaves_empty_samples_out_and_does_not_mind_a_stray_blank():
    training_phrases = ["a red apple", "an old house"]
    samples = ["a red  apple ", "a red house", "", "  "]
    assert text.novelty(samples, training_phrases)["share"] == 1 / 2
    assert text.novelty(samples, training_phrases)["n"] == 2
    # pairs: a-red red-apple | a-red red-house: only red-house stands in no phrase.
    # "apple an" would, if phrases ran into each other.
    assert text.ngram_novelty(samples, training_phrases, 2)["share"] == 1 / 4
    assert text.ngram_novelty(["apple an"], training_phrases, 2)["share"] == 1


def test_duplicates_are_the_repetitions_only():
    """a a b a: two of four repeat an earlier one, and a comes three times."""
    assert text.duplicates(["a", "a ", "b", "a", ""]) == {
        "share": 0.5, "n": 4, "most_repeated": "a", "times": 3}


def longest_by_trying_all(sample, phrases):
    """Length of the longest stretch of sample in any of the phrases: every pair of positions."""
    pieces = (sample[i:j] for i in range(len(sample) + 1)
              for j in range(i, len(sample) + 1))
    return max(len(piece) for piece in pieces
               if any(piece == phrase[k : k + len(piece)]
                      for phrase in phrases for k in range(len(phrase) - len(piece) + 1)))


def test_the_longest_copied_span_is_the_one_that_brute_force_finds():
    rng = random.Random(11)
    for _ in range(60):
        phrases = ["".join(rng.choices("ab ", k=rng.randint(1, 14))).strip() or "b"
                   for _ in range(rng.randint(1, 7))]
        sample = "".join(rng.choices("abc ", k=rng.randint(0, 12)))
        found = text.copied_spans([sample], phrases)[0]
        tidy, known = text.tidy(sample), [text.tidy(phrase) for phrase in phrases]
        assert found["characters"] == longest_by_trying_all(tidy, known)
        assert found["words"] == longest_by_trying_all(
            tidy.split(), [phrase.split() for phrase in known])
        assert found["copied"] in tidy and any(found["copied"] in phrase for phrase in known)


def test_no_copied_span_runs_from_one_phrase_into_the_next():
    found = text.copied_spans(["one two three"], ["say one", "two three now"])[0]
    assert (found["words"], found["copied"], found["of"]) == (2, "two three", 13)


def test_copied_spans_of_a_large_training_set_take_no_quadratic_time():
    """40,000 words and 200 samples: trying every pair of positions would be 10^9 comparisons."""
    rng = random.Random(5)
    words = [f"w{i}" for i in range(300)]
    phrases = [" ".join(rng.choices(words, k=10)) for _ in range(4000)]
    found = text.copied_spans([*rng.sample(phrases, 200)], phrases)
    assert all(span["words"] == 10 for span in found)


def test_quantiles_are_values_that_occur():
    """Of 1 2 3 4 the half that is not above the median ends at 2; 90% needs all four."""
    assert text.quantiles([3, 1, 4, 2]) == {"0": 1, "0.1": 1, "0.25": 1, "0.5": 2, "0.75": 3,
                                            "0.9": 4, "1": 4}
    assert text.quantiles([])["0.5"] is None


def test_the_distance_of_two_distributions_is_how_far_things_must_be_moved():
    """{0, 1, 3} and {5, 6, 8}: each by 5. {0, 0, 4} and {0, 6}: repeated to six values each,
    0 0 0 0 4 4 and 0 0 0 6 6 6, the sorted pairs are (0 + 0 + 0 + 6 + 2 + 2) / 6 apart."""
    assert text.earth_mover([0, 1, 3], [8, 5, 6]) == pytest.approx(5)
    assert text.earth_mover([4, 0, 0], [6, 0]) == pytest.approx(10 / 6)
    assert text.earth_mover([2, 2], [2]) == 0 and text.earth_mover([], [1]) is None


def test_calibration_worked_out_by_hand():
    """.95 right, .85 wrong, .85 right, .15 wrong, 1.0 right, in ten bins: bin 9 holds .95 and 1
    (mean .975, right 1, off .025), bin 8 .85 .85 (right .5, off .35), bin 1 .15 (off .15).
    ECE = 2/5 .025 + 2/5 .35 + 1/5 .15 = .18."""
    measured = text.calibration([0.95, 0.85, 0.85, 0.15, 1.0], [1, 0, 1, 0, 1])
    assert measured["ece"] == pytest.approx(0.18) and measured["n"] == 5
    assert [row["n"] for row in measured["bins"]] == [0, 1, 0, 0, 0, 0, 0, 0, 2, 2]
    assert text.calibration([], [])["ece"] is None


def test_ece_tells_the_sure_from_the_honest():
    """20,000 draws that come true as often as said: the error of a bin is about
    sqrt(.25 / 2000) = .011, and their mean lies below .02 by far. Boasting by .2 gives .2."""
    rng = np.random.default_rng(2)
    said = rng.uniform(0.3, 0.8, 20_000)
    honest = rng.uniform(size=20_000) < said
    assert text.calibration(said, honest)["ece"] < 0.02
    assert text.calibration(said + 0.2, honest)["ece"] == pytest.approx(0.2, abs=0.02)


# ---- the picture ---------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


def parse(picture):
    return ElementTree.fromstring(picture)


def ruler(root, axis, log=False):
    """What a place on this axis means, read off the labels: a function of a coordinate."""
    marks = []
    for mark in root.iter(f"{SVG}text"):
        if mark.get("class") == f"tick-{axis}":
            place = float(mark.get("x")) if axis == "x" else float(mark.get("y")) - 4
            marks.append((place, float(mark.text)))
    (a, first), (b, last) = marks[0], marks[-1]
    if not log:
        return lambda place: first + (place - a) / (b - a) * (last - first)
    return lambda place: first * (last / first) ** ((place - a) / (b - a))


def drawn(root, kind, log=False):
    """[[(step, loss), ...], ...]: the strokes of a line, in the units of the labels."""
    x, y = ruler(root, "x"), ruler(root, "y", log)
    line = next(p for p in root.iter(f"{SVG}path") if f"line {kind} " in p.get("class", "")
                and "h26" not in p.get("d"))
    return [[(x(float(a)), y(float(b))) for a, b in re.findall(r"([\d.]+) ([\d.]+)", stroke)]
            for stroke in line.get("d").split("M")[1:]]


def a_run(name="r", factor=1.0, **holes):
    metrics = [{"step": step, "train_loss": factor * (7 - step / 30), "val_loss":
                factor * (7.5 - step / 40)} for step in range(0, 181, 20)]
    for where, value in holes.items():
        metrics[int(where[1:])]["val_loss"] = value
    return metrics, {"run_id": name, "train": plot.points_of(metrics, "train_loss")[0],
                     "val": plot.points_of(metrics, "val_loss")[0]}


@pytest.mark.parametrize("log", [False, True])
def test_every_point_lies_where_its_numbers_say(log):
    """Coordinates are rounded to 0.01 of 340 units of height: 0.01% of a linear axis."""
    metrics, run = a_run()
    root = parse(plot.draw([run], log))
    for kind in ("train", "val"):
        (stroke,) = drawn(root, kind, log)
        expected = [(row["step"], row[f"{kind}_loss"]) for row in metrics]
        assert stroke == [pytest.approx(point, rel=2e-3, abs=0.02) for point in expected]
    ring = next(c for c in root.iter(f"{SVG}circle") if "best" in c.get("class"))
    x, y = ruler(root, "x"), ruler(root, "y", log)
    assert x(float(ring.get("cx"))) == pytest.approx(180, abs=0.1)
    assert y(float(ring.get("cy"))) == pytest.approx(3.0, rel=2e-3)


def test_a_value_that_is_not_finite_breaks_the_line_and_is_named(tmp_path, monkeypatch, capsys):
    metrics, run = a_run(_3=float("nan"), _6=None)
    strokes = drawn(parse(plot.draw([run])), "val")
    assert [len(stroke) for stroke in strokes] == [3, 2, 3]
    folder = tmp_path / "runs" / "r"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    rows = [*map(json.dumps, metrics), '{"step": 999, "val_l']  # torn by a crash
    (folder / "metrics.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plot-loss", "--run-id", "r"]) == 0
    assert "val loss not finite and left out at step 60, 120" in capsys.readouterr().out
    picture = (folder / "loss.svg").read_text("utf-8")
    assert "left out at step 60, 120" in picture and "999" not in picture


def test_the_same_metrics_give_the_same_bytes_whatever_the_run_is_called():
    name = 'a<b>&"c'
    runs_ = [a_run(name)[1], a_run("other", 2.0)[1]]
    picture = plot.draw(runs_, True, marks=[("bigram", 4.0), ("far", 90.0)])
    assert picture == plot.draw([a_run(name)[1], a_run("other", 2.0)[1]], True,
                                marks=[("bigram", 4.0), ("far", 90.0)])
    assert name in "".join(parse(picture).itertext()) and "bigram 4.000" in picture
    assert "far 90" not in picture  # a mark that would squeeze the curves is left out
    assert "prefers-color-scheme: dark" in picture


@pytest.mark.parametrize("values", [(2.0, 2.0), (0.001, 5e9), (1.3, 1.31), (3.0, 8.0), (7, 1e3)])
def test_ticks_enclose_the_values_and_stay_few(values):
    for ticks in (plot.nice_ticks(*values), plot.log_ticks(*values)):
        assert ticks == sorted(set(ticks)) and 2 <= len(ticks) <= 15
        assert ticks[0] <= values[0] and ticks[-1] >= values[1]
    assert all(tick > 0 for tick in plot.log_ticks(*values))


def test_one_point_and_no_point():
    picture = plot.draw([{"run_id": "r", "train": [None], "val": [(0, 3.5)]}])
    assert len(list(parse(picture).iter(f"{SVG}circle"))) == 2  # the point, the ring
    with pytest.raises(ValueError, match="no finite loss"):
        plot.draw([{"run_id": "r", "train": [None], "val": []}])


# ---- the leaderboard -----------------------------------------------------------------------------


def made_up(runs_dir, run_id, seed=1, loss=3.0, status="done", hash="h1", vocab=300, **settings):
    """A finished run's folder, with what a leaderboard reads of it."""
    folder = runs_dir / run_id
    folder.mkdir(parents=True)
    settings = {"n_layer": 2, "dropout": 0.1, **settings}
    (folder / "config.json").write_text(json.dumps(
        {"seed": seed, "data": {"path": "p.txt"}, "tokenizer": {"vocab_size": vocab},
         "model": settings}))
    (folder / "summary.json").write_text(json.dumps(
        {"status": status, "best_val_loss": loss, "best_val_bpb": loss and loss * 100 / vocab,
         "best_step": 40, "seconds": 2.0, "parameters": 1000, "vocab_size": vocab, "seed": seed,
         "data_hash": hash, "error": "the loss is nan\nTry less"}))
    return folder


@pytest.mark.parametrize("p, df, t", [
    (0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 4, 2.776), (0.975, 10, 2.228),
    (0.975, 120, 1.980), (0.95, 5, 2.015), (0.5, 3, 0.0)])
def test_t_quantiles_are_those_of_the_printed_tables(p, df, t):
    assert leaderboard.t_quantile(p, df) == pytest.approx(t, abs=1e-3)


def test_welch_worked_out_by_hand():
    """1 2 3 and 4 6 8 10: variances 1 and 20/3, so se^2 = 1/3 + 5/3 = 2 and
    df = 4 / ((1/9)/2 + (25/9)/3) = 4.0755. The t tables have 2.776 for 4, 2.571 for 5 degrees,
    so t is about 2.756 there, and the interval 5 +- 1.4142 * 2.756 = 5 +- 3.898."""
    difference, low, high = leaderboard.welch([1, 2, 3], [4, 6, 8, 10])
    assert difference == 5 and (low, high) == pytest.approx((1.102, 8.898), abs=0.01)
    assert leaderboard.welch([1], [2, 3]) is None


def test_groups_are_runs_that_differ_in_the_seed_only(tmp_path, capsys):
    losses = {"a": [3.0, 3.2, 3.1], "b": [2.5, 2.75]}
    for name, values in losses.items():
        for seed, loss in enumerate(values):
            made_up(tmp_path, f"{name}{seed}", seed, loss, n_layer={"a": 2, "b": 4}[name])
    boards, left_out = leaderboard.rank(tmp_path)
    ((first, second),) = [board["groups"] for board in boards]
    assert boards[0]["keys"] == ["model.n_layer"] and left_out == []
    for group, values in ((first, losses["b"]), (second, losses["a"])):
        assert group["mean"] == pytest.approx(statistics.mean(values))
        assert group["sd"] == pytest.approx(statistics.stdev(values))
        assert (group["low"], group["high"], group["n"]) == (min(values), max(values), len(values))
    # 95% of the difference .475 with se^2 = .01/3 + .03125/2, df 1.44: it reaches below zero.
    assert "no winner" in leaderboard.verdicts([first, second])[0]
    assert cli.main(["leaderboard", "--runs-dir", str(tmp_path), "--csv", "--json"]) == 0
    said = capsys.readouterr().out
    assert "dropout" not in said and re.search(r"1 +4 +2 +2\.6250 +0\.1768 ", said)
    rows = json.loads((tmp_path / "leaderboard.json").read_text())
    assert [row["model.n_layer"] for row in rows] == [4, 2]
    assert (tmp_path / "leaderboard.csv").read_text().count("\n") == 3


def test_a_difference_beyond_the_spread_is_called_one():
    """Means .5 apart, standard deviations .01: 50 of them."""
    groups = [{"values": [2.0, 2.01, 1.99], "mean": 2.0, "n": 3},
              {"values": [2.5, 2.51, 2.49], "mean": 2.5, "n": 3}]
    # se^2 = 2 (.0001 / 3), df 4: .5 +- 2.776 * .00816 = .4773 to .5227
    said = "2 lies 0.5000 above 1, 95% interval 0.4773 to 0.5227 (Welch, 3 and 3 seeds): more than"
    assert leaderboard.verdicts(groups)[0].startswith(said)
    one_seed = [{"values": [2.0], "mean": 2.0, "n": 1}, {"values": [2.5], "mean": 2.5, "n": 1}]
    assert "spread is not known" in leaderboard.verdicts(one_seed)[0]


def test_what_cannot_be_ranked_is_named_and_stops_nothing(tmp_path, capsys):
    made_up(tmp_path, "good", 1, 2.0)
    made_up(tmp_path, "twin", 1, 2.0)
    made_up(tmp_path, "failed", 2, 0.1, status="failed")
    made_up(tmp_path, "under_way", 3, 0.2, status="running")
    made_up(tmp_path, "no_loss", 4, None)
    (made_up(tmp_path, "torn", 5) / "summary.json").write_text('{"status": "do')
    (made_up(tmp_path, "list", 6) / "config.json").write_text("[1]")
    (made_up(tmp_path, "young", 7) / "summary.json").unlink()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "loss.svg").write_text("x")
    assert cli.main(["leaderboard", "--runs-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "1 finished run, 8 left out" in said and "0.1000" not in said
    ranked, _, rest = said.partition("not ranked:")
    for name, why in (("twin", "same config and seed as good"), ("failed", "failed (the loss is"),
                      ("under_way", "running"), ("no_loss", "None"), ("torn", "damaged"),
                      ("list", "no JSON object"), ("young", "unfinished"),
                      ("foreign", "config.json")):
        assert re.search(rf"^  {name} .*{re.escape(why)}", rest, re.MULTILINE), name
        assert name not in ranked


def test_losses_per_token_of_two_tokenizers_are_not_compared(tmp_path, capsys):
    """Longer tokens are fewer, so each costs more: 3.3 nats on 400 pieces is less per byte here
    (.825) than 3.0 on 300 (1.0), and wins."""
    made_up(tmp_path, "small", 1, 3.0, vocab=300)
    made_up(tmp_path, "large", 1, 3.3, vocab=400)
    (board,) = leaderboard.show(tmp_path)
    assert [group["run_ids"] for group in board["groups"]] == [["large"], ["small"]]
    assert board["by"] == "best_val_bpb" and "tokenizers differ" in capsys.readouterr().out


def test_runs_on_other_phrases_get_a_table_of_their_own(tmp_path, capsys):
    made_up(tmp_path, "a", 1, 3.0, hash="h1")
    made_up(tmp_path, "b", 1, 2.0, hash="h2")
    assert len(leaderboard.show(tmp_path)) == 2
    assert "2 different sets of phrases" in capsys.readouterr().out


# ---- the grid of a sweep -------------------------------------------------------------------------


def test_a_grid_is_the_cross_product_with_the_refused_points_named():
    base = config.RunConfig()
    grid = sweep.read_grid(["model.positional_encoding=rope,none",
                            "model.attention_enabled=true,false"], base)
    points = sweep.plan(base, grid, [1, 5], "pos")
    assert len(points) == 8 and len({point.run_id for point in points}) == 8
    assert [p.run_id for p in points[:2]] == [
        "pos-positional_encoding=rope-attention_enabled=true-s1",
        "pos-positional_encoding=rope-attention_enabled=true-s5"]
    no_sense = [point for point in points if point.reason]
    assert [point.settings["seed"] for point in no_sense] == [1, 5]
    assert all("acts inside attention" in point.reason for point in no_sense)
    assert points[-1].config["seed"] == 5 and points[-1].config["model.attention_enabled"] is False


def test_the_settings_of_a_point_are_read_back_as_they_were_written():
    base = config.RunConfig()
    grid = sweep.read_grid(["train.lr=1e-3,0.002", "model.n_kv_head=none,2", "train.steps=30",
                            'data.path="a,b.txt",c.txt'], base)
    assert grid == {"train.lr": [0.001, 0.002], "model.n_kv_head": [None, 2], "train.steps": [30],
                    "data.path": ["a,b.txt", "c.txt"]}
    for point in sweep.plan(base, grid, [3], "n"):
        again = config.flatten(config.apply_overrides(base, point.overrides()))
        assert again == point.config and runs.Run("runs", point.run_id)  # a name a run may have


def test_run_ids_stay_apart_when_names_are_long_or_odd():
    ids = {sweep.run_id_of("n", {"data.path": path, "seed": 1})
           for path in ("a/b", "a:b", "a_b", "x" * 200 + "1", "x" * 200 + "2")}
    assert len(ids) == 5 and all(len(run_id) < 140 and "/" not in run_id for run_id in ids)


@pytest.mark.parametrize("specs, seeds, said", [
    (["model.n_layers=1,2"], None, "--grid model.n_layers=1: there is no setting 'model.n_layers'. "
     "The nearest is model.n_layer"),
    (["data.path=none.txt,phrases.txt"], None, "data.path=none.txt: there is no such file"),
    (["model.n_layer=2,two"], None, "whole number"),
    (["model.n_layer"], None, "KEY=VALUE,VALUE"),
    (["model.n_layer=1,,2"], None, "KEY=VALUE,VALUE"),
    (["model.n_layer=2,2"], None, "twice"),
    (["train.lr=0.1,1e-1"], None, "twice"),
    (["model.n_layer=1", "model.n_layer=2"], None, "twice"),
    (["seed=1,2"], None, "--seeds"),
    ([], "1,x", "whole numbers"),
    ([], "3,3", "twice")])
def test_a_mistake_in_the_grid_ends_it_before_it_begins(here, capsys, specs, seeds, said):
    words = [word for spec in specs for word in ("--grid", spec)]
    words += ["--seeds", seeds] if seeds else []
    before = sorted((here / "runs").iterdir())
    assert said in refused(capsys, "sweep", "--config", "configs/default.py", *words)
    assert sorted((here / "runs").iterdir()) == before


def test_seeds_do_not_change_a_sweeps_name_and_the_grid_does():
    base = config.RunConfig()
    name = sweep.default_name(base, {"model.n_layer": [1, 2]})
    assert name == sweep.default_name(config.apply_overrides(base, ["seed=3"]),
                                      {"model.n_layer": [1, 2]})
    assert name != sweep.default_name(base, {"model.n_layer": [1, 3]})


def test_the_cores_are_shared_out(monkeypatch):
    monkeypatch.setattr(sweep.os, "sched_getaffinity", lambda _: range(8), raising=False)

    def runs_with(threads, count):
        return [sweep.Point("r", {}, {"train.threads": threads})] * count

    asked = [(None, 1, 12), (None, 1, 5), (3, 1, 12), (20, 1, 12), (None, 3, 12), (None, 20, 9)]
    assert [sweep.share_cores(jobs, runs_with(threads, count)) for jobs, threads, count in asked] \
        == [(8, 1), (5, 1), (3, 1), (12, 1), (2, 3), (1, 20)]
    with pytest.raises(UserError, match="--jobs 0"):
        sweep.share_cores(0, [])


def test_two_sweeps_never_train_one_run_at_a_time(tmp_path):
    if files.fcntl is None:
        pytest.skip("there are no file locks on this system")
    with open(tmp_path / "log", "a+") as first, open(tmp_path / "log", "a+") as second:
        assert files.lock(first) and not files.lock(second)


def test_a_run_that_is_being_trained_is_not_resumed_beside_it(here, tmp_path, capsys):
    if files.fcntl is None:
        pytest.skip("there are no file locks on this system")
    shutil.copytree(here / "runs", tmp_path / "runs")
    (tmp_path / "runs" / "one" / "summary.json").write_text('{"status": "running"}')
    words = ["train", "--runs-dir", str(tmp_path / "runs"), "--resume", "one"]
    with open(tmp_path / "runs" / "one" / "config.json") as other:
        assert files.lock(other)
        assert "another process is training run one" in refused(capsys, *words)
    assert cli.main(words) == 0


def test_a_sweeps_name_stands_for_one_base_config(here, tmp_path):
    """The runs of a sweep that wait for their turn read the base from one file."""
    base = config.load_config("configs/default.py")
    files.write_json(tmp_path / "s.config.json", config.to_dict(base))
    changed = config.apply_overrides(base, ["train.lr=0.5", "seed=9"])
    with pytest.raises(UserError, match=r"train.lr=0.005, and here it is 0.5.*another --name"):
        sweep.require_same(tmp_path / "s.config.json", changed, {})
    sweep.require_same(tmp_path / "s.config.json", changed, {"train.lr": [0.5]})
    sweep.require_same(tmp_path / "new.config.json", changed, {})


def test_a_sweep_whose_last_run_failed_does_not_promise_to_go_on(tmp_path, monkeypatch, capsys):
    lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    base = config.load_config("configs/default.py")
    [point] = sweep.plan(base, {}, [7], "s")
    folder = tmp_path / "runs" / point.run_id
    folder.mkdir(parents=True)
    files.write_json(folder / "config.json", config.to_dict(base))
    files.write_json(folder / "sweep.json", {"sweep": "s"})
    files.write_json(folder / "summary.json", {"status": "failed", "error": "nan\n  Try less"})
    assert cli.main(["sweep", "--name", "s"]) == 1
    said = capsys.readouterr().out
    assert "1 of 1 runs did not finish" in said
    assert "goes on" not in said and "failed before, and would again: nan" in said
    assert cli.main(["leaderboard", "--sweep", "s"]) == 0
    assert "status is failed (nan)\n" in capsys.readouterr().out


def test_several_values_may_follow_one_flag():
    args = cli.make_parser("sweep").parse_args(
        ["sweep", "--grid", "a=1,2", "b=3", "--set", "c=4", "d=5", "--grid", "e=6"])
    assert args.grid == ["a=1,2", "b=3", "e=6"] and args.overrides == ["c=4", "d=5"]


def test_a_run_of_other_settings_is_not_taken_for_a_point_of_the_grid(here):
    base = config.load_config("configs/default.py")
    rope = config.flatten(config.apply_overrides(base, ["model.positional_encoding=rope"]))
    assert sweep.state_of(here / "runs" / "one", rope)[0] == "done"
    with pytest.raises(UserError, match="positional_encoding=rope, and this sweep wants learned"):
        sweep.state_of(here / "runs" / "one", config.flatten(base))


# ---- the sweep as a process ----------------------------------------------------------------------


def rows_of(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_sweep_survives_a_killed_run_and_ctrl_c_and_goes_on(tmp_path):
    """A 2 x 2 grid of which two combinations make no sense: two runs at a time. One is killed,
    then the sweep is stopped; the same command finishes both, and then finds nothing to do."""
    lay_out(tmp_path)
    words = ["sweep", "--config", "configs/default.py", "--grid",
             "model.positional_encoding=rope,alibi", "--grid", "model.attention_enabled=true,false",
             "--set", "train.steps=60", "--set", "train.eval_every=1", "--jobs", "2",
             "--name", "s"]
    first, second = (tmp_path / "runs" / f"s-positional_encoding={kind}-attention_enabled=true-s7"
                     for kind in ("rope", "alibi"))
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tp", *words], cwd=tmp_path, stdout=log,
            stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(PLAYGROUND)})
    try:
        wait_for(lambda: len(rows_of(first)) > 2, process)
        children = psutil.Process(process.pid).children()
        next(child for child in children if first.name in child.cmdline()).kill()
        wait_for((second / "checkpoints" / "last.pt").exists, process)
        wait_for(lambda: "SIGKILL" in (tmp_path / "log").read_text(), process)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
    assert not any(child.is_running() for child in children)
    said = (tmp_path / "log").read_text()
    assert said.count("acts inside attention") == 2 and "killed by SIGKILL" in said
    assert "2 runs left: the same command goes on" in said
    assert json.loads((second / "summary.json").read_text())["status"] == "stopped"

    done = tp(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 are finished, 2 go on, 0 begin" in done.stdout
    assert "2 finished runs, 0 left out" in done.stdout
    for folder in (first, second):
        assert "resumed at step" in (folder / "train.log").read_text()
        # Each step once, also where the run was cut in two.
        assert [row["step"] for row in rows_of(folder)] == list(range(61))

    again = tp(*words, cwd=tmp_path)
    assert again.returncode == 0 and "2 are finished, 0 go on, 0 begin" in again.stdout
    assert (first / "train.log").read_text().count("----") == 2


# ---- compare and report --------------------------------------------------------------------------


def test_compare_shows_what_differs_and_nothing_else(here):
    done = tp("compare", "--runs-dir", "runs", "--run-ids", "one,two", "--prompt", "a",
              "--n-samples", "3", cwd=here)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    settings = lines[lines.index(next(line for line in lines if line.startswith("setting"))) + 1 :]
    assert [line.split() for line in settings[:2]] == [
        ["model.mlp_enabled", "true", "false"],
        ["model.positional_encoding", "rope", "learned"]]
    assert "settings are equal" in settings[2] and "n_layer" not in done.stdout
    summaries = [json.loads((here / "runs" / name / "summary.json").read_text())
                 for name in ("one", "two")]
    row = next(line for line in lines if line.startswith("best val loss"))
    assert row.split()[-2:] == [f"{summary['best_val_loss']:.4f}" for summary in summaries]
    texts = lines[next(i for i, line in enumerate(lines) if line.startswith("samples:")) + 1 : -1]
    assert len(texts) >= 5 and max(map(len, texts)) <= 90


def test_texts_side_by_side_fit_the_terminal():
    long = "word " * 30
    lines = tables.columns(["left", "right"], [[long, "short"], ["x", long]], width=61)
    assert max(map(len, lines)) <= 61 and len(lines) > 10
    words = " ".join(lines).split()
    assert words.count("word") == 60 and words.count("short") == 1
    assert tables.columns(["a", "b"], [["one", "two"]], width=20) == ["a: one", "b: two"]


def test_unknown_runs_are_answered_with_the_nearest_and_the_list(here, capsys):
    for words in (["compare", "--run-ids", "one,tow"], ["plot-loss", "--run-id", "tow"]):
        said = refused(capsys, *words)
        assert "Did you mean two?" in said and "\n  one\n  two" in said
    assert "two different runs" in refused(capsys, "compare", "--run-ids", "one,one")
    assert "cannot read" in refused(capsys, "sweep", "--config", "nowhere.py")
    assert "no run of the sweep 'x'" in refused(capsys, "leaderboard", "--sweep", "x")
    assert "cannot write runs (Is a directory)" in refused(capsys, "leaderboard", "--csv", "runs")
    assert "'' names 0 runs" in refused(capsys, "plot-loss", "--run-id", "")
    assert "--name ''" in refused(capsys, "sweep", "--name", "")
    with pytest.raises(SystemExit) as ended:
        cli.main(["leaderboard", "--by", "beauty"])
    assert ended.value.code == 2


def test_a_checkpoint_that_is_gone_is_said_in_its_column(here, tmp_path, capsys):
    shutil.copytree(here / "runs", tmp_path / "runs")
    (tmp_path / "runs" / "two" / "checkpoints" / "best_val.pt").unlink()
    words = ["compare", "--runs-dir", str(tmp_path / "runs"), "--run-ids", "one,two"]
    assert cli.main(words) == 0
    assert "best_val.pt" in capsys.readouterr().out
    (tmp_path / "runs" / "two" / "config.json").write_text("{")
    (tmp_path / "runs" / "two" / "summary.json").write_text("[]")
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "config.json is damaged" in said and "two: " in said and "no JSON object" in said


@pytest.mark.parametrize("line", ["5", "null", "[1]", '{"step": [1], "val_loss": "x"}', "[" * 9999,
                                  '{"step": 1, "val_loss": 1' + "0" * 400 + "}", "{}"])
def test_a_damaged_line_of_metrics_is_one_message_or_left_out(line, here, tmp_path, capsys):
    shutil.copytree(here / "runs", tmp_path / "runs")
    folder, words = tmp_path / "runs" / "one", ["--runs-dir", str(tmp_path / "runs")]
    for name in ("metrics.jsonl", "samples.jsonl"):
        (folder / name).write_text(line + "\n" + (folder / name).read_text())
    (folder / "summary.json").write_text("[]" if line == "5" else '{"vocab_size": [1]}')
    for command in (["report", "--run-id", "one", "--n-samples", "1"], ["leaderboard"],
                    ["plot-loss", "--run-id", "one"], ["compare", "--run-ids", "one,two"],
                    ["train", "--resume", "one"]):
        code = cli.main([*command, *words])
        assert code in (0, 2) and bool(capsys.readouterr().err) == (code == 2), command


def test_report_as_the_seed_calls_it(here):
    done = tp("report", "--runs-dir", "runs", "--run-id", "one", "--unconditional", "--n-samples",
              "20", "--max-new-tokens", "8", "--temperature", "0.9", "--top-p", "0.9", cwd=here)
    assert done.returncode == 0, done.stderr
    (path,) = (here / "runs" / "one" / "reports").glob("report-best_val-*.json")
    assert f"wrote {path.relative_to(here)}" in done.stdout
    told = json.loads(path.read_text("utf-8"))
    summary = json.loads((here / "runs" / "one" / "summary.json").read_text())
    assert told["step"] == summary["best_step"] and len(told["samples"]) == 20
    assert told["losses"]["val"]["loss"] == pytest.approx(summary["best_val_loss"], rel=1e-5)
    assert told["losses"]["val"]["bpb"] == pytest.approx(summary["best_val_bpb"], rel=1e-5)
    assert told["losses"]["ladder"] == pytest.approx(summary["ladder"])
    assert told["losses"]["gap"] == pytest.approx(
        told["losses"]["val"]["loss"] - told["losses"]["train"]["loss"])
    measures, texts = told["measures"], [sample["text"] for sample in told["samples"]]
    phrases = (here / "phrases.txt").read_text().splitlines()
    held_out = set(phrases) - set(data.load_split(config.load_config(
        here / "runs" / "one" / "config.json").data)[0])
    assert measures["distinct_1"]["share"] == pytest.approx(
        len({w for t in texts for w in t.split()}) / sum(len(t.split()) for t in texts))
    assert measures["new_phrases"]["n"] == sum(bool(t.strip()) for t in texts)
    assert measures["ended"]["n"] == 20 and measures["empty"]["n"] == 20
    # Validation phrases are kept out of training: none of them can be an old one.
    assert told["validation_phrases"]["new_phrases"]["share"] == 1 and held_out
    assert sum(row["n"] for row in told["losses"]["calibration"]["bins"]) == (
        told["losses"]["val"]["tokens"])
    for part in ("nats/token", "distinct-1", "longest copy", "ECE", "95% interval", "median"):
        assert part in done.stdout


def test_a_models_recitation_is_found_out():
    """Four samples: a training phrase, the same again, half of one, and one that is empty."""
    train = ["the cat sleeps at noon", "a bird sings by the sea"]
    samples = [{"text": t, "ended": t != ""} for t in
               (train[0], train[0], "a bird sings at night", "")]
    told = report.measure_samples(samples, train, ["my aunt waits"], seed=1)
    measures = told["measures"]
    assert (measures["new_phrases"]["share"], measures["new_phrases"]["n"]) == (1 / 3, 3)
    assert measures["longest_copy"]["copied"] == train[0]
    assert measures["longest_copy_words"]["words"] == 5
    assert measures["duplicates"]["share"] == pytest.approx(1 / 3)
    assert measures["empty"]["share"] == 1 / 4 and measures["ended"]["share"] == 3 / 4
    assert [sample["new"] for sample in told["samples"][:3]] == [False, False, True]
    # of 22, 22 and 21 characters 22, 22 and "a bird sings " are copied
    assert measures["median_copied_share"] == 1


def test_predictions_agree_with_the_models_own_loss(here):
    import torch

    model, tokenizer, settings, _ = runs.Run("runs", "two").load_model("last")
    _, val = data.load_split(settings.data)
    batches = data.ordered_batches(data.to_rows(val, tokenizer, 16), 7)
    nats, confidence, right = report.predictions(model, batches)
    total, tokens = training.evaluate(model, batches)
    assert len(nats) == len(confidence) == len(right) == tokens
    assert float(nats.sum()) == pytest.approx(total, rel=1e-5)
    # The likeliest token is right exactly where its probability is that of the one which came.
    assert (np.isclose(np.exp(-nats), confidence) == right).mean() > 0.999
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()  # all logits 0: every token has 1 / V
    nats, confidence, _ = report.predictions(model, batches)
    assert nats == pytest.approx(math.log(tokenizer.vocab_size), rel=1e-5)
    assert confidence == pytest.approx(1 / tokenizer.vocab_size, rel=1e-4)


def test_a_reader_that_has_enough_is_no_traceback(here, monkeypatch):
    """As `tp generate --run-id two | head -1`."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert cli.main(["generate", "--run-id", "two"]) == 141


def test_no_samples_is_no_crash_and_a_strange_text_cannot_command_the_terminal(here, capsys,
                                                                               monkeypatch):
    assert cli.main(["report", "--run-id", "two", "--checkpoint", "last", "--n-samples", "0"]) == 0
    assert "ECE" in capsys.readouterr().out
    assert tables.visible("a\x1b[2Jb\nc\u202e") == "a\\x1b[2Jb\\nc\\u202e"
    assert "--temperature" in refused(capsys, "report", "--run-id", "two", "--temperature", "-1")
    assert compare.short_labels(["a", "x" * 40]) == ["A", "B"]
    monkeypatch.setattr(sample, "generate", lambda *_, **__: iter(["tea\x1b[2J\nfor two"]))
    assert cli.main(["generate", "--run-id", "two"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["tea\\x1b[2J\\nfor two"]
