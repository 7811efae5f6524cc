"""A plan as one JSON object, for programs."""

from typing import Any

from dspark_megatron.planning.cost.machine import GIB
from dspark_megatron.planning.cost.run_cost import RunCost, run_cost
from dspark_megatron.planning.layouts import layout_words
from dspark_megatron.planning.recommend import Search


def cost_of(done: Search) -> RunCost | None:
    """None where the number of steps is not known."""
    return run_cost(done.best.plan, done.best.time, done.bill, done.machine.world_size)


def plan_record(done: Search) -> dict[str, Any]:
    best, data, cost = done.best, done.data, cost_of(done)
    config, plan = best.plan.config, best.plan
    return {
        "layout": {
            "words": layout_words(plan),
            "ranks": done.machine.world_size,
            "tensor_parallel": config.parallel.tensor_parallel,
            "data_parallel": plan.dp_size,
            "shards_of_the_target": plan.target_split.shards,
            "expert_parallel": config.parallel.expert_parallel,
        },
        "gpu_memory_gib": round(best.memory.total / GIB, 3),
        "seconds_per_step": best.time.total,
        "tokens_per_second": best.tokens_per_second,
        "target_layer_ids": config.model.target_layer_ids,
        "mask_token": vars(data.mask) if data else {"id": done.asked.model.mask_token_id},
        "data": {
            "samples": data.report.kept,
            "tokens": data.report.total_tokens,
            "supervised_tokens": data.report.loss_tokens,
            "longest_sample": data.longest,
        }
        if data
        else None,
        "cost": vars(cost) if cost else None,
    }


def summary_lines(done: Search) -> list[str]:
    """What a reader wants to know at once; the comments of the YAML have the rest."""
    best, cost = done.best, cost_of(done)
    lines = list(done.data.lines()) if done.data else []
    lines += [
        f"layout: {layout_words(best.plan)} on {done.machine.world_size} GPUs, "
        f"{best.memory.total / GIB:.1f} GiB a GPU; {best.time.total:,.2f} s a step (arithmetic)",
    ]
    if cost is not None:
        price = "" if cost.price is None else f", {cost.price:,.2f} at {done.bill.price:g} each"
        lines.append(
            f"run: {cost.steps:,} steps, {cost.hours:,.1f} hours, {cost.gpu_hours:,.1f} GPU-hours"
            f"{price}"
        )
        if cost.steps < FEW_STEPS:
            lines.append(
                f"few steps: {cost.steps} of {best.plan.config.train.global_batch_size} samples; "
                "give more data, or a smaller --global-batch-size"
            )
    return lines


FEW_STEPS = 100
"""With fewer a draft has hardly begun to learn."""
