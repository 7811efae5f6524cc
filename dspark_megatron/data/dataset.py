"""All training samples, tokenized at start and held compactly in memory.

Shapes: n kept samples, t tokens of all of them, s tokens of one.
"""

import hashlib
from array import array
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from dspark_megatron.config import ConfigError
from dspark_megatron.data.conversation import ConversationEncoder, Sample
from dspark_megatron.data.jsonl import errors_at, read_jsonl


@dataclass(kw_only=True)
class DropReport:
    """What became of the samples that were read."""

    kept: int = 0
    too_few_loss_tokens: int = 0
    """Dropped: fewer supervised tokens than asked for, after truncation."""
    no_anchor: int = 0
    """Dropped: enough of them, but no two are adjacent."""
    truncated: int = 0
    """Cut to the largest length; kept or dropped afterwards."""
    total_tokens: int = 0
    """Of the kept samples."""
    loss_tokens: int = 0
    """Supervised tokens of the kept samples."""

    @property
    def read(self) -> int:
        return self.kept + self.too_few_loss_tokens + self.no_anchor

    def describe(self) -> str:
        """All counts in one line."""
        return (
            f"data: kept {self.kept:,} of {self.read:,} samples with {self.total_tokens:,} tokens, "
            f"{self.loss_tokens:,} of them supervised; dropped {self.too_few_loss_tokens:,} with "
            f"too few supervised tokens and {self.no_anchor:,} without an anchor; "
            f"cut {self.truncated:,} to the largest length"
        )


class ConversationDataset:
    """Samples by index, in the order of the files."""

    def __init__(
        self, token_ids: Tensor, loss_mask: Tensor, offsets: Tensor, report: DropReport
    ) -> None:
        """token_ids: [t] int32. loss_mask: [t] bool. offsets: [n + 1] int64; sample i is the
        half-open range from offsets[i] to offsets[i + 1]."""
        self._token_ids, self._loss_mask, self._offsets = token_ids, loss_mask, offsets
        self.report = report

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` in [0, n). IndexError outside."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is not in [0, {len(self)})")
        start, end = self._offsets[index : index + 2].tolist()
        return Sample(self._token_ids[start:end].long(), self._loss_mask[start:end].clone())

    @property
    def lengths(self) -> Tensor:
        """[n] int64 tokens of each sample."""
        return self._offsets.diff()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of all samples and their order; equal means the same data."""
        digest = hashlib.sha256()
        for tensor in (self._offsets, self._token_ids, self._loss_mask):
            digest.update(tensor.numpy())
        return digest.hexdigest()


def load_samples(
    files: list[str] | list[Path],
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    max_length: int,
    min_loss_tokens: int,
    show_progress: bool = False,
) -> ConversationDataset:
    """Tokenize all files, cut each sample to `max_length` tokens and drop what cannot be trained
    on: fewer than `min_loss_tokens` supervised tokens are left, or no two adjacent ones.

    Raises ConfigError for a malformed line (naming `file:line`) and when no sample is kept.
    """
    encoder = ConversationEncoder(tokenizer, vocab_size)
    packed = _PackedSamples()
    report = DropReport()
    for path in files:
        lines = tqdm(
            read_jsonl(path), desc=Path(path).name, unit=" samples", disable=not show_progress
        )
        for number, record in lines:
            with errors_at(path, number):
                sample = encoder.encode(record)
            report.truncated += len(sample.input_ids) > max_length
            sample = Sample(sample.input_ids[:max_length], sample.loss_mask[:max_length])
            if _count(sample, min_loss_tokens, report):
                packed.append(sample)
    if not report.kept:
        raise _nothing_kept(files, report, max_length, min_loss_tokens)
    return packed.dataset(report)


def _count(sample: Sample, min_loss_tokens: int, report: DropReport) -> bool:
    """Whether the sample is kept; adds it to the report."""
    mask = sample.loss_mask
    loss_tokens = int(mask.sum())
    if loss_tokens < min_loss_tokens:
        report.too_few_loss_tokens += 1
        return False
    if not (mask[:-1] & mask[1:]).any():
        report.no_anchor += 1
        return False
    report.kept += 1
    report.total_tokens += len(mask)
    report.loss_tokens += loss_tokens
    return True


def _nothing_kept(
    files: list[str] | list[Path], report: DropReport, max_length: int, min_loss_tokens: int
) -> ConfigError:
    names = ", ".join(str(path) for path in files)
    if not report.read:
        return ConfigError(f"no samples in {names}: the files have no lines")
    return ConfigError(
        f"all {report.read:,} samples of {names} were dropped: {report.too_few_loss_tokens:,} "
        f"have fewer than data.min_loss_tokens ({min_loss_tokens}) supervised tokens within "
        f"data.max_length ({max_length}), {report.no_anchor:,} have no two adjacent ones; "
        f"{report.truncated:,} were longer than data.max_length. Raise data.max_length, lower "
        "data.min_loss_tokens, or give longer answers"
    )


class _PackedSamples:
    """Samples while they are read: growing flat buffers, 5 bytes per token."""

    def __init__(self) -> None:
        self._token_ids = array("i")
        self._loss_mask = bytearray()
        self._offsets = array("q", [0])

    def append(self, sample: Sample) -> None:
        self._token_ids.frombytes(sample.input_ids.int().numpy().tobytes())
        self._loss_mask += sample.loss_mask.numpy().tobytes()
        self._offsets.append(len(self._loss_mask))

    def dataset(self, report: DropReport) -> ConversationDataset:
        return ConversationDataset(
            torch.frombuffer(self._token_ids, dtype=torch.int32),
            torch.frombuffer(self._loss_mask, dtype=torch.bool),
            torch.frombuffer(self._offsets, dtype=torch.int64),
            report,
        )
