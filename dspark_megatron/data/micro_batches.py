"""What a data-parallel rank trains on: samples and their blocks, by the samples consumed so far."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from dspark_megatron.config import Config
from dspark_megatron.data.blend import Blend
from dspark_megatron.data.blocks import (
    BlockRules,
    DraftBlocks,
    anchor_seed,
    draft_blocks,
    sample_anchors,
)
from dspark_megatron.data.collate import collate
from dspark_megatron.data.dataset import ConversationDataset
from dspark_megatron.data.sampler import SampleRef, StepSampler


@dataclass(frozen=True)
class MicroBatch:
    """Right-padded samples and their blocks, on the CPU."""

    input_ids: Tensor
    """[b, s]"""
    lengths: list[int]
    blocks: DraftBlocks
    samples: tuple[int, ...] = ()
    """Their indices in the data; what a cache of states goes by."""

    def weight(self, slots: Tensor) -> float:
        """Sum of the loss weights of all supervised slots. slots [k]."""
        return float((self.blocks.eval_mask.double() * slots).sum())


class MicroBatches:
    """The micro-batches of every step, for one data-parallel rank."""

    def __init__(
        self, config: Config, dataset: ConversationDataset, *, dp_group: dist.ProcessGroup
    ) -> None:
        train = config.train
        self._config, self._dataset = config, dataset
        self.blend = Blend(dataset.shares, train.seed) if dataset.shares else None
        self._sampler = StepSampler(
            len(dataset),
            train.seed,
            train.global_batch_size,
            train.micro_batch_size,
            dp_group.rank(),
            dp_group.size(),
            self.blend,
            dataset.lengths if config.data.group_by_length else None,
        )

    def of_step(self, consumed_samples: int) -> list[MicroBatch]:
        """Those of the step that starts after `consumed_samples`, of all ranks together."""
        return [self._of(refs) for refs in self._sampler.micro_batches(consumed_samples)]

    def _of(self, refs: list[SampleRef]) -> MicroBatch:
        samples = [self._dataset[ref.sample_index] for ref in refs]
        ids = [sample.input_ids for sample in samples]
        masks = [sample.loss_mask for sample in samples]
        model, rules = self._config.model, BlockRules.of(self._config.loss)
        seeds = (anchor_seed(self._config.train.seed, r.epoch, r.sample_index) for r in refs)
        anchors = [
            sample_anchors(mask, model.num_anchors, seed, rules)
            for mask, seed in zip(masks, seeds, strict=True)
        ]
        blocks = draft_blocks(ids, masks, anchors, model.block_size, rules)
        input_ids, _ = collate(samples)
        indices = tuple(ref.sample_index for ref in refs)
        return MicroBatch(input_ids, [len(row) for row in ids], blocks, indices)
