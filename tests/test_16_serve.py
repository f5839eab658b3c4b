"""16_serve.py: company changes nobody's text, clients of any make are served, and none can harm.

The oracles: challenge 05's Engine, one prompt at a time; the transformers library's samplers; the
official openai client; prometheus_client's parser; and, for the page, a real Chromium.

Three stages are served here, on a tokenizer of bytes. `random` has weights that make every path
matter. `script` is a chain: the next token depends on the last one only, so that its answer is
written down in this file (SCRIPT). `loop` never ends.
"""

import contextlib
import http.client
import json
import math
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import serve_fuzz
import torch
from conftest import load, script_path

serve, engine05, gsm = load("16_serve"), load("05_engine"), load("09_gsm8k")

BOS, USER, USER_END, ASSISTANT, END, PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = range(256, 265)
# What the chain writes after <|assistant_start|>: a token follows another only once.
SCRIPT = [*"Aé:".encode(), PYTHON, *b"6*7", PYTHON_END]
SCRIPT_AFTER = [*b" <b>x", END]  # and after the calculator's output
SCRIPT_TOKENS = len(SCRIPT) + 4 + len(SCRIPT_AFTER)  # the calculator writes <|output_start|>42...
SCRIPT_TEXT = "Aé:<<6*7=42>> <b>x"
LOOP_CONTEXT = 2000


# ---- models --------------------------------------------------------------------------------------


def random_model(seed=1, sequence_len=64):
    """A GPT whose every weight is random and large enough for every part of it to show."""
    torch.manual_seed(seed)
    model = serve.GPT(serve.GPTConfig(sequence_len, 265, n_layer=3, n_head=6, n_kv_head=2,
                                      n_embd=48)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0.0, 1.0 if "wte" in name else 1.5 / weight.shape[1] ** 0.5)
    return model


def chain_model(following, sequence_len):
    """A GPT that writes following[last token]; the head reads the last token's own channel."""
    V, C = 265, 268
    model = serve.GPT(serve.GPTConfig(sequence_len, V, 1, 2, 2, C)).eval()
    with torch.no_grad():
        model.transformer.wte.weight.copy_(torch.eye(V, C))
        model.lm_head.weight.fill_(-1.0)
        for last, token in following.items():
            model.lm_head.weight[token, last] = 3.0
    return model


def chain_of(*texts):
    return {last: token for text in texts for last, token in zip(text, text[1:])}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    tokenizer = serve_fuzz.write_byte_tokenizer(folder / "tokenizer", serve)
    script = chain_of([ASSISTANT, *SCRIPT], [OUTPUT_END, *SCRIPT_AFTER])
    loop = chain_of([ASSISTANT, *b"abca"])
    for name, model in {"random": random_model(), "script": chain_model(script, 256),
                        "loop": chain_model(loop, LOOP_CONTEXT)}.items():
        serve_fuzz.write_stage(folder / name, model, tokenizer)
    for name in ("broken", "half"):  # a model that is none, and a folder that is being written
        (folder / name).mkdir()
    (folder / "half" / "model.safetensors").write_bytes(b"no weights")
    (folder / "broken" / "model.safetensors").write_bytes(b"no weights")
    (folder / "broken" / "config.json").write_text('{"model": {"sequence_len": 64}}', "utf-8")
    return folder


@pytest.fixture(scope="session")
def stages(data_dir):
    return serve.Stages(serve.Config(data_dir=data_dir, stage="script"), torch.device("cpu"))


