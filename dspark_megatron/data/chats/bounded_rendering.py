"""Limits of what a chat template may take: processor time, memory and text.

A template is a program of the target's folder. Jinja's sandbox keeps it from files and attributes;
it does not keep it from looping or from making gigabytes.
"""

import contextlib
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import FrameType

from jinja2 import Environment, TemplateSyntaxError

from dspark_megatron.data.files.bad_lines import NoFurther
from dspark_megatron.errors import require

MOST_SECONDS = 20.0
"""Of processor time for one rendering."""
MOST_BYTES = 2**32
"""Of memory for one rendering, beside what the process has."""
MOST_LETTERS = 2**26
"""Of a rendered chat."""
MOST_TEMPLATE_LETTERS = 2**20


def check_template(template: str) -> None:
    """ConfigError for a template that could not be stopped: it is too long to be compiled, or
    raises to powers, which texts do not need and no limit of time interrupts."""
    require(
        len(template) <= MOST_TEMPLATE_LETTERS,
        f"the chat template has {len(template):,} letters, and at most {MOST_TEMPLATE_LETTERS:,} "
        "are read; give the target another one",
    )
    try:
        lexed = Environment().lex(template)
        tokens = [(kind, text) for _, kind, text in lexed if kind != "whitespace"]
    except TemplateSyntaxError:  # which rendering says better
        return
    powers = [
        before
        for (_, before), token in pairwise(tokens)
        if token == ("operator", "**") and before not in ("(", ",")
    ]
    require(
        not powers,  # behind a bracket or a comma it stands for arguments by name
        "the chat template raises to powers (**), which is not allowed; change the template",
    )


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """NoFurther for a rendering inside that takes more than the limits. Time is limited on the main
    thread, where signals arrive, and memory where /proc tells how much there is."""
    try:
        with _limited_time(), _limited_memory():
            yield
    except MemoryError as error:
        raise NoFurther(
            f"the chat template takes more than {MOST_BYTES:,} bytes of memory for this chat; "
            "change the template or the chat"
        ) from error


def checked_text(text: str) -> str:
    if len(text) > MOST_LETTERS:
        raise NoFurther(
            f"the chat template makes {len(text):,} letters of this chat, and at most "
            f"{MOST_LETTERS:,} are used; change the template or the chat"
        )
    return text


@contextlib.contextmanager
def _limited_time() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise NoFurther(
        f"the chat template takes more than {MOST_SECONDS:g} seconds of processor time for this "
        "chat; change the template or the chat"
    )


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    if not sys.platform.startswith("linux"):
        yield
        return
    pages = int(Path("/proc/self/statm").read_bytes().split()[0])
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + MOST_BYTES
    allowed = [limit for limit in (before, hard, most) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(allowed), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))
