"""Challenge 6: the conversations, what is refused, and a teacher that misbehaves on command.

The language model is a real HTTP server on 127.0.0.1 that speaks the protocol of the openai client.
The oracle for money is the server's own list of requests: what it answered is what was paid for.
"""
import email.utils
import functools
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import load, wait_for

identity = load("06_identity")
KEY = "sk-very-secret-123"


def need(name):
    """Skip a test of something that a learner's version does not have, such as a command line."""
    if not hasattr(identity, name):
        pytest.skip(f"this version has no `{name}`")


def bare(text):
    return " ".join(re.findall(r"\w+", text.lower()))


def turns(*contents):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content}
                         for i, content in enumerate(contents)]}


def read_lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# ---- what is said --------------------------------------------------------------------------------


def test_there_are_fifty_starters_or_more_and_no_two_say_the_same():
    starters = identity.STARTER_PROMPTS
    assert len(starters) >= 50
    assert len({bare(starter) for starter in starters}) == len(starters)
    assert all(starter.isascii() and starter == starter.strip() for starter in starters)
    first_words = {bare(starter).split()[0] for starter in starters}
    assert len(first_words) >= 20, first_words


def test_a_generated_conversation_is_valid_and_the_same_each_time():
    for index in range(0, 400, 7):
        conversation = identity.generate_conversation(index)
        identity.validate_conversation(conversation)
        assert conversation == identity.generate_conversation(index)
        assert conversation["messages"][0]["content"] in identity.STARTER_PROMPTS


def test_no_starter_comes_twice_before_all_have_come_once():
    count = len(identity.STARTER_PROMPTS)
    first = [identity.generate_conversation(i)["messages"][0]["content"] for i in range(count)]
    assert len(set(first)) == count


