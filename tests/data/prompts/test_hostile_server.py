"""A server that is broken, or wants the key: nothing hangs, nothing leaks, nothing odd is kept."""

import itertools
import json

import pytest

from dspark_megatron.data.prompts import endpoint, json_server
from dspark_megatron.data.prompts.address import checked_address
from support.chat_server import KEY, Server, running

KEY_OF_A_SERVICE = "sk-0123456789/abc+def"
GOOD = {"message": {"content": "fine"}, "finish_reason": "stop"}


def ask(server, run, script, *options):
    """What a run says that gets such an answer."""
    server.scripts["odd"] = script
    code, rows, said = run("odd", options=["--retries", "0", *options])
    assert (code, rows) == (1, None)
    return said.err


def response(choice=GOOD, **more):
    return lambda handler: handler.reply(200, {"choices": [choice], **more})


def message(**parts):
    return {"message": parts, "finish_reason": "stop"}


def sending(pieces, seconds=0.0):
    """An answer of these pieces of bytes, each after a while."""

    def send(handler):
        for piece in pieces:
            handler.wfile.write(piece)
            handler.wfile.flush()
            if handler.server.silence.wait(seconds):
                return

    return send


START = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        itertools.chain([START + b"\r\n"], itertools.repeat(b" ")),
        itertools.chain([START], itertools.repeat(b"X: 1\r\n")),
        itertools.chain([START + b"X: "], itertools.repeat(b"1")),
        itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n"),
        itertools.chain(
            [START + b"Transfer-Encoding: chunked\r\n\r\n"], itertools.repeat(b"1\r\n1\r\n")
        ),
    ],
    ids=["body", "headers", "a header", "continue", "chunks"],
)
def test_a_dripping_answer_ends_at_the_time_limit(server, run, pieces):
    said = ask(server, run, sending(pieces, 0.05), "--timeout=0.4")
    assert "timeout: no whole answer in 0.4 s, the limit of --timeout" in said


def test_an_endless_body_is_cut_at_the_size_limit(server, run, monkeypatch):
    monkeypatch.setattr(json_server, "LARGEST_BODY", 100_000)
    body = itertools.chain([START + b"\r\n"], itertools.repeat(b'"' * 4096))
    assert "too long an answer: more than 100,000 bytes" in ask(server, run, sending(body))


@pytest.mark.parametrize("asked", ["1e9", "inf", "61"])
def test_a_long_wait_that_the_server_asks_for_is_cut_and_told(server, run, monkeypatch, asked):
    monkeypatch.setattr(json_server, "LONGEST_DELAY", 0.01)
    monkeypatch.setattr(endpoint, "LONGEST_DELAY", 0.01)
    options = "--retries=2", "--retry-delay=0"
    busy = ask(
        server, run, lambda handler: handler.reply(429, {}, [("Retry-After", asked)]), *options
    )
    assert f"(of its Retry-After, {asked}, 0.01 s are waited)" in busy
    assert len(server.bodies) == 3


@pytest.mark.parametrize("asked", ["-5", "soon", "nan", ""])
def test_a_wait_that_is_none_is_passed_over_and_told(server, run, asked):
    said = ask(server, run, lambda handler: handler.reply(503, {}, [("Retry-After", asked)]))
    assert "is no number of seconds and is passed over" in said


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (response(message(content=None)), "no content"),
        *((response(message(content=x)), "content must be text") for x in ([], ["a"], 1, {}, True)),
        (response(message(content="", reasoning=[1])), "reasoning must be text, not list"),
        (response(message(content="", tool_calls="f()")), "tool_calls must be a list of objects"),
        (response(message(content="", tool_calls=[1])), "tool_calls must be a list of objects"),
        (response({"message": "hm", "finish_reason": "stop"}), "malformed answer: AttributeError"),
        (response({"message": {"content": "x"}, "finish_reason": {}}), "finish_reason {}"),
        (response({**GOOD, "token_ids": [1, "2"]}), "token_ids must be a list of token ids"),
        (response({**GOOD, "token_ids": [10**30]}), "token_ids must be a list of token ids"),
        (response(prompt_token_ids=[True]), "prompt_token_ids must be a list of token ids"),
        (response(usage={"completion_tokens": "7"}), "completion_tokens must be a whole number"),
        (response(usage={"completion_tokens": 10**400}), "completion_tokens must be a whole"),
        (response(usage=[7]), "malformed answer: AttributeError"),
        (lambda handler: handler.reply(200, {"choices": []}), "malformed answer: IndexError"),
        (lambda handler: handler.reply(200, []), "no JSON object"),
        (lambda handler: handler.reply(200, b"[" * 10**5), "no JSON (RecursionError)"),
        (lambda handler: handler.reply(200, b"\xff"), "no JSON (UnicodeDecodeError)"),
        (
            lambda handler: handler.reply(
                200, {"choices": [GOOD]}, [("Content-Type", "text/html")]
            ),
            "Content-Type text/html, not application/json",
        ),
        (lambda handler: handler.reply(204, b""), "no JSON"),
    ],
)
def test_what_is_no_answer_is_a_failure(server, run, script, reason):
    assert reason in ask(server, run, script)


