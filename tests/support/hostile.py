"""Inputs that somebody else wrote, and what must come of them: one sentence."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dspark_megatron.errors import ConfigError

INF, NAN = float("inf"), float("nan")
DEEP = "[" * 100_000
MISSING = object()
LONG_SENTENCE = 1200


def refused(work: Callable[[], Any], fragment: str, *, lines: int = 1) -> str:
    """The message of a refusal, which has the fragment and at most so many lines."""
    with pytest.raises(ConfigError) as error:
        work()
    message = str(error.value)
    assert fragment in message, message
    assert message.count("\n") < lines and len(message) < LONG_SENTENCE, message
    return message


def with_key(path: Path, key: str, value: Any) -> None:
    """Change a JSON file's key, which may be dotted, or take it out."""
    content = json.loads(path.read_text(encoding="utf-8"))
    *parents, last = key.split(".")
    part = content
    for parent in parents:
        part = part.setdefault(parent, {})
    if value is MISSING:
        part.pop(last, None)
    else:
        part[last] = value
    path.write_text(json.dumps(content), encoding="utf-8")


def make_strange(path: Path, kind: str) -> None:
    """Put something that is no file under a file's name."""
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("nowhere")
    else:
        assert kind == "loop"
        path.symlink_to(path.name)
