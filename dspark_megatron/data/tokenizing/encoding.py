"""From lines to the samples that are kept of them, a batch at a time and in whatever process."""

from functools import cached_property
from typing import NamedTuple

import numpy
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dspark_megatron.data.blocks import has_block
from dspark_megatron.data.conversation import ConversationEncoder, Sample
from dspark_megatron.data.files.bad_lines import NoFurther
from dspark_megatron.data.files.jsonl import errors_at, parse_line
from dspark_megatron.data.rules import DropReport, SampleRules
from dspark_megatron.errors import ConfigError, require

Line = tuple[int, object]
"""A line by its number, or a document of an indexed dataset, [s], by its own."""


class Failure(NamedTuple):
    """A line that cannot be used."""

    place: int
    """In its batch, from 0."""
    reason: str
    ends: bool = False
    """No other line would pass either, so none after it was read."""


class Encoded(NamedTuple):
    """What is kept of a batch of lines, as bytes: they go from process to process."""

    token_ids: bytes
    """int32, of all kept samples one after the other."""
    loss_mask: bytes
    """bool."""
    lengths: list[int]
    numbers: list[int]
    """The line of each sample."""
    report: DropReport
    failures: list[Failure]


def mask_token_found(mask_token_id: int | None) -> str:
    """How the reason begins for a line that has the mask token."""
    return f"model.mask_token_id ({mask_token_id}) stands"


class LineEncoder:
    """Makes samples by one tokenizer and one set of rules. It can be pickled."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, rules: SampleRules
    ) -> None:
        self._tokenizer, self._vocab_size, self.rules = tokenizer, vocab_size, rules

    def encode(self, lines: list[Line]) -> Encoded:
        """The samples of lines in their order, and what is wrong with the others."""
        report, failures, kept = DropReport(), list[Failure](), list[tuple[int, Sample]]()
        hidden_before = self._encoder.reasoning.hidden_tokens
        for place, (number, line) in enumerate(lines):
            samples: list[Sample] = []
            try:
                with errors_at("", number):
                    samples = self._samples(line)
            except NoFurther as error:
                failures.append(Failure(place, str(error), ends=True))
                break
            except ConfigError as error:
                failures.append(Failure(place, str(error.__cause__)))
            report.split_chats += len(samples) > 1
            cut = (self._cut(sample, report) for sample in samples)
            kept += [(number, sample) for sample in cut if self._is_kept(sample, report)]
        if self.rules.reasoning_tags is not None:
            report.reasoning_tokens = self._encoder.reasoning.hidden_tokens - hidden_before
        return Encoded(
            b"".join(sample.input_ids.numpy().tobytes() for _, sample in kept),
            b"".join(sample.loss_mask.numpy().tobytes() for _, sample in kept),
            [len(sample.loss_mask) for _, sample in kept],
            [number for number, _ in kept],
            report,
            failures,
        )

    @cached_property
    def _encoder(self) -> ConversationEncoder:
        rules = self.rules
        return ConversationEncoder(
            self._tokenizer, self._vocab_size, rules.reasoning_tags, rules.answers
        )

    def _samples(self, line: object) -> list[Sample]:
        """The samples of a line or document, before they are cut. ConfigError if it cannot be
        used."""
        if isinstance(line, Tensor):
            samples = [self._encoder.encode_document(line)]
        else:
            samples = self._encoder.encode(parse_line(line))
        mask_token_id = self.rules.mask_token_id
        for sample in samples if mask_token_id is not None else ():
            count = sample.input_ids[: self.rules.max_length].tolist().count(mask_token_id)
            require(
                not count,
                f"{mask_token_found(mask_token_id)} {count} times in this line, and "
                "the draft takes it for an unknown token; choose one that never occurs in the data",
            )
        return samples

    def _cut(self, sample: Sample, report: DropReport) -> Sample:
        report.truncated += len(sample.input_ids) > self.rules.max_length
        return Sample(*(part[: self.rules.max_length] for part in sample))

    def _is_kept(self, sample: Sample, report: DropReport) -> bool:
        """Whether there is enough to learn. The report counts it."""
        rules, loss_tokens = self.rules, int(sample.loss_mask.sum())
        if loss_tokens < rules.min_loss_tokens:
            report.too_few_loss_tokens += 1
            return False
        if not has_block(sample.loss_mask, rules.num_draft_tokens, rules.loss):
            report.no_anchor += 1
            return False
        report.kept += 1
        report.total_tokens += len(sample.loss_mask)
        report.loss_tokens += loss_tokens
        return True


def transportable(lines: list[Line]) -> list[Line]:
    """Lines for another process: PyTorch would send a tensor through shared memory."""
    return [(n, line.numpy() if isinstance(line, Tensor) else line) for n, line in lines]


def received(lines: list[Line]) -> list[Line]:
    return [
        (n, torch.from_numpy(line) if isinstance(line, numpy.ndarray) else line)
        for n, line in lines
    ]
