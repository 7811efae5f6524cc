"""The section `parallel`."""

from dataclasses import dataclass

from dspark_megatron.config.rules import positive, require


@dataclass(kw_only=True)
class ParallelConfig:
    """How ranks share the work. Data parallelism is what is left of the world size."""

    tensor_parallel: int = 1
    """Ranks that split the target and the draft."""
    sequence_parallel: bool = False
    """Split the rows of the draft's norms and residuals over the tensor-parallel ranks as well:
    less memory for activations, the same mathematics. On one rank there is nothing to split."""
    expert_parallel: int = 1
    """Ranks over which the experts of a mixture-of-experts target are spread, whole ones on each;
    1: every expert is split over the tensor-parallel ranks. A multiple of tensor_parallel that
    divides tensor_parallel x target.shard_across_data_parallel and the number of experts; with
    target.provider=megatron any divisor of the world size and of the number of experts."""
    context_parallel: int = 1
    """Always 1: a sample stays whole on its ranks."""

    def validate(self) -> None:
        size = self.context_parallel
        positive("parallel.tensor_parallel", self.tensor_parallel)
        require(
            size == 1,
            f"parallel.context_parallel ({size}) must be 1: samples are not split. "
            "For long ones set target.max_tokens_per_forward, parallel.sequence_parallel=true and "
            "train.micro_batch_size=1",
        )
        positive("parallel.expert_parallel", self.expert_parallel)
