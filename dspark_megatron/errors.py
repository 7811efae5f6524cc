"""The one error that a user sees without a traceback: how it is raised, and how it is printed."""

import sys
import unicodedata

BAD_INPUT, FAILED, INTERRUPTED = 2, 3, 130
"""Exit codes of ranks and commands; cli/exit_codes.py has all of them, in words."""
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories of characters that a terminal obeys, hides, or cannot show."""


class ConfigError(ValueError):
    """The user's settings cannot work; the message says what must hold and the way out."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def printable(text: str) -> str:
    """The text with all that a terminal would obey spelled out: it may hold words of a server, a
    file or its name. Line feeds and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode()
        if c not in "\n\t" and unicodedata.category(c) in _UNSEEN
        else c
        for c in text
    )


def print_error(error: ConfigError) -> int:
    """Print it as a command's last words; returns the command's exit code."""
    print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
    return BAD_INPUT
