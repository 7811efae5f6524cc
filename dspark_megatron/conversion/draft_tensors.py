"""The tensors that a draft in memory would save, against the name table."""

from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from dspark_megatron.conversion.names import check_megatron_tensors
from dspark_megatron.model.draft_model import DSparkDraftModel


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
