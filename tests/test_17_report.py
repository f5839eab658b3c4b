"""17_report.py: what is gathered, what is named as missing, pictures, escaping, and two runs.

The run that is reported on is made here: tiny models with random weights on the 256 bytes, and the
files that the other scripts would have left, with numbers that appear nowhere else.
"""

import base64
import copy
import hashlib
import html
import html.parser
import json
import math
import os
import random
import re
import socket
import subprocess
import time
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from conftest import load
from safetensors.torch import save_file

report = load("17_report")
CPU = torch.device("cpu")
QUICK = {"ask": ("Who?", "2*3?"), "go_on": ("The sky",), "max_tokens": 5}


# ---- a run ---------------------------------------------------------------------------------------


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_tokenizer(folder):
    ranks = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    specials = {name: 256 + i for i, name in enumerate(report.SPECIAL_TOKENS)}
    about = {"pattern": r"(?s:.)", "special_tokens": specials}
    about["sha256"] = report.Tokenizer.identity(ranks, about["pattern"], specials)
    write_json(folder / "config.json", about)
    (folder / "tokenizer.tiktoken").write_bytes(ranks)
    return about["sha256"]


METRICS = {
    "base": [{"step": i * 10, "loss": 5.5 - i, "val_bpb": 2.5 - i / 4 if i % 2 else None}
             for i in range(5)] + [{"step": 50, "val_bpb": 1.125, "ladder_bigram": 2.25}],
    "sft": [{"step": i, "loss": 3.5 / (i + 1), "val_loss": 4.5 / (i + 1)} for i in range(8)],
    "rl": [{"step": 0, "accuracy": 0.0625}]
    + [{"step": i, "reward": i / 10, "tool_use": i / 20, "accuracy": None} for i in range(1, 9)],
}
PIPELINE = [
    {"stage": "check", "seconds": 2.5, "peak_mb": 301, "metric": "ranks", "before": None,
     "after": 1, "n": 1},
    {"stage": "pretrain", "seconds": 100.25, "peak_mb": 655, "metric": "val bits per byte",
     "before": 1.375, "after": 0.4375, "n": 54321},
    {"stage": "sft", "seconds": 60, "peak_mb": 912, "metric": "held-out right", "before": 0.0625,
     "after": 0.9375, "n": "14.0 MB"},
    {"stage": "rl", "seconds": 40.5, "peak_mb": 1017, "metric": "solved", "before": 0.03125,
     "after": 0.96875, "n": 400},
]


def write_stage(folder, sha256, number):
    torch.manual_seed(number)
    model = report.GPT(report.GPTConfig(sequence_len=128, vocab_size=265, n_layer=1, n_head=2,
                                        n_kv_head=1, n_embd=16))
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    name = folder.name
    write_json(folder / "config.json", {
        "model": vars(model.config), "tokenizer_sha256": sha256, "step": 100 + number,
        "metrics": {}, "script": {"data_dir": "data", "matrix_lr": 0.0125 * number, "seed": 77},
        "versions": {"torch": "2.0.7"}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS[name]))
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    write_json(folder / "eval.json", {
        "stage": name, "made_from": {"weights": weights}, "scores": {
            "facts": {"kind": "chat", "score": 0.25 * number, "n": 123, "chance": 0.125,
                      "low": 0.25 * number - 0.1, "high": 0.25 * number + 0.1},
            "bits per byte, val": {"kind": "bpb", "score": 0.515625, "n": 4567, "chance": 3.5}}})


def make_run(folder):
    folder.mkdir()
    sha256 = write_tokenizer(folder / "tokenizer")
    for number, name in enumerate(("base", "sft", "rl"), 1):
        write_stage(folder / name, sha256, number)
    write_json(folder / "pipeline.json", PIPELINE)
    return folder


@pytest.fixture
def run_folder(tmp_path):
    return make_run(tmp_path / "one")


def config(folder, **changes):
    return report.Config(**{"data_dir": folder, **QUICK, **changes})


def collect(folder, **changes):
    return report.collect_run(config(folder, **changes), folder, CPU)


FLAGS = ["--max-tokens", "5", "--device-type", "cpu"]


def written(folder, *flags):
    """(exit code, report.html, report.md) of the command on a folder."""
    code = report.main(["--data-dir", str(folder), *FLAGS, *flags])
    return (code, (folder / "report/report.html").read_text("utf-8"),
            (folder / "report/report.md").read_text("utf-8"))