def test_the_plain_questions_are_always_among_the_hundred():
    need("draw_brief")
    for seed in range(20):
        starters = {identity.draw_brief(index, seed).starter for index in range(100)}
        assert {"Who are you?", "Who made you?", "What are you?", "What are you for?"} <= starters
        assert len(starters) == 100


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a default run, made once, in a process of its own with hashes of its own."""
    need("main")
    folder = tmp_path_factory.mktemp("written")
    done = subprocess.run([sys.executable, identity.__file__, "--data-dir", folder],
                          capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    (folder / "out.txt").write_text(done.stdout, "utf-8")
    return folder


def test_the_default_file_is_a_hundred_valid_conversations_of_one_and_several_turns(written):
    rows = read_lines(written / "my_identity.jsonl")
    assert len(rows) == 100
    for row in rows:
        identity.validate_conversation(row)
        assert set(row) == {"messages"}
    lengths = [len(row["messages"]) // 2 for row in rows]
    assert lengths.count(1) >= 20 and sum(n > 1 for n in lengths) >= 40


def test_every_text_is_short_plain_ascii_without_leftovers_of_a_template(written):
    for row in read_lines(written / "my_identity.jsonl"):
        for message in row["messages"]:
            text = message["content"]
            assert text.isascii() and not set(text) & set("[]{}|<>\n"), text
            assert len(text.split()) < 30, text
            assert text[0].isupper() and text[-1] in ".!?", text
            assert "  " not in text and not re.search(r"[.!?] [a-z]", text), text
            assert not re.search(r"\b(\w+) \1\b", text), text  # a word twice in a row


def test_the_answers_know_their_name_nearly_always_and_each_fact_often(written):
    answers = [message["content"] for row in read_lines(written / "my_identity.jsonl")
               for message in row["messages"][1::2]]
    persona = identity.PERSONA
    assert sum(persona.name in answer for answer in answers) >= 0.85 * len(answers)
    for fact in (persona.nature, persona.maker, persona.skills):
        assert sum(fact.lower() in answer.lower() for answer in answers) >= 15, fact
    assert sum(persona.home in answer for answer in answers) >= 5


def test_another_process_writes_the_same_bytes_and_another_seed_others(written, tmp_path):
    for seed, same in ((1337, True), (5, False)):
        assert identity.main(["--data-dir", str(tmp_path), "--seed", str(seed)]) == 0
        ours = (tmp_path / "my_identity.jsonl").read_bytes()
        assert (ours == (written / "my_identity.jsonl").read_bytes()) is same


def test_another_name_replaces_the_old_one_everywhere(tmp_path, capsys):
    need("main")
    assert identity.main(["--data-dir", str(tmp_path), "--name", "Robin"]) == 0
    for name in ("my_identity.jsonl", "my_identity_test.jsonl"):
        text = (tmp_path / name).read_text("utf-8")
        assert "Robin" in text and identity.PERSONA.name not in text
    assert "persona Robin" in capsys.readouterr().out


# ---- the held-out prompts ------------------------------------------------------------------------


def test_fifty_held_out_prompts_stand_in_no_starter_no_template_and_no_chat_of_the_tiny_world():
    need("TALK")
    held = {bare(prompt) for prompt in identity.HELD_OUT_PROMPTS}
    assert len(identity.HELD_OUT_PROMPTS) == len(held) == 50
    asked = [bare(prompt) for subject in identity.TALK.values()
             for block in (subject.starters, subject.later) for prompt in block.split("|")]
    assert len(asked) > 150 and not held & set(asked)
    assert not held & {bare(starter) for starter in identity.STARTER_PROMPTS}
    world = load("00_tiny_world")
    chats = [bare(prompt) for topic in world.SMALL_TALK + world.UNKNOWN
             for block in topic[:2] for prompt in block.split("|")]
    assert len(chats) > 100 and not held & set(chats)


def test_the_held_out_prompts_stand_in_nothing_that_is_written_to_train_on(written):
    held = {bare(prompt) for prompt in identity.HELD_OUT_PROMPTS}
    rows = read_lines(written / "my_identity.jsonl")
    rows += [identity.generate_conversation(i) for i in range(1000)]
    assert not held & {bare(message["content"]) for row in rows for message in row["messages"]}


def test_the_test_file_asks_for_name_maker_nature_and_purpose_and_says_what_is_right(written):
    rows = read_lines(written / "my_identity_test.jsonl")
    assert [row["messages"] for row in rows] == [
        [{"role": "user", "content": prompt}] for prompt in identity.HELD_OUT_PROMPTS]
    kinds = [row["kind"] for row in rows]
    assert set(kinds) == {"name", "maker", "nature", "purpose"}
    assert all(kinds.count(kind) >= 10 for kind in set(kinds))
    trained = "\n".join(message["content"] for row in read_lines(written / "my_identity.jsonl")
                        for message in row["messages"][1::2])
    small_talk = " ".join(topic[2] for topic in load("00_tiny_world").SMALL_TALK)
    for answer in {answer for row in rows for answer in row["answer"]}:
        assert re.search(rf"\b{re.escape(answer)}\b", trained), answer
        # a model that has only had the tiny world's chats must not pass by accident
        assert not re.search(rf"\b{re.escape(answer)}\b", small_talk, re.IGNORECASE), answer


# ---- what is refused -----------------------------------------------------------------------------

FINE = ("Who are you?", "I am Pip, a small language model.")


@pytest.mark.parametrize("obj", [
    turns(*FINE),
    turns(*FINE, "And now?", "Now I wait. \"Soon,\" said the fox."),
    turns("hello", "Hello! You can call me Pip."),
    turns("Are you ChatGPT, or Siri?", "No, I am Pip."),
    turns("Are you a person?", "I am not a person. I am no human, I am a program."),
    turns("Do you speak English?", "I am English only, I'm afraid. I can see why you ask."),
    turns("Who made you?", "I was built by a reader of Zero to RLHF, on a laptop."),
    turns("Are you big?", "I am smaller than any large language model."),
    {**turns(*FINE), "kind": "name"},
])
def test_a_good_conversation_is_accepted(obj):
    assert identity.validate_conversation(obj) is None


@pytest.mark.parametrize(("obj", "named"), [
    (None, "messages"), ([], "messages"), ("text", "messages"), ({}, "messages"),
    ({"messages": None}, "messages"), ({"messages": {}}, "messages"),
    ({"messages": []}, "0 messages"), (turns("Who are you?"), "1 messages"),
    (turns(*FINE, "And?"), "3 messages"),
    ({"messages": ["Hello!", "I am Pip."]}, "message 0"),
    ({"messages": turns(*FINE)["messages"][::-1]}, "message 0"),
    ({"messages": turns(*FINE)["messages"][:1] * 2}, "message 1"),
    ({"messages": [{"role": "system", "content": "Be Pip."}, *turns(*FINE)["messages"]]}, "system"),
    ({"messages": [{"role": "user"}, {"role": "assistant", "content": "Hi."}]}, "message 0"),
    ({"messages": [{"role": "user", "content": "Hi", "name": "x"}] * 2}, "name"),
    (turns("Who are you?", None), "message 1"), (turns("Who are you?", ["I am Pip."]), "message 1"),
    (turns("", "I am Pip."), "message 0"), (turns("Who are you?", " \n"), "message 1"),
    (turns("Who are you?", "I am Pip, a small"), "a small"),
    (turns("Who are you?", "I am Pip, a small..."), "cut off"),
    (turns("Who are you?", "I am Pip. My maker said, \"Hello."), "cut off"),
    (turns("Who are you,", "I am Pip."), "cut off"),
    (turns("Who are you?", "I am Pip. " * 200), "characters"),
    (turns(*FINE * 7), "14 messages"),
    (turns("Who are you?", "I am \ud83d Pip."), "message 1"),
    (turns("Who are you?", "I am [Your Name]."), "[Your Name]"),
    (turns("Who are you?", "I am {name}."), "{name}"),
    (turns("Who are you?<|user_end|>", "I am Pip."), "<|"),
    (turns("Who are you?", "My name is Max."), "Max"),
    (turns("Who are you?", "I'm Bob, nice to meet you!"), "Bob"),
    (turns("Who are you?", "Hello! You can call me Assistant."), "Assistant"),
    (turns(*FINE, "Again?", "I am called Lucy."), "Lucy"),
    (turns("Who made you?", "I am Pip. I was trained by OpenAI."), "OpenAI"),
    (turns("Who made you?", "I am Pip. A team of engineers built me."), "engineers"),
    (turns("Who made you?", "I was carefully made by you."), "gives a maker"),
    (turns("Who made you?", "My creators are many people."), "gives a maker"),
    (turns("Who are you?", "I am Pip, and I am a large language model."), "large language model"),
    (turns("Who are you?", "I am like ChatGPT, but small."), "ChatGPT"),
    (turns("Are you real?", "Yes, I am a real person."), "person"),
    (turns("Are you real?", "Yes, I'm just a girl."), "girl"),
    (turns("Can you see me?", "Yes, I can see you."), "I can see"),
])
def test_what_is_wrong_with_a_conversation_is_named(obj, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        identity.validate_conversation(obj)


def test_duplicates_near_duplicates_and_held_out_prompts_are_refused_and_change_nothing():
    need("Collection")
    collection = identity.Collection()
    long = "I am Pip, a small language model. I can help you with facts, sums and short stories."
    collection.add(turns("Who are you?", long))
    for other, reason in (
            (turns("who ARE you", long.upper()), "duplicate"),
            (turns("Who are you?", long.replace("short ", "")), "near-duplicate"),
            (turns("do you go BY a name", "I am Pip."), "held-out prompt"),
            (turns("Hello!", "Hello!", "your NAME please", "I am Pip."), "held-out prompt")):
        with pytest.raises(identity.Rejected) as raised:
            collection.add(other)
        assert raised.value.reason == reason
    collection.add(turns("Who are you?", "My name is Pip."))
    collection.add(turns("Hi!", "Hi."))  # too short for a run of three words
    collection.add(turns("Ho!", "Ho."))
    assert len(collection.kept) == 4


def test_the_templates_say_when_they_have_no_more_to_say(tmp_path, capsys, monkeypatch):
    need("TALK")
    one = {"name": identity.Subject("Who are you?", "I am {name}.")}
    monkeypatch.setattr(identity, "TALK", one)
    monkeypatch.setattr(identity, "STARTER_PROMPTS", ("Who are you?",))
    monkeypatch.setattr(identity, "SUBJECT_OF", {"Who are you?": "name"})
    monkeypatch.setattr(identity, "WEIGHT_OF", {"Who are you?": 1})
    assert identity.main(["--data-dir", str(tmp_path), "--num-conversations", "2"]) == 1
    out, err = capsys.readouterr()
    assert "--num-conversations 1" in err and "duplicate" in out
    assert not (tmp_path / "my_identity.jsonl").exists()


# ---- what is measured ----------------------------------------------------------------------------


def test_diversity_is_what_one_counts_by_hand():
    """a b a b: runs ab, ba, ab; c d: run cd. 3 different of 4. Prefixes: "i am pip" is shared."""
    need("measure_diversity")
    assert identity.distinct_n(["a b a b", "C d!"], 2) == 3 / 4
    assert identity.distinct_n([], 2) == 0 and identity.distinct_n(["one"], 2) == 0
    texts = ["I am Pip, you know.", "Who is it?", "I am Pip. Hello!", "Who was it?"]
    assert identity.longest_shared_prefix(texts) == 3
    assert identity.longest_shared_prefix(texts[:1]) == identity.longest_shared_prefix([]) == 0
    found = identity.measure_diversity(
        [turns("Hi!", "I am Pip.", "And?", "I like pips."), turns("HI", "My name is Bob.")],
        identity.PERSONA)
    assert (found["starters"], found["answers"], found["given"]) == (1, 3, 2)
    assert found["named"] == 1 / 3 and found["right"] == 1 / 2


def test_the_output_gives_the_numbers_that_the_file_has(written):
    out = (written / "out.txt").read_text("utf-8")
    rows = read_lines(written / "my_identity.jsonl")
    answers = [message["content"] for row in rows for message in row["messages"][1::2]]
    named = sum("Pip" in answer for answer in answers) / len(answers)
    starters = len({row["messages"][0]["content"] for row in rows})
    assert f"diversity: {starters} distinct starters (n=100)" in out
    assert f"persona: {named:.0%} of {len(answers)} answers name Pip, 100% of the" in out


# ---- the server ----------------------------------------------------------------------------------


def conversation_for(asked):
    """A valid conversation that follows the brief, and that no other request gets."""
    prompt = asked["messages"][-1]["content"]
    starter = re.search(r"in other words: (['\"])(.*?)\1\. Work", prompt)[2]
    number = re.search(r"number (\d+)", prompt)[1]
    words = " ".join("zero one two three four five six seven eight nine".split()[int(digit)]
                     for digit in number)
    return turns(starter, f"I am Pip, a small language model. My lucky words are {words}.")


def say(content, finish="stop", **message):
    """Answer with this text, or with what content(request) gives."""
    def behave(handler, asked):
        text = content(asked) if callable(content) else content
        handler.complete(text, finish, message)
    return behave


good = say(lambda asked: json.dumps(conversation_for(asked)))
prose = say(lambda asked: "Sure {here} it is:\n```json\n" + json.dumps(conversation_for(asked))
            + "\n```\nAnything else {?}")
bare_lines = say(lambda asked: json.dumps(conversation_for(asked)).replace("model.", "model.\n "))
curly = say(lambda asked: json.dumps(
    conversation_for(asked)).replace("My lucky", "\\u201cPip\\u201d\\u2019s lucky"))
same = say(json.dumps(turns(*FINE)))


def status(code, message="busy", error_code=None, **headers):
    def behave(handler, asked):
        body = {"error": {"message": message, "type": "x", "code": error_code}}
        handler.start(code, json.dumps(body).encode(), **headers)
    return behave


def raw(body, kind="application/json", length=None):
    def behave(handler, asked):
        handler.start(200, body, kind=kind, length=length)
    return behave


def hang(handler, asked):
    handler.server.closing.wait(5)


def hang_up(handler, asked):
    handler.connection.shutdown(socket.SHUT_RDWR)


def only(*understood):
    """A server that knows no other response_format than these; None is no such field at all."""
    def behave(handler, asked):
        kind = (asked.get("response_format") or {}).get("type")
        if kind in understood:
            return good(handler, asked)
        return status(400, f"unknown response_format {kind}")(handler, asked)
    return behave


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def start(self, code, body, kind="application/json", length=None, **headers):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length or len(body)))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = length is not None

    def complete(self, text, finish, message):
        choice = {"index": 0, "finish_reason": finish,
                  "message": {"role": "assistant", "content": text, **message}}
        body = {"id": "x", "object": "chat.completion", "created": 1, "model": "m",
                "choices": [choice]}
        if self.server.counts:
            body["usage"] = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
        self.start(200, json.dumps(body).encode())

    def do_POST(self):
        server = self.server
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, self.headers.get("Authorization"), asked))
            behave = server.faults.pop(0) if server.faults else server.always
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        try:
            time.sleep(server.latency)
            behave(self, asked)
        except OSError:
            pass  # the client has left
        finally:
            with server.lock:
                server.busy -= 1


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


@pytest.fixture(scope="module")
def transport():
    """One pool of connections for all tests: to make one, certificates are read for 0.1 s."""
    openai = pytest.importorskip("openai")
    with openai.DefaultHttpxClient() as client:
        yield functools.partial(openai.OpenAI, http_client=client)


@pytest.fixture
def llm(monkeypatch, transport):
    """A server that is well until told otherwise: .faults are used up first, then .always."""
    need("OpenAITeacher")
    monkeypatch.setattr("openai.OpenAI", transport)
    server = Server(("127.0.0.1", 0), Handler)
    server.faults, server.requests, server.always, server.counts = [], [], good, True
    server.busy = server.most_busy = server.latency = 0
    server.lock, server.closing = threading.Lock(), threading.Event()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def ask(tmp_path, capsys):
    """ask(*flags) -> (exit code, stdout, stderr) of --teacher openai, eight conversations."""
    def run(*flags, workers=2, wanted=8):
        code = identity.main([
            "--teacher", "openai", "--model", "m", "--data-dir", str(tmp_path), "--base-delay",
            "0.01", "--timeout", "5", "--workers", str(workers), "--num-conversations",
            str(wanted), *flags])
        out, err = capsys.readouterr()
        assert KEY not in out + err and "Traceback" not in err
        return code, out, err
    return run


def kept_in(tmp_path):
    return [row for row in read_lines(tmp_path / "my_identity.paid.jsonl") if "messages" in row]


# ---- a teacher that is paid ----------------------------------------------------------------------


def test_a_healthy_server_is_asked_once_per_conversation_and_told_all_that_matters(
        llm, ask, tmp_path):
    code, out, _ = ask()
    assert code == 0 and len(llm.requests) == 8
    rows = read_lines(tmp_path / "my_identity.jsonl")
    assert len(rows) == 8 and all(identity.validate_conversation(row) is None for row in rows)
    for path, key, asked in llm.requests:
        assert (path, key, asked["model"]) == ("/v1/chat/completions", f"Bearer {KEY}", "m")
        form = asked["response_format"]
        assert form["type"] == "json_schema" and form["json_schema"]["strict"] is True
        assert "Pip" in asked["messages"][0]["content"] and "temperature" not in asked
    prompts = [asked["messages"][1]["content"] for _, _, asked in llm.requests]
    assert len(set(prompts)) == 8
    assert any(starter in prompts[0] for starter in identity.STARTER_PROMPTS)
    assert "asked 8, kept 8, rejected 0" in out
    assert "tokens used: 856 (800 in, 56 out)" in out
    assert "result: valid conversations 0 -> 8 (n=8)" in out


def test_as_many_requests_as_there_are_workers_are_in_flight_and_no_more(llm, ask):
    llm.latency = 0.05
    assert ask(workers=4)[0] == 0
    assert llm.most_busy == 4 and len(llm.requests) == 8


def test_a_server_that_does_not_count_tokens_is_no_obstacle(llm, ask):
    llm.counts = False
    code, out, _ = ask()
    assert code == 0 and "tokens used: the server does not say" in out


def test_the_temperature_is_sent_when_it_is_given(llm, ask):
    ask("--temperature", "0.7")
    assert {asked["temperature"] for _, _, asked in llm.requests} == {0.7}


@pytest.mark.parametrize("fault", [
    status(429), status(429, Retry_After="0"), status(500), status(503), status(408), status(409),
    hang_up, hang, raw(b'{"id"', length=500)],
    ids="429 429-with-wait 500 503 408 409 hang-up hang cut-body".split())
def test_after_a_failure_that_passes_the_same_question_is_asked_again(llm, ask, tmp_path, fault):
    llm.faults = [fault]
    code, out, _ = ask(*(["--timeout", "0.4"] if fault is hang else []))
    assert code == 0 and len(llm.requests) == 9
    assert "asked 8, kept 8, rejected 0" in out
    assert len(read_lines(tmp_path / "my_identity.jsonl")) == 8
    prompts = [asked["messages"][1]["content"] for _, _, asked in llm.requests]
    assert prompts.count(prompts[0]) == 2 and len(set(prompts)) == 8


@pytest.mark.parametrize(("fault", "reason"), [
    (say('{"messages": [{"role": "user", "content": "Who are y'), "broken JSON"),
    (say("I would rather not."), "no JSON"),
    (say('{"turns": []}'), "broken JSON"),
    (say("{" * 3000), "broken JSON"),
    (say('[{"a":' * 2000), "broken JSON"),
    (say('{"messages": 5}'), "wrong shape"),
    (say(json.dumps({"messages": [{"role": "user", "content": "Hi"}] * 2})), "wrong roles"),
    (say(""), "empty"), (say(None), "empty"), (say("  \n"), "empty"),
    (say(json.dumps(turns("Hi!", ""))), "empty"),
    (say(json.dumps(turns("Hi!", "I am"))), "cut off"),
    (say(json.dumps(turns("Hi!", "I am Pip.")), finish="length"), "cut off"),
    (say(None, refusal="No."), "refused"),
    (say("x", finish="content_filter"), "refused"),
    (say(json.dumps(turns("Hi!", "I am ChatGPT."))), "another persona"),
    (say(json.dumps(turns("Your name please!", "I am Pip."))), "held-out prompt"),
    (say(json.dumps(turns("Hi!", "I am \ud83d."))), "broken text"),
    (raw(b'{"error": {"message": "overloaded"}, "choices": null}'), "no completion"),
    (raw(b'{"choices": []}'), "no completion"),
    (raw(b"{"), "no completion"),
    (raw(b"[]"), "no completion"),
    (raw(b"<html>Log in</html>", kind="text/html"), "no completion"),
])
def test_a_useless_answer_is_counted_by_its_reason_and_made_up_for(
        llm, ask, tmp_path, fault, reason):
    llm.faults = [fault]
    code, out, _ = ask(wanted=3)
    assert code == 0 and len(llm.requests) == 4
    assert f"asked 4, kept 3, rejected 1 ({reason} 1)" in out
    assert len(read_lines(tmp_path / "my_identity.jsonl")) == 3


@pytest.mark.parametrize("dressed", [prose, bare_lines, curly], ids="prose newlines quotes".split())
def test_json_is_found_in_prose_and_tidied(llm, ask, tmp_path, dressed):
    llm.always = dressed
    code, out, _ = ask(wanted=3)
    assert code == 0 and "asked 3, kept 3, rejected 0" in out
    assert "\\u20" not in (tmp_path / "my_identity.jsonl").read_text("utf-8")


def test_a_teacher_that_repeats_itself_is_caught_at_it(llm, ask, tmp_path):
    llm.faults = [same] * 4
    code, out, _ = ask(workers=1)
    assert code == 0 and len(llm.requests) == 11
    assert "asked 11, kept 8, rejected 3 (duplicate 3)" in out
    assert len({json.dumps(row) for row in read_lines(tmp_path / "my_identity.jsonl")}) == 8


# ---- servers that know less ----------------------------------------------------------------------


@pytest.mark.parametrize(("understood", "forms"), [
    ("json_object", ["json_schema", "json_object", "json_object"]),
    (None, ["json_schema", "json_object", None, None])])
def test_a_server_without_json_schema_is_asked_for_what_it_understands(
        llm, ask, understood, forms):
    llm.always = only(understood)
    code, out, _ = ask(workers=1, wanted=2)
    assert code == 0
    sent = [(asked.get("response_format") or {}).get("type") for _, _, asked in llm.requests]
    assert sent == forms
    assert f"going on with {understood or 'text'}" in out


def test_several_workers_step_down_together_and_not_too_far(llm, ask):
    llm.always, llm.latency = only("json_object"), 0.02
    code, out, _ = ask(workers=4)
    assert code == 0 and out.count("note:") == 1
    assert {(asked.get("response_format") or {}).get("type") for _, _, asked in llm.requests} == {
        "json_schema", "json_object"}


def test_once_the_schema_has_worked_a_400_is_about_one_question_only(llm, ask):
    llm.faults = [good, status(400, "content filter")]
    code, out, _ = ask(workers=1, wanted=3)
    assert code == 0 and "rejected 1 (refused 1)" in out and "note:" not in out
    assert all(asked["response_format"]["type"] == "json_schema" for _, _, asked in llm.requests)


# ---- waiting -------------------------------------------------------------------------------------


def teacher_with_clock(**settings):
    waits = []
    config = identity.Config(model="m", base_delay=0.0, **settings)
    return identity.OpenAITeacher(config, sleep=waits.append), waits


@pytest.mark.parametrize(("headers", "least", "most"), [
    ({"Retry_After": "7"}, 7, 7), ({"Retry_After": "2.5"}, 2.5, 2.5),
    ({"retry_after_ms": "1500", "Retry_After": "9"}, 1.5, 1.5),
    ({"Retry_After": 60}, 40, 61), ({"Retry_After": -60}, 0, 0),  # dates, from now on
    ({"Retry_After": "soon"}, 0, 0), ({}, 0, 0)])
@pytest.mark.parametrize("code", [429, 503])
def test_the_wait_is_the_one_the_server_asks_for(llm, code, headers, least, most):
    headers = {name: value if isinstance(value, str) else
               email.utils.formatdate(time.time() + value, usegmt=True)
               for name, value in headers.items()}
    llm.faults = [status(code, **headers)]
    teacher, waits = teacher_with_clock()
    assert identity.generate_conversation(0, teacher)["messages"]
    assert least <= max(waits) <= most and len(llm.requests) == 2


def test_other_workers_wait_too_when_one_is_told_to(llm):
    llm.faults = [status(429, Retry_After="7")]
    teacher, waits = teacher_with_clock()
    identity.generate_conversation(0, teacher)
    waits.clear()
    identity.generate_conversation(1, teacher)
    assert 5 < waits[0] <= 7


def test_without_a_word_from_the_server_the_waits_grow_and_have_jitter(llm, monkeypatch):
    llm.always = status(500)
    monkeypatch.setattr(identity.random, "uniform", lambda low, high: high)
    teacher, waits = teacher_with_clock()
    teacher.config.base_delay = 1.0
    with pytest.raises(identity.TeacherError, match="tried 5 times"):
        identity.generate_conversation(0, teacher)
    assert [wait for wait in waits if wait] == [2, 4, 8, 16] and len(llm.requests) == 5


def test_a_wait_of_hours_ends_the_run_at_once_and_says_so(llm, ask):
    llm.always = status(429, Retry_After="7200")
    code, _, err = ask(workers=1)
    assert code == 1 and "7200 s" in err and len(llm.requests) == 1


# ---- giving up -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "code", "named"), [
    (status(401, "bad key"), 2, "OPENAI_API_KEY"), (status(403, "no entry"), 2, "OPENAI_API_KEY"),
    (status(404, "no such model"), 2, "--model m"),
    (status(429, "out of money", "insufficient_quota"), 1, "out of money"),
    (status(402, "pay first"), 1, "pay first"), (status(400, "bad in any form"), 1, "bad in any")])
def test_what_will_not_pass_ends_the_run_at_once_with_what_to_do(llm, ask, tmp_path, fault, code,
                                                                 named):
    llm.always = fault
    got, out, err = ask(workers=2)
    assert got == code and named in err and "nothing was kept" in err
    assert len(llm.requests) <= 6  # at most two workers, each stepping down twice
    assert "next:" not in out and not (tmp_path / "my_identity.jsonl").exists()


def test_a_server_that_is_down_is_named_and_costs_no_time(llm, ask, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{free.getsockname()[1]}/v1")
        began = time.monotonic()
        code, _, err = ask()
    assert code == 1 and "Connection" in err and "tried 5 times" in err
    assert time.monotonic() - began < 5


def test_a_server_that_never_answers_ends_in_an_error(llm, ask):
    llm.always = hang
    code, _, err = ask("--timeout", "0.1", "--attempts", "2")
    assert code == 1 and "timed out" in err
    assert len(llm.requests) <= 2 * (3 + 2)  # three that are lost, two more in flight


def test_a_model_that_never_yields_json_is_given_up_before_it_costs_much(llm, ask):
    llm.faults = [good, good]
    llm.always = say("Here is your conversation!")
    code, out, err = ask("--give-up-after", "4", "--max-asked", "10")
    assert code == 1 and "4 answers in a row" in err and "no JSON" in err
    assert "kept 2" in out and 6 <= len(llm.requests) <= 8


def test_no_more_is_paid_for_than_the_budget(llm, ask, tmp_path):
    llm.faults = [good if i % 4 == 0 else same for i in range(40)]
    code, out, err = ask("--max-asked", "2", workers=1)
    assert code == 1 and len(llm.requests) == 16 and "2 answers per missing" in err
    assert f"kept {len(kept_in(tmp_path))} in " in err
    assert "asked 16" in out and "tokens used: 1712 " in out


# ---- never paying twice --------------------------------------------------------------------------


def test_after_a_stop_the_same_command_goes_on_and_asks_only_for_what_is_missing(
        llm, ask, tmp_path):
    llm.faults = [good, same, good, status(401)]
    code, out, err = ask(workers=1)
    assert code == 2 and "kept 3" in out and "asked 4, " in out
    assert "--teacher openai" in err and "--num-conversations 3" in err
    assert not (tmp_path / "my_identity.jsonl").exists()
    before, first = kept_in(tmp_path), len(llm.requests)
    code, out, _ = ask(workers=3)
    assert code == 0 and len(llm.requests) - first == 5
    assert kept_in(tmp_path)[:3] == before
    assert "asked 8, kept 8" in out and "valid conversations 3 -> 8" in out
    assert "tokens used: 856 " in out
    prompts = [asked["messages"][1]["content"] for _, _, asked in llm.requests]
    assert len(set(prompts)) == len(prompts) - 1  # the one with the wrong key came back

    wrote, asked = (tmp_path / "my_identity.jsonl").read_bytes(), len(llm.requests)
    assert ask()[0] == 0 and len(llm.requests) == asked  # all is there: no request
    assert (tmp_path / "my_identity.jsonl").read_bytes() == wrote
    assert ask(wanted=9)[0] == 0 and len(llm.requests) == asked + 1


def test_what_was_rejected_is_remembered_and_not_asked_again(llm, ask):
    llm.faults = [say("no"), status(401)]
    ask(workers=1)
    _, out, _ = ask(workers=1, wanted=2)
    assert "asked 3, kept 2, rejected 1 (no JSON 1)" in out
    assert len({asked["messages"][1]["content"] for _, _, asked in llm.requests}) == 3


def test_the_template_teacher_leaves_alone_what_was_paid_for(llm, ask, tmp_path):
    ask()
    paid = (tmp_path / "my_identity.paid.jsonl").read_bytes()
    assert identity.main(["--data-dir", str(tmp_path)]) == 0
    assert len(read_lines(tmp_path / "my_identity.jsonl")) == 100
    assert (tmp_path / "my_identity.paid.jsonl").read_bytes() == paid
    first = len(llm.requests)
    assert ask()[0] == 0 and len(llm.requests) == first


def test_a_line_that_a_crash_cut_off_is_dropped_and_paid_for_again(llm, ask, tmp_path):
    ask()
    paid = tmp_path / "my_identity.paid.jsonl"
    paid.write_bytes(paid.read_bytes()[:-9])
    assert ask()[0] == 0 and len(llm.requests) == 9
    assert len(kept_in(tmp_path)) == 8


def test_a_line_that_is_no_record_is_named_and_nothing_is_asked(llm, ask, tmp_path):
    paid = tmp_path / "my_identity.paid.jsonl"
    for line in ("what?", "[]", "{}", '{"index": "x"}'):
        paid.write_text('{"index": 0, "rejected": "no JSON"}\n' + line + "\n", "utf-8")
        code, _, err = ask()
        assert code == 2 and "line 2" in err and llm.requests == []


def test_what_was_kept_for_another_persona_does_not_slip_in(llm, ask, tmp_path):
    ask(wanted=3)
    llm.always = say(lambda asked: json.dumps(conversation_for(asked)).replace("Pip", "Robin"))
    code, out, _ = ask("--name", "Robin", wanted=3)
    assert code == 0 and "no longer fits (another persona) 3" in out and len(llm.requests) == 6
    assert "Pip" not in (tmp_path / "my_identity.jsonl").read_text("utf-8")


def test_a_name_that_no_check_sees_does_not_slip_in_either(llm, ask, tmp_path):
    """Robin would otherwise be trained to say: Ask Pip!"""
    llm.always = say(lambda asked: json.dumps(conversation_for(asked)).replace(
        "I am Pip, a", "Just ask for Pip, a"))
    ask(wanted=3)
    assert "ask for Pip" in (tmp_path / "my_identity.jsonl").read_text("utf-8")
    llm.always = say(lambda asked: json.dumps(conversation_for(asked)).replace("Pip", "Robin"))
    code, out, _ = ask("--name", "Robin", wanted=3)
    assert code == 0 and "no longer fits (another persona) 3" in out and len(llm.requests) == 6
    assert "Pip" not in (tmp_path / "my_identity.jsonl").read_text("utf-8")
    assert ask(wanted=3)[0] == 0 and len(llm.requests) == 6  # Pip's own are still there


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
@pytest.mark.parametrize("presses, kept", [(1, 5), (2, 3)])
def test_ctrl_c_waits_for_the_answers_in_flight_and_twice_does_not(
        llm, ask, tmp_path, presses, kept):
    """Three answers came before; two more are under way, and paid for."""
    def late(handler, asked):
        handler.server.closing.wait(3)
        good(handler, asked)

    llm.faults, llm.always = [good, good, good], late
    process = subprocess.Popen(
        [sys.executable, identity.__file__, "--teacher", "openai", "--model", "m", "--data-dir",
         tmp_path, "--num-conversations", "8", "--workers", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    paid = tmp_path / "my_identity.paid.jsonl"
    wait_for(lambda: paid.exists() and paid.read_bytes().count(b"\n") == 3 and llm.busy == 2,
             process)
    for _ in range(presses):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert f"kept {kept} in" in err and "--teacher openai" in err and "Traceback" not in err
    assert len(kept_in(tmp_path)) == kept and len(llm.requests) == 5


# ---- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "named"), [
    (["--num-conversations", "0"], "--num-conversations is 0"), (["--workers", "0"], "--workers"),
    (["--attempts", "0"], "--attempts"), (["--max-asked", "0.5"], "--max-asked"),
    (["--name", "pip"], "'pip'"), (["--name", "Big Pip"], "'Big Pip'"), (["--name", ""], "''"),
    (["--name", "AI"], "'AI'"),
    (["--teacher", "openai", "--model", "m"], "OPENAI_API_KEY")])
def test_a_mistake_ends_with_2_one_message_and_no_file(
        tmp_path, capsys, monkeypatch, flags, named):
    need("main")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    assert identity.main(["--data-dir", str(tmp_path), *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and named in err and not list(tmp_path.iterdir())


def test_a_server_setting_that_cannot_work_ends_with_2(tmp_path, capsys, monkeypatch):
    need("main")
    command = ["--data-dir", str(tmp_path), "--teacher", "openai"]
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert identity.main(command) == 2 and "--model NAME" in capsys.readouterr().err
    monkeypatch.setenv("OPENAI_BASE_URL", "localhost:8000")
    assert identity.main([*command, "--model", "m"]) == 2
    assert "localhost:8000" in capsys.readouterr().err
    monkeypatch.delenv("OPENAI_BASE_URL")
    monkeypatch.setitem(sys.modules, "openai", None)  # as if it were not installed
    assert identity.main([*command, "--model", "m"]) == 2
    assert "pip install" in capsys.readouterr().err


def test_a_data_folder_that_is_a_file_is_named(tmp_path, capsys):
    need("main")
    path = tmp_path / "file"
    path.write_text("", "utf-8")
    assert identity.main(["--data-dir", str(path)]) == 2
    assert str(path) in capsys.readouterr().err
