"""Lines of a JSONL file, and errors that name the line."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dspark_megatron.config import ConfigError


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """The objects of a file with their line numbers (from 1); blank lines are skipped.

    Reads as it goes. Raises ConfigError for a file that cannot be read, and, naming `file:line`,
    for a line that is not a JSON object in UTF-8.
    """
    try:
        with open(path, "rb") as file:  # bytes: only "\n" ends a line
            for number, line in enumerate(file, start=1):
                if line.strip():
                    with errors_at(path, number):
                        record = _parse(line)
                    yield number, record
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


@contextmanager
def errors_at(path: str | Path, number: int) -> Iterator[None]:
    """Puts `file:line: ` before the message of a ConfigError raised inside."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}:{number}: {error}") from error


def _parse(line: bytes) -> dict:
    try:
        record = json.loads(line)
    except ValueError as error:  # malformed JSON, or bytes that are not UTF-8
        raise ConfigError(f"not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ConfigError(
            f'a line must be a JSON object such as {{"messages": [...]}}, '
            f"not a {type(record).__name__}"
        )
    return record