def prompts_of(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


def alone(engine, prompt, count, **options):
    """What challenge 05's engine writes after one prompt, by itself."""
    single = engine05.Engine(engine.model, engine.tokenizer)
    return single.generate_batch([prompt], 1, count, **options)[0][0][len(prompt) :]


class Mail(list):
    put_nowait = list.append


def job_for(prompt, stage="random", **options):
    return serve.Job(stage, prompt, Mail(), **{"temperature": 0.0, "max_tokens": 20, **options})


class Watched(serve.RollingBatch):
    """A batch that notes the tokens of each job, in .said."""

    def __init__(self, engine, slots):
        super().__init__(engine, slots)
        self.said = {}

    def step(self):
        before = [(row, row.count) for row in self.rows]
        take = serve.Answer.take
        said = self.said

        def noting(row, *arguments):
            token, piece = take(row, *arguments)
            said.setdefault((id(row.job), row.index), []).append(token)
            return token, piece

        serve.Answer.take = noting
        try:
            news = super().step()
        finally:
            serve.Answer.take = take
        assert all(row.count == count + 1 for row, count in before)
        return news


def decode_together(batch, arrivals, leaves=None):
    """Run the batch; arrivals: {step: [jobs that join before it]}, leaves: {step: [cancelled]}."""
    with torch.inference_mode():
        for step in range(400):
            for job in arrivals.pop(step, []):
                batch.join(job)
            for job in (leaves or {}).get(step, []):
                job.cancelled = True
            if batch.rows:
                batch.step()
            elif not arrivals:
                return batch.said


# ---- one batch for all ---------------------------------------------------------------------------


def test_rows_that_join_and_leave_say_what_each_says_alone_to_the_engine(stages):
    engine = stages.load("random")
    prompts = prompts_of(3, 17, 8, 1, 30, 5, 11)
    jobs = [job_for(prompt, max_tokens=count)
            for prompt, count in zip(prompts, (20, 5, 33, 60, 34, 1, 12))]
    said = decode_together(Watched(engine, 4), {
        0: jobs[:2], 2: [jobs[2]], 5: [jobs[3]], 6: [jobs[4]], 44: jobs[5:]})
    for job in jobs:
        expected = alone(engine, job.prompt, job.max_tokens, temperature=0.0)
        assert said[id(job), 0] == expected and len(expected) == job.max_tokens


def test_logits_in_company_are_the_logits_alone(stages):
    """Rows come and go, and a row takes the slot of one that was longer: nothing shines through."""
    engine = stages.load("random")
    batch, jobs = Watched(engine, 3), [job_for(p, max_tokens=40) for p in prompts_of(20, 2, 9, 4)]
    with torch.inference_mode():
        for step, joining in enumerate([jobs[:3], [], [], [jobs[3]], [], []]):
            if step == 3:  # the longest row leaves, and a newcomer gets its slot
                jobs[0].cancelled = True
                batch.step()
            for job in joining:
                batch.join(job)
            batch.step()
            for row, logits in zip(batch.rows, batch.logits):
                ids = row.job.prompt + batch.said[id(row.job), 0]
                truth = engine.model(torch.tensor([ids]))[0, -1]
                assert (logits - truth).abs().max() < 1e-4


def test_a_seed_gives_the_same_text_alone_and_in_company(stages):
    engine = stages.load("random")
    rules = [dict(temperature=1.0), dict(temperature=0.7, top_k=5), dict(temperature=0.0),
             dict(temperature=1.3, top_p=0.8), dict(temperature=1.0, top_k=40, top_p=0.5)]

    def jobs():
        return [job_for(prompt, seed=7, n=2, **rule)
                for prompt, rule in zip(prompts_of(4, 9, 2, 13, 6), rules)]

    together, single = jobs(), jobs()
    company = decode_together(Watched(engine, 10), {i: [job] for i, job in enumerate(together)})
    for job, twin in zip(together, single):
        by_itself = decode_together(Watched(engine, 2), {0: [twin]})
        for index in range(2):
            assert company[id(job), index] == by_itself[id(twin), index]
    first, second = (company[id(together[0]), index] for index in range(2))
    assert first != second, "the answers of one request are different ones"


def test_sampling_without_a_nucleus_is_the_engines(stages):
    torch.manual_seed(0)
    logits, u = 3 * torch.randn(6, 50), torch.rand(6)
    ones = torch.ones(6)
    for top_k in (0, 1, 7, 500):
        rows = serve.sample_rows(logits, u, 0.8 * ones, torch.full((6,), top_k), ones)
        assert rows.equal(engine05.sample_next_token(logits, u, 0.8, top_k))
    greedy = serve.sample_rows(logits, u, 0 * ones, torch.full((6,), 9), 0.3 * ones)
    assert greedy.equal(logits.argmax(-1))


def test_what_can_be_sampled_is_what_transformers_would_sample_from():
    warpers = pytest.importorskip("transformers.generation.logits_process")
    torch.manual_seed(0)
    logits = 2 * torch.randn(1, 40)
    u = torch.linspace(0, 1 - 1e-6, 4001)  # every slice of the distribution, in proportion
    for temperature, top_k, top_p in ((0.7, 0, 0.9), (1.5, 8, 0.6), (1.0, 12, 0.999),
                                      (0.3, 3, 1.0), (1.0, 0, 0.0), (2.0, 0, 0.35)):
        scores = warpers.TemperatureLogitsWarper(temperature)(None, logits)
        if top_k:
            scores = warpers.TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = warpers.TopPLogitsWarper(top_p)(None, scores)
        many = torch.ones(len(u))
        drawn = serve.sample_rows(logits.expand(len(u), -1), u, temperature * many,
                                  torch.full((len(u),), top_k), top_p * many)
        share = torch.bincount(drawn, minlength=40) / len(u)
        assert (share - scores.softmax(-1)[0]).abs().max() < 0.002


def test_the_largest_random_number_draws_a_token_that_is_allowed():
    logits = torch.tensor([[0.0, 5.0, 1.0, -30.0]])
    one = torch.ones(1)
    for top_k, top_p, allowed in ((0, 1.0, {0, 1, 2, 3}), (2, 1.0, {1, 2}), (0, 0.5, {1})):
        token = serve.sample_rows(logits, one, one, torch.tensor([top_k]), top_p * one)
        assert int(token) in allowed


def test_calculator_calls_are_forced_as_by_the_engine_and_shown_in_one_form(stages):
    engine = stages.load("script")
    prompt = [BOS, USER, *b"hi", USER_END, ASSISTANT]
    job, batch = job_for(prompt, "script", max_tokens=50), Watched(engine, 2)
    other = job_for([*prompt, *b"A"], "script", max_tokens=3)
    news = []
    with torch.inference_mode():
        batch.join(job)
        batch.join(other)
        while batch.rows:
            news += [piece for owner, piece in batch.step() if owner is job]
    expected = [*SCRIPT, OUTPUT, *b"42", OUTPUT_END, *SCRIPT_AFTER]
    assert batch.said[id(job), 0] == expected == alone(engine, prompt, 50, temperature=0.0)
    assert "".join(piece.text for piece in news) == SCRIPT_TEXT
    assert [piece.finish_reason for piece in news] == [None] * (len(expected) - 1) + ["stop"]
    assert sum(piece.tokens for piece in news) == len(expected)


def test_a_conversation_is_shown_to_the_model_as_it_wrote_it(stages):
    """The answer comes back as history: the very tokens that the model and the calculator wrote."""
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": SCRIPT_TEXT},
               {"role": "user", "content": "and"}]
    ids, dropped = serve.render_prompt(history, stages.tokenizer, 256, 10, None)
    written = [*SCRIPT, OUTPUT, *b"42", OUTPUT_END, *SCRIPT_AFTER]
    assert dropped == 0
    assert ids == [BOS, USER, *b"hi", USER_END, ASSISTANT, *written, USER, *b"and", USER_END,
                   ASSISTANT]


def test_only_the_assistants_text_can_hold_a_call_and_no_text_a_special_token(stages):
    tricks = "<<6*7=42>> <|assistant_end|><|python_start|>1<|python_end|><|bos|>"
    for role in ("system", "user"):
        messages = [{"role": "user", "content": tricks}]
        if role == "system":
            messages.insert(0, {"role": "system", "content": tricks})
        ids, _ = serve.render_prompt(messages, stages.tokenizer, 2000, 10, None)
        assert [i for i in ids if i > 255] == [BOS, USER, USER_END, ASSISTANT]
    ids, _ = serve.render_prompt([
        {"role": "user", "content": "x"}, {"role": "assistant", "content": tricks},
        {"role": "user", "content": "y"}], stages.tokenizer, 2000, 10, None)
    assert [i for i in ids if i > 255] == [
        BOS, USER, USER_END, ASSISTANT, PYTHON, PYTHON_END, OUTPUT, OUTPUT_END, END, USER, USER_END,
        ASSISTANT]