# ---- a whole run ---------------------------------------------------------------------------------


def test_a_run_is_reported_whole(run_folder, capsys):
    code, page, text = written(run_folder, "--stages", "base", "sft", "rl")
    out = capsys.readouterr().out
    assert code == 0 and "missing" not in out and "Missing" not in page + text
    assert "all stages together took 3 min 23 s" in out  # 2.5 + 100.25 + 60 + 40.5
    assert out.splitlines()[-2:] == [
        "result: stages with a model in the report 0 -> 3 (n=3)", "next: python edu/15_chat.py"]
    for word in ("Who are you?", "3 min 23 s", "1.375 \u2192 0.4375", "0.03125 \u2192 0.9688",
                 "1,017", "54,321", "14.0 MB", "0.250 (0.15..0.35)", "0.750 (0.65..0.85)", "0.516",
                 "4,567", "--matrix-lr", "0.0375", "2.0.7", "102",
                 report.platform.python_version(), torch.__version__):
        assert word in html.unescape(page), word
        assert word in html.unescape(text), word


def test_what_is_read_is_what_was_written(run_folder):
    run = collect(run_folder, stages=("base", "sft", "rl"))
    assert run["missing"] == [] and json.loads(json.dumps(run)) == run
    assert run["pipeline"] == PIPELINE and report.total_seconds(run) == 203.25
    assert run["stages"]["base"]["curves"] == {
        "loss": [[0, 5.5], [10, 4.5], [20, 3.5], [30, 2.5], [40, 1.5]],
        "val_bpb": [[10, 2.25], [30, 1.75], [50, 1.125]], "ladder_bigram": [[50, 2.25]]}
    assert run["stages"]["rl"]["curves"]["accuracy"] == [[0, 0.0625]]
    assert run["stages"]["sft"]["step"] == 102
    # 265 tokens x 16 twice, and 4 + 2 * 4 * 4 squares of 16 x 16 less half the keys and values
    assert run["stages"]["rl"]["params"] == 2 * 265 * 16 + (1 + 0.5 + 0.5 + 1 + 4 + 4) * 256


def test_samples_are_the_likeliest_tokens_in_the_form_of_a_chat(run_folder):
    """The same by a loop without a cache; the format spelled out in bytes and special ids."""
    tokenizer = report.Tokenizer.from_dir(run_folder / "tokenizer")
    model, _ = report.load_checkpoint(run_folder / "sft", tokenizer, CPU)
    special = tokenizer.encode_special
    prompts = [[256, special("<|user_start|>"), *b"Who?", special("<|user_end|>"),
                special("<|assistant_start|>")], [256, *b"The sky"]]
    stops = {256, special("<|assistant_end|>")}
    samples = collect(run_folder)["stages"]["sft"]["samples"]
    for ids, sample in zip(prompts, (samples[0], samples[2])):
        new = []
        while len(new) < 5 and not stops & set(new):
            logits = model(torch.tensor([ids + new]))[0, -1]
            new.append(int(logits.argmax()))
        assert sample == report.sample_parts(new, tokenizer, stops)


def test_a_call_of_the_calculator_is_a_part_of_its_own(run_folder):
    tokenizer = report.Tokenizer.from_dir(run_folder / "tokenizer")
    call, called, out, end = (tokenizer.encode_special(f"<|{name}|>") for name in
                              ("python_start", "python_end", "output_start", "output_end"))
    stop = tokenizer.encode_special("<|assistant_end|>")

    def parts(*tokens):
        return report.sample_parts(list(tokens), tokenizer, {stop})

    assert parts(*b"is ", call, *b"6*7", called, out, *b"42", end, *b"42.", stop) == [
        ["text", "is "], ["call", "6*7 = 42"], ["text", " 42."]]
    assert parts(call, *b"9**9", called, *b", so", stop) == [["call", "9**9"], ["text", ", so"]]
    assert parts(call, *b"1", called, call, *b"2", called, stop) == [["call", "1"], ["call", "2"]]
    assert parts(*b"cut") == [["text", "cut"], ["text", " ..."]]
    assert parts(*"\u00e9".encode()[:1], stop) == [["text", "\ufffd"]]
    assert parts(stop) == []


# ---- self-contained ------------------------------------------------------------------------------


