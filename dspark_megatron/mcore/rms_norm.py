"""PyTorch's RMSNorm in the shape that Megatron-Core's layer specs ask for."""

from typing import Any

import torch


class RMSNorm(torch.nn.RMSNorm):
    """Runs anywhere. Megatron-Core's own wrapper of it refuses sequence parallelism, where all it
    takes is a mark: each rank has the weight's gradient of its rows alone, and Megatron sums the
    gradients of marked parameters over the tensor-parallel ranks."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        """config: a TransformerConfig."""
        super().__init__(hidden_size, eps=eps)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010
