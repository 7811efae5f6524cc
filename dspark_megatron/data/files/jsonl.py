"""Reads the lines of a file of JSON objects: plain, compressed, or as one JSON array.

The first bytes tell what a file is. Errors name the file, and the line where there is one.
"""

import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dspark_megatron.data.files.opening import damaged, file_errors, open_packed
from dspark_megatron.errors import ConfigError, require

MOST_LINE_BYTES = 2**24
MOST_ARRAY_BYTES = 2**30
"""Of a file that is one JSON array, unpacked. It is read whole."""
MOST_LEVELS = 100
"""How deep the objects and lists of a line may be nested."""
TOO_DEEP = f"the line is nested too deeply: at most {MOST_LEVELS} levels are read"


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """The objects of a file with their line numbers, from 1, without blank lines.

    Reads as it goes, but a JSON array is read whole, and its items are the lines. Raises
    ConfigError for a file that cannot be read, and for a line that is no JSON object in UTF-8.
    """
    for number, line in lines_of(path):
        with errors_at(path, number):
            record = parse_line(line)
        yield number, record


def lines_of(path: str | Path) -> Iterator[tuple[int, object]]:
    """The lines of a file as bytes, by number from 1 and without blank ones, or the items of a JSON
    array. ConfigError for a file that cannot be read or has another form."""
    number = 0
    with file_errors(path), open_packed(path) as file:
        try:
            for number, line in _items(path, file):
                yield number, line
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            raise damaged(path, error, f"line {number:,}") from error
        except OSError as error:
            if error.errno is None:  # not of the system, but of what unpacks
                raise damaged(path, error, f"line {number:,}") from error
            raise


class Unusable(NamedTuple):
    """A line or row that was not kept."""

    reason: str

    @classmethod
    def too_long(cls, size: int) -> "Unusable":
        return cls(f"the line has {size:,} bytes, and at most {MOST_LINE_BYTES:,} are read")


class Row(NamedTuple):
    """A row of a table that keeps the bounds of a line."""

    record: dict
    nbytes: int
    """As Arrow holds it, on average of the rows that were unpacked with it."""


def parse_line(line: object) -> dict:
    """The object of a line's bytes, of an array's item or of a table's row. ConfigError for
    anything else."""
    if isinstance(line, Unusable):
        raise ConfigError(line.reason)
    if isinstance(line, Row):
        return line.record
    try:
        record = json.loads(line) if isinstance(line, bytes) else line
    except ValueError as error:  # malformed JSON, or bytes that are not UTF-8
        raise ConfigError(f"not valid JSON: {error}") from error
    if not isinstance(line, bytes) or line.count(b"[") + line.count(b"{") > MOST_LEVELS:
        check_bounds(record)
    if not isinstance(record, dict):
        raise ConfigError(
            f'a line must be a JSON object such as {{"messages": [...]}}, '
            f"not a {type(record).__name__}"
        )
    return record


def check_bounds(record: object) -> None:
    """ConfigError for a record that is nested too deeply or, out of an array, too large."""
    size = 0
    parts: list[tuple[Any, int]] = [(record, 1)]
    while parts:
        value, level = parts.pop()
        require(level <= MOST_LEVELS, TOO_DEEP)
        size += len(value) if isinstance(value, str) else 1
        inner = value.values() if isinstance(value, dict) else value
        if isinstance(value, dict | list):
            parts += [(part, level + isinstance(part, dict | list)) for part in inner]
    require(
        size <= MOST_LINE_BYTES,
        f"the item has {size:,} letters and values, and at most {MOST_LINE_BYTES:,} are read",
    )


@contextmanager
def errors_at(path: str | Path, number: int) -> Iterator[None]:
    """Puts `file:line: ` before the message of a ConfigError raised inside."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}:{number}: {error}") from error
    except RecursionError:  # JSON, or JSON text inside of it
        reason = ConfigError(TOO_DEEP)
        raise ConfigError(f"{path}:{number}: {reason}") from reason


def _items(path: str | Path, file: BinaryIO) -> Iterator[tuple[int, object]]:
    is_first, number = True, 0
    while line := file.readline(MOST_LINE_BYTES + 1):  # bytes: only "\n" ends a line
        number += 1
        text = line.strip().removeprefix(b"\xef\xbb\xbf")
        if is_first and text.startswith(b"["):
            rest = file.read(MOST_ARRAY_BYTES)
            yield from enumerate(_array(path, line.removeprefix(b"\xef\xbb\xbf") + rest), start=1)
            return
        if is_first and text == b"{":
            raise ConfigError(
                f"{path} has a JSON object over several lines, and each line must be one; write it "
                "as a JSON array or with one object a line (jq -c . FILE)"
            )
        if len(line) > MOST_LINE_BYTES:
            yield number, Unusable.too_long(len(line) + _bytes_left(file))
        elif text:
            yield number, text
        is_first = is_first and not text


def _bytes_left(file: BinaryIO) -> int:
    """Bytes up to the end of a line, passed over."""
    count = 0
    while piece := file.readline(2**20):
        count += len(piece)
        if piece.endswith(b"\n"):
            break
    return count


def _array(path: str | Path, content: bytes) -> list:
    require(
        len(content) < MOST_ARRAY_BYTES,
        f"{path} begins with [, so it is one JSON array, and has more than {MOST_ARRAY_BYTES:,} "
        "bytes, which are read whole; write it with one object a line (jq -c '.[]' FILE)",
    )
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        message = f"{path} begins with [, so it is one JSON array, and is not valid: {error}"
        raise ConfigError(message) from error