def test_words_that_no_file_can_hold_are_a_failure(server, run):
    deep = b"[" * 40 + b"]" * 40
    for part, reason in (
        (b'"content": "\\ud800"', "it is not valid Unicode"),
        (b'"content": "", "tool_calls": [{"f": %s}]' % deep, "tool_calls go deeper than 32"),
    ):
        body = b'{"choices": [{"message": {%s}, "finish_reason": "stop"}]}' % part
        assert reason in ask(server, run, lambda handler, body=body: handler.reply(200, body))


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(server, run, code):
    """Nor is one to the same host: it may be another's port."""
    with running(Server()) as other:
        place = f"{other.url}/chat/completions"
        said = ask(server, run, lambda handler: handler.reply(code, {}, [("Location", place)]))
        assert f"redirect: HTTP {code} to {place}, which is not followed" in said
        assert not other.bodies
        server.scripts["/v1/models"] = lambda handler: handler.reply(
            code, {}, [("Location", f"{other.url}/models\x1b]0;x\x07")]
        )
        code, _, said = run("one")
        assert code == 2 and "cannot be used: redirect" in said.err and "\x1b" not in said.err


@pytest.mark.parametrize("code", [200, 400, 401, 302])
@pytest.mark.parametrize("padding", [0, 290, json_server._LARGEST_ERROR - 10])
def test_a_key_that_the_server_sends_back_is_not_printed(server, run, monkeypatch, code, padding):
    monkeypatch.setenv("OPENAI_API_KEY", KEY_OF_A_SERVICE)

    def echo(handler):
        key = handler.headers["Authorization"]
        spellings = (
            key,
            key.replace("/", "%2f"),
            key.replace("s", r"\u0073"),
            key.replace("/", r"\/"),
        )
        text = " " * padding + "\x1b[31m\u202e %2F " + " ".join(spellings)
        handler.reply(code, text.encode(), [("Location", f"http://x/{key}")])

    server.scripts["/v1/models"] = lambda handler: handler.reply(404, b"")
    said = ask(server, run, echo)
    assert "sk-" not in said and "0123" not in said
    assert not {"\x1b", "\u202e"} & set(said)
    server.scripts["/v1/models"] = echo
    code, _, said = run("one")
    assert code == 2 and "sk-" not in said.err and "\x1b" not in said.err


def test_a_key_in_a_good_answer_or_in_the_names_of_models_goes_nowhere(server, run, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY_OF_A_SERVICE)
    names = {"data": [{"id": f"name of {KEY_OF_A_SERVICE}"}] * 30}
    server.scripts["/v1/models"] = lambda handler: handler.reply(200, names)
    code, _, said = run("one")
    assert code == 2 and "it serves name of ***, " in said.err and "and 20 more" in said.err
    server.scripts["/v1/models"] = lambda handler: handler.reply(404, b"")
    said = ask(server, run, response(message(content=f"It is {KEY_OF_A_SERVICE}.")))
    assert "the key in the answer: the server sends the key back" in said
    assert "sk-" not in said


