"""The blocks of a micro-batch on the device that trains.

Blocks are made on the host, where the data is: a GPU would have to be waited for to count
supervised slots. All that the draft and its loss need of them travels in one transfer.

Shapes: b samples, s tokens, n blocks, k slots, t context tokens that some block sees, r supervised
slots.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_megatron.data.blocks import DraftBlocks
from dspark_megatron.ops.context_ranges import ContextRanges
from dspark_megatron.ops.transfer import all_to_device


@dataclass(frozen=True)
class DeviceBlocks:
    """Blocks as indices and tokens, int64 on the device."""

    context_samples: Tensor
    """[t] row of the micro-batch."""
    context_positions: Tensor
    """[t] position in that sample."""
    context_ranges: ContextRanges
    """What each block sees of the t tokens."""
    prev_token_ids: Tensor
    """[n, k] token before each label; slot 0 sees the anchor."""
    positions: Tensor
    """[n, k] position of each slot in its sample."""
    slot_index: Tensor
    """[r] supervised slots of the flattened [n * k]."""
    labels: Tensor
    """[r] ground-truth next tokens."""
    target_samples: Tensor
    """[r] row of the micro-batch of each supervised slot."""
    target_positions: Tensor
    """[r] position of the target state that predicts its label."""

    @classmethod
    def of(cls, blocks: DraftBlocks, device: torch.device) -> "DeviceBlocks":
        """There must be a block. One transfer."""
        context, mask, positions = blocks.visible_context(), blocks.eval_mask, blocks.position_ids()
        made = {
            "context_samples": context.samples,
            "context_positions": context.positions,
            "context_ranges": torch.tensor(context.ranges),
            "prev_token_ids": blocks.prev_token_ids,
            "positions": positions,
            "slot_index": mask.flatten().nonzero().squeeze(1),
            "labels": blocks.labels[mask],
            "target_samples": blocks.sample_index[:, None].expand_as(mask)[mask],
            "target_positions": positions[mask],
        }
        moved = dict(zip(made, all_to_device(list(made.values()), device), strict=True))
        ranges = ContextRanges(context.ranges, moved.pop("context_ranges"))
        return cls(context_ranges=ranges, **moved)

    def context_of(self, taps: Tensor) -> Tensor:
        """[b, s, x] -> [t, x]"""
        return taps[self.context_samples, self.context_positions]

    def target_of(self, last_hidden: Tensor) -> Tensor:
        """[b, s, h] -> [r, h]"""
        return last_hidden[self.target_samples, self.target_positions]

    def supervised(self, by_slot: Tensor) -> Tensor:
        """[n, k, ...] -> [r, ...]"""
        return by_slot.flatten(0, 1).index_select(0, self.slot_index)

    def by_slot(self, values: Tensor) -> Tensor:
        """[r] -> [n, k]; 0 where a slot is not supervised."""
        slots = values.new_zeros(self.prev_token_ids.numel())
        return slots.index_copy(0, self.slot_index, values).view(self.prev_token_ids.shape)
