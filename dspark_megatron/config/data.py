"""The section `data`."""

import contextlib
import math
from dataclasses import dataclass, field
from datetime import date
from typing import Literal

from dspark_megatron.config.rules import not_negative
from dspark_megatron.errors import require


@dataclass(kw_only=True)
class DataConfig:
    """Training conversations."""

    train_files: list[str] = field(default_factory=list)
    """Files of chats, completions or token ids: JSONL (also compressed, or JSON arrays), Parquet,
    Arrow, prefixes of Megatron indexed datasets, or folders and globs of these. `hf:NAME:SPLIT` is
    a data set of Hugging Face's library. docs/data.md describes the forms."""
    weights: list[float] = field(default_factory=list)
    """For each entry of train_files its share of an epoch's samples, relative to the others.
    Empty: every sample comes once an epoch."""
    reasoning: Literal["keep", "mask"] = "keep"
    """What becomes of reasoning in answers: `keep` learns it like all else, `mask` lets the draft
    read it but not learn it. Lines with `input_ids` and indexed datasets stay as they are."""
    reasoning_tags: list[str] = field(default_factory=lambda: ["<think>", "</think>"])
    """The texts that open and close reasoning in what the target writes. Where a chat template puts
    an empty block of reasoning before an answer without any, that block is not learnt."""
    template_date: str | None = None
    """The day (YYYY-MM-DD) that is given to a chat template which reads the clock, the same on
    every rank. Null takes the day of the run's first start, which its config.yaml keeps; with
    stored states it is the day of those."""
    max_length: int = 4096
    """The most tokens of a sample. The rest is cut off."""
    min_loss_tokens: int | None = None
    """Supervised tokens that a sample must have after it is cut. Null means twice the tokens that a
    block drafts."""
    skip_bad_lines: float = 0.0
    """The share of lines that may be left out because they cannot be used (malformed, or not
    rendered whole by the chat template), for example 0.01. They are counted and listed by reason.
    With 0 any such line ends the run before it starts, with the same list."""
    group_by_length: bool = False
    """Put samples of similar length into the same micro-batch, so that less is padded. The step
    learns from the same samples."""
    cache_dir: str | None = None
    """Folder for tokenized data, which later starts and other runs on the same data map instead of
    tokenizing again. One on a file system that all nodes share is written once for all of them, any
    other once a node. Null: `token_cache` in train.output_dir."""
    tokenize_workers: int | None = None
    """Processes that tokenize, on each node that does. 0 or 1: the training process itself. Null:
    one for each core that it may use, 32 at most, and for small files none."""
    show_sample: bool = True
    """Print one decoded sample with its loss mask at start."""

    def validate(self) -> None:
        require(
            len(self.weights) in (0, len(self.train_files))
            and all(0 < weight < math.inf for weight in self.weights),
            f"data.weights ({self.weights}) must have a number > 0 for each of the "
            f"{len(self.train_files)} entries of data.train_files, or be empty",
        )
        require(
            len(self.reasoning_tags) == 2 and all(self.reasoning_tags),
            f"data.reasoning_tags ({self.reasoning_tags}) must be two texts: what reasoning begins "
            "and what it ends with",
        )
        require(
            self.template_date is None or is_day(self.template_date),
            f"data.template_date ({self.template_date!r}) must be a day such as 2026-01-31 or null",
        )
        require(
            0 <= self.skip_bad_lines < 1,
            f"data.skip_bad_lines ({self.skip_bad_lines:g}) must be a share of the lines, in "
            "[0, 1), such as 0.01 for one in a hundred",
        )
        require(
            self.cache_dir != "",
            "data.cache_dir is empty; name a folder, or give null for one in train.output_dir",
        )
        not_negative("data", self, "tokenize_workers")
        require(self.max_length >= 2, f"data.max_length ({self.max_length}) must be >= 2")
        require(
            self.min_loss_tokens is None or self.min_loss_tokens >= 1,
            f"data.min_loss_tokens ({self.min_loss_tokens}) must be >= 1, "
            "or null for twice the tokens that a block drafts",
        )


def is_day(text: str) -> bool:
    """Whether a text is a date in the form YYYY-MM-DD."""
    with contextlib.suppress(ValueError):
        return date.fromisoformat(text).isoformat() == text
    return False