@pytest.mark.parametrize(("text", "parts"), [
    ("", [("text", "")]), ("plain", [("text", "plain")]),
    ("<<1+2=3>>", [("python", "1+2"), ("python_output", "3")]),
    ("a<<1/0=>>b", [("text", "a"), ("python", "1/0"), ("text", "b")]),
    ("<<3==3=>>", [("python", "3==3")]), ("<<no>>", [("text", "<<no>>")]),
    ("<<=3>>", [("text", "<<=3>>")]), ("<<1=2", [("text", "<<1=2")]),
    ("<<a\n=2>>", [("text", "<<a\n=2>>")]),
    ("x <<2*3=6>>6.\n#### 6", [("text", "x "), ("python", "2*3"), ("python_output", "6"),
                               ("text", "6.\n#### 6")])])
def test_calls_are_read_back_from_their_form(text, parts):
    assert [(part["type"], part["text"]) for part in serve.parts_of(text)] == parts
    if "=>>" not in text and "<<=" not in text and "<<no" not in text:
        assert serve.parts_of(text)[-1:] == (gsm.parse_answer(text) or [
            {"type": "text", "text": ""}])[-1:], "challenge 09 reads the same form"


def written(tokens, stages, stops=()):
    """(pieces of text, tokens used) of a TextWriter that is given plain tokens."""
    engine = stages.load("script")
    writer, state, pieces = serve.TextWriter(engine, stops), engine05.RowState(), []
    for used, token in enumerate(tokens, 1):
        pieces.append(writer.add(token, False, state))
        if writer.stopped:
            return pieces, used
    return [*pieces, writer.finish()], len(tokens)


def test_a_letter_of_several_bytes_is_one_piece(stages):
    text = "aé\u4e2d\U0001f600z"
    pieces, _ = written(text.encode(), stages)
    assert [piece for piece in pieces if piece] == list(text)
    pieces, _ = written(text.encode()[:-2], stages)  # the end of the answer comes in mid-letter
    assert "".join(pieces) == "aé\u4e2d\ufffd"


def test_whatever_the_tokens_and_stops_the_text_is_that_of_the_whole_up_to_the_first_stop(stages):
    """Oracle: the whole text at once, cut before the stop string that begins first of all that are
    complete at the earliest token at which any is complete."""
    rng = random.Random(5)
    for _ in range(400):
        tokens = [rng.choice((*b"aab\n", 0xC3, 0xA9)) for _ in range(rng.randint(0, 14))]
        stops = tuple("".join(rng.choice("ab\né") for _ in range(rng.randint(1, 4)))
                      for _ in range(rng.randint(0, 3)))
        expected, end = bytes(tokens).decode("utf-8", "replace"), None
        for used in range(1, len(tokens) + 1):
            sofar = whole_letters(tokens[:used])
            places = [sofar.find(stop) for stop in stops if stop in sofar]
            if places:
                expected, end = sofar[: min(places)], used
                break
        pieces, used = written(tokens, stages, stops)
        if end is None and any(stop in expected for stop in stops):  # complete only at the flush
            expected = expected[: min(expected.find(stop) for stop in stops if stop in expected)]
        assert "".join(pieces) == expected and used == (end or len(tokens)), (tokens, stops)


def whole_letters(tokens):
    """The text of bytes, of which 0xC3 begins a letter of two bytes that 0xA9 ends."""
    data = bytes(tokens)
    return (data[:-1] if data.endswith(b"\xc3") else data).decode("utf-8", "replace")


# ---- the worker ----------------------------------------------------------------------------------


@contextlib.contextmanager
def working(stages, max_batch=4, max_queue=8, prefill_tokens=512):
    """(worker, news): a running worker, and the queue of (job, piece) that it delivers to."""
    news = queue.Queue()
    worker = serve.Worker(stages.load, lambda pieces: [news.put(pair) for pair in pieces],
                          max_batch, max_queue, prefill_tokens)
    worker.start()
    yield worker, news
    worker.stop()
    assert not worker.is_alive()


def wait_for(condition, seconds=10, what="it"):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} has not happened within {seconds} s"
        time.sleep(0.005)


def finish(news, jobs):
    """Take pieces until each of the jobs has finished."""
    left = {id(job): job.n for job in jobs}
    while any(left.values()):
        job, piece = news.get(timeout=20)
        assert not isinstance(piece, Exception), piece
        if id(job) in left:
            left[id(job)] -= piece.finish_reason is not None


def test_many_answers_take_hardly_more_passes_than_one(stages):
    """The odds of speed, counted instead of timed: 4 rows of 40 tokens in far fewer than 160."""
    jobs = [job_for([ASSISTANT], "loop", max_tokens=40) for _ in range(4)]
    with working(stages) as (worker, news):
        for job in jobs:
            worker.submit(job)
        finish(news, jobs)
        assert 40 <= worker.steps <= 60


def test_a_newcomer_is_served_while_the_others_are_still_being_decoded(stages):
    long, short = (job_for([ASSISTANT], "loop", max_tokens=n) for n in (1500, 5))
    with working(stages) as (worker, news):
        worker.submit(long)
        news.get(timeout=10)
        worker.submit(short)
        finish(news, [short])
        assert worker.active_rows() == 1
        worker.cancel(long)


def test_jobs_wait_for_a_place_in_the_order_in_which_they_came(stages):
    jobs = [job_for([ASSISTANT], "loop", max_tokens=30 + i, n=n)
            for i, n in enumerate((3, 4, 1, 2))]
    with working(stages, max_queue=20) as (worker, news):
        for job in jobs:
            worker.submit(job)
        seen = []
        left = {id(job): job.n for job in jobs}
        while any(left.values()):
            job, piece = news.get(timeout=20)
            if job not in seen:
                seen.append(job)
            left[id(job)] -= piece.finish_reason is not None
            assert worker.active_rows() <= 4
    assert seen == jobs


def test_a_cancelled_row_leaves_before_the_next_step_and_a_waiting_job_the_queue(stages):
    jobs = [job_for([ASSISTANT], "loop", max_tokens=1900, n=4) for _ in range(2)]
    with working(stages) as (worker, news):
        for job in jobs:
            worker.submit(job)
        news.get(timeout=10)
        assert worker.queue_depth() == 4
        worker.cancel(jobs[1])
        assert worker.queue_depth() == 0
        worker.cancel(jobs[0])
        wait_for(lambda: worker.active_rows() == 0)
        assert worker.steps < 1500


