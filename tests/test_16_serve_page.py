"""16_serve.html in a real Chromium: what is typed, streamed, stopped, edited, and never executed.

The page is served with the very policy that 16_serve.py gives it, by a server that answers with
bytes of the test's choosing, cut wherever the test likes. Without a browser, or without Playwright,
all of this is skipped: `apt-get install chromium` and `pip install -r tests/requirements.txt`.
"""

import contextlib
import json
import os
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import serve_fuzz
from conftest import load

serve = load("16_serve")
playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is missing")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")

EVIL = ("<script>window.hacked=1</script><img src=x onerror='window.hacked=2'>"
        "<svg onload=window.hacked=3><a href='javascript:window.hacked=4'>x</a>")


# ---- a server that says what it is told to -------------------------------------------------------


def event(**choice):
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": {}, **choice}]}).encode()


def said(*texts, end=b"\n\n", tokens=3):
    """The bytes of a stream that says these pieces."""
    events = [event(delta={"role": "assistant", "content": ""})]
    events += [event(delta={"content": text}) for text in texts]
    events.append(event(finish_reason="stop"))
    events.append(b"data: " + json.dumps(
        {"choices": [], "usage": {"completion_tokens": tokens}}).encode())
    return b"".join(part + end for part in (*events, b"data: [DONE]"))


class Talker(ThreadingHTTPServer):
    """answers: a list of generators of bytes (or bytes, or (status, headers, object)), one for each
    question; asked: the bodies of the questions; left: set when a client has hung up."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.answers, self.asked, self.paths, self.left = [], [], [], threading.Event()
        self.stages = ["rl", "sft", "base"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def reply(self, status, kind, body, **headers):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.server.paths.append(self.path)
        if self.path == "/":
            page, policy = serve.read_page()
            self.reply(200, "text/html; charset=utf-8", page.encode(),
                       Content_Security_Policy=policy)
        else:
            models = {"data": [{"id": stage} for stage in self.server.stages]}
            self.reply(200, "application/json", json.dumps(models).encode())

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        self.server.asked.append(json.loads(self.rfile.read(length)))
        answer = self.server.answers.pop(0)
        if isinstance(answer, tuple):
            status, headers, body = answer
            return self.reply(status, "application/json", json.dumps(body).encode(), **headers)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            for piece in [answer] if isinstance(answer, bytes) else answer:
                self.wfile.write(piece)
                self.wfile.flush()
        except OSError:
            self.server.left.set()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
        browser = driver.chromium.launch(**options)
        yield browser
        browser.close()


@pytest.fixture
def talker():
    with Talker() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def open_page(browser, talker):
    """open_page(**context options) -> page, with its console errors in page.wrong."""
    with contextlib.ExitStack() as stack:
        def open_page(url=None, **options):
            context = browser.new_context(**options)
            stack.callback(context.close)
            context.set_default_timeout(5000)
            page = context.new_page()
            page.wrong = []
            page.on("pageerror", lambda error: page.wrong.append(str(error)))
            page.on("console", lambda message: page.wrong.append(message.text)
                    if message.type == "error" else None)
            page.goto(url or talker.url)
            page.wait_for_selector("#stage option", state="attached")
            return page

        yield open_page


@pytest.fixture
def page(open_page):
    page = open_page()
    yield page
    assert page.wrong == []


def ask(page, text, wait=True):
    page.fill("#input", text)
    page.press("#input", "Enter")
    if wait:
        page.wait_for_selector("#send:not([hidden])")
        page.wait_for_selector(".message:not(.busy):last-child .below button")


def wait_js(page, expression):
    """Wait until the expression is true. Playwright's own wait would need eval, which the policy
    of the page forbids.
    """
    end = time.monotonic() + 5
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"never true: {expression}\n{texts(page)}"
        time.sleep(0.01)


def texts(page):
    return [node.inner_text() for node in page.query_selector_all(".message .text")]


def sent(talker, number=-1):
    return [(message["role"], message["content"]) for message in talker.asked[number]["messages"]]


# ---- streaming -----------------------------------------------------------------------------------


def test_an_answer_grows_as_it_is_streamed(page, talker):
    go_on = threading.Event()

    def answer():
        yield event(delta={"content": "Once upon"}) + b"\n\n"
        go_on.wait(5)
        yield said(" a time")

    talker.answers = [answer()]
    ask(page, "A story", wait=False)
    wait_js(page, "document.querySelector('.assistant .text').innerText === 'Once upon'")
    assert page.is_visible("#stop") and not page.is_visible("#send")
    go_on.set()
    page.wait_for_selector("#send:not([hidden])")
    assert texts(page) == ["A story", "Once upon a time"]
    assert "3 tokens" in page.inner_text(".assistant .stats")


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_stream_may_be_cut_anywhere(page, talker, end, size):
    """Between \\r and \\n, in the middle of a letter of four bytes, in the middle of `data:`."""
    words = ("Gr\u00fc\u00dfe ", "\u4e2d\u6587 \U0001f600", "!")
    stream = b": a comment" + end + said(*words, end=end)

    def pieces():
        for i in range(0, len(stream), size):
            yield stream[i : i + size]
            time.sleep(0.0003)

    talker.answers = [pieces()]
    ask(page, "hi")
    assert texts(page)[1] == "Gr\u00fc\u00dfe \u4e2d\u6587 \U0001f600!"


def test_real_letters_cut_in_the_middle_arrive_whole(page, talker):
    """The stream's own JSON may hold letters as they are, of several bytes."""
    data = json.dumps({"choices": [{"index": 0, "delta": {"content": "\u00e9\u4e2d\U0001f600"}}]},
                      ensure_ascii=False).encode()

    def pieces():
        for byte in b"data: " + data + b"\n\n" + said():
            yield bytes([byte])
            time.sleep(0.0003)

    talker.answers = [pieces()]
    ask(page, "hi")
    assert texts(page)[1] == "\u00e9\u4e2d\U0001f600"


