"""The `dspark` command itself: its table of commands, help, and exit codes."""

import re
import subprocess
import sys

import pytest

from dspark_megatron.cli.exit_codes import BAD_INPUT, EXIT_CODES
from dspark_megatron.cli.main import COMMANDS, GROUPS, main, parser_of


def test_the_overview_names_every_command_and_exit_code(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    for command in COMMANDS.values():
        assert f"  {command.name:<16} {command.summary}" in said
    for code in EXIT_CODES:
        assert f"{code.number:<16} {code.meaning}" in said


def test_names_are_unique():
    assert len(COMMANDS) == sum(len(group) for group in GROUPS.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_at_once(name):
    """Whatever takes long to import waits until a command works."""
    program = (
        "import sys; from dspark_megatron.cli.main import main\n"
        f"try: main([*{name!r}.split(), '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'megatron', 'matplotlib'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "examples:\n  dspark " in done.stdout
    assert "--json" in done.stdout and "--quiet" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_each_default_once(name):
    text = " ".join(parser_of(name).format_help().split())
    assert not re.search(r"\(default: (None|False|\[\]|\(\))\)|\(default[^)]*\) \(default", text)


def test_help_tells_a_default_of_nought():
    help_of = {name: parser_of(name).format_help() for name in ("plan", "generate")}
    assert "samples of a step (default: 512)" in " ".join(help_of["plan"].split())
    assert "each batch has its own (default: 0)" in " ".join(help_of["generate"].split())


def test_an_unknown_command_is_one_sentence(capsys):
    assert main(["tarin"]) == BAD_INPUT
    assert capsys.readouterr().err.count("\n") == 1