@pytest.mark.parametrize("listed", [{"data": 7}, {"data": [1]}, {"data": [{"id": None}]}, []])
def test_a_list_of_models_that_is_none_is_refused(server, run, listed):
    server.scripts["/v1/models"] = lambda handler: handler.reply(200, listed)
    code, _, said = run("one")
    assert code == 2 and "cannot be used: malformed answer" in said.err


def test_the_key_is_stripped_and_a_broken_one_refused_untold(run, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\r\n")
    assert run("400 one")[0] == 1
    for key in ("sk-1\r\nX-Evil: 1", "sk-1\x1b[2J", "sk-1\u00e9", "sk-1\u200b"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        code, _, said = run("400 one")
        assert code == 2 and "OPENAI_API_KEY must be one line of plain ASCII" in said.err
        assert "sk-1" not in said.err


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://user:pass@localhost:1/v1", "must not hold a name or password"),
        ("https://pass@host/v1", "must not hold a name or password"),
        ("user:pass@host", "must not hold a name or password"),
        ("http://host:1/v1", "would send prompts and key in clear to another host"),
        ("http://127.0.0.1.evil.com/v1", "would send prompts and key in clear"),
        ("http://localhost.evil.com/v1", "would send prompts and key in clear"),
        ("http://[::ffff:10.0.0.1]/v1", "would send prompts and key in clear"),
        ("http://10.0.0.1:8000/v1", "--insecure in a network that you trust"),
        ("https://host/v1?key=pass", "must end with its path"),
        ("https://host/v1#pass", "must end with its path"),
        ("ftp://host/v1", "must be a URL"),
        ("https:///v1", "must be a URL"),
        ("https://host:x/v1", "no valid host or port"),
        ("https://[::1/v1", "no valid host or port"),
        ("https://h\u00f6st/v1", "plain ASCII"),
        ("https://host/\x1b[2J", "plain ASCII"),
    ],
)
def test_an_address_that_leaks_or_is_none_is_refused(run, url, message):
    code, _, said = run("one", options=["--endpoint", url])
    assert code == 2 and message in said.err
    assert "pass" not in said.err.replace("password", "") and "\x1b" not in said.err


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "127.0.0.1", "[::ffff:127.0.0.1]"])
def test_this_host_may_be_asked_in_clear(host):
    assert checked_address(f"http://{host}:8000/v1", insecure=False)


def test_a_proxy_is_not_asked_for_this_host(server, run, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert run("one")[0] == 0


def test_insecure_lets_http_through(run):
    code, _, said = run("one", options=["--endpoint", "http://no-such-host.invalid", "--insecure"])
    assert code == 2 and "no connection" in said.err


def test_failures_of_many_kinds_are_not_all_listed(server, run):
    texts = [f"odd {i}" for i in range(14)]
    for i, text in enumerate(texts):
        choice = {"message": {"content": "x"}, "finish_reason": f"reason{i}"}
        server.scripts[text] = response(choice)
    code, _, said = run(*texts)
    assert code == 1 and "4 times 4 other reasons" in said.err


@pytest.mark.parametrize(
    "option", ["--timeout=1e300", "--retries=9999999", "--concurrency=1000000", "--top-p=nan"]
)
def test_numbers_without_measure_are_refused(run, option):
    code, _, said = run("one", options=[option])
    assert code == 2 and "must be finite" in said.err


def test_a_partial_file_that_holds_something_else_is_refused(run, tmp_path):
    run("400 one")
    partial = tmp_path / "out.jsonl.partial"
    settings = partial.read_text()
    good = {"content": "x", "finish_reason": "stop", "tokens": 1}
    wrong = {"content": 5}, {"finish_reason": None}, {"tokens": "x"}, {"parts": 1}
    wrong += {"token_ids": "abc"}, {"prompt_ids": [0.5]}
    answers = [{"0": good | part} for part in wrong]
    for line in ({"x": {}}, {"0": {"words": 1}}, {"0": 7}, *answers):
        partial.write_text(f"{settings}{json.dumps(line)}\n")
        code, _, said = run("400 one")
        assert code == 2 and "holds other things than answers" in said.err
    other = tmp_path / "other"
    other.write_text(settings)
    partial.unlink()
    partial.symlink_to(other)
    code, _, said = run("400 one")
    assert code == 2 and "is a link" in said.err and other.read_text() == settings
