"""Samples packed one behind the other into sequences of a forward pass, so that little is padding.

Positions start anew with each sample. By that Transformers tells the samples of a sequence apart:
its masks (`sdpa`, `eager`, `flex_attention`) in sequences side by side, flash attention in one.

Shapes: b samples padded to s tokens, r packed sequences of w positions.
"""

import heapq
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dspark_megatron.config import TargetConfig
from dspark_megatron.ops.transfer import to_device
from dspark_megatron.targets.base import TargetStates
from dspark_megatron.targets.passes import Sequences

_WITH_MASKS = ("sdpa", "eager", "flex_attention")


@dataclass(frozen=True)
class PackedSequences:
    """Sequences that go through the target side by side."""

    samples: list[list[int]]
    """Of each sequence, in their order there."""
    width: int
    """Positions of the longest; the others are filled up."""
    max_tokens: int | None = None
    """Cut the one sequence, of one sample, into pieces of so many tokens."""

    @property
    def positions(self) -> int:
        return len(self.samples) * self.width

    def take(self, input_ids: Tensor, lengths: list[int]) -> Sequences:
        """The sequences of right-padded samples. input_ids [b, s]."""
        if self.max_tokens is not None:
            [[sample]] = self.samples
            whole = input_ids[sample : sample + 1, : lengths[sample]]
            return Sequences(whole.split(self.max_tokens, dim=1))
        tokens = [torch.cat([input_ids[i, : lengths[i]] for i in one]) for one in self.samples]
        # Each position that fills a sequence up is a sample of its own: position 0.
        positions = [torch.cat([torch.arange(lengths[i]) for i in one]) for one in self.samples]
        return Sequences(
            (pad_sequence(tokens, batch_first=True),),
            to_device(pad_sequence(positions, batch_first=True), input_ids.device),
        )

    def split(self, states: Tensor, lengths: list[int]) -> dict[int, Tensor]:
        """By sample, its own part [length, x] of the states [r, w, x]."""
        parts: dict[int, Tensor] = {}
        for samples, sequence in zip(self.samples, states, strict=True):
            sizes = [lengths[i] for i in samples]
            parts.update(zip(samples, sequence[: sum(sizes)].split(sizes), strict=True))
        return parts


def unpacked(
    found: list[TargetStates], groups: list[PackedSequences], lengths: list[int]
) -> TargetStates:
    """States of right-padded samples from those of all groups of sequences."""

    def side_by_side(tensors: list[Tensor]) -> Tensor:
        parts: dict[int, Tensor] = {}
        for group, states in zip(groups, tensors, strict=True):
            parts.update(group.split(states, lengths))
        return pad_sequence([parts[i] for i in range(len(lengths))], batch_first=True)

    last_hidden = [states.last_hidden for states in found if states.last_hidden is not None]
    return TargetStates(
        side_by_side([states.taps for states in found]),
        side_by_side(last_hidden) if last_hidden else None,
        positions=sum(group.positions for group in groups),
    )


@dataclass(frozen=True)
class SequencePacker:
    """How samples are packed: a function of their lengths and the settings alone."""

    hidden_size: int
    max_tokens: int | None
    """Of one forward pass."""
    has_masks: bool
    """Whether attention takes a mask: then it costs the square of a sequence, and sequences may
    stand side by side. Else it costs no more for a longer sequence, and a pass has one."""

    @classmethod
    def of(cls, config: TargetConfig, hidden_size: int) -> "SequencePacker":
        has_masks = config.attention in _WITH_MASKS
        return cls(hidden_size, config.max_tokens_per_forward, has_masks)

    def groups(self, lengths: list[int]) -> list[PackedSequences]:
        """Every sample once. One longer than `max_tokens` has a sequence, in pieces, to itself."""
        limit = self.max_tokens or sum(lengths)
        long = [i for i, length in enumerate(lengths) if length > limit]
        groups = [PackedSequences([[i]], lengths[i], limit) for i in long]
        short = [i for i, length in enumerate(lengths) if length <= limit]
        if not short:
            return groups
        packed = self._cheapest(short, lengths, limit)
        width = _width(packed, lengths)
        at_once = len(packed) if self.max_tokens is None else max(1, limit // width)
        if not self.has_masks:
            at_once = 1
        for start in range(0, len(packed), at_once):
            part = packed[start : start + at_once]
            groups.append(PackedSequences(part, _width(part, lengths)))
        return groups

    def _cheapest(self, samples: list[int], lengths: list[int], limit: int) -> list[list[int]]:
        """The packing that costs least, no sequence longer than `limit`: few long ones have little
        padding, many short ones little attention."""
        # Few are tried of many: a tenth fewer changes the cost little.
        counts = {math.ceil(len(samples) / 1.1**i) for i in range(100)}
        choices = [_dealt(samples, lengths, count) for count in sorted(counts)]
        fitting = [packed for packed in choices if _width(packed, lengths) <= limit]
        return min(fitting, key=lambda packed: self._cost(len(packed), _width(packed, lengths)))

    def _cost(self, sequences: int, width: int) -> int:
        """In proportion to the multiplications of a layer: some 12 h^2 of its matrices for each
        position, and 2 h of attention for each pair of positions in a sequence."""
        attention = width if self.has_masks else 0
        return sequences * width * (6 * self.hidden_size + attention)


def _dealt(samples: list[int], lengths: list[int], count: int) -> list[list[int]]:
    """Into `count` sequences of about one length: the longest sample first, each into the shortest
    sequence."""
    packed: list[list[int]] = [[] for _ in range(count)]
    widths = [(0, i) for i in range(count)]  # a heap
    for sample in sorted(samples, key=lambda i: -lengths[i]):
        width, shortest = widths[0]
        packed[shortest].append(sample)
        heapq.heapreplace(widths, (width + lengths[sample], shortest))
    return packed


def _width(packed: list[list[int]], lengths: list[int]) -> int:
    return max(sum(lengths[i] for i in samples) for samples in packed)
