"""A matrix with one row per vocabulary entry, split over tensor-parallel ranks."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint


class VocabParallelWeight(MegatronModule):
    """`weight` [v/tp, width]: `markov_w2`, or the LM head with columns for it, used by the
    head loss and by decoding.

    It has no forward: the only product with it is fused into the loss.
    """

    def __init__(
        self,
        config: TransformerConfig,
        padded_vocab_size: int,
        width: int,
        *,
        tp_group: dist.ProcessGroup,
    ) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        rows = padded_vocab_size // tp_group.size()
        self.weight = torch.nn.Parameter(torch.empty(rows, width, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The padding, and so the global shape, depends on the tensor-parallel size; a checkpoint
        may be loaded at another one."""
        key = f"{prefix}weight"
        return {
            key: make_tp_sharded_tensor_for_checkpoint(
                self.weight,
                key,
                allow_shape_mismatch=True,
                prepend_offsets=sharded_offsets,
                tp_group=self.tp_group,
                dp_cp_group=(metadata or {})["dp_cp_group"],
            )
        }