def test_a_full_queue_says_so_at_once(stages):
    with working(stages) as (worker, news):
        running = job_for([ASSISTANT], "loop", max_tokens=1900, n=4)
        worker.submit(running)
        news.get(timeout=10)
        for _ in range(2):
            worker.submit(job_for([ASSISTANT], "loop", n=4))
        with pytest.raises(serve.Busy) as busy:
            worker.submit(job_for([ASSISTANT], "loop"))
        assert 1 <= busy.value.seconds <= 60
        worker.cancel(running)


def test_a_failure_takes_down_the_job_and_not_the_worker(stages, monkeypatch):
    with working(stages) as (worker, news):
        worker.submit(job_for([ASSISTANT], "broken"))
        assert isinstance(news.get(timeout=10)[1], serve.UserError)
        worker.submit(job_for([999], "random"))  # no such token: the embedding fails
        assert isinstance(news.get(timeout=10)[1], IndexError)
        monkeypatch.setattr(serve, "sample_rows", lambda *_: 1 / 0)
        worker.submit(job_for([ASSISTANT], "loop"))
        assert isinstance(news.get(timeout=10)[1], ZeroDivisionError)
        monkeypatch.undo()
        job = job_for([ASSISTANT], "loop")
        worker.submit(job)
        finish(news, [job])


# ---- over HTTP -----------------------------------------------------------------------------------


