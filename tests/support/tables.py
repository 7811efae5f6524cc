"""Parquet and Arrow files of records."""

from pathlib import Path

import pyarrow
from pyarrow import parquet


def write_parquet(path: Path, records: list[dict] | pyarrow.Table, **options: object) -> Path:
    parquet.write_table(as_table(records), path, **options)
    return path


def write_arrow(path: Path, records: list[dict] | pyarrow.Table, *, stream: bool = False) -> Path:
    table = as_table(records)
    new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


def as_table(records: list[dict] | pyarrow.Table) -> pyarrow.Table:
    if isinstance(records, pyarrow.Table):
        return records
    names = dict.fromkeys(name for record in records for name in record)
    return pyarrow.table({name: [record.get(name) for record in records] for name in names})
