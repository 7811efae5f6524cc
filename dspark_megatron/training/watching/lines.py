"""What a reader of the log is told: a line of a step, the start of a run and its end."""

import math
from pathlib import Path
from typing import Any

from dspark_megatron.config import TrainConfig
from dspark_megatron.config.objective.words import objective_words
from dspark_megatron.data.dataset import ConversationDataset
from dspark_megatron.progress import describe_seconds
from dspark_megatron.run.check import RunPlan
from dspark_megatron.run.checkpoints.state import RunState
from dspark_megatron.run.ranks.job import ranks_of_node
from dspark_megatron.run.ranks.runtime import Runtime
from dspark_megatron.storage.checkpoints.whole import iteration_folder


def step_line(row: dict[str, Any], iterations: int, *, rank: str) -> str:
    """The line of a logged step, for a log file. rank: what one is called here, GPU or rank."""
    step, seconds = row["iteration"], row.get("step_seconds")
    parts = [f"step {step}/{iterations}", *_numbers(row)]
    if (rate := row.get("tokens_per_second_per_rank")) is not None:
        parts.append(f"{short(rate)} tok/s/{rank}")
    if (flops := row.get("tflops_per_rank")) is not None:
        parts.append(f"{short(flops)} TFLOP/s/{rank}")
    if (memory := row.get("peak_memory_gib")) is not None:
        parts.append(f"{memory:.3g} GiB")
    if seconds is not None:
        parts.append(f"ETA {describe_seconds((iterations - step) * seconds)}")
    return "  ".join(parts)


def _numbers(row: dict[str, Any]) -> list[str]:
    """Those that are there and are numbers."""
    names = {"loss": "loss", "tau": "tau", "grad": "grad_norm", "lr": "learning_rate"}
    values = {short_name: row.get(name) for short_name, name in names.items()}
    return [
        f"{name} {short(value) if name != 'lr' else small(value)}"
        for name, value in values.items()
        if value is not None and math.isfinite(value)
    ]


def short(value: float) -> str:
    """Three digits: 2.31, 8.1k, 1.25M."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def small(value: float) -> str:
    """A learning rate: 6e-4."""
    digits, _, exponent = f"{value:.2e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}" if value else "0"


def start_lines(
    plan: RunPlan,
    runtime: Runtime,
    data: ConversationDataset,
    output_dir: Path,
    *,
    trained: int,
    iterations: int,
    resume_from: Path | None,
) -> list[str]:
    """What trains on what, before the first step. trained: parameters of this rank's draft."""
    config, shape = plan.config, plan.shape
    tp, train = config.parallel.tensor_parallel, config.train
    head = config.model.enable_confidence_head
    batch = train.global_batch_size
    source = resume_from or train.initial_checkpoint or "new weights"
    return [
        f"training a draft of {shape.num_layers} layers and blocks of {shape.block_size}, "
        f"{trained:,} trained parameters on a rank, for the target {config.target.path} "
        f"(provider {config.target.provider})",
        f"layout: {runtime.world_size} ranks = {tp} tensor-parallel x {plan.dp_size} "
        f"data-parallel, on {runtime.device.type}, {train.dtype}",
        f"objective: {objective_words(config.loss, with_confidence_head=head)}",
        f"length: {iterations:,} steps of {batch:,} samples, {iterations * batch / len(data):.3g} "
        f"epochs of {len(data):,} samples with {data.report.total_tokens:,} tokens",
        f"writes to {output_dir}; starts from {source}",
    ]


def end_lines(
    output_dir: Path, state: RunState, row: dict[str, Any] | None, seconds: float
) -> list[str]:
    """What came of it, after the last save, and the next command. row: the last logged step's."""
    newest = iteration_folder(output_dir / "checkpoints", state.iteration)
    figures = f", {', '.join(_numbers(row)[:2])}" if row else ""
    best = ""
    if state.best is not None and math.isfinite(state.best.tau):
        folder = iteration_folder(output_dir / "checkpoints", state.best.iteration)
        best = f"; best: {folder} with tau {state.best.tau:.4f} on held-out answers"
    return [
        f"this start took {describe_seconds(seconds)}{figures}",
        f"newest checkpoint: {newest}{best}",
        f"next: dspark evaluate {output_dir}   or   dspark export {output_dir}",
    ]


def stopped_lines(
    cause: str, output_dir: Path, state: RunState, where: str, settings: TrainConfig, world: int
) -> list[str]:
    """That a run was stopped and what is saved of it, and the command that goes on. where: how far
    it is, in words. world: its ranks."""
    saved = "nothing is saved, since no step was taken"
    if state.iteration:
        saved = f"saved in {iteration_folder(output_dir / 'checkpoints', state.iteration)}"
    return [
        f"stopped by {cause} after {where}; {saved}",
        f"next: {continuing_command(output_dir, settings, world)}",
    ]


def continuing_command(output_dir: Path, settings: TrainConfig, world: int) -> str:
    """What continues a run on as many ranks, by the config in its folder."""
    per_node = ranks_of_node(world)
    words = [f"dspark train {output_dir} --gpus {per_node}"]
    if per_node < world:
        words.append(f"--nodes {world // per_node} --node-rank R --rendezvous HOST:PORT")
    if not settings.resume:  # the folder's config would begin anew
        words.append("train.resume=true train.overwrite=false")
    return " ".join(words)