class Running:
    """A server in a thread of this process."""

    def __init__(self, stages, **options):
        options = {"data_dir": stages.cfg.data_dir, "stage": "script", "max_batch": 4,
                   "max_queue": 8, "log_requests": False, **options}
        self.cfg = serve.Config(**options)
        self.server, self.worker, self.metrics = serve.make_server(self.cfg, stages)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],))

    def __enter__(self):
        self.thread.start()
        wait_for(lambda: self.server.started, what="the start of the server")
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(timeout=20)
        assert not self.thread.is_alive() and not self.worker.is_alive()

    def request(self, method, path, body=None, **headers):
        """(status, headers, text); body: bytes, or what becomes JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None:
            headers.setdefault("Content-Type", "application/json")
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read().decode()

    def chat(self, stage="script", content="hi", **options):
        return self.request("POST", "/v1/chat/completions", {
            "model": stage, "messages": [{"role": "user", "content": content}], **options})

    def idle(self):
        wait_for(lambda: (self.worker.active_rows(), self.worker.queue_depth()) == (0, 0))


@pytest.fixture(scope="module")
def server(stages):
    with Running(stages) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


ASK = [{"role": "user", "content": "hi"}]


def test_the_openai_client_gets_a_whole_answer(client):
    done = client.chat.completions.create(model="script", messages=ASK, temperature=0)
    assert done.choices[0].message.content == SCRIPT_TEXT
    assert done.choices[0].message.role == "assistant"
    assert (done.choices[0].finish_reason, done.model, done.object) == (
        "stop", "script", "chat.completion")
    prompt, written = 6, SCRIPT_TOKENS
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (
        prompt, written, prompt + written)
    assert done.id.startswith("chatcmpl-") and abs(done.created - time.time()) < 60


def test_the_openai_client_gets_the_same_answer_in_a_stream(client):
    chunks = list(client.chat.completions.create(
        model="script", messages=ASK, temperature=0, stream=True, n=2,
        stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    for index in range(2):
        choices = [chunk.choices[0] for chunk in chunks
                   if chunk.choices and chunk.choices[0].index == index]
        assert choices[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in choices) == SCRIPT_TEXT
        assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + [
            "stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 2 * SCRIPT_TOKENS


def test_the_openai_client_streams_as_the_text_is_written(client):
    with client.chat.completions.create(model="loop", messages=ASK, stream=True) as stream:
        times = [time.monotonic() for _, _ in zip(range(20), stream)]
    assert times[-1] > times[0]


def test_max_tokens_stop_and_n(client):
    def ask(**options):
        return client.chat.completions.create(model="loop", messages=ASK, **options).choices

    (cut,) = ask(max_tokens=7)
    assert (cut.message.content, cut.finish_reason) == ("abcabca", "length")
    (newer,) = ask(max_completion_tokens=2)
    assert newer.message.content == "ab"
    (stopped,) = ask(stop=["x", "ca"], max_tokens=50)
    assert (stopped.message.content, stopped.finish_reason) == ("ab", "stop")
    (one,) = ask(stop="bc", max_tokens=50)
    assert one.message.content == "a"
    several = ask(n=3, max_tokens=4)
    assert [choice.index for choice in several] == [0, 1, 2]
    assert {choice.message.content for choice in several} == {"abca"}


def test_a_seed_repeats_an_answer_over_http_and_without_one_answers_differ(client, stages):
    def ask(**options):
        options = {"temperature": 1.5, "max_tokens": 30, **options}
        done = client.chat.completions.create(model="random", messages=ASK, **options)
        return done.choices[0].message.content

    assert ask(seed=5) == ask(seed=5) != ask(seed=6)
    assert len({ask() for _ in range(4)}) > 1
    prompt = [BOS, USER, *b"hi", USER_END, ASSISTANT]
    engine = stages.load("random")
    ids = [i for i in alone(engine, prompt, 30, temperature=0.0) if i not in engine.stops]
    if not any(i > 255 for i in ids):
        assert ask(temperature=0) == stages.tokenizer.decode(ids)


def test_stages_are_listed_and_loaded_when_asked_for(client, server):
    assert {model.id for model in client.models.list()} == {"script", "loop", "random", "broken"}
    assert client.models.list().data[0].id == "script"
    assert client.models.retrieve("loop").id == "loop"
    status, _, text = server.request("POST", "/v1/chat/completions", {"messages": ASK})
    assert status == 200 and json.loads(text)["model"] == "script"


def test_the_openai_client_raises_its_own_errors(client):
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-9", messages=ASK)
    assert error.value.code == "model_not_found" and error.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="script", messages=ASK, temperature=3)
    assert error.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="script", messages=ASK,
                                       response_format={"type": "json_object"})
    assert error.value.code == "unsupported_parameter"
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(
            model="script", messages=[{"role": "user", "content": "x" * 300}])
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.InternalServerError) as error:
        client.chat.completions.create(model="broken", messages=ASK)
    assert error.value.status_code == 503 and error.value.code == "model_not_loaded"


def test_a_full_queue_is_429_with_a_time_to_come_back(server, client):
    openai = pytest.importorskip("openai")
    with contextlib.ExitStack() as stack:
        for _ in range(3):  # four rows are decoded, eight wait
            stack.enter_context(client.chat.completions.create(
                model="loop", messages=ASK, n=4, stream=True))
        with pytest.raises(openai.RateLimitError) as error:
            client.chat.completions.create(model="loop", messages=ASK)
        assert 1 <= int(error.value.response.headers["Retry-After"]) <= 60
    server.idle()
    assert client.chat.completions.create(model="script", messages=ASK).choices


def test_the_teacher_of_challenge_06_speaks_with_it(server, run_script, tmp_path):
    """A chain knows no JSON: what is tested is that both understand each other."""
    done = run_script(
        "06_identity", "--teacher", "openai", "--model", "loop", "--num-conversations", "3",
        "--give-up-after", "2", "--workers", "2", data_dir=tmp_path,
        env={"OPENAI_BASE_URL": server.url + "/v1", "OPENAI_API_KEY": "none"})
    assert "going on with json_object" in done.stdout and "going on with text" in done.stdout
    assert "Traceback" not in done.stderr and "in a row" in done.stderr, done.stderr


# ---- conversations -------------------------------------------------------------------------------


def test_turns_are_rendered_as_they_were_trained(server, stages, monkeypatch):
    """Oracle: challenge 07's render_for_completion, on what the request means."""
    data07, asked = load("07_sft_data"), []
    submit = server.worker.submit
    monkeypatch.setattr(server.worker, "submit", lambda job: (asked.append(job), submit(job)))
    cases = [
        ([("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")], None),
        ([("developer", "Be brief."), ("user", "a")], [("system", "Be brief."), ("user", "a")]),
        ([("user", "a"), ("user", "b")], [("user", "a\n\nb")]),
        ([("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])],
         [("user", "ab")]),
        ([("user", "a"), ("assistant", ""), ("user", "c")], None)]
    for given, meant in cases:
        body = {"messages": [{"role": role, "content": content} for role, content in given],
                "max_tokens": 1}
        assert server.request("POST", "/v1/chat/completions", body)[0] == 200
        meant = [{"role": role, "content": content} for role, content in meant or given]
        assert asked[-1].prompt == data07.render_for_completion(meant, stages.tokenizer)


def test_with_truncation_auto_the_oldest_turns_go_and_the_answer_says_so(server):
    turns = [{"role": ("user", "assistant")[i % 2], "content": str(i % 10) * 40} for i in range(11)]
    body = {"messages": [{"role": "system", "content": "S"}, *turns]}
    status, _, text = server.request("POST", "/v1/chat/completions", body)
    assert status == 400 and json.loads(text)["error"]["code"] == "context_length_exceeded"
    status, _, text = server.request("POST", "/v1/chat/completions", {**body, "truncation": "auto"})
    answer = json.loads(text)
    assert status == 200 and answer["dropped_messages"] == 8
    # bos, "S\n\n" before the first user message, three messages, and the start of the answer
    assert answer["usage"]["prompt_tokens"] == 1 + 3 + 3 * 42 + 1
    body["messages"] = body["messages"][:2]
    status, _, text = server.request("POST", "/v1/chat/completions", {**body, "truncation": "auto"})
    assert status == 200 and "dropped_messages" not in json.loads(text)


def test_with_truncation_auto_a_talk_longer_than_is_read_at_all_goes_on(server):
    """700 messages where 500 are read, and one of 9,000 characters where 8,000 are."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": "hi"} for i in range(701)]
    body = {"messages": [{"role": "system", "content": "S"}, *turns], "truncation": "auto"}
    status, _, text = server.request("POST", "/v1/chat/completions", body)
    answer = json.loads(text)
    # each message left takes its 2 letters and 2 marks; a quarter of the context is kept free
    left = (answer["usage"]["prompt_tokens"] - 1 - 3 - 1) // 4
    assert status == 200 and answer["dropped_messages"] == 701 - left and left % 2 == 1
    body["messages"] = [{"role": "user", "content": "x" * 9000}, *turns[1:3]]
    status, _, text = server.request("POST", "/v1/chat/completions", body)
    assert status == 200 and json.loads(text)["dropped_messages"] == 2
    body["messages"] = [*turns[:2], {"role": "user", "content": "x" * 9000}]  # the question itself
    assert server.request("POST", "/v1/chat/completions", body)[0] == 400


def test_a_stage_that_is_full_holds_up_no_other():
    """In line: two for stage a, which is full, one for b, which is not; then none for b."""
    def job(stage, n):
        return serve.Job(stage, [0], None, n, 1, 1.0, 0, 1.0, 0)

    worker = serve.Worker(None, None, max_batch=4, max_queue=9, prefill_tokens=1)
    worker.batches["a"] = SimpleNamespace(rows=[None] * 3)
    large, small, other = job("a", 2), job("a", 1), job("b", 1)
    for waiting in (large, small, other):
        worker.submit(waiting)
    assert worker.next_job() is other
    worker.cancel(other)
    assert worker.next_job() is None  # the small one has room, and may not overtake the large one
    worker.batches["a"].rows.pop()
    assert worker.next_job() is large


def test_as_few_turns_go_as_make_room(stages):
    """Oracle: one pair after the other is taken away until the rest fits."""
    rng = random.Random(2)
    for _ in range(60):
        messages = [{"role": ("user", "assistant")[i % 2], "content": "x" * rng.randint(1, 40)}
                    for i in range(2 * rng.randint(0, 12) + 1)]
        if rng.random() < 0.5:
            messages.insert(0, {"role": "system", "content": "y" * rng.randint(0, 20)})
        first = int(messages[0]["role"] == "system")
        rest, dropped, reserve = list(messages), 0, rng.choice((1, 50))
        while True:
            ids = serve.render_for_completion(rest, stages.tokenizer)
            if len(ids) + reserve <= 128 or len(rest) == first + 1:
                break
            rest, dropped = rest[:first] + rest[first + 2 :], dropped + 2
        assert serve.render_prompt(messages, stages.tokenizer, 128, reserve, "auto") == (
            ids, dropped)


def test_an_answer_ends_where_the_context_ends(server):
    status, _, text = server.chat("loop", "x", max_tokens=100_000)
    answer = json.loads(text)
    assert answer["usage"]["total_tokens"] == LOOP_CONTEXT
    assert answer["choices"][0]["finish_reason"] == "length"


# ---- what is refused -----------------------------------------------------------------------------


def wrong(**changes):
    return json.dumps({"messages": ASK, **changes}).encode()


REFUSED = [
    (b"", "body"), (b"[", "body"), (b"null", "body"), (b"3", "body"), (b'"x"', "body"),
    (b"\xff\xfe", "body"), (b"[" * 100_000, "body"), (b'{"messages": "\\ud800"}', "body"),
    (b"{}", "messages"), (wrong(messages=[]), "messages"), (wrong(messages="hi"), "messages"),
    (wrong(messages=[3]), "messages.0"), (wrong(messages=[{}]), "messages.0.role"),
    (wrong(messages=[{"role": "tool", "content": "x"}]), "messages.0.role"),
    (wrong(messages=[{"role": "user"}]), "messages.0.content"),
    (wrong(messages=[{"role": "user", "content": None}]), "messages.0.content"),
    (wrong(messages=[{"role": "user", "content": 3}]), "messages.0.content"),
    (wrong(messages=[{"role": "user", "content": " \n"}]), "messages.0.content"),
    (wrong(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages.0.content"),
    (wrong(messages=[{"role": "user", "content": "x" * 8001}]), "messages.0.content"),
    (wrong(messages=[{"role": "user", "content": "x" * 7000}] * 5), "messages.4.content"),
    (wrong(messages=ASK * 501), "messages"),
    (wrong(messages=[{"role": "assistant", "content": "x"}]), "messages"),
    (wrong(messages=[{"role": "system", "content": "x"}]), "messages"),
    (wrong(messages=[{"role": "assistant", "content": "x"}, *ASK]), "messages"),
    (wrong(messages=[*ASK, {"role": "assistant", "content": "x"}]), "messages"),
    (wrong(messages=[*ASK, {"role": "system", "content": "x"}]), "messages.1.role"),
    (wrong(temperature=-0.1), "temperature"), (wrong(temperature=2.1), "temperature"),
    (wrong(temperature="1"), "temperature"), (wrong(temperature=True), "temperature"),
    (wrong(temperature=math.nan), "temperature"), (wrong(temperature=math.inf), "temperature"),
    (wrong(temperature=10**400), "temperature"), (wrong(top_p=1.01), "top_p"),
    (wrong(top_p=math.nan), "top_p"), (wrong(top_k=-1), "top_k"), (wrong(top_k=10**30), "top_k"),
    (wrong(n=0), "n"), (wrong(n=5), "n"), (wrong(n=1.5), "n"), (wrong(n=True), "n"),
    (wrong(max_tokens=0), "max_tokens"), (wrong(max_tokens=10**9), "max_tokens"),
    (wrong(max_tokens="5"), "max_tokens"), (wrong(max_completion_tokens=-1),
                                            "max_completion_tokens"),
    (wrong(seed=2**63), "seed"), (wrong(seed=0.5), "seed"), (wrong(stream="yes"), "stream"),
    (wrong(stop=""), "stop"), (wrong(stop=["a"] * 5), "stop"), (wrong(stop=[1]), "stop"),
    (wrong(stop="x" * 101), "stop"), (wrong(stream_options=1), "stream_options"),
    (wrong(truncation="middle"), "truncation"), (wrong(model=3), "model"),
    (wrong(tools=[{"type": "function"}]), "tools"), (wrong(logprobs=True), "logprobs"),
    (wrong(response_format={"type": "json_schema"}), "response_format"),
    (wrong(frequency_penalty=1), "frequency_penalty"), (wrong(logit_bias={"5": 1}), "logit_bias"),
]


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_bad_request_is_400_in_openais_shape_and_names_the_field(server, body, param):
    status, headers, text = server.request("POST", "/v1/chat/completions", body)
    error = json.loads(text)["error"]
    assert status == 400 and headers["Content-Type"] == "application/json"
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == (None if param == "body" else param)
    assert param in error["message"] and len(error["message"]) < 300


def test_fields_that_are_harmless_or_at_rest_are_taken(server):
    body = {"messages": ASK, "n": None, "temperature": None, "stop": None, "user": "x",
            "response_format": {"type": "text"}, "tools": [], "frequency_penalty": 0.0,
            "presence_penalty": 0, "logprobs": False, "logit_bias": {}, "metadata": {"a": "b"},
            "top_p": 0, "stop_sequences": 3, "max_tokens": 1}
    assert server.request("POST", "/v1/chat/completions", body)[0] == 200


@pytest.mark.parametrize(("method", "path", "options", "status"), [
    ("GET", "/nowhere", {}, 404), ("GET", "/docs", {}, 404), ("GET", "/openapi.json", {}, 404),
    ("GET", "/v1/chat/completions", {}, 405), ("DELETE", "/v1/models", {}, 405),
    ("POST", "/health", {}, 405), ("GET", "/v1/models/..%2fscript", {}, 404),
    ("GET", "/health", {"Host": "evil.example"}, 403),
    ("GET", "/", {"Host": "127.0.0.1.evil.example"}, 403), ("GET", "/", {"Host": ""}, 403),
    ("GET", "/", {"Host": "localhost:1@evil.example"}, 403),
    ("GET", "/health", {"Origin": "http://evil.example"}, 403),
    ("GET", "/health", {"Origin": "null"}, 403),
    ("GET", "/health", {"Origin": "http://127.0.0.1:1"}, 403),
    ("POST", "/v1/chat/completions", {"Content-Type": "text/plain"}, 415),
    ("POST", "/v1/chat/completions", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ("POST", "/v1/chat/completions", {"Content-Type": ""}, 415),
    ("OPTIONS", "/v1/chat/completions", {"Origin": "http://evil.example"}, 403),
])
def test_what_does_not_belong_here_is_refused(server, method, path, options, status):
    body = wrong() if method == "POST" else None
    got, headers, text = server.request(method, path, body, **options)
    assert got == status and isinstance(json.loads(text)["error"]["message"], str)
    assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize("options", [
    {"Host": "localhost"}, {"Host": "LOCALHOST:99"}, {"Host": "[::1]:8"}, {"Host": "localhost."}])
def test_the_names_of_this_machine_are_served(server, options):
    assert server.request("GET", "/health", **options)[0] == 200
    origin = {"Host": f"localhost:{server.port}", "Origin": f"http://localhost:{server.port}"}
    assert server.request("POST", "/v1/chat/completions", wrong(), **origin)[0] == 200


def test_a_body_of_more_than_a_megabyte_is_refused_whether_its_length_is_told_or_not(server):
    long = wrong(messages=[{"role": "user", "content": "x" * 1_000_000}])
    assert server.request("POST", "/v1/chat/completions", long)[0] == 413
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(part), part)
                      for part in (long[i : i + 50_000] for i in range(0, len(long), 50_000)))
    request = serve_fuzz.request_bytes(pieces + b"0\r\n\r\n", Content_Length=None,
                                       Transfer_Encoding="chunked")
    assert serve_fuzz.status_of(serve_fuzz.send_one(server.port, request)) == "413"
    told = serve_fuzz.request_bytes(b"", Content_Length=2_000_000)  # before any of it is sent
    assert serve_fuzz.status_of(serve_fuzz.send_one(server.port, told)) == "413"
    chunked = serve_fuzz.request_bytes(b"%x\r\n%s\r\n0\r\n\r\n" % (len(wrong()), wrong()),
                                       Content_Length=None, Transfer_Encoding="chunked")
    assert serve_fuzz.status_of(serve_fuzz.send_one(server.port, chunked)) == "200"


def test_a_key_is_asked_for_where_it_is_set(stages):
    with Running(stages, api_key="secret") as server:
        for given, status in (({}, 401), ({"Authorization": "Bearer wrong"}, 401),
                              ({"Authorization": "secret"}, 401),
                              ({"Authorization": "Bearer secret"}, 200)):
            assert server.request("GET", "/v1/models", **given)[0] == status
            assert server.request("GET", "/metrics", **given)[0] == status
            got, _, text = server.request("POST", "/v1/chat/completions", wrong(), **given)
            assert got == status
        assert server.request("GET", "/health")[0] == server.request("GET", "/")[0] == 200


def test_other_names_are_served_when_they_are_allowed(stages):
    with Running(stages, allow_host=("Box.Lan",)) as server:
        assert server.request("GET", "/health", Host="box.lan:80")[0] == 200
        assert server.request("GET", "/health", Host="other.lan")[0] == 403


def test_noise_gets_a_400_in_openais_shape(server):
    response = serve_fuzz.send_one(server.port, b"\x16\x03\x01 what is this\r\n\r\n")
    assert serve_fuzz.status_of(response) == "400"
    assert json.loads(response.partition(b"\r\n\r\n")[2])["error"]["type"] == (
        "invalid_request_error")


# ---- clients that leave, dawdle or swarm ---------------------------------------------------------


def open_request(port, body, **headers):
    client = socket.create_connection(("127.0.0.1", port), 10)
    client.sendall(serve_fuzz.request_bytes(json.dumps(body).encode(), **headers))
    return client


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_work(server, stream):
    steps, left = server.worker.steps, server.metrics.counts["/v1/chat/completions", 499]
    client = open_request(server.port, {"model": "loop", "messages": ASK, "stream": stream, "n": 2})
    wait_for(lambda: server.worker.active_rows() == 2)
    client.close()
    server.idle()
    assert server.worker.steps - steps < LOOP_CONTEXT / 2
    wait_for(lambda: server.metrics.counts["/v1/chat/completions", 499] > left)


@pytest.fixture(scope="module")
def impatient(stages):
    running = Running(stages, patience=0.4, max_connections=12, beat=0.0)
    running.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with running:
        yield running


def test_slow_clients_are_hung_up_on_and_others_do_not_notice(impatient):
    stop, left = threading.Event(), []
    slow = threading.Thread(
        target=lambda: left.append(serve_fuzz.slow_clients(impatient.port, 9, stop)))
    slow.start()
    for _ in range(5):
        assert impatient.chat()[0] == 200
    slow.join(timeout=10)
    stop.set()
    slow.join()
    assert left == [0]


@pytest.mark.parametrize("sent", [
    b"", b"POST /v1/chat/completions HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
    serve_fuzz.request_bytes(b'{"mess', Content_Length=90)])
def test_a_request_that_does_not_come_to_its_end_is_answered_with_408(impatient, sent):
    response = serve_fuzz.send_one(impatient.port, sent)
    assert serve_fuzz.status_of(response) == "408"
    assert json.loads(response.partition(b"\r\n\r\n")[2])["error"]["message"]


def lazy_client(port, request):
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect(("127.0.0.1", port))
    client.sendall(request)
    return client


def test_a_client_that_does_not_read_its_stream_is_dropped(impatient):
    body = {"model": "loop", "messages": ASK, "stream": True, "n": 4, "max_tokens": 1500}
    client = lazy_client(impatient.port, serve_fuzz.request_bytes(json.dumps(body).encode()))
    wait_for(lambda: impatient.worker.active_rows() == 4)
    impatient.idle()
    wait_for(lambda: not impatient.server.server_state.connections, 15)
    assert b"[DONE]" not in all_that_comes(client)


def test_a_client_that_leaves_a_whole_answer_in_the_buffers_is_dropped_too(impatient):
    """The page is written at once, more than the system's small buffers hold: the rest would wait
    in this process for ever."""
    client = lazy_client(impatient.port, serve_fuzz.request_bytes(b"", "GET", "/"))
    wait_for(lambda: impatient.server.server_state.connections)
    wait_for(lambda: not impatient.server.server_state.connections, 15)
    received = all_that_comes(client)
    assert received.startswith(b"HTTP/1.1 200") and b"</html>" not in received


def all_that_comes(client):
    received = b""
    with contextlib.closing(client), contextlib.suppress(OSError):
        client.settimeout(10)
        while piece := client.recv(65536):
            received += piece
    return received


def test_too_many_connections_are_429(impatient):
    wait_for(lambda: not impatient.server.server_state.connections, 15)
    clients = [socket.create_connection(("127.0.0.1", impatient.port), 5) for _ in range(12)]
    wait_for(lambda: len(impatient.server.server_state.connections) == 12)
    response = serve_fuzz.send_one(impatient.port, b"")
    assert serve_fuzz.status_of(response) == "429" and b"Retry-After" in response
    for client in clients:
        client.close()
    wait_for(lambda: impatient.request("GET", "/health")[0] == 200)


def test_a_few_hundred_random_requests_leave_no_trace(stages):
    """The short form of serve_fuzz.py; `python tests/serve_fuzz.py` sends ten thousand."""
    with Running(stages, patience=0.3, stage="random") as server:
        statuses, complaints = serve_fuzz.fuzz(server.port, 400, seed=3)
        assert not complaints, "\n".join(complaints[:5])
        assert statuses["200"] > 20 and statuses["400"] > 100
        server.idle()
        wait_for(lambda: not server.server.server_state.connections, 15)
        assert server.chat()[0] == 200


# ---- health, metrics, logs -----------------------------------------------------------------------


def test_health_and_metrics_count_what_happens(stages):
    parser = pytest.importorskip("prometheus_client.parser")
    with Running(stages) as server:
        for options in ({}, {"n": 2}, {"n": 99}):
            server.chat(**options)
        server.request("GET", "/no/such/thing?q=secret")
        health = json.loads(server.request("GET", "/health")[2])
        assert (health["status"], health["active_rows"], health["queue_depth"]) == ("ok", 0, 0)
        status, headers, text = server.request("GET", "/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert "secret" not in text and "such" not in text
    found = {}
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            found[(sample.name, *sample.labels.values())] = sample.value
            assert family.type in ("counter", "gauge", "histogram")
    assert found["edu_requests_total", "/v1/chat/completions", "200"] == 2
    assert found["edu_requests_total", "/v1/chat/completions", "400"] == 1
    assert found["edu_requests_total", "other", "404"] == 1
    assert found["edu_prompt_tokens_total",] == 2 * 6
    assert found["edu_completion_tokens_total",] == 3 * SCRIPT_TOKENS
    assert found["edu_queue_depth",] == found["edu_active_rows",] == 0
    assert found["edu_request_seconds_count",] == 5
    assert found["edu_request_seconds_bucket", "+Inf"] == 5
    assert found["edu_first_token_seconds_count",] == 2
    buckets = [value for key, value in found.items() if key[0] == "edu_request_seconds_bucket"]
    assert buckets == sorted(buckets)


class Process:
    """The script as a process of its own, its output read line by line."""

    def __init__(self, data_dir, *flags):
        self.process = subprocess.Popen(
            [sys.executable, script_path("16_serve"), "--data-dir", data_dir, *flags],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
        self.lines = []

    def read_until(self, pattern):
        for line in self.process.stdout:
            self.lines.append(line)
            found = re.search(pattern, line)
            if found:
                return found
        pytest.fail(f"{pattern!r} was not printed:\n{''.join(self.lines)}")

    def __enter__(self):
        self.port = int(self.read_until(r"chat at http://127\.0\.0\.1:(\d+)")[1])
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()


def test_ctrl_c_lets_the_answers_finish_and_the_log_tells_no_secret(data_dir):
    with Process(data_dir, "--stage", "script", "--port", "0") as running:
        body = {"model": "loop", "messages": [{"role": "user", "content": "sesame"}],
                "max_tokens": 400, "stream": True}
        client = open_request(running.port, body)
        client.settimeout(20)
        received = client.recv(4096)
        running.process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):
            while piece := client.recv(65536):
                received += piece
        client.close()
        out, _ = running.process.communicate(timeout=20)
    out = "".join(running.lines) + out
    assert b'"finish_reason": "length"' in received and b"data: [DONE]" in received
    assert running.process.returncode == 0
    assert "result: requests answered 0 -> 1 (n=1)" in out and "next: python edu/" in out
    assert "POST /v1/chat/completions 200" in out and "loop 10 prompt tokens" in out
    assert "sesame" not in out and "abc" not in out and "Traceback" not in out


def test_a_port_that_is_taken_and_a_model_that_is_missing_are_said_in_words(
        data_dir, tmp_path, capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = ["--data-dir", str(data_dir), "--stage", "script", "--port", str(port)]
        assert serve.main(flags) == 2
        said = capsys.readouterr().err
        assert f"port {port}" in said and "--port" in said and "Traceback" not in said
    assert serve.main(["--data-dir", str(data_dir), "--stage", "gone"]) == 2
    said = capsys.readouterr().err
    assert "--stage gone" in said and "script" in said and "my_pipeline.sh" in said
    assert serve.main(["--data-dir", str(tmp_path)]) == 2
    assert "tokenizer" in capsys.readouterr().err
    serve_fuzz.write_byte_tokenizer(tmp_path / "tokenizer", serve)
    assert serve.main(["--data-dir", str(tmp_path)]) == 2
    assert "no model" in capsys.readouterr().err
    assert serve.main(["--data-dir", str(data_dir), "--stage", "broken"]) == 2
    assert "no checkpoint" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(serve, "PAGE", tmp_path / "gone.html")
        assert serve.main(["--data-dir", str(data_dir), "--stage", "script"]) == 2
        assert "gone.html" in capsys.readouterr().err
    for flags in (["--max-batch", "0"], ["--port", "70000"], ["--patience", "0"]):
        assert serve.main(["--data-dir", str(data_dir), *flags]) == 2
        assert flags[0] in capsys.readouterr().err


def test_measure_prints_a_row_for_each_number_of_clients(data_dir, capsys):
    assert serve.main(["--data-dir", str(data_dir), "--stage", "random", "--measure", "3",
                       "--measure-tokens", "6"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if line[:7].strip().isdigit()] == [
        "1", "2", "3"]
    assert re.search(r"^result: tokens per second, 1 client against 3 \d+ -> \d+ \(n=18\)$", out,
                     re.MULTILINE)
