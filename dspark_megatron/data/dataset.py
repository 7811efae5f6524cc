"""All samples of a run. They are tokenized at start and kept in memory, 5 bytes per token.

Shapes: n kept samples, t tokens of all of them, s tokens of one.
"""

import hashlib
import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspark_megatron.config import LossConfig
from dspark_megatron.data.blocks import has_block
from dspark_megatron.data.chats.answers import AnswerRules
from dspark_megatron.data.conversation import ConversationEncoder, Sample
from dspark_megatron.data.files.bad_lines import BadLines
from dspark_megatron.data.files.jsonl import parse_line
from dspark_megatron.data.files.reading import check_readable, read_lines
from dspark_megatron.data.files.sources import DataFile, find_files
from dspark_megatron.data.origins import Origins
from dspark_megatron.data.sampler import Shares, share_out
from dspark_megatron.errors import ConfigError, printable, require

ReadIndexed = Callable[[Path], Iterable[Tensor]]
"""Gives the documents of a Megatron indexed dataset by its prefix, each [s]."""


@dataclass(frozen=True, kw_only=True)
class SampleRules:
    """Which tokens of a sample are kept and learnt, and which samples are dropped."""

    max_length: int
    """The most tokens that are kept of a sample."""
    min_loss_tokens: int
    """Supervised tokens that it needs then."""
    block_size: int
    loss: LossConfig
    """By these some anchor of it must start a block with something to learn."""
    reasoning_tags: tuple[str, str] | None = None
    """Reasoning between these is not learnt. None: it is learnt."""
    answers: AnswerRules = field(default_factory=AnswerRules)
    """Where answers begin and end."""
    mask_token_id: int | None = None
    """The draft's mask token, which no sample may have. None: not known."""
    skip_bad_lines: float = 0.0
    """Share of the lines that may be left out because they cannot be used."""


@dataclass(kw_only=True)
class DropReport:
    """What became of the samples that were read."""

    kept: int = 0
    too_few_loss_tokens: int = 0
    """Samples dropped because too few supervised tokens are left after truncation."""
    no_anchor: int = 0
    """Samples dropped because no anchor has anything to learn."""
    truncated: int = 0
    """Samples cut to the largest length, whether they were kept or dropped then."""
    total_tokens: int = 0
    """Of the kept samples."""
    loss_tokens: int = 0
    """Supervised tokens of the kept samples."""
    split_chats: int = 0
    """Chats that became several samples because the chat template rewrites earlier turns."""
    reasoning_tokens: int | None = None
    """Tokens of reasoning that are not learnt, before truncation. None: it is learnt."""
    lines: int = 0
    """Lines and documents that were read, the bad ones included."""
    bad_lines: BadLines = field(default_factory=BadLines)
    """Lines left out because they cannot be used."""

    @property
    def read(self) -> int:
        return self.kept + self.too_few_loss_tokens + self.no_anchor

    def describe(self) -> str:
        """All counts in one line. Lines that were left out follow, by reason."""
        split = f"; {self.split_chats:,} chats were split by turns" if self.split_chats else ""
        hidden = left_out = ""
        if self.reasoning_tokens is not None:
            hidden = f"; {self.reasoning_tokens:,} tokens of reasoning are not learnt"
        if self.bad_lines:
            left_out = f"; left out {len(self.bad_lines):,} of {self.lines:,} lines that cannot be "
            left_out += f"used:\n{self.bad_lines.describe()}"
        return (
            f"data: kept {self.kept:,} of {self.read:,} samples with {self.total_tokens:,} tokens, "
            f"{self.loss_tokens:,} of them supervised; dropped {self.too_few_loss_tokens:,} with "
            f"too few supervised tokens and {self.no_anchor:,} without an anchor; "
            f"cut {self.truncated:,} to the largest length{split}{hidden}{left_out}"
        )


