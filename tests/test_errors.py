"""What is printed may hold words from outside: a terminal must not obey them."""

import pytest

from dspark_megatron.errors import ConfigError, print_error, printable
from dspark_megatron.run.ranks.ending import say
from dspark_megatron.storage.notices import say_once

ESCAPES = "\x1b[2J\r\x07\x9b\u202e\u2028\ud800\x00"
SPELLED = r"\x1b[2J\r\x07\x9b\u202e\u2028\ud800\x00"


def test_what_a_terminal_obeys_is_spelled_out_and_words_stay():
    assert printable(f"a{ESCAPES}") == f"a{SPELLED}"
    for text in ("plain", "\u4e2d\u6587\u3000text\n\twith \u00e9", ""):
        assert printable(text) == text


@pytest.mark.parametrize("print_it", [say, say_once, lambda t: print_error(ConfigError(t))])
def test_every_way_out_spells_it_out(capsys, print_it):
    print_it(f"no {ESCAPES}")
    assert f"no {SPELLED}\n" in capsys.readouterr().err


def test_a_command_ends_with_2_after_an_error(capsys):
    assert print_error(ConfigError("no")) == 2
    assert capsys.readouterr().err == "error: no\n"