def test_a_connection_that_breaks_keeps_the_text_and_offers_another_try(open_page, talker):
    page = open_page()
    talker.answers = [event(delta={"content": "half"}) + b"\n\n", said("whole")]
    ask(page, "hi")
    assert "broke" in page.inner_text("[role=alert]") and texts(page)[1] == "half"
    page.click("text=Try again")
    wait_js(page, "document.querySelectorAll('.message .text')[1].innerText === 'whole'")
    assert sent(talker) == [("user", "hi")] and not page.query_selector("[role=alert]")


def test_errors_are_shown_in_words(open_page, talker):
    page = open_page()
    error = {"error": {"message": "the queue is full " + EVIL}}
    talker.answers = [(429, {"Retry_After": "7"}, error), (502, {}, "what"),
                      b'data: {"error": {"message": "the model failed"}}\n\ndata: [DONE]\n\n']
    for expected in ("try again in 7 s", "answered 502", "the model failed"):
        ask(page, "hi")
        assert expected in page.inner_text(".message:last-child [role=alert]")
    assert page.evaluate("window.hacked") is None
    talker.shutdown()
    talker.server_close()
    ask(page, "hi")
    assert "cannot be reached" in page.inner_text(".message:last-child [role=alert]")


# ---- nothing that is said is ever executed -------------------------------------------------------


def test_html_stays_text_whoever_writes_it(open_page, talker):
    page = open_page()
    talker.answers = [said(EVIL, f" **{EVIL}** `{EVIL}` <<{EVIL[:9]}=1>>\n```\n{EVIL}\n```\n",
                           f"#### {EVIL}")]
    ask(page, EVIL)
    shown = texts(page)
    assert shown[0] == EVIL and shown[1].count("<script>") == 6
    assert page.query_selector_all(".message script, .message img, .message a, .message iframe,"
                                   " .text > svg, [onerror], [onload]") == []
    page.click(".user [title=Edit]")
    assert page.input_value(".editor textarea") == EVIL
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None and page.wrong == []


def test_names_of_stages_are_text_too(open_page, talker):
    talker.stages = [EVIL, "rl"]
    page = open_page()
    assert page.eval_on_selector("#stage", "node => node.options[0].text").startswith("<script>")
    assert page.evaluate("window.hacked") is None


