"""The lines of all files in batches, each of one file."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from dspark_megatron.data.files.jsonl import Row
from dspark_megatron.data.files.reading import check_readable, read_lines
from dspark_megatron.data.files.sources import DataFile
from dspark_megatron.data.tokenizing.encoding import Line
from dspark_megatron.errors import ConfigError

ReadIndexed = Callable[[Path], Iterable[Tensor]]
"""Gives the documents of a Megatron indexed dataset by its prefix, each [s]."""
_MOST_LINES, _MOST_BYTES = 256, 2**20


class LineBatch(NamedTuple):
    file: int
    """Its place among the files, from 0. Each has a batch, if only an empty one."""
    path: Path
    lines: list[Line]
    nbytes: int
    """Of the lines, where they are bytes."""


def check_file(file: DataFile, read_indexed: ReadIndexed | None) -> None:
    """ConfigError for a file that cannot be read."""
    if not file.indexed:
        check_readable(file)
    elif read_indexed is not None:
        read_indexed(file.path)


def line_batches(files: list[DataFile], read_indexed: ReadIndexed | None) -> Iterator[LineBatch]:
    for place, file in enumerate(files):
        lines = _lines(file, read_indexed)
        is_first = True
        while True:
            batch, error = _next(lines)
            if batch or is_first:
                nbytes = sum(len(line) + 1 for _, line in batch if isinstance(line, bytes))
                yield LineBatch(place, file.path, batch, nbytes)
            if error is not None:
                raise error  # what stands before a damaged place was read first
            if not batch:
                break
            is_first = False


def _next(lines: Iterator[Line]) -> tuple[list[Line], ConfigError | None]:
    """The next lines, and what ended them too early."""
    batch: list[Line] = []
    size = 0
    try:
        for line in itertools.islice(lines, _MOST_LINES):
            batch.append(line)
            size += _size(line[1])
            if size >= _MOST_BYTES:
                break
    except ConfigError as error:
        return batch, error
    return batch, None


def _size(line: object) -> int:
    """Bytes that it takes; 0 for an item of an array, which is in memory anyway."""
    if isinstance(line, bytes):
        return len(line)
    return line.nbytes if isinstance(line, Row | Tensor) else 0


def _lines(file: DataFile, read_indexed: ReadIndexed | None) -> Iterator[Line]:
    """The lines of a file by number, or the documents of an indexed dataset, from 0."""
    if not file.indexed:
        return iter(read_lines(file))
    assert read_indexed is not None, f"no reader for the indexed dataset {file.path}"
    return enumerate(read_indexed(file.path))
