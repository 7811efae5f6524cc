"""The section `parallel`."""

from dataclasses import dataclass

from dspark_megatron.config.rules import positive
from dspark_megatron.errors import require


@dataclass(kw_only=True)
class ParallelConfig:
    """How ranks share the work. What tensor parallelism leaves of the world size is the draft's
    data parallelism."""

    tensor_parallel: int = 1
    """Ranks that split the target and the draft."""
    sequence_parallel: bool = False
    """Split the draft's norms and residuals along the sequence over the tensor-parallel ranks, too.
    Activations take less memory; the mathematics is the same. On one rank nothing is split."""
    expert_parallel: int = 1
    """Ranks over which the experts of a mixture-of-experts target are spread as whole experts. With
    1 every expert is split over the tensor-parallel ranks. It must be a multiple of
    tensor_parallel, and divide the number of experts and tensor_parallel x
    target.shard_across_data_parallel. With target.provider=megatron it must be a multiple or a
    divisor of tensor_parallel, and divide the number of experts and the ranks of a pipeline
    stage."""
    pipeline_parallel: int = 1
    """Stages that split the layers of a target of provider `megatron`. The draft is not split: each
    rank of a pipeline trains on its own micro-batches, like a data-parallel rank."""
    pipeline_micro_batches: int | None = None
    """Micro-batches of each rank that go through the stages in one run. Their states are in memory
    together: more of them keep the stages busier, fewer take less memory. Null means all
    micro-batches of a step."""
    virtual_pipeline_parallel: int = 1
    """Must be 1: a stage holds consecutive layers."""
    context_parallel: int = 1
    """Must be 1: samples are not split over ranks."""

    def validate(self) -> None:
        size = self.context_parallel
        positive("parallel", self, "tensor_parallel")
        require(
            size == 1,
            f"parallel.context_parallel ({size}) must be 1: samples are not split. "
            "For long ones set target.max_tokens_per_forward, parallel.sequence_parallel=true and "
            "train.micro_batch_size=1",
        )
        positive("parallel", self, "expert_parallel", "pipeline_parallel", "pipeline_micro_batches")
        require(
            self.virtual_pipeline_parallel == 1,
            f"parallel.virtual_pipeline_parallel ({self.virtual_pipeline_parallel}) must be 1: "
            "layers of the target are split once. To leave stages idle for less of the time raise "
            "parallel.pipeline_micro_batches, or train.global_batch_size where it is null",
        )
