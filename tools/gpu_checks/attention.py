"""Block attention: both backends against the dense mask, then time, memory and recompilations."""

import time
from functools import partial
from statistics import median
from typing import Any

import benchmarking
import torch
from attention_curve import AttentionInputs
from torch._dynamo.utils import counters

from dspark_megatron.config.attention import LayerAttention
from gpu_checks.context import Context, check_close

BACKENDS = "sdpa", "flex"
# Another order of sums, and bf16 scores that are rounded before the softmax.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
VARIANTS = {
    "full": {},
    "causal window, sink": dict(rule=LayerAttention(64, "slot", True), with_sink=True),
    "window of the anchor": dict(rule=LayerAttention(200, "anchor")),
}
MOST_COMPILATIONS = 3
"""Of FlexAttention, forward and backward, over all lengths."""


def check(context: Context) -> None:
    for backend in BACKENDS:
        for dtype in TOLERANCE:
            for context_length in (40, 333) if context.tiny else (300, 1024, 2050):
                for variant in VARIANTS:
                    _check_values(context, backend, dtype, context_length, variant)
    lengths = (64, 128) if context.tiny else (1024, 4096, 16384)
    for length in lengths:
        context.figures[f"speed, context {length}"] = _speed(context, length)
    for backend in BACKENDS:
        if _trains(context, backend):
            name, made = f"new lengths, {backend}", _new_lengths(context, backend)
            context.figures[name] = made
    if not _trains(context, "flex"):
        return
    made = context.figures["new lengths, flex"]["compilations"]
    assert made <= MOST_COMPILATIONS, (
        f"FlexAttention was compiled {made} times for 30 lengths, at most {MOST_COMPILATIONS} are "
        "expected"
    )


def _trains(context: Context, backend: str) -> bool:
    """FlexAttention has no backward pass on CPUs."""
    return backend == "sdpa" or context.device.type == "cuda"


def _inputs(
    context: Context,
    backend: str,
    context_length: int,
    dtype: torch.dtype,
    anchors: int,
    **options: Any,
) -> AttentionInputs:
    heads = (4, 2, 16) if context.tiny else (32, 8, 128)
    options |= dict(backend=backend, group_size=16, dtype=dtype)
    return AttentionInputs(heads, 7, anchors, context_length, context.device, **options)


def _check_values(
    context: Context, backend: str, dtype: torch.dtype, context_length: int, variant: str
) -> None:
    options = VARIANTS[variant]
    inputs = _inputs(context, backend, context_length, dtype, anchors=32, **options)
    expected = inputs.in_fp32().dense()
    for leaf in inputs.leaves:
        leaf.requires_grad_(_trains(context, backend))
    found = inputs.ours()
    for name, got, want in zip(("output", *inputs.NAMES), found, expected, strict=False):
        label = f"{name} ({variant}, {backend}, {str(dtype)[6:]}, context {context_length})"
        check_close(context, label, got, want, TOLERANCE[dtype])


def _speed(context: Context, context_length: int) -> list[dict[str, float | str]]:
    anchors = 16 if context.tiny else 512
    calls = {}
    for backend in BACKENDS:
        if _trains(context, backend):
            inputs = _inputs(context, backend, context_length, torch.bfloat16, anchors)
            calls[backend] = inputs.ours
    if context_length <= 4096:  # scores of the dense mask grow with the square of the anchors
        calls["dense mask"] = inputs.dense
    peaks = {
        name: benchmarking.peak_memory(c, context.device, repeats=1) for name, c in calls.items()
    }
    rounds = 1 if context.tiny else 10
    seconds = benchmarking.interleaved_seconds(calls, context.device, rounds=rounds)
    return [
        {"variant": name, "ms": 1e3 * seconds[name], "MiB": peaks[name] / benchmarking.MIB}
        for name in calls
    ]


def _new_lengths(context: Context, backend: str) -> dict[str, float]:
    """Calls for contexts of 30 lengths that were not met before, as training makes them."""
    torch._dynamo.reset()
    counters.clear()
    anchors = 16 if context.tiny else 512
    lengths = range(100, 130) if context.tiny else range(1000, 3910, 97)
    make = partial(_inputs, context, backend, dtype=torch.bfloat16, anchors=anchors)
    spent = []
    for length in lengths:
        inputs = make(context_length=length)
        benchmarking.synchronize(context.device)
        start = time.perf_counter()
        inputs.ours()
        benchmarking.synchronize(context.device)
        spent.append(1e3 * (time.perf_counter() - start))
    compilations = counters["stats"]["unique_graphs"]
    return {"ms, median": median(spent), "ms, sum": sum(spent), "compilations": compilations}
