"""Answers through a real HTTP server on this machine, with failures of every kind."""

import re
from collections import Counter

import generate_responses as tool
import pytest

from support.chat_lines import prompt


def test_answers_in_input_order_with_bounded_concurrency(server, run):
    texts = [f"word{i}" for i in range(20)]
    code, rows, said = run(*texts, "long one", "think", options=["--concurrency", "3"])
    assert code == 0 and "22 answers, 7.0 tokens on average, 1 cut" in said.out
    turns = [row["messages"][-1] for row in rows]
    assert [turn["content"] for turn in turns] == [*map(str.upper, texts), "LONG ONE", ""]
    assert turns[-1]["reasoning_content"] == "hm"
    assert [row["finish_reason"] for row in rows] == ["stop"] * 20 + ["length", "stop"]
    assert 1 < server.most_busy <= 3


def test_token_ids_are_asked_for_and_kept(server, run):
    code, rows, said = run("one", "an old server", options=["--token-ids", "--leave-out-failed"])
    assert server.bodies[0]["return_token_ids"] is True
    assert [(row["input_ids"], row["loss_mask"]) for row in rows] == [([1, 2, 3, 4], [0, 0, 1, 1])]
    assert code == 1 and "1 times no token ids: the server does not tell" in said.err


def test_a_request_has_nothing_that_was_not_asked_for(server, run):
    run("one", options=["--temperature=0.5", "--max-new-tokens=9"])
    plain = server.bodies.pop()
    assert {type(plain.pop("seed")), *plain} == {
        int,
        "messages",
        "model",
        "temperature",
        "max_tokens",
    }
    assert (plain["temperature"], plain["max_tokens"], plain["model"]) == (0.5, 9, "tiny")


def test_parameters_go_by_their_own_names(server, run):
    tools, kwargs = [{"type": "function"}], {"enable_thinking": False}
    row = {**prompt("one"), "tools": tools, "chat_template_kwargs": kwargs}
    values = {"top_p": 0.5, "top_k": 20, "presence_penalty": 0.25, "repetition_penalty": 1.5}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    assert run(row, row, options=[*flags, "--seed=3"])[0] == 0
    for body in server.bodies:
        assert {name: body.get(name) for name in values} == values
        assert (body["tools"], body["chat_template_kwargs"]) == (tools, kwargs)
        assert "frequency_penalty" not in body
    assert len({body["seed"] for body in server.bodies}) == 2


def test_a_tool_call_is_sent_and_kept_as_it_was_written(server, run):
    call = {"type": "function", "function": {"name": "add", "arguments": '{"n":  3}'}}
    asked = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "call 3"},
    ]
    _, [row], _ = run({"messages": asked})
    assert server.bodies[0]["messages"] == row["messages"][:-1] == asked
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert (row["messages"][-1], row["finish_reason"]) == (answer, "tool_calls")


def test_what_passes_is_tried_again(run):
    code, rows, _ = run("503 then", "429 500 then", "drop then", "hang then", "text then", "plain")
    assert code == 0
    assert [row["messages"][-1]["content"] for row in rows][0] == "503 THEN"


def test_failures_are_counted_and_only_they_are_asked_again(server, run, tmp_path):
    texts = ["fine", "400 x", "400 y", "always 503", "empty z", "filter w"]
    code, rows, said = run(*texts, options=["--retries", "2"])
    assert (code, rows) == (1, None)
    assert "5 prompts have no answer" in said.err
    assert "2 times HTTP 400: " in said.err and "the prompt 400" in said.err
    for one in ("1 times HTTP 503", "1 times no content", "1 times finish_reason content_filter"):
        assert one in said.err
    asked = Counter(body["messages"][-1]["content"] for body in server.bodies)
    assert (asked["always 503"], asked["400 x"], asked["fine"]) == (3, 1, 1)
    server.bodies.clear()
    code, rows, said = run(*texts, options=["--retries", "0", "--leave-out-failed"])
    assert code == 1 and "without them" in said.err
    assert [row["messages"][0]["content"] for row in rows] == [*texts[:3], *texts[4:]]
    assert "fine" not in [body["messages"][-1]["content"] for body in server.bodies]
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_a_torn_partial_file_is_continued(server, run, tmp_path):
    run("one", "two", "400 three")
    partial = tmp_path / "out.jsonl.partial"
    with partial.open("ab") as file:
        file.write(b'{"2": {"cont')
    code, rows, _ = run("one", "two", "400 three", options=["--concurrency", "1"])
    assert code == 0 and len(rows) == 3 and not partial.exists()
    assert len(server.bodies) == 4


def test_other_settings_do_not_continue(run):
    run("400 one")
    code, _, said = run("400 one", options=["--top-p=0.5"])
    assert code == 2 and "other settings (top_p None -> 0.5)" in said.err


def test_a_server_that_fails_for_good_is_not_asked_for_all(server, run):
    texts = [f"always 503 {i}" for i in range(50)]
    code, _, said = run(*texts, options=["--concurrency=2", "--retries=0"])
    assert code == 1 and "were not asked" in said.err
    assert 8 <= len(server.bodies) <= 10


def test_a_refused_key_ends_the_run(server, run):
    code, _, said = run(*[f"401 {i}" for i in range(50)], options=["--concurrency=2"])
    assert code == 1 and len(server.bodies) <= 4
    assert "HTTP 401" in said.err and "were not asked" in said.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "other"], "does not serve --model other; it serves tiny"),
        (["--api-key-variable", "NO_SUCH_KEY"], "HTTP 401: .*no such key"),
        (["--endpoint", "http://127.0.0.1:9/v1"], "cannot be used: no connection"),
        (["--endpoint", "localhost"], "must be a URL"),
        (["--concurrency", "0"], "concurrency must be finite and >= 1"),
    ],
)
def test_what_cannot_work_is_refused_at_once(run, tmp_path, options, message):
    code, rows, said = run("one", options=options)
    assert (code, rows) == (2, None)
    assert re.search(message, said.err), said.err
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_a_local_target_takes_no_parameters_of_requests(tmp_path, capsys):
    files = ["--target", "x", "--input", "y", "--output", str(tmp_path / "z")]
    assert tool.main([*files, "--top-p=0.5"]) == 2
    assert "top_p need --endpoint" in capsys.readouterr().err
