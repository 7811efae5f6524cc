"""The section `parallel`."""

from dataclasses import dataclass

from dspark_megatron.config.rules import positive
from dspark_megatron.errors import require


@dataclass(kw_only=True)
class ParallelConfig:
    """How ranks share the work. The draft's data parallelism is what tensor parallelism leaves of
    the world size."""

    tensor_parallel: int = 1
    """Ranks that split the target and the draft."""
    sequence_parallel: bool = False
    """Split the rows of the draft's norms and residuals over the tensor-parallel ranks as well:
    less memory for activations, the same mathematics. On one rank there is nothing to split."""
    expert_parallel: int = 1
    """Ranks over which the experts of a mixture-of-experts target are spread, whole ones on each;
    1: every expert is split over the tensor-parallel ranks. A multiple of tensor_parallel that
    divides tensor_parallel x target.shard_across_data_parallel and the number of experts; with
    target.provider=megatron any divisor of the ranks of one pipeline stage and of the number of
    experts that is a multiple or a divisor of tensor_parallel."""
    pipeline_parallel: int = 1
    """Stages that split the layers of a target of provider `megatron`. The draft stays whole: each
    rank of a pipeline trains on micro-batches of its own, as a data-parallel rank."""
    pipeline_micro_batches: int | None = None
    """Micro-batches of each rank that go through the stages in one run. Their states are held
    together: more leave stages idle for less of the time, fewer take less memory. Null: all of a
    step."""
    virtual_pipeline_parallel: int = 1
    """Always 1: a stage holds consecutive layers."""
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
        positive("parallel.pipeline_parallel", self.pipeline_parallel)
        if self.pipeline_micro_batches is not None:
            positive("parallel.pipeline_micro_batches", self.pipeline_micro_batches)
        require(
            self.virtual_pipeline_parallel == 1,
            f"parallel.virtual_pipeline_parallel ({self.virtual_pipeline_parallel}) must be 1: "
            "layers of the target are split once. To leave stages idle for less of the time raise "
            "parallel.pipeline_micro_batches, or train.global_batch_size where it is null",
        )
