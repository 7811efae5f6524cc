"""Reads the lines of a file of JSON objects: plain, compressed, or as one JSON array.

The first bytes tell what a file is. Errors name the file, and the line where there is one.
"""

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dspark_megatron.errors import ConfigError, require

OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
"""How to open compressed files, by their first bytes."""
MOST_LINE_BYTES = 2**24
MOST_ARRAY_BYTES = 2**30
"""Of a file that is one JSON array, unpacked. It is read whole."""
MOST_LEVELS = 100
"""How deep the objects and lists of a line may be nested."""
_TOO_DEEP = f"the line is nested too deeply: at most {MOST_LEVELS} levels are read"
AS_JSONL = "write it as JSONL: datasets.{}.to_json(...)"
FOREIGN = {
    b"PAR1": (
        "a Parquet file",
        AS_JSONL.format("load_dataset('parquet', data_files=...)['train']"),
    ),
    b"ARROW1": ("an Arrow file", AS_JSONL.format("load_dataset('arrow', data_files=...)['train']")),
    b"\xff\xff\xff\xff": ("an Arrow stream", AS_JSONL.format("load_from_disk(FOLDER)")),
    b"\x28\xb5\x2f\xfd": ("compressed by Zstandard", "unpack it: zstd -d FILE"),
    b"PK\x03\x04": ("a ZIP archive", "unpack it: unzip FILE"),
}
"""Other forms of data by their first bytes: what each is, and how to make it JSONL."""


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
    try:
        with _open(path) as file:
            yield from _items(path, file)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ConfigError(f"{path} is damaged or cut short: {error}; copy it again") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error


class LongLine(NamedTuple):
    """A line that was not kept."""

    size: int
    """In bytes."""


def check_readable(path: str | Path) -> None:
    """ConfigError for a file that cannot be opened or has another form."""
    try:
        _open(path).close()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error


def parse_line(line: object) -> dict:
    """The object of a line's bytes, or of an array's item. ConfigError for anything else."""
    if isinstance(line, LongLine):
        raise ConfigError(
            f"the line has {line.size:,} bytes, and at most {MOST_LINE_BYTES:,} are read"
        )
    try:
        record = json.loads(line) if isinstance(line, bytes) else line
    except ValueError as error:  # malformed JSON, or bytes that are not UTF-8
        raise ConfigError(f"not valid JSON: {error}") from error
    if not isinstance(line, bytes) or line.count(b"[") + line.count(b"{") > MOST_LEVELS:
        _check_bounds(record)
    if not isinstance(record, dict):
        raise ConfigError(
            f'a line must be a JSON object such as {{"messages": [...]}}, '
            f"not a {type(record).__name__}"
        )
    return record


def _check_bounds(record: object) -> None:
    """ConfigError for a record that is nested too deeply or, out of an array, too large."""
    size = 0
    parts: list[tuple[Any, int]] = [(record, 1)]
    while parts:
        value, level = parts.pop()
        require(level <= MOST_LEVELS, _TOO_DEEP)
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
        reason = ConfigError(_TOO_DEEP)
        raise ConfigError(f"{path}:{number}: {reason}") from reason


def _open(path: str | Path) -> BinaryIO:
    require(
        Path(path).is_file() or not Path(path).exists(),
        f"cannot read {path}: it is a folder, pipe or device, not a file",
    )
    with open(path, "rb") as file:
        start = file.read(8)
    for magic, (kind, way_out) in FOREIGN.items():
        if start.startswith(magic):
            raise ConfigError(f"{path} is {kind}, and lines of JSON are read; {way_out}")
    fitting: Iterator[Any] = (found for magic, found in OPENERS.items() if start.startswith(magic))
    return next(fitting, open)(path, "rb")


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
            yield number, LongLine(len(line) + _bytes_left(file))
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
