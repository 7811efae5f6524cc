"""What a run would be: resolved config, layout, parameters, memory and communication of a rank."""

import math
from pathlib import Path

from dspark_megatron.config import Config
from dspark_megatron.config.objective.words import objective_words
from dspark_megatron.conversion.layouts.names import hugging_face_shapes
from dspark_megatron.planning.cost.describe import describe_time
from dspark_megatron.planning.memory import (
    RankMemory,
    quantization_note,
    rank_memory,
)
from dspark_megatron.planning.on_paper.observation import observed_draft
from dspark_megatron.planning.pipeline import PipelineStates
from dspark_megatron.planning.target.plan import target_pass
from dspark_megatron.planning.work import StepWork, step_work
from dspark_megatron.run.check import RunPlan, check
from dspark_megatron.run.initial.initial_weights import InitialWeights
from dspark_megatron.run.initial.warm_start import check_warm_start
from dspark_megatron.shape.rope import beyond_yarn
from dspark_megatron.storage.checkpoints.tracker import latest_iteration

GIB = 2**30
SMALL = GIB // 2000
"""Bytes that round to no line of their own; sums have them."""


def describe_run(config: Config, world_size: int) -> str:
    """The text of `--dry-run`. Raises ConfigError where the run would, as far as that needs
    neither weights nor data nor the run's machine."""
    plan = check(config, world_size, use="plan")
    checkpoints = Path(config.train.output_dir) / "checkpoints"
    if not config.train.resume or latest_iteration(checkpoints) is None:
        InitialWeights.open(plan)
        check_warm_start(plan)
    lines = [config.to_yaml(), describe_plan(plan), *describe_time(plan)]
    if plan.found_tokenizer is None:
        lines.append(f"not checked: the tokenizer, since {config.target.path} has none")
    return "\n".join(lines)


def describe_plan(plan: RunPlan) -> str:
    """Layout, parameters, objective, memory of a rank by part, what it sends in a step."""
    tp, model = plan.config.parallel.tensor_parallel, plan.config.model
    objective = objective_words(plan.config.loss, with_confidence_head=model.enable_confidence_head)
    trained = hugging_face_shapes(plan.shape, shared_weights=False)
    total = sum(math.prod(size) for size in trained.values())
    memory, draft = rank_memory(plan), observed_draft(plan)
    lines = [
        f"layout: {tp * plan.dp_size} ranks = {tp} tensor-parallel x {plan.dp_size} data-parallel",
        f"draft: {total:,} trained parameters, {draft.trained:,} on a rank",
        f"objective: {objective}",
        *pipeline_note(plan),
        *memory_lines(memory),
        *length_note(plan),
        *quantization_note(plan, counted="frozen target" in memory.held),
        *target_pass(plan).by_formula,
        *draft.notes,
        *work_lines(step_work(plan)),
    ]
    return "\n".join(lines)


def pipeline_note(plan: RunPlan) -> list[str]:
    pipeline = PipelineStates.of(plan)
    stages, together = pipeline.stages, pipeline.per_run
    if stages == 1:
        return []
    return [
        f"target: {stages} pipeline stages x {plan.dp_size // stages} data-parallel; runs of "
        f"{stages} x {together} micro-batches, in which a stage waits for "
        f"{100 * pipeline.idle:.0f}% of the time if all are equally fast; what stages keep for one "
        "another and send is by formula"
    ]


def length_note(plan: RunPlan) -> list[str]:
    text = plan.target_config.get_text_config()
    most, length = text.max_position_embeddings, plan.config.data.max_length
    unreached = beyond_yarn(plan.shape.rope_parameters, plan.shape.max_position_embeddings)
    notes = [unreached] if unreached else []
    if length <= most:
        return notes
    return [
        *notes,
        f"data.max_length ({length}) is more than the target's max_position_embeddings ({most}): "
        "where samples are as long, the target is outside of what it was made for",
    ]


def memory_lines(memory: RankMemory) -> list[str]:
    lines = ["memory of a rank, GiB (not in it: NCCL's buffers, the CUDA context, fragmentation):"]
    lines += [_line(name, size) for name, size in memory.held.items()]
    for moment, parts in memory.moments.items():
        total = sum(parts.values())
        lines.append(_line(f"on top, in {moment}", total))
        lines += [_line(name, size, indent=4) for name, size in parts.items() if size >= SMALL]
    return [*lines, _line(f"sum at the highest, {memory.highest}", memory.total)]


def work_lines(step: StepWork) -> list[str]:
    lines = [f"{'a rank in a step, samples of full length:':<60}{'TFLOP':>7}{'GiB moved':>12}"]
    lines += [
        f"  {name:<56}{work.flops / 1e12:9,.1f}{work.moved / GIB:12,.1f}"
        for name, work in step.parts.items()
    ]
    lines.append("sent by a rank in a step, GiB (collectives on rings):")
    sent = sorted((one for one in step.sent if one.sent >= SMALL), key=lambda one: -one.sent)
    lines += [_line(f"{one.group}: {one.kind} of {one.size}", one.sent) for one in sent]
    return [*lines, _line("sum", sum(one.sent for one in step.sent))]


def _line(name: str, size: int, indent: int = 2) -> str:
    return f"{' ' * indent}{name:<{66 - indent}}{size / GIB:9.3f}"
