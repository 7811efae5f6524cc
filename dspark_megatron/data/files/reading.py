"""Reads any file of data but an indexed one: lines of JSON, or rows of a table."""

from collections.abc import Iterator

from dspark_megatron.data.files import jsonl, tables
from dspark_megatron.data.files.opening import file_errors, open_packed
from dspark_megatron.data.files.sources import DataFile


def read_lines(file: DataFile) -> Iterator[tuple[int, object]]:
    """What `parse_line` makes records of, by number from 1. ConfigError for a file that cannot be
    read or has another form."""
    table = _table(file)
    return jsonl.lines_of(file.path) if table is None else tables.rows_of(table)


def check_readable(file: DataFile) -> None:
    """ConfigError for a file that cannot be opened, or of another form."""
    if _table(file) is None:
        with file_errors(file.path):
            open_packed(file.path).close()


def _table(file: DataFile) -> tables.Table | None:
    """None: it has lines."""
    if file.dataset is not None:
        return file.dataset.table(file.path)
    with file_errors(file.path):
        return tables.open_table(file.path) if tables.is_table(file.path) else None
