"""The tool that asks a server, and a server for it."""

import generate_responses as tool
import pytest

from support.chat_lines import prompt, read_rows, write_jsonl
from support.chat_server import KEY, Server, running


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with running(Server()) as server:
        yield server


@pytest.fixture
def run(server, tmp_path, capsys):
    """Asks for the texts; returns the exit code, the rows of the output, and what was said."""

    def run(*texts, options=()):
        rows = [text if isinstance(text, dict) else prompt(text) for text in texts]
        source = write_jsonl(tmp_path / "prompts.jsonl", rows)
        output = tmp_path / "out.jsonl"
        arguments = ["--endpoint", server.url, "--model", "tiny", "--input", str(source)]
        arguments += ["--output", str(output), "--retry-delay", "0.01", "--timeout", "0.5"]
        code = tool.main([*arguments, *options])
        return code, read_rows(output) if output.exists() else None, capsys.readouterr()

    return run
