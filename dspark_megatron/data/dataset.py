"""All samples of a run: in memory, or mapped from a store on disk; 5 bytes per token.

Shapes: n kept samples, t tokens of all of them, s tokens of one.
"""

import hashlib
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dspark_megatron.data.conversation import Sample
from dspark_megatron.data.origins import Origins
from dspark_megatron.data.rules import DropReport, SampleRules
from dspark_megatron.data.sampler import Shares, share_out
from dspark_megatron.data.tokenizing.batches import ReadIndexed
from dspark_megatron.data.tokenizing.collecting import Streams, Tokenizing
from dspark_megatron.data.tokenizing.encoding import LineEncoder
from dspark_megatron.errors import ConfigError


class SampleArrays(NamedTuple):
    """Samples one after the other."""

    token_ids: numpy.ndarray
    """[t] int32, half the memory of int64."""
    loss_mask: numpy.ndarray
    """[t] bool"""
    offsets: numpy.ndarray
    """[n + 1] int64: sample i is the half-open range from offsets[i] to offsets[i + 1]."""
    lines: numpy.ndarray
    """[n] int64: line, or document, of each sample in its file."""


DTYPES = SampleArrays(*map(numpy.dtype, ("<i4", "?", "<i8", "<i8")))


class TokenizedSamples(NamedTuple):
    """The samples of the files of some entries."""

    arrays: SampleArrays
    report: DropReport
    files: list[Path]
    starts: list[int]
    """The first sample of each file."""
    sizes: list[int]
    """Samples of each entry."""


class ConversationDataset:
    """Samples by index, in the order of the files."""

    def __init__(
        self,
        arrays: SampleArrays,
        report: DropReport,
        origins: Origins,
        shares: Shares | None = None,
    ) -> None:
        """shares: those of the sources, unless each sample comes once an epoch."""
        self._arrays, self._offsets = arrays, arrays.offsets
        self.report, self.origins, self.shares = report, origins, shares

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` in [0, n), its ids as int64. IndexError outside."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is not in [0, {len(self)})")
        start, end = self._offsets[index : index + 2].tolist()
        return Sample(
            torch.from_numpy(self._arrays.token_ids[start:end].astype(numpy.int64)),
            torch.from_numpy(self._arrays.loss_mask[start:end].copy()),
        )

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sample, [n] int64."""
        return torch.from_numpy(numpy.diff(self._offsets))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of all samples, their order and the shares of their sources. Equal
        fingerprints mean the same data."""
        return fingerprint_of(self._arrays, self.shares)


def fingerprint_of(arrays: SampleArrays, shares: Shares | None) -> str:
    """See `ConversationDataset.fingerprint`. Reads all samples."""
    digest = hashlib.sha256()
    for part in (arrays.offsets, arrays.token_ids, arrays.loss_mask):
        digest.update(part)
    if shares is not None:
        digest.update(repr(tuple(map(tuple, shares))).encode())
    return digest.hexdigest()


def load_samples(
    entries: list[str] | list[Path],
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    rules: SampleRules,
    *,
    weights: list[float] | None = None,
    read_indexed: ReadIndexed | None = None,
    workers: int = 0,
    show_progress: bool = False,
) -> ConversationDataset:
    """Tokenize all files of all entries into memory and cut each sample to the largest length.
    Samples with too few supervised tokens left, or without an anchor, are dropped.

    `weights`: the entries' shares of an epoch. None: every sample comes once an epoch.
    `read_indexed`: how to read indexed datasets. None: there must be none. `workers`: processes;
    with 0 or 1 it is this one.
    Raises ConfigError when no sample is kept, and for lines that cannot be used, if they are more
    than may be left out. It lists all of them by reason and names `file:line`.
    """
    work = Tokenizing(
        entries,
        LineEncoder(tokenizer, vocab_size, rules),
        read_indexed=read_indexed,
        workers=workers,
        show_progress=show_progress,
    )
    return load_in_memory(work, entries, rules, weights)


def load_in_memory(
    work: Tokenizing,
    entries: list[str] | list[Path],
    rules: SampleRules,
    weights: list[float] | None = None,
) -> ConversationDataset:
    """What `work` makes. ConfigError as of `load_samples`."""
    streams = [BytesIO() for _ in Streams._fields]
    for _ in work.into(Streams(*streams)):
        pass
    arrays = (
        numpy.frombuffer(stream.getbuffer(), dtype) if stream.tell() else numpy.empty(0, dtype)
        for stream, dtype in zip(streams, DTYPES, strict=True)
    )
    files = [file.path for file in work.files]
    found = TokenizedSamples(SampleArrays(*arrays), work.report, files, work.starts, work.sizes)
    return dataset_of(found, entries, rules, weights)


def dataset_of(
    samples: TokenizedSamples,
    entries: list[str] | list[Path],
    rules: SampleRules,
    weights: list[float] | None = None,
) -> ConversationDataset:
    """The data set of a run; ConfigError as of `load_samples`."""
    report = samples.report
    report.bad_lines.check(report.lines, rules.skip_bad_lines)
    if not report.kept:
        raise _nothing_kept(entries, report, rules)
    names = [str(entry) for entry in entries]
    shares = share_out(names, samples.sizes, weights) if weights else None
    origins = Origins(samples.files, samples.starts, samples.arrays.lines)
    return ConversationDataset(samples.arrays, report, origins, shares)


def _nothing_kept(
    entries: list[str] | list[Path], report: DropReport, rules: SampleRules
) -> ConfigError:
    names = ", ".join(map(str, entries))
    if not report.read:
        return ConfigError(f"no samples in {names}: the files have no lines")
    return ConfigError(
        f"all {report.read:,} samples of {names} were dropped: {report.too_few_loss_tokens:,} "
        f"have fewer than data.min_loss_tokens ({rules.min_loss_tokens}) supervised tokens within "
        f"data.max_length ({rules.max_length}), {report.no_anchor:,} have no anchor (two adjacent "
        f"ones, by default); {report.truncated:,} were longer than data.max_length. Raise "
        "data.max_length, lower data.min_loss_tokens, or give longer answers"
    )
