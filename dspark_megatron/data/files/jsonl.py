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
from typing import Any, BinaryIO

from dspark_megatron.errors import ConfigError

OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
"""How to open compressed files, by their first bytes."""
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


def parse_line(line: object) -> dict:
    """The object of a line's bytes, or of an array's item. ConfigError for anything else."""
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


@contextmanager
def errors_at(path: str | Path, number: int) -> Iterator[None]:
    """Puts `file:line: ` before the message of a ConfigError raised inside."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}:{number}: {error}") from error


def _open(path: str | Path) -> BinaryIO:
    with open(path, "rb") as file:
        start = file.read(8)
    for magic, (kind, way_out) in FOREIGN.items():
        if start.startswith(magic):
            raise ConfigError(f"{path} is {kind}, and lines of JSON are read; {way_out}")
    fitting: Iterator[Any] = (found for magic, found in OPENERS.items() if start.startswith(magic))
    return next(fitting, open)(path, "rb")


def _items(path: str | Path, file: BinaryIO) -> Iterator[tuple[int, object]]:
    is_first = True
    for number, line in enumerate(file, start=1):  # bytes: only "\n" ends a line
        text = line.strip().removeprefix(b"\xef\xbb\xbf")
        if is_first and text.startswith(b"["):
            yield from enumerate(_array(path, text + b"\n" + file.read()), start=1)
            return
        if is_first and text == b"{":
            raise ConfigError(
                f"{path} has a JSON object over several lines, and each line must be one; write it "
                "as a JSON array or with one object a line (jq -c . FILE)"
            )
        if text:
            is_first = False
            yield number, text


def _array(path: str | Path, content: bytes) -> list:
    try:
        return json.loads(content)
    except ValueError as error:
        message = f"{path} begins with [, so it is one JSON array, and is not valid: {error}"
        raise ConfigError(message) from error
