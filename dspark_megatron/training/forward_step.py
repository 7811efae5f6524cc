"""A micro-batch through target and draft to its loss: the same in our loop and in Megatron's."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dspark_megatron.config import LossConfig
from dspark_megatron.data.device_blocks import DeviceBlocks
from dspark_megatron.data.micro_batches import MicroBatch
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.targets.base import StatesSource, TargetStates
from dspark_megatron.training.draft_loss import DraftLoss
from dspark_megatron.training.metrics import MetricSums


class ForwardStep:
    """The loss of micro-batches. What its sum is divided by is the loop's."""

    def __init__(
        self,
        loss: LossConfig,
        draft: DSparkDraftModel,
        target: StatesSource,
        *,
        tp_group: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self.target, self.device = target, device
        self.draft_loss = DraftLoss(loss, draft, tp_group=tp_group, device=device)

    def weight(self, micro_batch: MicroBatch) -> float:
        """What the loss of a micro-batch weighs; 0 where nothing is learnt from it."""
        return micro_batch.weight(self.draft_loss.slots)

    def expect(self, micro_batches: list[MicroBatch]) -> None:
        """Tell the target what comes, in its order; of use where a loop knows it."""
        ids = [micro_batch.input_ids for micro_batch in micro_batches]
        self.target.expect(ids, samples=[micro_batch.samples for micro_batch in micro_batches])

    def __call__(self, micro_batch: MicroBatch, model: Any, metrics: MetricSums) -> Tensor | None:
        """[] sum of weighted terms, with gradients; None where nothing is learnt. Adds to
        `metrics`. model: the draft, or what a loop has wrapped it in."""
        blocks = micro_batch.blocks
        metrics.add(
            samples=len(micro_batch.lengths),
            tokens=sum(micro_batch.lengths),
            candidates=blocks.candidates,
        )
        # A small loss_decay_gamma may round the weight of late slots, and of all there are, to 0.
        if self.weight(micro_batch) == 0:  # the same on every tensor-parallel rank
            if self.target.lockstep:
                self._target_states(micro_batch, metrics)
            return None
        metrics.add(blocks=blocks.num_blocks, rows=float(blocks.eval_mask.sum()))
        on_device = DeviceBlocks.of(blocks, self.device)
        states = self._target_states(micro_batch, metrics)
        output = model(states.taps, on_device)
        return self.draft_loss(on_device, states, output, metrics)

    def _target_states(self, micro_batch: MicroBatch, metrics: MetricSums) -> TargetStates:
        lengths = micro_batch.lengths
        states = self.target.states(
            micro_batch.input_ids, lengths=lengths, samples=micro_batch.samples
        )
        if states.positions is not None:
            metrics.add(positions=states.positions, padding=states.positions - sum(lengths))
        return states
