"""Rows of tables (Parquet, Arrow, `datasets`), a few at a time. They are numbered from 1."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dspark_megatron.data.files import jsonl
from dspark_megatron.data.files.columns import Make, made, makers
from dspark_megatron.data.files.jsonl import TOO_DEEP, Row, Unusable
from dspark_megatron.data.files.opening import damaged, first_bytes, needed
from dspark_megatron.errors import ConfigError, require

PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR", b"ARROW1", b"\xff\xff\xff\xff"
_STREAM_END = ARROW_STREAM + bytes(4)
BATCH_ROWS = 16
"""Rows that are unpacked at once. More are not read faster."""


class Table(NamedTuple):
    path: Path
    """As messages name it."""
    makers: dict[str, Make]
    """How to make JSON of each column that is read."""
    batches: Iterable[Any]
    """Of type pyarrow.RecordBatch. They have these columns, and maybe more."""
    num_rows: int | None = None
    """What the file says of itself. None: it does not."""


def is_table(path: str | Path) -> bool:
    return first_bytes(path).startswith((PARQUET, ARROW_FILE, ARROW_STREAM))


def open_table(path: Path) -> Table:
    """ConfigError for a file that is damaged, or has no columns that can be used."""
    is_parquet = first_bytes(path).startswith(PARQUET)
    try:
        return _open_parquet(path) if is_parquet else _open_arrow(path)
    except ConfigError:
        raise
    except Exception as error:  # whatever a damaged file makes pyarrow raise
        raise damaged(path, error) from error


def _open_parquet(path: Path) -> Table:
    """Columns that are not read are not unpacked, and of the others some pages at a time."""
    parquet = needed("pyarrow.parquet", f"{path} is a Parquet file, which")
    file = parquet.ParquetFile(path, buffer_size=2**20)
    found = makers(path, file.schema_arrow)
    batches = file.iter_batches(BATCH_ROWS, columns=list(found))
    return Table(path, found, batches, file.metadata.num_rows)


def _open_arrow(path: Path) -> Table:
    ipc = needed("pyarrow.ipc", f"{path} is an Arrow file, which")
    source = needed("pyarrow", "it").memory_map(str(path))
    if first_bytes(path).startswith(ARROW_STREAM):
        check_stream_end(path)
        batches = reader = ipc.open_stream(source)
    else:
        reader = ipc.open_file(source)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    return Table(path, makers(path, reader.schema), _in_pieces(batches))


def check_stream_end(path: str | Path) -> None:
    """A stream that was cut behind some rows would pass for a shorter one. ConfigError, or OSError
    for a file that has not even these bytes."""
    with open(path, "rb") as file:
        file.seek(-len(_STREAM_END), io.SEEK_END)
        require(
            file.read() == _STREAM_END,
            f"{path} is damaged or cut short: it lacks the end of an Arrow stream; copy it again",
        )


def _in_pieces(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield batch.slice(start, BATCH_ROWS)


def rows_of(table: Table) -> Iterator[tuple[int, Row | Unusable]]:
    """The rows as records, without the keys that have no value. ConfigError where the file cannot
    be read any further."""
    number, batches = 0, iter(table.batches)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:  # as above
            raise damaged(table.path, error, f"row {number:,}") from error
        if batch is None:
            break
        for row in _rows(batch.select(list(table.makers)), table.makers):
            number += 1
            yield number, row
    if table.num_rows not in (None, number):
        raise damaged(table.path, f"it speaks of {table.num_rows:,} rows", f"row {number:,}")


def _rows(batch: Any, make: dict[str, Make]) -> Iterator[Row | Unusable]:
    """All at once if none is wrong, else one by one."""
    wrong = _what_is_wrong(batch)
    if wrong is None:
        nbytes = batch.nbytes // max(1, batch.num_rows)
        yield from (_row(values, make, nbytes) for values in batch.to_pylist())
    elif batch.num_rows == 1:
        yield wrong
    else:
        for i in range(batch.num_rows):
            yield from _rows(batch.slice(i, 1), make)


def _what_is_wrong(batch: Any) -> Unusable | None:
    """With one row, or with any of several."""
    try:
        batch.validate(full=True)  # offsets, and UTF-8
    except ValueError as error:
        return Unusable(f"not valid Arrow data: {error}")
    try:
        size = batch.nbytes
    except TypeError as error:  # of views of texts, in older versions
        return Unusable(f"a newer pyarrow is needed: {error}")
    return Unusable.too_long(size) if size > jsonl.MOST_LINE_BYTES else None


def _row(values: dict[str, Any], make: dict[str, Make], nbytes: int) -> Row | Unusable:
    try:
        return Row(made(values, make), nbytes)
    except ConfigError as error:  # of JSON within
        return Unusable(str(error))
    except RecursionError:
        return Unusable(TOO_DEEP)
