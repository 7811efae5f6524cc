"""The section `data`."""

import contextlib
import math
from dataclasses import dataclass, field
from datetime import date

from dspark_megatron.config.rules import one_of
from dspark_megatron.errors import require


@dataclass(kw_only=True)
class DataConfig:
    """Training conversations."""

    train_files: list[str] = field(default_factory=list)
    """JSONL files (also packed, or JSON arrays) of chats, completions or token ids, prefixes of
    Megatron indexed datasets, folders and globs of these; docs/data.md has the forms."""
    weights: list[float] = field(default_factory=list)
    """For each entry of train_files, the share that it fills of an epoch's samples, against the
    others'; empty: every sample comes once an epoch."""
    reasoning: str = "keep"
    """Reasoning inside answers: `keep` (learnt like all else) or `mask` (read, but not learnt).
    Lines with `input_ids` and indexed datasets are left as they are."""
    reasoning_tags: list[str] = field(default_factory=lambda: ["<think>", "</think>"])
    """What reasoning begins and ends with in the text that the target writes. An answer without
    reasoning does not learn the empty block that a chat template puts before it."""
    template_date: str | None = None
    """The day (YYYY-MM-DD) that a chat template which reads the clock is given, the same on every
    rank. null: that of the run's first start, which its config.yaml keeps; with a cache of states
    that of the cache."""
    max_length: int = 4096
    """Tokens kept of a sample; the rest is cut off."""
    min_loss_tokens: int | None = None
    """Supervised tokens that a sample needs after truncation; null means 2 * block_size."""
    skip_bad_lines: float = 0.0
    """Share of the lines that may be left out since they cannot be used (malformed, or not rendered
    whole by the chat template), such as 0.01; they are counted and listed by reason. 0: any of them
    ends the run before it starts, with the same list."""
    group_by_length: bool = False
    """Deal the samples of a step out to micro-batches by length, so that less is padded. The step
    learns from the same samples."""
    show_sample: bool = True
    """Print one decoded sample with its loss mask at start."""

    def check_given(self) -> None:
        """What training needs."""
        require(bool(self.train_files), "data.train_files is empty; name at least one JSONL file")

    def validate(self) -> None:
        require(
            len(self.weights) in (0, len(self.train_files))
            and all(0 < weight < math.inf for weight in self.weights),
            f"data.weights ({self.weights}) must have a number > 0 for each of the "
            f"{len(self.train_files)} entries of data.train_files, or be empty",
        )
        one_of("data.reasoning", self.reasoning, ("keep", "mask"))
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
        require(self.max_length >= 2, f"data.max_length ({self.max_length}) must be >= 2")
        require(
            self.min_loss_tokens is None or self.min_loss_tokens >= 1,
            f"data.min_loss_tokens ({self.min_loss_tokens}) must be >= 1, "
            "or null for 2 * block_size",
        )


def is_day(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return date.fromisoformat(text).isoformat() == text
    return False
