"""The trained tensors of a draft in memory: against the name table, filled from it, and whole."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from dspark_megatron.conversion.layouts.names import (
    Rule,
    check_megatron_tensors,
    name_table,
    raise_if_any,
    to_hugging_face,
    to_megatron,
)
from dspark_megatron.conversion.target_match import not_finite
from dspark_megatron.model.draft_model import FROZEN_REPLICAS, DSparkDraftModel


def check_draft_tensors(draft: DSparkDraftModel, where: str) -> None:
    """ConfigError that lists what a checkpoint of this draft would lack, have too much or have in
    another shape, and trained parameters that it would not have. No collective."""
    trained = {n: tuple(p.shape) for n, p in draft.named_parameters() if p.requires_grad}
    saved = {}
    for name, entry in draft.sharded_state_dict().items():
        # Gate and up are made two tensors of one name when they are saved.
        tensor = entry.build()[0] if isinstance(entry, ShardedTensorFactory) else entry
        saved[name] = tuple(tensor.global_shape)
    check_megatron_tensors(draft.shape, {**trained, **saved}, where)


@torch.no_grad()
def check_finite(draft: DSparkDraftModel, where: str) -> None:
    """ConfigError that names the trained tensors of this rank that have values that are infinite or
    no numbers. No collective."""
    trained = ((name, p) for name, p in draft.named_parameters() if p.requires_grad)
    raise_if_any([line for name, p in trained for line in not_finite(name, p)], where)


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
    tp_rank, tp_size = tp_group.rank(), tp_group.size()
    parts = to_megatron(draft.shape, get, padded, tp_rank=tp_rank, tp_size=tp_size)
    for name, tensor in parts:
        waiting.pop(name).copy_(tensor)
    if waiting:
        raise ValueError(f"the name table lacks the draft's parameters {sorted(waiting)}")


@torch.no_grad()
def whole_tensors(draft: DSparkDraftModel, *, tp_group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Every trained tensor by canonical name, whole and on the CPU, in the type that it has. One
    all-gather for each parameter that is split."""
    own = dict(draft.named_parameters())
    table = {entry.megatron: entry for entry in name_table(draft.shape)}

    def whole(name: str) -> Tensor:
        entry, parameter = table[name], own[name].detach()
        if entry.split is None or tp_group.size() == 1:
            return parameter.cpu()
        parts = [torch.empty_like(parameter) for _ in range(tp_group.size())]
        dist.all_gather(parts, parameter.contiguous(), group=tp_group)
        matrices = len(entry.hugging_face) if entry.rule is Rule.STACK else 1
        split = [part.chunk(matrices, dim=entry.split) for part in parts]
        return torch.cat([rank[i] for i in range(matrices) for rank in split], entry.split).cpu()

    return dict(to_hugging_face(draft.shape, whole))