class Reader(html.parser.HTMLParser):
    """The tags, attributes and visible text of a page; complains of tags that do not match."""

    VOID = {"meta", "br", "path", "circle"}

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.rows, self.texts = [], [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data
        self.texts.append(data)


def test_the_page_needs_nothing_from_outside_and_runs_nothing(run_folder):
    _, page, _ = written(run_folder)
    reader = Reader(page)
    names = {name for name, _ in reader.attributes}
    assert not {"src", "href", "srcset", "data", "action", "style"} & names
    assert not [name for name in names if name.startswith("on")]
    assert not {"script", "link", "iframe", "object", "img", "base", "form"} & set(reader.tags)
    assert "url(" not in page and "@import" not in page
    assert set(re.findall(r"https?://[^\"' ]+", page)) <= {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page and 'charset="utf-8"' in page


def test_the_pictures_of_the_markdown_lie_beside_it_and_are_svg(run_folder):
    _, _, text = written(run_folder)
    names = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert names == [f"curve_{name}.svg" for name in
                     ("base_loss", "base_bpb", "sft_loss", "rl_reward", "rl_tools")]
    for name in names:
        root = ElementTree.parse(run_folder / "report" / name).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"


def test_pictures_of_an_earlier_report_go_and_no_half_file_stays(run_folder):
    written(run_folder)
    (run_folder / "rl/metrics.jsonl").unlink()
    written(run_folder)
    files = sorted(path.name for path in (run_folder / "report").iterdir())
    assert files == ["curve_base_bpb.svg", "curve_base_loss.svg", "curve_sft_loss.svg",
                     "report.html", "report.json", "report.md"]


def test_the_report_tells_neither_the_name_of_the_machine_nor_a_path(run_folder, tmp_path):
    _, page, text = written(run_folder, "--compare", str(run_folder))
    saved = (run_folder / "report/report.json").read_text()
    for told in (page, text, saved):
        assert str(tmp_path) not in told
        if len(socket.gethostname()) > 4:
            assert socket.gethostname() not in told


# ---- pictures ------------------------------------------------------------------------------------


def test_ticks_are_round_few_and_enclose_the_data():
    rng = random.Random(0)
    for _ in range(500):
        low = rng.choice([0, rng.uniform(-100, 100)])
        high = low + 10 ** rng.uniform(-1, 6)
        ticks = report.nice_ticks(low, high)
        step = ticks[1] - ticks[0]
        slack = 1e-9 * max(abs(low), abs(high), step)
        assert ticks[0] <= low + slack and ticks[-1] >= high - slack and 2 <= len(ticks) <= 7
        assert round(step / 10 ** math.floor(math.log10(step * 1.0001)), 6) in (1, 2, 2.5, 5)
    assert report.nice_ticks(3, 3)[0] <= 3 <= report.nice_ticks(3, 3)[-1]


def test_a_curve_stands_where_its_axes_say():
    """Each point is read back from the picture through the labels of the ticks, as an eye would."""
    points = [[0, 7.5], [40, 2.25], [80, 1.5], [200, 0.25]]
    root = ElementTree.fromstring(report.draw_chart("t", "u", [("a", points, "c0")]))
    tag = "{http://www.w3.org/2000/svg}"
    labels = [(e.text, float(e.get("x")), float(e.get("y")), e.get("text-anchor"))
              for e in root.iter(tag + "text") if re.fullmatch(r"-?[\d.]+", e.text or "")]
    ys = [(float(text), y - 4) for text, _, y, anchor in labels if anchor == "end"]
    xs = [(float(text), x) for text, x, _, anchor in labels if anchor == "middle"]

    def value(place, ticks):
        (v0, p0), (v1, p1) = ticks[0], ticks[-1]
        return v0 + (place - p0) / (p1 - p0) * (v1 - v0)

    path = next(e for e in root.iter(tag + "path") if e.get("class") == "line c0").get("d")
    drawn = [tuple(map(float, pair.split())) for pair in path[1:].split("L")]
    assert len(drawn) == len(points) and (0.0 in [v for v, _ in ys])
    for (x, y), (h, v) in zip(points, drawn):
        assert value(h, xs) == pytest.approx(x, abs=0.3)
        assert value(v, ys) == pytest.approx(y, abs=0.02)


@pytest.mark.parametrize("points", [[[0, 0]], [[5, -2.5]], [[0, 1e-12]], [[0, 1e20], [1, -1e20]],
                                    [[-3, 1], [10**15, 2]], [[0, 5e-324]]])
def test_the_oddest_curve_gives_a_picture(points):
    svg = report.draw_chart("a < b & c", "\"u\"", [("x", points, "c0")])
    assert "nan" not in svg and "inf" not in svg
    ElementTree.fromstring(svg)


def test_the_bigram_that_was_counted_once_is_a_line_over_the_whole_run(run_folder):
    curves = collect(run_folder)["stages"]["base"]["curves"]
    assert report.with_reach("ladder_bigram", curves) == [[0, 2.25], [50, 2.25]]


# ---- missing, damaged, unfinished ----------------------------------------------------------------


def remove(folder, name):
    path = folder / name
    for child in sorted(path.rglob("*"), reverse=True) if path.is_dir() else ():
        child.unlink() if child.is_file() else child.rmdir()
    path.rmdir() if path.is_dir() else path.unlink()


def cut(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) * 2 // 3])


def put(name, text):
    def do(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return do


BREAKAGES = {
    "no stage folder": (lambda f: remove(f, "sft"), "sft: there is no such folder; python "
                        "edu/08_sft.py makes it"),
    "no model": (lambda f: remove(f, "sft/model.safetensors"), "sft/model.safetensors is not "
                 "there: the stage has not finished"),
    "half a model": (lambda f: cut(f, "sft/model.safetensors"), "no samples of sft: "),
    "no config": (lambda f: remove(f, "sft/config.json"), "sft/config.json is not there"),
    "half a config": (lambda f: cut(f, "sft/config.json"), "sft/config.json is damaged"),
    "config a list": (put("sft/config.json", "[1]"), "sft/config.json is damaged (a list"),
    "config of bytes": (put("sft/config.json", b"\xff\xfe\0"), "sft/config.json is damaged"),
    "deep config": (put("sft/config.json", "[" * 100_000), "sft/config.json is damaged"),
    "config a folder": (lambda f: (remove(f, "sft/config.json"), (f / "sft/config.json").mkdir()),
                        "sft/config.json cannot be read"),
    "no step yet": (put("sft/config.json", '{"step": 0}'), "sft has been saved before its first"),
    "no metrics": (lambda f: remove(f, "sft/metrics.jsonl"), "sft/metrics.jsonl is not there"),
    "half a line": (lambda f: cut(f, "sft/metrics.jsonl"), "sft/metrics.jsonl: 1 of 6 lines"),
    "empty metrics": (put("sft/metrics.jsonl", ""), "sft/metrics.jsonl has no step in it"),
    "zero steps": (put("sft/metrics.jsonl", '{"step": 0, "loss": 7}\n'),
                   "sft/metrics.jsonl has no step in it"),
    "metrics of bytes": (put("sft/metrics.jsonl", bytes(range(256))), "lines cannot be read"),
    "metrics of nan": (put("sft/metrics.jsonl", '{"step": 5, "loss": NaN, "val_loss": Infinity}\n'
                           '{"step": NaN, "loss": 5}\n{"step": true}'),
                       "sft/metrics.jsonl: 2 of 3 lines"),
    "no eval": (lambda f: remove(f, "sft/eval.json"), "sft/eval.json is not there"),
    "half an eval": (lambda f: cut(f, "sft/eval.json"), "sft/eval.json is damaged"),
    "empty eval": (put("sft/eval.json", '{"scores": {"a": 5, "b": {"score": "x"}}}'),
                   "sft/eval.json holds no score"),
    "eval of other weights": (put("sft/eval.json", '{"made_from": {"weights": "abc"}, "scores": '
                                  '{"facts": {"score": 0.5}}}'),
                              "sft/eval.json is of other weights"),
    "no tokenizer": (lambda f: remove(f, "tokenizer"), "no samples of sft: no tokenizer"),
    "another tokenizer": (put("sft/config.json", '{"step": 1, "tokenizer_sha256": "x", "model": '
                              '{"sequence_len": 64, "vocab_size": 265, "n_layer": 1, "n_head": 2, '
                              '"n_kv_head": 1, "n_embd": 16}}'), "no samples of sft: "),
    "no pipeline": (lambda f: remove(f, "pipeline.json"), "no times and no memory: bash"),
    "half a pipeline": (lambda f: cut(f, "pipeline.json"), "pipeline.json is damaged"),
    "pipeline of nonsense": (put("pipeline.json", '[5, null, {"stage": 7}, {"seconds": 1}]'),
                             "no times and no memory"),
    "a stage under way": (put(".pipeline/sft.begun", "{}"), "the stage sft of my_pipeline.sh was "
                          "begun and has not ended"),
}


@pytest.mark.parametrize("damage", BREAKAGES)
def test_what_is_missing_is_named_and_is_not_fatal(run_folder, capsys, damage):
    do, words = BREAKAGES[damage]
    do(run_folder)
    code, page, text = written(run_folder, "--stages", "base", "sft", "rl")
    out = capsys.readouterr().out
    assert code == 0
    assert any(line.startswith("missing: ") and words in line for line in out.splitlines()), out
    assert words in html.unescape(page) and words in html.unescape(text)
    Reader(page)
    # and what is there is still told
    assert "0.750 (0.65..0.85)" in page and (run_folder / "report/curve_rl_reward.svg").exists()


def test_an_empty_folder_makes_a_report_that_says_so(tmp_path, capsys):
    code, page, _ = written(tmp_path)
    assert code == 0 and "-> 0 (n=4)" in capsys.readouterr().out
    for stage in ("base", "mid", "sft", "rl"):
        assert f"{stage}: there is no such folder" in page


def test_a_prompt_that_leaves_no_room_costs_its_own_sample_only(run_folder):
    """<|bos|>, three around the question and 5 for the answer: 119 bytes fit, 120 do not."""
    run = collect(run_folder, ask=("x" * 119, "x" * 120, "y"), stages=("base",))
    (line,) = run["missing"]
    assert line.startswith("no samples of base for 1 prompts: with 5 tokens of answer")
    samples = run["stages"]["base"]["samples"]
    assert [sample is None for sample in samples] == [False, True, False, False]
    Reader(report.html_report(run))


def test_whatever_stands_in_the_files_a_report_comes_of_it(tmp_path):
    """60 times a value in each file becomes nonsense, and one in the report to compare with."""
    folder, rng = make_run(tmp_path / "one"), random.Random(0)
    files = [*folder.glob("*/eval.json"), *folder.glob("*l/config.json"), folder / "pipeline.json"]
    whole = {path: json.loads(path.read_text()) for path in files}
    run = collect(folder)
    nonsense = [None, True, -1, 1e300, "", "<b>|\n", [], {}, [[]], {"a": 1}, float("nan"), "\ud800"]
    for path in folder.glob("*/model.safetensors"):
        path.unlink()  # models are tested elsewhere, and take time

    def spoil(value):
        places = [(value, key) for key in (value if isinstance(value, dict) else range(len(value)))]
        for holder, key in places:
            if isinstance(holder[key], (dict, list)) and holder[key]:
                inner = holder[key]
                keys = inner if isinstance(inner, dict) else range(len(inner))
                places += [(inner, k) for k in keys]
        holder, key = rng.choice(places)
        holder[key] = rng.choice(nonsense)
        return value

    for _ in range(60):
        for path, value in whole.items():
            path.write_text(json.dumps(spoil(copy.deepcopy(value))))
        other = report.mended_report(spoil(copy.deepcopy(json.loads(json.dumps(run)))))
        found = collect(folder)
        for beside in (None, other):
            Reader(report.html_report(found, beside))
            report.markdown_report(found, beside).encode()
            json.dumps(found).encode()


# ---- what the pipeline remembers -----------------------------------------------------------------


def test_the_newest_row_of_a_stage_counts_and_they_stand_in_order(run_folder):
    """At the report's own turn the closing table is not yet written, or is that of an older run."""
    newer = {**PIPELINE[2], "seconds": 77.5}
    write_json(run_folder / ".pipeline/sft.json", {"row": newer})
    write_json(run_folder / ".pipeline/world.json", {"row": {"stage": "world", "seconds": 9}})
    write_json(run_folder / ".pipeline/own.json", {"row": {"stage": "own", "seconds": 1}})
    write_json(run_folder / ".pipeline/report.json", {"row": {"stage": "report", "seconds": 4}})
    rows = report.read_pipeline(run_folder, [])
    assert [row["stage"] for row in rows] == ["check", "world", "pretrain", "sft", "rl", "own"]
    assert rows[3]["seconds"] == 77.5
    assert report.total_seconds({"pipeline": rows}) == 2.5 + 9 + 100.25 + 77.5 + 40.5 + 1


def test_a_stage_that_runs_again_has_no_row_of_its_last_time(run_folder):
    missing = []
    (run_folder / ".pipeline").mkdir()
    for name in ("sft", "rl", "report"):
        (run_folder / f".pipeline/{name}.begun").touch()
    write_json(run_folder / ".pipeline/rl.json", {"row": PIPELINE[3]})  # begun, and done since
    rows = report.read_pipeline(run_folder, missing)
    assert [row["stage"] for row in rows] == ["check", "pretrain", "rl"]
    assert missing == ["the stage sft of my_pipeline.sh was begun and has not ended"]


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0 s"), (0.4, "0 s"), (59.6, "1 min 0 s"), (61, "1 min 1 s"), (428, "7 min 8 s"),
    (3600, "1 h 0 s"), (7325, "2 h 2 min 5 s")])  # fmt: skip
def test_durations_are_worked_by_hand(seconds, text):
    assert report.duration(seconds).replace("1 h 0 min", "1 h") == text


# ---- hostile text --------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>", "</td></tr></table><h1>x", "a | b | c", "two\nlines\n\n# three",
    "`code` **bold** _it_ [a](javascript:x) ![i](http://x) <http://x> ~~s~~ $x$", "\\| \\\\| \\",
    "&lt; &amp; &#124;", "| --- |\n| x |", "\x1b[2J\x00\u0085", "\u202e\u00e9\U0001f600",
    "\ud800", "", "'\"", "n_head snake_case_ _x",
]  # fmt: skip


