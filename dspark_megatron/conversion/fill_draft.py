"""A draft model's trained parameters from tensors under canonical names."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from dspark_megatron.conversion.names import to_megatron
from dspark_megatron.model.draft_model import FROZEN_REPLICAS, DSparkDraftModel


@torch.no_grad()
def fill_draft(
    draft: DSparkDraftModel, get: Callable[[str], Tensor], *, tp_group: dist.ProcessGroup
) -> None:
    """Every trained parameter of this rank. get: whole tensors of a draft of the same shape by
    canonical name, each asked for once. No collective."""
    shard = draft.vocab_shard
    padded = (shard.vocab_end_index - shard.vocab_start_index) * tp_group.size()
    waiting = {
        name: parameter
        for name, parameter in draft.named_parameters()
        if not name.startswith(FROZEN_REPLICAS)
    }
    place = dict(tp_rank=tp_group.rank(), tp_size=tp_group.size())
    for name, tensor in to_megatron(draft.shape, get, padded, **place):
        waiting.pop(name).copy_(tensor)
    if waiting:
        raise ValueError(f"the name table lacks the draft's parameters {sorted(waiting)}")
