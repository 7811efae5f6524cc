"""What a target's pipeline stages keep for each other and send, by formula."""

from dataclasses import dataclass

from dspark_megatron.run.check import RunPlan
from dspark_megatron.shape.layout import stage_layers


@dataclass(frozen=True)
class PipelineStates:
    """Hidden states of layers, each of one micro-batch: how many of them a rank has. With one stage
    nothing is kept or sent."""

    stages: int
    micro_batches: int
    """Of each rank in a step."""
    per_run: int
    """Of these, the ones that go through the stages together."""
    states: int
    """Of one micro-batch: taps and, if the loss compares with the target, the last hidden one."""
    widest: int
    """Of these, the most that one stage makes."""

    @classmethod
    def of(cls, plan: RunPlan) -> "PipelineStates":
        train, parallel = plan.config.train, plan.config.parallel
        stages, shape = parallel.pipeline_parallel, plan.shape
        layers = stage_layers(shape.num_target_layers, stages)
        made = [layer_id // layers[0] for layer_id in shape.target_layer_ids]
        made += [stages - 1] * plan.config.needs_target_logits
        micro_batches = train.global_batch_size // (train.micro_batch_size * plan.dp_size)
        return cls(
            stages=stages,
            micro_batches=micro_batches,
            per_run=min(parallel.pipeline_micro_batches or micro_batches, micro_batches),
            states=len(made),
            widest=max(made.count(stage) for stage in range(stages)),
        )

    @property
    def kept_for_others(self) -> int:
        """While a run goes on."""
        return (self.stages > 1) * self.stages * self.per_run * self.widest

    @property
    def received(self) -> int:
        """From the end of a run to that of its last micro-batch."""
        return (self.stages > 1) * self.per_run * self.states

    @property
    def sent_to_owners(self) -> int:
        """In a step."""
        return (self.stages - 1) * self.micro_batches * self.widest

    @property
    def sent_to_next_stage(self) -> int:
        """In a step: of every micro-batch of the pipeline."""
        return (self.stages > 1) * self.stages * self.micro_batches

    @property
    def idle(self) -> float:
        """Share of a run's time in which a stage waits, if all take equally long."""
        return (self.stages - 1) / (self.stages * self.per_run + self.stages - 1)
