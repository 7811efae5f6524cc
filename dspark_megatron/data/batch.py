"""What goes through the target and the draft at once, from the samples to the loss."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dspark_megatron.config import Config
from dspark_megatron.data.blocks import DraftBlocks, anchor_seed, draft_blocks, sample_anchors
from dspark_megatron.data.conversation import Sample
from dspark_megatron.data.dataset import ConversationDataset
from dspark_megatron.data.sampler import Blend, SampleRef, StepSampler
from dspark_megatron.ops.transfer import PackedTensors


@dataclass(frozen=True)
class Batch:
    """Samples of a forward pass of the target."""

    input_ids: Tensor
    """[b, s], padded on the right only: no anchor sees the padding, so there is no attention mask.
    """
    lengths: list[int] | None = None
    """Of the samples, the longest s; a target may then leave the padding out. None: it may not."""
    sample_indices: tuple[int, ...] = ()
    """Where the samples stand in the data; stored states are found by it."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch(Batch):
    """And the blocks that are learnt from them: on the host, where it is made, or on the device."""

    lengths: list[int]
    blocks: DraftBlocks
    packed: PackedTensors | None = None
    """Its tensors, ready to be sent."""

    @classmethod
    def of(
        cls, samples: Sequence[Tensor], blocks: DraftBlocks, sample_indices: tuple[int, ...] = ()
    ) -> "MicroBatch":
        """samples: the tokens [s] of each."""
        lengths = [len(sample) for sample in samples]
        return cls(padded(samples), lengths=lengths, sample_indices=sample_indices, blocks=blocks)

    def ready_for(self, device: torch.device) -> "MicroBatch":
        """The same with all done that can be done before `to`."""
        return replace(self, packed=PackedTensors.of(self._tensors, device))

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on the device, in one transfer."""
        tensors, packed = self._tensors, self.packed
        if packed is None or not packed.holds(tensors):
            packed = PackedTensors.of(tensors, device)
        moved: dict[str, Any] = packed.to(device)
        input_ids = moved.pop("input_ids")
        blocks = replace(self.blocks, **moved)
        return replace(self, input_ids=input_ids, blocks=blocks, packed=None)

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, **self.blocks.tensors}


def padded(samples: Sequence[Tensor]) -> Tensor:
    """[s] each -> [b, s], s the longest, with zeros on the right."""
    return pad_sequence(list(samples), batch_first=True)


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
        return micro_batch([self._dataset[ref.sample_index] for ref in refs], refs, self._config)


def micro_batch(samples: Sequence[Sample], refs: Sequence[SampleRef], config: Config) -> MicroBatch:
    """One of these samples, with the anchors that each use of a sample has in a run."""
    model, loss, seed = config.model, config.loss, config.train.seed
    ids, masks = zip(*samples, strict=True)
    anchors = [
        sample_anchors(mask, model.num_anchors, anchor_seed(seed, *ref), loss)
        for mask, ref in zip(masks, refs, strict=True)
    ]
    reach = model.attention.reach(model.num_layers)
    blocks = draft_blocks(ids, masks, anchors, model.num_draft_tokens, loss, reach=reach)
    return MicroBatch.of(ids, blocks, tuple(ref.sample_index for ref in refs))
