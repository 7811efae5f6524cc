"""What a rank sends in one optimizer step, by purpose and group."""

import math
from dataclasses import dataclass

from dspark_megatron.planning.communication import StepSize, draft_collectives, ring_bytes
from dspark_megatron.planning.memory import (
    draft_pass,
    pipeline_state_bytes,
    plan_target_work,
    target_passes,
)
from dspark_megatron.planning.meta_draft import draft_elements
from dspark_megatron.planning.pipeline import PipelineStates
from dspark_megatron.run.check import RunPlan


@dataclass(frozen=True)
class Traffic:
    purpose: str
    sent: int
    """Bytes of a step, collectives on rings."""
    span: int
    """Neighbouring ranks from the group's first to its last: what must fit into a node for the
    bytes to stay in it."""


def step_traffic(plan: RunPlan) -> list[Traffic]:
    """Only what is sent at all. Sizes of samples as in `rank_memory`."""
    config, split, tp = plan.config, plan.target_split, plan.config.parallel.tensor_parallel
    passes = config.train.global_batch_size // (config.train.micro_batch_size * plan.dp_size)
    shared_passes = math.ceil(passes / plan.pass_size.micro_batches)
    work, shared = plan_target_work(plan), tp * split.shards
    states, size, world = PipelineStates.of(plan), pipeline_state_bytes(plan), tp * plan.dp_size
    found = [
        Traffic("draft, tensor-parallel", passes * _draft_bytes(plan), tp),
        Traffic("draft's gradients and weights, data-parallel", _data_parallel(plan), world),
        Traffic(
            "target's outputs, tensor-parallel",
            shared_passes * ring_bytes("all-reduce", work.all_reduced, tp),
            tp,
        ),
        Traffic(
            "target's weights, between their shards",
            shared_passes * target_passes(plan) * work.received_weights,
            shared,
        ),
        Traffic("target's tokens, to their experts", shared_passes * work.exchanged, split.ep_size),
        Traffic("target's outputs, to the next stage", states.sent_to_next_stage * size, world),
        Traffic("target's states, to their pipeline ranks", states.sent_to_owners * size, world),
    ]
    return [traffic for traffic in found if traffic.sent]


def _draft_bytes(plan: RunPlan) -> int:
    one, tp = draft_pass(plan), plan.config.parallel.tensor_parallel
    size = StepSize(one.blocks, one.context, one.blocks * plan.shape.block_size)
    handed = draft_collectives(
        plan.shape,
        size,
        tp,
        one.itemsize,
        sequence_parallel=one.sequence_parallel,
        recompute=one.recompute,
    )
    return sum(ring_bytes(name, count, tp) for name, count in handed.items())


def _data_parallel(plan: RunPlan) -> int:
    """Gradients in fp32, reduced once a step. With the distributed optimizer each rank gets the
    sums of its own part, and all get the updated weights."""
    trained = draft_elements(plan.shape, plan.config.parallel.tensor_parallel).trained
    if not plan.config.optimizer.use_distributed_optimizer:
        return ring_bytes("all-reduce", 4 * trained, plan.dp_size)
    weights = trained * plan.dtype.itemsize // plan.dp_size
    gradients = ring_bytes("reduce-scatter", 4 * trained, plan.dp_size)
    return gradients + ring_bytes("all-gather", weights, plan.dp_size)
