"""How far tokenizing is, and how fast."""

import time
from pathlib import Path
from types import TracebackType

from dspark_megatron.data.files.sources import DataFile
from dspark_megatron.data.rules import DropReport
from dspark_megatron.data.tokenizing.batches import LineBatch
from dspark_megatron.errors import printable
from dspark_megatron.progress import Progress


def bytes_of(file: DataFile) -> int:
    """On the disk, or in the tables of the library `datasets`."""
    if file.dataset is not None:
        return int(file.dataset.rows.data.nbytes)
    path = Path(f"{file.path}.bin") if file.indexed else file.path
    return path.stat().st_size if path.is_file() else 0


class TokenizingProgress:
    """The bytes that are read. Within a compressed file it is ahead, and within one of
    Parquet or one JSON array it stands still."""

    def __init__(self, files: list[DataFile], *, show: bool) -> None:
        self._files, self._sizes = files, [bytes_of(file) for file in files]
        self._file, self._read = 0, 0
        self._start = time.perf_counter()
        self._bar = Progress(sum(self._sizes), "tokenizing", "B", show=show, scale=True)

    def __enter__(self) -> "TokenizingProgress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self._bar.update(self._bar.total - self._bar.done)
        self._bar.close()

    def add(self, batch: LineBatch, report: DropReport) -> None:
        """What became of the next batch; the report has it already."""
        if batch.file != self._file or not self._read:
            self._file, self._read = batch.file, 0
            self._bar.rename(f"tokenizing {printable(batch.path.name)}")
        self._read += batch.nbytes
        rows, size = self._files[self._file].dataset, self._sizes[self._file]
        if rows is not None and batch.lines:
            self._read = size * batch.lines[-1][0] // len(rows.rows)
        passed = sum(self._sizes[: self._file]) + min(self._read, size)
        self._bar.note(self.rate(report))
        self._bar.update(passed - self._bar.done)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def rate(self, report: DropReport) -> str:
        lines, tokens = (n / self.seconds for n in (report.lines, report.total_tokens))
        return f"{lines:,.0f} lines/s, {tokens:,.0f} tokens/s"