def hostile_run(run, text):
    """A run in which everything that another program wrote is `text`."""
    run = copy.deepcopy(run)
    stage = run["stages"]["rl"]
    stage["samples"][0] = [["text", text], ["call", text]]
    stage["script"] = {text: text}
    stage["versions"] = {"torch": text}
    stage["scores"] = {text: stage["scores"]["facts"]}
    run["prompts"][0] = text
    run["missing"] = [text]
    run["pipeline"][0].update(metric=text, n=text, before=text, after=text, stage=text)
    run["environment"]["CPU"] = text
    return run


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_a_model_stays_text_in_html(run_folder, text):
    run = collect(run_folder)
    tags = Reader(report.html_report(run)).tags
    page = report.html_report(hostile_run(run, text))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page) and page.encode()
    reader = Reader(page)
    assert set(reader.tags) <= {*tags, "ul", "li", "span"}
    shown = report.plain(text)
    row = next(row for row in reader.rows if row[0] == "rl" and len(row) == 2)
    assert row == ["rl", f"{shown}[{shown}]"]
    assert any(cell == shown for row in reader.rows for cell in row)


def cells_of(line):
    """The cells of a Markdown table row: split at each | that no backslash stands before."""
    return [cell.strip(" ") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_from_a_model_breaks_no_markdown_table(run_folder, text):
    run = collect(run_folder)
    page = report.markdown_report(hostile_run(run, text))
    tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    assert len(tables) == len([b for b in report.markdown_report(run).split("\n\n")
                               if b.startswith("|")])
    for lines in tables:
        widths = {len(cells_of(line)) for line in lines}
        assert len(widths) == 1 and re.fullmatch(r"(\| --- )+\|", lines[1])
    shown = report.plain(text).replace("\t", " ")
    row = next(cells_of(line) for lines in tables for line in lines if line.startswith("| rl | "))
    back = html.unescape(row[1].replace("<br>", "\n"))
    assert back.strip(" ") == f"{shown}[{shown}]".strip(" ")
    # nothing is left that Markdown would take for markup, but for our own brackets around the call
    assert not re.search(r"[`*~$\\]|<(?!br>)|\]\(|!\[|(?<!\w)_|_(?!\w)", row[1])


# ---- two runs ------------------------------------------------------------------------------------


def other_of(run_folder, tmp_path):
    other = make_run(tmp_path / "two")
    about = json.loads((other / "sft/config.json").read_text())
    about["script"].update(matrix_lr=0.5, seed=77, new_flag="on")
    write_json(other / "sft/config.json", about)
    scores = json.loads((other / "rl/eval.json").read_text())
    scores["scores"]["facts"].update(score=0.4, low=0.3, high=0.5)
    write_json(other / "rl/eval.json", scores)
    scores = json.loads((other / "sft/eval.json").read_text())  # 0.4..0.6 there
    scores["scores"]["facts"].update(score=0.45, low=0.35, high=0.55)
    write_json(other / "sft/eval.json", scores)
    write_json(other / "pipeline.json", [{**PIPELINE[2], "seconds": 50.5, "after": 0.5}])
    return other


@pytest.mark.parametrize("saved", [False, True])
def test_two_runs_stand_side_by_side_with_their_differences(run_folder, tmp_path, saved):
    """The other run is a folder, or what its own report has saved; both tell the same."""
    other = other_of(run_folder, tmp_path)
    beside = other
    if saved:
        written(other, "--stages", "base", "sft", "rl")
        beside = tmp_path / "kept.json"
        (other / "report/report.json").rename(beside)
    code, page, text = written(run_folder, "--stages", "base", "sft", "rl", "--compare",
                               str(beside))
    assert code == 0
    for told in (html.unescape(page), html.unescape(text)):
        assert "60 / 50.5 (+9.5)" in told  # seconds of sft
        assert "912 / 912 (+0)" in told
        assert "0.9375 / 0.5 (+0.4375)" in told
        assert "203.25"[:5] in told and "/ 50.5 (+152.8)" in told  # the totals
        assert "0.500 / 0.450 (+0.050)" in told  # facts of sft
        assert "Settings that differ" in told and "new-flag" in told
    assert "<strong>0.750 / 0.400 (+0.350)</strong>" in page  # 0.65..0.85 and 0.30..0.50
    assert "<strong>0.500" not in page  # these intervals meet
    assert "**0.750 / 0.400 (+0.350)**" in text
    differing = [row for row in Reader(page).rows if row[0] == "sft" and row[1][:2] == "--"]
    assert differing == [["sft", "--matrix-lr", "0.025", "0.5"], ["sft", "--new-flag", "", "on"]]
    assert ["rl, both"] == [row[0] for row in Reader(page).rows if row[0].startswith("rl, ")][:1]
    assert page.count("line c0 other") == 5  # one dashed curve in each picture


def test_runs_that_are_set_alike_are_said_to_be(run_folder):
    _, page, _ = written(run_folder, "--compare", str(run_folder))
    assert "No stage was set differently." in page and "<strong>0." not in page


def test_another_run_that_lacks_everything_is_no_obstacle(run_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    code, page, _ = written(run_folder, "--compare", str(tmp_path / "empty"))
    assert code == 0 and "other run: rl: there is no such folder" in page


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--compare", "nowhere"], "--compare nowhere: "),
        (["--compare", "one/pipeline.json"], "Give a data folder"),
        (["--compare", "one/base/config.json"], "config.json is no report"),
        (["--compare", "one/base/metrics.jsonl"], "damaged"),
        (["--max-tokens", "0"], "--max-tokens 0"),
        (["--data-dir", "nowhere"], "bash my_pipeline.sh"),
    ],
)
def test_a_wrong_flag_ends_with_2_and_a_sentence(run_folder, capsys, monkeypatch, flags, words):
    monkeypatch.chdir(run_folder.parent)
    assert report.main(["--data-dir", str(run_folder), *flags]) == 2
    assert words in capsys.readouterr().err


# ---- the environment -----------------------------------------------------------------------------


def test_the_commit_is_that_of_git_and_changes_are_told(tmp_path):
    def git(*words):
        return subprocess.run(["git", "-C", str(tmp_path), *words], check=True, encoding="utf-8",
                              capture_output=True).stdout.strip()

    assert report.git_commit(tmp_path) is None
    try:
        git("init", "-q")
    except FileNotFoundError:
        pytest.skip("there is no git")
    (tmp_path / "a").write_text("a")
    git("add", "a")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a")
    assert report.git_commit(tmp_path) == git("rev-parse", "--short=12", "HEAD")
    (tmp_path / "a").write_text("b")
    assert report.git_commit(tmp_path).endswith(", changed since")


def test_a_machine_without_git_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert report.git_commit(tmp_path) is None


def test_the_date_is_that_of_the_newest_model(run_folder):
    for name in ("base", "sft", "rl"):
        os.utime(run_folder / name / "model.safetensors", (1_700_000_000,) * 2)
    stamp = time.strftime("%Y-%m-%d %H:%M", time.localtime(1_700_000_000))
    assert collect(run_folder)["date"] == stamp
