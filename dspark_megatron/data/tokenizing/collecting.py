"""All samples of a run's files, one after the other, into streams of bytes."""

import itertools
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dspark_megatron.data.files.bad_lines import NoFurther
from dspark_megatron.data.files.sources import DataFile, find_files
from dspark_megatron.data.rules import DropReport
from dspark_megatron.data.tokenizing.batches import (
    LineBatch,
    ReadIndexed,
    check_file,
    line_batches,
)
from dspark_megatron.data.tokenizing.encoding import Encoded, LineEncoder
from dspark_megatron.data.tokenizing.progress import TokenizingProgress, bytes_of
from dspark_megatron.data.tokenizing.workers import chosen_workers, encoded_batches
from dspark_megatron.errors import ConfigError


class Streams(NamedTuple):
    """Where samples go. n samples, t tokens of all of them."""

    token_ids: BinaryIO
    """[t] int32"""
    loss_mask: BinaryIO
    """[t] bool"""
    offsets: BinaryIO
    """[n + 1] int64: sample i is the half-open range from offsets[i] to offsets[i + 1]."""
    lines: BinaryIO
    """[n] int64: line, or document, of each sample in its file."""


class Tokenizing:
    """The work of making samples of the files of all entries, and what is known of them then."""

    def __init__(
        self,
        entries: list[str] | list[Path],
        encoder: LineEncoder,
        *,
        read_indexed: ReadIndexed | None = None,
        workers: int | None = 0,
        show_progress: bool = False,
    ) -> None:
        """ConfigError for files that cannot be read. read_indexed: None: there must be no indexed
        dataset. workers: processes; with 0 or 1 it is this one. None: by size and cores."""
        self.entries = [str(entry) for entry in entries]
        self._encoder, self._read_indexed = encoder, read_indexed
        groups = [find_files(entry) for entry in entries]
        self.files: list[DataFile] = list(itertools.chain.from_iterable(groups))
        for file in self.files:
            check_file(file, read_indexed)  # before the work
        self._ends = list(itertools.accumulate(map(len, groups)))
        self._workers = chosen_workers(workers, sum(map(bytes_of, self.files)))
        self._show_progress = show_progress
        self.speed = ""
        """For the reader, once all is done."""
        self.report = DropReport()
        self.starts: list[int] = []
        """The first sample of each file."""

    @property
    def sizes(self) -> list[int]:
        """Samples of each entry."""
        ends = [*self.starts, self.report.kept]
        return [ends[end] - ends[start] for start, end in itertools.pairwise([0, *self._ends])]

    def into(self, streams: Streams) -> Iterator[None]:
        """Write all samples; a step for each batch of lines. ConfigError for a line that ends the
        reading, and once there are so many bad ones that the rest does not matter."""
        streams.offsets.write(array("q", [0]).tobytes())
        batches = line_batches(self.files, self._read_indexed)
        work = encoded_batches(batches, self._encoder, self._workers)
        with TokenizingProgress(self.files, show=self._show_progress) as progress:
            for batch, encoded in work:
                self._take(batch, encoded, streams)
                progress.add(batch, self.report)
                yield
        by = f" by {self._workers} processes" if self._workers > 1 else ""
        self.speed = (
            f"tokenized {self.report.lines:,} lines in {progress.seconds:,.1f} s{by} "
            f"({progress.rate(self.report)})"
        )

    def _take(self, batch: LineBatch, encoded: Encoded, streams: Streams) -> None:
        if batch.file == len(self.starts):
            self.starts.append(self.report.kept)
        self._count(batch, encoded)
        before = self.report.total_tokens
        self.report.add(encoded.report)
        offsets = itertools.accumulate(encoded.lengths, initial=before)
        streams.token_ids.write(encoded.token_ids)
        streams.loss_mask.write(encoded.loss_mask)
        streams.offsets.write(array("q", itertools.islice(offsets, 1, None)).tobytes())
        streams.lines.write(array("q", encoded.numbers).tobytes())

    def _count(self, batch: LineBatch, encoded: Encoded) -> None:
        """The lines, and what was wrong with them, in their order."""
        report, before = self.report, self.report.lines
        for failure in encoded.failures:
            report.lines = before + failure.place + 1
            number, _ = batch.lines[failure.place]
            with report.bad_lines.at(batch.path, number):
                raise (NoFurther if failure.ends else ConfigError)(failure.reason)
            report.bad_lines.check_early(report.lines, self._encoder.rules.skip_bad_lines)
        report.lines = before + len(batch.lines)