class ConversationDataset:
    """Samples by index, in the order of the files."""

    def __init__(
        self,
        token_ids: Tensor,
        loss_mask: Tensor,
        offsets: Tensor,
        report: DropReport,
        origins: Origins,
        shares: Shares | None = None,
    ) -> None:
        """token_ids: [t] int32, half the memory of int64. loss_mask: [t] bool. offsets: [n + 1]
        int64; sample i is the half-open range from offsets[i] to offsets[i + 1]. shares: those of
        the sources, unless each sample comes once an epoch."""
        self._token_ids, self._loss_mask, self._offsets = token_ids, loss_mask, offsets
        self.report, self.origins, self.shares = report, origins, shares

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` in [0, n), its ids as int64. IndexError outside."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is not in [0, {len(self)})")
        start, end = self._offsets[index : index + 2].tolist()
        return Sample(self._token_ids[start:end].long(), self._loss_mask[start:end].clone())

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sample, [n] int64."""
        return self._offsets.diff()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of all samples, their order and the shares of their sources. Equal
        fingerprints mean the same data."""
        digest = hashlib.sha256()
        for tensor in (self._offsets, self._token_ids, self._loss_mask):
            digest.update(tensor.numpy())
        if self.shares is not None:
            digest.update(repr(tuple(map(tuple, self.shares))).encode())
        return digest.hexdigest()


def load_samples(
    entries: list[str] | list[Path],
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    rules: SampleRules,
    *,
    weights: list[float] | None = None,
    read_indexed: ReadIndexed | None = None,
    show_progress: bool = False,
) -> ConversationDataset:
    """Tokenize all files of all entries and cut each sample to the largest length. Samples with too
    few supervised tokens left, or without an anchor, are dropped.

    `weights`: the entries' shares of an epoch. None: every sample comes once an epoch.
    `read_indexed`: how to read indexed datasets. None: there must be none.
    Raises ConfigError when no sample is kept, and for lines that cannot be used, if they are more
    than may be left out. It lists all of them by reason and names `file:line`.
    """
    files = [find_files(entry) for entry in entries]
    for file in itertools.chain.from_iterable(files):
        _check_readable(file, read_indexed)  # before the work
    encoder = ConversationEncoder(tokenizer, vocab_size, rules.reasoning_tags, rules.answers)
    packed, report, sizes = _PackedSamples(), DropReport(), []
    for group in files:
        kept_before = report.kept
        for file in group:
            packed.origins.start_file(file.path)
            for number, line in _read(file, read_indexed, show_progress):
                report.lines += 1
                samples: list[Sample] = []
                with report.bad_lines.at(file.path, number):
                    samples = _samples(line, encoder, rules)
                report.bad_lines.check_early(report.lines, rules.skip_bad_lines)
                report.split_chats += len(samples) > 1
                for sample in samples:
                    packed.add(sample, number, rules, report)
        sizes.append(report.kept - kept_before)
    report.bad_lines.check(report.lines, rules.skip_bad_lines)
    if encoder.reasoning.tags is not None:
        report.reasoning_tokens = encoder.reasoning.hidden_tokens
    if not report.kept:
        raise _nothing_kept(entries, report, rules)
    names = [str(entry) for entry in entries]
    return packed.dataset(report, share_out(names, sizes, weights) if weights else None)


def _check_readable(file: DataFile, read_indexed: ReadIndexed | None) -> None:
    if not file.indexed:
        check_readable(file)
    elif read_indexed is not None:
        read_indexed(file.path)


def _read(
    file: DataFile, read_indexed: ReadIndexed | None, show_progress: bool
) -> Iterator[tuple[int, object]]:
    """The lines of a file by number, or the documents of an indexed dataset, from 0."""
    if file.indexed:
        assert read_indexed is not None, f"no reader for the indexed dataset {file.path}"
        lines: Iterable[tuple[int, object]] = enumerate(read_indexed(file.path))
    else:
        lines = read_lines(file)
    yield from tqdm(
        lines, desc=printable(file.path.name), unit=" samples", disable=not show_progress
    )


def _samples(line: object, encoder: ConversationEncoder, rules: SampleRules) -> list[Sample]:
    """The samples of a line or document, before they are cut. ConfigError if it cannot be used."""
    if isinstance(line, Tensor):
        samples = [encoder.encode_document(line)]
    else:
        samples = encoder.encode(parse_line(line))
    for sample in samples:
        count = sample.input_ids[: rules.max_length].tolist().count(rules.mask_token_id)
        require(
            not count,
            f"model.mask_token_id ({rules.mask_token_id}) stands {count} times in this line, and "
            "the draft takes it for an unknown token; choose one that never occurs in the data",
        )
    return samples


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


class _PackedSamples:
    """Collects samples in flat buffers that grow."""

    def __init__(self) -> None:
        self._token_ids = array("i")
        self._loss_mask = bytearray()
        self._offsets = array("q", [0])
        self.origins = Origins()

    def add(self, sample: Sample, line: int, rules: SampleRules, report: DropReport) -> None:
        """Cut the sample, then keep or drop it. The report counts which."""
        report.truncated += len(sample.input_ids) > rules.max_length
        sample = Sample(*(part[: rules.max_length] for part in sample))
        loss_tokens = int(sample.loss_mask.sum())
        if loss_tokens < rules.min_loss_tokens:
            report.too_few_loss_tokens += 1
        elif not has_block(sample.loss_mask, rules.block_size, rules.loss):
            report.no_anchor += 1
        else:
            report.kept += 1
            report.total_tokens += len(sample.loss_mask)
            report.loss_tokens += loss_tokens
            self._token_ids.frombytes(sample.input_ids.numpy().tobytes())
            self._loss_mask += sample.loss_mask.numpy().tobytes()
            self._offsets.append(len(self._loss_mask))
            self.origins.add(line)

    def dataset(self, report: DropReport, shares: Shares | None) -> ConversationDataset:
        return ConversationDataset(
            torch.frombuffer(self._token_ids, dtype=torch.int32),
            torch.frombuffer(self._loss_mask, dtype=torch.bool),
            torch.frombuffer(self._offsets, dtype=torch.int64),
            report,
            self.origins,
            shares,
        )
