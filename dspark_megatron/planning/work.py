"""What a rank computes, moves and sends in a step, by part: the measure that time is made of."""

from dataclasses import dataclass

from dspark_megatron.planning.memory import pipeline_state_bytes
from dspark_megatron.planning.observing.work import Sent, Work, summed
from dspark_megatron.planning.on_paper.observation import observed_draft
from dspark_megatron.planning.pipeline import PipelineStates
from dspark_megatron.planning.target.plan import target_pass
from dspark_megatron.run.check import RunPlan


@dataclass(frozen=True)
class StepWork:
    parts: dict[str, Work]
    """`target`, `draft`, `loss` and `optimizer`, of a whole step: all its micro-batches."""

    @property
    def sent(self) -> tuple[Sent, ...]:
        return summed(tuple(one for work in self.parts.values() for one in work.sent))


def step_work(plan: RunPlan) -> StepWork:
    """Of a rank, for samples of full length. The draft's is observed on paper."""
    config, draft = plan.config, observed_draft(plan)
    count = config.train.global_batch_size // (config.train.micro_batch_size * plan.dp_size)
    parts = {name: work.times(count) for name, work in draft.micro_batch.items()}
    whole, rest = divmod(count, plan.pass_size.micro_batches)
    target = target_pass(plan).work.times(whole) + Work(sent=_pipeline(plan))
    if rest:
        target += target_pass(plan, rest).work
    return StepWork({"target": target, **parts, "optimizer": draft.once})


def _pipeline(plan: RunPlan) -> tuple[Sent, ...]:
    """Of a step, by formula."""
    states, size = PipelineStates.of(plan), pipeline_state_bytes(plan)
    ranks, world = states.stages, plan.config.parallel.tensor_parallel * plan.dp_size
    next_stage, owners = states.sent_to_next_stage, states.sent_to_owners
    sent = (
        Sent(
            "send",
            "target's outputs, to the next stage",
            ranks,
            world,
            next_stage * size,
            next_stage,
        ),
        Sent(
            "send", "target's states, to their pipeline ranks", ranks, world, owners * size, owners
        ),
    )
    return tuple(one for one in sent if one.handed)