def test_the_policy_lets_no_other_script_run_and_nothing_be_fetched_elsewhere(open_page, talker):
    page = open_page()
    refused = page.evaluate("""() => {
        const tried = {};
        try { document.body.innerHTML = "<b>x</b>"; tried.html = "done"; }
        catch (error) { tried.html = error.name; }
        try { document.body.setAttribute("onclick", "hacked = 1"); tried.handler = "done"; }
        catch (error) { tried.handler = error.name; }
        try { tried.script = Object.assign(document.createElement("script"), {text: "hacked=1"}); }
        catch (error) { tried.script = error.name; }
        return tried;
    }""")
    assert refused == dict.fromkeys(("html", "handler", "script"), "TypeError")
    assert page.evaluate("fetch('http://127.0.0.1:9/').then(() => 1, () => 0)") == 0
    assert any("Content Security Policy" in line for line in page.wrong)
    assert set(talker.paths) <= {"/", "/v1/models"}, "nothing else is loaded"
    policy = serve.read_page()[1]
    assert "unsafe" not in policy and "*" not in policy and "default-src 'none'" in policy


def test_the_page_names_no_outside_resource():
    page = serve.read_page()[0]
    assert "innerHTML" not in page and "document.write" not in page and "eval(" not in page
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s)>]+)""", page)
    assert all(link.startswith(("#", "data:", '"#"')) for link in links), links
    assert set(re.findall(r"https?://[\w./]+", page)) == {"http://www.w3.org/2000/svg"}


# ---- what a conversation needs -------------------------------------------------------------------


def test_stop_keeps_what_was_said_and_tells_the_server(page, talker):
    def endless():
        while True:
            yield event(delta={"content": "la "}) + b"\n\n"
            time.sleep(0.01)

    for how in (lambda: page.click("#stop"), lambda: page.keyboard.press("Escape")):
        talker.answers = [endless()]
        ask(page, "Sing", wait=False)
        wait_js(page, "document.querySelector('.message:last-child .text')"
                      ".innerText.includes('la la')")
        how()
        page.wait_for_selector("#send:not([hidden])")
        assert talker.left.wait(5), "the connection was closed, so the server stops"
        talker.left.clear()
        before = texts(page)[-1]
        assert "stopped" in page.inner_text(".message:last-child .stats")
        page.wait_for_timeout(60)
        assert texts(page)[-1] == before
        assert not page.query_selector("[role=alert]")
    talker.answers = [said("Fine.")]
    ask(page, "Thanks")
    assert [role for role, _ in sent(talker)] == ["user", "assistant"] * 2 + ["user"]
    assert sent(talker)[1][1].startswith("la la")


def test_editing_a_message_starts_again_from_there(page, talker):
    talker.answers = [said("one"), said("two"), said("three")]
    ask(page, "first")
    ask(page, "second")
    assert sent(talker) == [("user", "first"), ("assistant", "one"), ("user", "second")]
    page.hover(".user")
    page.click(".user >> nth=0 >> [title=Edit]")
    assert page.evaluate("document.activeElement.value") == "first"
    page.fill(".editor textarea", "other")
    page.press(".editor textarea", "Enter")
    page.wait_for_selector("#send:not([hidden])")
    assert texts(page) == ["other", "three"] and sent(talker) == [("user", "other")]


def test_an_edit_can_be_given_up(page, talker):
    talker.answers = [said("one")]
    ask(page, "first")
    for leave in (lambda: page.click("text=Cancel"), lambda: page.keyboard.press("Escape")):
        page.hover(".user")
        page.click(".user [title=Edit]")
        page.fill(".editor textarea", "changed")
        leave()
        assert texts(page) == ["first", "one"]
    assert len(talker.asked) == 1


def test_regenerate_asks_the_same_again(page, talker):
    talker.answers = [said("one"), said("two"), said("three")]
    ask(page, "first")
    ask(page, "second")
    page.click(".assistant >> nth=0 >> [title=Regenerate]")
    page.wait_for_selector("#send:not([hidden])")
    assert texts(page) == ["first", "three"] and sent(talker) == [("user", "first")]


def test_a_call_of_the_calculator_is_shown_as_such_also_while_it_is_written(page, talker):
    go_on = threading.Event()

    def answer():
        yield event(delta={"content": "There are <<38*1"}) + b"\n\n"
        go_on.wait(5)
        yield said("6=608>>608 trees. <<1/0=>>\n#### 608")

    talker.answers = [answer()]
    ask(page, "How many?", wait=False)
    page.wait_for_selector(".chip")
    assert page.inner_text(".chip") == "38*1"
    go_on.set()
    page.wait_for_selector("#send:not([hidden])")
    labels = [chip.get_attribute("aria-label") for chip in page.query_selector_all(".chip")]
    assert labels == ["calculator: 38*16 = 608", "calculator: 1/0 = no result"]
    assert page.inner_text(".final").split() == ["answer", "608"]
    assert "<<" not in texts(page)[1]
    talker.answers = [said("ok")]
    ask(page, "More")
    assert sent(talker)[1][1] == "There are <<38*16=608>>608 trees. <<1/0=>>\n#### 608"


def test_copy_takes_the_text_as_it_was_written(open_page, talker):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    talker.answers = [said("**b** <<1+1=2>> <b>")]
    ask(page, "hi")
    page.click(".assistant [title=Copy]")
    wait_js(page, "document.getElementById('announce').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == "**b** <<1+1=2>> <b>"


def test_settings_and_stage_go_into_the_request(page, talker):
    page.click("#open-settings")
    assert page.get_attribute("#open-settings", "aria-expanded") == "true"
    for field, value in {"top_k": "7", "max_tokens": "33", "seed": "5", "system": " Be brief. ",
                         "key": "k"}.items():
        page.fill("#" + field, value)
    page.eval_on_selector("#temperature", "node => { node.value = 1.25; "
                          "node.dispatchEvent(new Event('input')); }")
    assert page.inner_text("#temperature-now") == "1.25"
    page.select_option("#stage", "sft")
    talker.answers = [said("ok")]
    ask(page, "hi")
    body = talker.asked[-1]
    assert sent(talker) == [("system", "Be brief."), ("user", "hi")]
    assert {name: body[name] for name in ("model", "temperature", "top_k", "max_tokens", "seed",
                                          "top_p", "stream", "truncation")} == {
        "model": "sft", "temperature": 1.25, "top_k": 7, "max_tokens": 33, "seed": 5, "top_p": 1,
        "stream": True, "truncation": "auto"}
    page.reload()
    page.wait_for_selector("#stage option", state="attached")
    assert page.input_value("#stage") == "sft", "the stage is remembered"


def test_dropped_turns_are_told(page, talker):
    first = json.dumps({"dropped_messages": 4, "choices": [{"index": 0, "delta": {}}]}).encode()
    talker.answers = [b"data: " + first + b"\n\n" + said("ok")]
    ask(page, "hi")
    assert "oldest 4 messages" in page.inner_text(".notice")


def test_a_new_chat_forgets_and_stops(page, talker):
    talker.answers = [said("one"), iter([event(delta={"content": "x"}) + b"\n\n", b": \n" * 9])]
    ask(page, "first")
    page.click("#new")
    assert texts(page) == [] and page.is_visible("#welcome")
    talker.answers.insert(0, said("two"))
    ask(page, "again")
    assert sent(talker) == [("user", "again")]


def test_an_example_can_be_clicked(page, talker):
    talker.answers = [said("I am Pip.")]
    page.click("#examples button >> nth=0")
    page.wait_for_selector("#send:not([hidden])")
    assert texts(page) == ["Who are you?", "I am Pip."] and not page.is_visible("#welcome")


def test_page_and_server_understand_each_other(open_page, tmp_path):
    """The real server, on a small model with random weights: noise, and the rest as it should be.
    """
    process, port = serve_fuzz.start_server(tmp_path)
    try:
        page = open_page(f"http://127.0.0.1:{port}")
        assert page.inner_text("#stage") == "rl" and page.inner_text("#state") == "ready"
        for number in range(4):  # more than its context of 64 tokens holds
            ask(page, f"Hello {number}")
            stats = page.inner_text(".assistant:last-child .stats")
            assert re.match(r"\d+ tokens", stats), stats
        assert "no longer fit" in page.inner_text(".notice >> nth=-1")
        assert page.wrong == []
    finally:
        process.terminate()
        process.communicate()


# ---- for everyone --------------------------------------------------------------------------------


def test_the_keyboard_is_enough(page, talker):
    talker.answers = [said("one"), said("two")]
    assert page.evaluate("document.activeElement.id") == "input"
    page.keyboard.type("a")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("b")
    page.keyboard.press("Enter")
    page.wait_for_selector(".assistant .stats")
    assert sent(talker) == [("user", "a\nb")]
    page.keyboard.press("Enter")  # nothing to send
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Control+A")
    page.keyboard.type("c")
    page.keyboard.press("Enter")
    wait_js(page, "document.querySelector('.assistant .text').innerText === 'two'")
    assert sent(talker) == [("user", "c")] and len(talker.asked) == 2
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.title"))
    assert {"stage", "open-settings", "theme", "new", "input", "Copy", "Regenerate"} <= reached


def test_every_control_has_a_name_and_the_conversation_is_a_log(page, talker):
    talker.answers = [said("one")]
    ask(page, "hi")
    page.click("#open-settings")
    nameless = page.evaluate("""() => [...document.querySelectorAll(
        "button, input, select, textarea")].filter(node => !node.ariaLabel && !node.labels?.length
        && !node.textContent.trim()).map(node => node.outerHTML)""")
    assert nameless == []
    assert page.get_attribute("#log", "role") == "log"
    assert page.get_attribute("html", "lang") == "en"
    assert page.inner_text("#announce") == "Pip: one"


CONTRAST = """() => {
    const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const light = (colour) => numbers(colour).slice(0, 3).map((c) => (c /= 255) <= 0.03928
        ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (node) => {
        for (; node; node = node.parentElement) {
            const colour = getComputedStyle(node).backgroundColor;
            if ((numbers(colour)[3] ?? 1) > 0.5) return colour;
        }
    };
    const worst = {};
    for (const name of [".user .text", ".assistant .text", ".stats", ".chip", ".chip b", ".final",
                        ".final span", "h1", "h1 small", "#settings label", "#settings p",
                        ".assistant .avatar", "footer p", ".notice"]) {
        const node = document.querySelector(name);
        const [a, b] = [light(getComputedStyle(node).color), light(behind(node))];
        worst[name] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    }
    return worst;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(open_page, talker, scheme):
    """WCAG 2: contrast of at least 4.5; and the choice of the button outlives a reload."""
    page = open_page(color_scheme=scheme)
    talker.answers = [b'data: {"dropped_messages": 2, "choices": []}\n\n' + said(
        "<<1+1=2>>\n#### 2")]
    ask(page, "hi")
    page.click("#open-settings")
    for _ in range(2):
        low = {name: round(ratio, 2) for name, ratio in page.evaluate(CONTRAST).items()
               if ratio < 4.5}
        assert low == {}
        page.click("#theme")
    dark = "getComputedStyle(document.body).colorScheme"
    page.click("#theme")
    chosen = page.evaluate(dark)
    assert chosen != scheme
    page.reload()
    assert page.evaluate(dark) == chosen


@pytest.mark.parametrize("width", [320, 390, 768])
def test_a_phone_needs_no_sideways_scrolling_and_has_room_for_a_thumb(open_page, talker, width):
    page = open_page(viewport={"width": width, "height": 640}, has_touch=True, is_mobile=True)
    talker.answers = [said("w" * 400, "\n```\n" + "code " * 80, "\n```\n<<", "1+" * 30, "1=31>>")]
    ask(page, "x" * 300)
    page.click("#open-settings")
    wide = "document.documentElement.scrollWidth - window.innerWidth"
    assert page.evaluate(wide) <= 0
    assert page.eval_on_selector("#scroller", "node => node.scrollWidth - node.clientWidth") <= 0
    small = page.evaluate("""() => [...document.querySelectorAll("button")]
        .map((node) => [node.title || node.textContent, node.getBoundingClientRect()])
        .filter(([, box]) => box.width && (box.height < 28 || box.width < 28))
        .map(([name, box]) => `${name} ${box.width} x ${box.height}`)""")
    assert small == []
    assert page.eval_on_selector("#input", "node => parseFloat(getComputedStyle(node).fontSize)"
                                 ) >= 16, "below 16 pixels a phone zooms in"
    assert page.is_visible("#send") and page.is_visible("#input")
