"""The micro-batch that a plan is made for: samples of full length, anchors evenly spread, the last
one where its block just ends with the sample, and every slot supervised."""

import torch

from dspark_megatron.data.batch import Batch, MicroBatch
from dspark_megatron.data.blocks import draft_blocks
from dspark_megatron.run.check import RunPlan
from dspark_megatron.targets.base import StatesSource, TargetStates


def full_micro_batch(plan: RunPlan) -> MicroBatch:
    """On the host. Its tokens are all 0."""
    config, drafted = plan.config, plan.shape.num_draft_tokens
    samples, length = config.train.micro_batch_size, config.data.max_length
    count, last = min(config.model.num_anchors, length - 1), max(length - 1 - drafted, 0)
    anchors = torch.arange(1, count + 1) * last // count
    ids, mask = torch.zeros(length, dtype=torch.int64), torch.ones(length, dtype=torch.bool)
    parts = [ids] * samples, [mask] * samples, [anchors] * samples
    reach = plan.shape.attention.reach(plan.shape.num_layers)
    blocks = draft_blocks(*parts, drafted, config.loss, reach=reach)
    return MicroBatch.of([ids] * samples, blocks, tuple(range(samples)))


class FullStates(StatesSource):
    """States as a target leaves them, in its type, of no values."""

    lockstep = False

    def __init__(self, plan: RunPlan, device: torch.device) -> None:
        self.taps_width = len(plan.shape.target_layer_ids) * plan.shape.hidden_size
        self.hidden_width = plan.shape.hidden_size if plan.config.needs_target_logits else None
        self.dtype, self.device = plan.target_dtype, device

    def states(self, batch: Batch) -> TargetStates:
        def made(width: int) -> torch.Tensor:
            size = (*batch.input_ids.shape, width)
            return torch.zeros(size, dtype=self.dtype, device=self.device)

        last_hidden = None if self.hidden_width is None else made(self.hidden_width)
        return TargetStates(made(self.taps_width), last_hidden)
