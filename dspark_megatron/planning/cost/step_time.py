"""Seconds of a step at given rates: arithmetic, no forecast. What kernels and links really reach,
what a host costs and how ranks wait for each other is in no figure but the rates."""

from dataclasses import dataclass, field, replace

from dspark_megatron.planning.cost.machine import Machine
from dspark_megatron.planning.observing.work import Sent, Work
from dspark_megatron.planning.pipeline import PipelineStates
from dspark_megatron.planning.target.target_pass import SHARDS
from dspark_megatron.planning.work import StepWork
from dspark_megatron.run.check import RunPlan
from dspark_megatron.targets.stored.deepspec_layout import RECORD, DeepSpecLayout


@dataclass(frozen=True)
class PartTime:
    products: float = 0.0
    """What its FLOPs take."""
    moving: float = 0.0
    """What the bytes take that its operators read and write, beside that."""
    sent: dict[str, float] = field(default_factory=dict)
    """By group, in words."""
    hidden: float = 0.0
    """Of what is sent, beside the computation."""
    idle: float = 0.0
    """Waiting for other pipeline stages."""

    @property
    def compute(self) -> float:
        return max(self.products, self.moving)

    @property
    def waited(self) -> float:
        """For what is sent."""
        return sum(self.sent.values()) - self.hidden

    @property
    def total(self) -> float:
        return self.compute + self.waited + self.idle


@dataclass(frozen=True)
class StepTime:
    parts: dict[str, PartTime]
    reading: float = 0.0
    """Stored states, read ahead by a thread: what takes longer counts, they or all the rest."""

    @property
    def working(self) -> float:
        return sum(part.total for part in self.parts.values())

    @property
    def total(self) -> float:
        return max(self.working, self.reading)


def step_time(
    work: StepWork, machine: Machine, *, idle: float = 0.0, stored_bytes: int = 0
) -> StepTime:
    """idle: share of the target's time in which a pipeline stage waits. stored_bytes: of states
    that all ranks together read in the step."""
    parts = {
        name: _part_time(part, machine, idle if name == "target" else 0.0)
        for name, part in work.parts.items()
    }
    return StepTime(parts, stored_bytes / (1e9 * machine.rates.disk))


def plan_step_time(plan: RunPlan, work: StepWork, machine: Machine) -> StepTime:
    """Of samples of full length."""
    stored = plan.config.target.is_stored * plan.config.train.global_batch_size
    return step_time(
        work,
        machine,
        idle=PipelineStates.of(plan).idle,
        stored_bytes=stored * stored_sample_bytes(plan),
    )


def stored_sample_bytes(plan: RunPlan) -> int:
    """Of a sample of full length in DeepSpec's layout, bf16; ours takes no more."""
    layout = DeepSpecLayout(plan.shape.hidden_size, plan.shape.target_layer_ids, "")
    return layout.sample_bytes(plan.config.data.max_length) + RECORD.size


def _part_time(work: Work, machine: Machine, idle: float) -> PartTime:
    rates = machine.rates
    part = PartTime(work.flops / rates.flops, work.moved / rates.moved)
    sent: dict[str, float] = {}
    for one in work.sent:
        words = f"{one.group}, {one.size} ranks"
        sent[words] = sent.get(words, 0.0) + sent_seconds(one, machine)
    # Each layer's weights are gathered on a stream of their own while the layer before computes.
    ahead = sum(sent_seconds(one, machine) for one in work.sent if one.group == SHARDS)
    hidden = min(ahead, part.compute) if rates.overlap else 0.0
    busy = replace(part, sent=sent, hidden=hidden)
    return replace(busy, idle=busy.total * idle / (1 - idle))


def sent_seconds(one: Sent, machine: Machine) -> float:
    """At the slowest link that the group needs: between nodes unless all of it is in one."""
    rates = machine.rates
    link = rates.sent(in_node=one.span <= machine.gpus_per_node)
    return one.sent / link + one.calls * rates.latency_us / 1e6
