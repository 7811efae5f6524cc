"""The time of a step and the cost of a run in words."""

from dspark_megatron.planning.cost.machine import Machine
from dspark_megatron.planning.cost.run_cost import Bill, cost_lines
from dspark_megatron.planning.cost.step_time import PartTime, StepTime, plan_step_time
from dspark_megatron.planning.work import step_work
from dspark_megatron.run.check import RunPlan

NODE = 8
"""GPUs of a node, where nothing is said of them."""
SHOWN = 0.0005
"""Seconds that the last digit shows."""


def describe_time(plan: RunPlan) -> list[str]:
    """At the default rates, for a run whose machine and data are not known."""
    gpus = plan.dp_size * plan.config.parallel.tensor_parallel
    machine = Machine(min(gpus, NODE), -(-gpus // NODE), 0)
    time = plan_step_time(plan, step_work(plan), machine)
    return [*time_lines(time, machine, plan), *cost_lines(plan, time, Bill(), gpus)]


def time_lines(time: StepTime, machine: Machine, plan: RunPlan) -> list[str]:
    lines = [
        "seconds of a step (arithmetic at stated rates, not a forecast; samples of full length):",
        f"  rates of a GPU: {machine.rates.words()}; {machine.gpus_per_node} GPUs a node",
        *dtype_note(plan),
    ]
    for name, part in time.parts.items():
        if part.total:
            lines += _part_lines(name, part)
    target = time.parts.get("target", PartTime())
    if not target.products and not plan.config.target.is_stored:
        lines.append("  too short: what the target computes is not known, and not in it")
    if time.reading:
        what = f"reading stored states ({machine.rates.disk:g} GB/s), beside all of it"
        lines += [_line(what, time.reading)]
    return [*lines, _line("sum" if time.total == time.working else "the reading", time.total)]


def _part_lines(name: str, part: PartTime) -> list[str]:
    bound = "matrix products" if part.products > part.moving else "memory"
    shown = {group: seconds for group, seconds in part.sent.items() if seconds >= SHOWN}
    if (rest := sum(part.sent.values()) - sum(shown.values())) >= SHOWN:
        shown["other groups"] = rest
    lines = [_line(f"{name}, computing ({bound})", part.compute)]
    lines += [_line(f"sent: {group}", seconds, 4) for group, seconds in shown.items()]
    if part.hidden:
        lines.append(_line("of that beside the computation", -part.hidden, 4))
    if part.idle:
        lines.append(_line("waiting for other pipeline stages", part.idle, 4))
    return lines


def dtype_note(plan: RunPlan) -> list[str]:
    """Rates are of 16-bit matrix products."""
    kinds = {"draft": plan.dtype, "target": plan.target_dtype}
    if plan.config.target.is_stored:
        del kinds["target"]
    wide = [name for name, dtype in kinds.items() if dtype.itemsize > 2]
    if not wide:
        return []
    return [f"  too short for the {' and the '.join(wide)} in fp32: the rate is that of bf16"]


def _line(name: str, seconds: float, indent: int = 2) -> str:
    return f"{' ' * indent}{name:<{66 - indent}}{seconds:9.3f}"
