"""The section `data`."""

import math
from dataclasses import dataclass, field

from dspark_megatron.config.rules import one_of, require


@dataclass(kw_only=True)
class DataConfig:
    """Training conversations."""

    train_files: list[str] = field(default_factory=list)
    """JSONL files of chats, completions or token ids, prefixes of Megatron indexed datasets,
    folders and globs of these; docs/training.md has the forms."""
    weights: list[float] = field(default_factory=list)
    """For each entry of train_files, the share that it fills of an epoch's samples, against the
    others'; empty: every sample comes once an epoch."""
    reasoning: str = "keep"
    """Reasoning inside answers: `keep` (learnt like all else) or `mask` (read, but not learnt).
    Lines with `input_ids` and indexed datasets are left as they are."""
    reasoning_tags: list[str] = field(default_factory=lambda: ["<think>", "</think>"])
    """What reasoning begins and ends with in the text that the target writes."""
    max_length: int = 4096
    """Tokens kept of a sample; the rest is cut off."""
    min_loss_tokens: int | None = None
    """Supervised tokens that a sample needs after truncation; null means 2 * block_size."""
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
        require(self.max_length >= 2, f"data.max_length ({self.max_length}) must be >= 2")
        require(
            self.min_loss_tokens is None or self.min_loss_tokens >= 1,
            f"data.min_loss_tokens ({self.min_loss_tokens}) must be >= 1, "
            "or null for 2 * block_size",
        )
