"""Lines of a JSONL file, and errors that name the line."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dspark_megatron.data.files.forms import lines_of
from dspark_megatron.errors import ConfigError


@contextmanager
def errors_at(path: str | Path, number: int) -> Iterator[None]:
    """Puts `file:line: ` before the message of a ConfigError raised inside."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}:{number}: {error}") from error


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """The objects of a file with their line numbers (from 1); blank lines are skipped.

    Reads as it goes; a JSON array is read whole, its items are the lines. Raises ConfigError for a
    file that cannot be read and, naming `file:line`, for a line that is no JSON object in UTF-8.
    """
    for number, line in lines_of(path):
        with errors_at(path, number):
            record = parse_line(line)
        yield number, record


def parse_line(line: object) -> dict:
    """The object of a line's bytes, or of an array's item; ConfigError for anything else."""
    try:
        record = json.loads(line) if isinstance(line, bytes) else line
    except ValueError as error:  # malformed JSON, or bytes that are not UTF-8
        raise ConfigError(f"not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ConfigError(
            f'a line must be a JSON object such as {{"messages": [...]}}, '
            f"not a {type(record).__name__}"
        )
    return record
