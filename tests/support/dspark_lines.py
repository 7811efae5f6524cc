"""`dspark COMMAND ...` lines of pages, held to the real parsers; nothing is run."""

import argparse
import contextlib
import io

from dspark_megatron.cli.main import COMMANDS, parser_of, split_command


def is_dspark(words: list[str]) -> bool:
    """Whether a line is a dspark command, under a launcher or not."""
    return words[:1] == ["dspark"] or "dspark_megatron" in words


def check_dspark(words: list[str], *, whole: bool = True) -> None:
    """Fails unless the parser of the command takes the words. `...` stands for more of them.
    whole: whether it is a command that could be run as it stands, and not one that names some
    options only."""
    start = 1 if words[0] == "dspark" else words.index("dspark_megatron") + 1
    given = [word for word in words[start:] if word != "..."]
    if not given or given[0] in ("COMMAND", "--help", "--version"):
        return
    name, rest = split_command(given)
    several = any(other.startswith(f"{name} ") for other in COMMANDS)
    if several and set(rest) <= {"--help"}:
        return
    assert name in COMMANDS, f"there is no command: dspark {' '.join(given)}"
    parser = parser_of(name)
    known = {option for action in _shown(parser) for option in action.option_strings}
    options = {word.partition("=")[0] for word in rest if word.startswith("--")}
    assert not options - known, f"dspark {name} has no {options - known}"
    if whole and "--help" not in rest:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                parser.parse_intermixed_args(rest)
        except SystemExit:
            raise AssertionError(f"dspark {' '.join(given)}: {said.getvalue()}") from None


def _shown(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """What its help shows; options under old names are not among them."""
    return [action for action in parser._actions if action.help != argparse.SUPPRESS]
