"""A whole step of the draft, target states given: values, and where its time goes."""

import functools
import time
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import benchmarking
import torch
from benchmark_step import draft_shape, make_items
from step_variants import OurStep, build_draft, step_variants
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from dspark_megatron.config import LossConfig, OptimizerConfig
from dspark_megatron.mcore.optimizer import build_optimizer
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.run.ranks.runtime import Runtime
from dspark_megatron.training import forward_step
from gpu_checks.context import Context

ONE_RANK = OptimizerConfig(use_distributed_optimizer=False)
H100_TFLOPS = 989
"""Dense bf16 by the data sheet of an H100 SXM, as in tools/roofline.py."""
SMALL = dict(hidden=64, ffn=96, layers=2, heads=4, kv_heads=2, head_dim=16, vocab=512, rank=16)
SMALL |= dict(block_size=7, target_layers=2, seq_length=96, num_anchors=16, seed=1, samples=1)
# Qwen3-8B's sizes.
LARGE = dict(hidden=4096, ffn=12288, layers=5, heads=32, kv_heads=8, head_dim=128, vocab=151936)
LARGE |= dict(rank=256, block_size=7, target_layers=5, seq_length=4096, num_anchors=512, seed=1)
LARGE |= dict(samples=1)
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}
"""Relative, of losses: sums in another order, and bf16 logits."""


def check(context: Context) -> None:
    runtime = context.runtime()
    for dtype in TOLERANCE:
        _check_losses(context, runtime, dtype)
    sizes = Namespace(**(SMALL if context.tiny else LARGE), data="synthetic", dtype="bfloat16")
    [item] = make_items(sizes, context.device)
    draft = build_draft(draft_shape(sizes), runtime, torch.bfloat16)
    step = OurStep(draft, runtime, LossConfig())
    optimizer = build_optimizer(ONE_RANK, step.step.model, torch.bfloat16)

    def whole() -> None:
        step(item)
        optimizer.step()

    for _ in range(3):
        whole()
    context.figures["ms of a step"] = 1e3 * _seconds(context, whole)
    context.figures["MiB of a step"] = (
        benchmarking.peak_memory(whole, context.device, repeats=1) / benchmarking.MIB
    )
    context.figures["ms by part"] = _parts(context, draft, step, item, optimizer)
    context.figures.update(_profile(context, whole))
    _check_waits(context, functools.partial(step.gradients, item))
    flops = _flops(sizes, runtime, item)
    context.figures["TFLOP of a step"] = flops / 1e12
    seconds = context.figures["ms of a step"] / 1e3
    context.figures["share of an H100's data sheet"] = flops / seconds / 1e12 / H100_TFLOPS


def _flops(sizes: Namespace, runtime: Runtime, item: Any) -> int:
    """Of a step's products. A counter of FLOPs cannot look into FlexAttention's kernel, so the same
    step runs on SDPA, which does the same products."""
    draft = build_draft(draft_shape(sizes), runtime, torch.bfloat16, attention_backend="sdpa")
    step = OurStep(draft, runtime, LossConfig())
    with FlopCounterMode(display=False) as counter:
        step(item)
    return counter.get_total_flops()


def _check_losses(context: Context, runtime: Runtime, dtype: str) -> None:
    sizes = Namespace(**SMALL, data="synthetic", dtype=dtype)
    [item] = make_items(sizes, context.device)
    options = dict(dtype=benchmarking.DTYPES[dtype], loss=LossConfig(chunk_rows=32))
    steps = step_variants(draft_shape(sizes), runtime, SMALL["num_anchors"], **options)
    losses = {name: step(item) for name, step in steps.items()}
    context.figures[f"losses, {dtype}"] = losses
    for name, loss in losses.items():
        assert abs(loss / losses["plain"] - 1) <= TOLERANCE[dtype], (
            f"the loss of {name!r} is {loss} in {dtype}, the plain twin's {losses['plain']}"
        )


def _seconds(context: Context, call: Callable[[], None], rounds: int = 5) -> float:
    benchmarking.synchronize(context.device)
    start = time.perf_counter()
    for _ in range(rounds):
        call()
    benchmarking.synchronize(context.device)
    return (time.perf_counter() - start) / rounds


def _parts(
    context: Context, draft: DSparkDraftModel, step: OurStep, item: Any, optimizer: Any
) -> dict[str, float]:
    """Milliseconds of parts that are waited for one by one: their sum is above that of a step."""
    spent: Counter[str] = Counter()

    def timed(name: str, function: Callable) -> Callable:
        def run(*arguments: Any, **options: Any) -> Any:
            benchmarking.synchronize(context.device)
            start = time.perf_counter()
            out = function(*arguments, **options)
            benchmarking.synchronize(context.device)
            spent[name] += 1e3 * (time.perf_counter() - start)
            return out

        return run

    with (
        mock.patch.object(draft, "encode_context", timed("context", draft.encode_context)),
        mock.patch.object(draft, "backbone", timed("backbone", draft.backbone)),
        mock.patch.object(
            forward_step.HeadLoss, "__call__", timed("head loss", forward_step.HeadLoss.__call__)
        ),
        mock.patch.object(
            torch.Tensor, "backward", timed("backward of the rest", torch.Tensor.backward)
        ),
    ):
        timed("gradients", step)(item)
    timed("optimizer", optimizer.step)()
    return dict(spent)


def _profile(context: Context, call: Callable[[], None]) -> dict[str, Any]:
    """Of three steps: kernels of one, the share of time in which some kernel runs, the top ten."""
    on_gpu = context.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    steps = 3
    with profile(activities=activities) as profiler:
        _seconds(context, call, steps)
    device_type = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [
        event
        for event in profiler.events()
        if event.device_type == device_type and not event.is_user_annotation
    ]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    by_name: Counter[str] = Counter()
    for event in events:
        by_name[event.name] += event.time_range.end - event.time_range.start
    return {
        "kernels of a step": len(events) / steps,
        "busy share of a step without profiler": _union(spans)
        / (1e3 * steps * context.figures["ms of a step"]),
        "top ten, ms of a step": [
            (name[:120], total / 1e3 / steps) for name, total in by_name.most_common(10)
        ],
    }


def _union(spans: list[tuple[float, float]]) -> float:
    """Length of what sorted spans cover."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _check_waits(context: Context, call: Callable[[], Any]) -> None:
    """Nothing but Megatron-Core's look for NaN waits for the device in a step's gradients."""
    if context.device.type != "cuda":
        context.figures["waits"] = (
            "CUDA alone counts them; on meta tests/model/test_device_discipline.py"
        )
        return
    with _waits() as found:
        call()
    context.figures["waits"] = dict(found)
    unknown = [place for place in found if "/megatron/core/" not in place]
    assert not unknown, f"these lines wait for the GPU in a step: {', '.join(unknown)}"


@contextmanager
def _waits() -> Iterator[Counter[str]]:
    """Places in Python whose calls wait for the GPU, and how often."""
    found: Counter[str] = Counter()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroniz" in str(warning.message).lower():
            found[f"{warning.filename}:{warning.lineno}"] += 1
