"""Which tokens of a sample are kept and learnt, and what became of the samples that were read."""

from dataclasses import asdict, dataclass, field
from typing import Any

from dspark_megatron.config import LossConfig
from dspark_megatron.data.chats.answers import AnswerRules
from dspark_megatron.data.files.bad_lines import BadLines

ANCHOR_RULES = ("anchor_rule", "supervised_slots", "slot_mask")
"""The keys of the loss section that decide where a block has something to learn."""


@dataclass(frozen=True, kw_only=True)
class SampleRules:
    """Which tokens of a sample are kept and learnt, and which samples are dropped."""

    max_length: int
    """The most tokens that are kept of a sample."""
    min_loss_tokens: int
    """Supervised tokens that it needs then."""
    num_draft_tokens: int
    """Of a block."""
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

    def facts(self) -> dict[str, Any]:
        """JSON of all that decides on the tokens of a sample and whether it is kept."""
        facts = asdict(self)
        del facts["skip_bad_lines"]  # decides whether a run begins
        facts["block_size"] = facts.pop("num_draft_tokens")  # as older stores call it
        facts["answers"]["stop_ids"] = sorted(self.answers.stop_ids)
        facts["loss"] = {name: getattr(self.loss, name) for name in ANCHOR_RULES}
        return facts


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

    def add(self, part: "DropReport") -> None:
        """Count what became of further samples; lines are counted by who reads them."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(part, name))
        if part.reasoning_tokens is not None:
            self.reasoning_tokens = (self.reasoning_tokens or 0) + part.reasoning_tokens

    def content(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "bad_lines": self.bad_lines.content()}

    @classmethod
    def of(cls, content: dict[str, Any]) -> "DropReport":
        """From its JSON. TypeError or KeyError for anything else."""
        return cls(**{**content, "bad_lines": BadLines.of(content["bad_lines"])})

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


_COUNTS = (
    *("kept", "too_few_loss_tokens", "no_anchor", "truncated"),
    *("total_tokens", "loss_tokens", "split_chats"),
)
