"""Cost of the draft's attention, forward and backward, as the number of anchors grows.

Our grouped attention should cost A * B * S for A anchors of B slots over S context tokens; a dense
mask costs A * B * (S + A * B). A part of `benchmark_step.py --attention-curve`.

Shapes: A anchors, B slots, S context tokens, a query heads, g key/value heads, d head width.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import benchmarking  # makes `reference` importable
import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_megatron.config.attention import FULL, LayerAttention
from dspark_megatron.ops.attention.block_attention import block_attention
from dspark_megatron.ops.transfer import ContextRanges
from dspark_megatron.shape import DraftShape
from support.reference import context_mask

CURVE_FORMATS = {"anchors": "d", "variant": "", "MiB": ",.1f", "ms": ",.1f"}
CURVE_FORMATS |= {"ns / ABS": ".3f", "bytes / ABS": ".2f"}
FIT_FORMATS = {"variant": "", "time ~ A^": ".2f", "memory ~ A^": ".2f", "R2 of time ~ ABS": ".4f"}


class AttentionInputs:
    """Queries, keys and values of evenly spread anchors, as the model has them."""

    NAMES = "query", "context key", "context value", "block key", "block value", "sink"

    def __init__(
        self,
        heads: tuple[int, int, int],
        slots: int,
        anchors: int,
        context: int,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        rule: LayerAttention = FULL,
        with_sink: bool = False,
        **options: Any,
    ) -> None:
        """heads: how many of queries, how many of keys and values, and their width. options: which
        backend of ours, and its group size."""

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(device, dtype).requires_grad_()

        generator = torch.Generator().manual_seed(anchors)
        query_heads, *kv = heads
        self.query = normal(anchors, slots, query_heads, heads[-1])
        self.context_kv = normal(context, *kv), normal(context, *kv)
        self.block_kv = normal(anchors, slots, *kv), normal(anchors, slots, *kv)
        self.sink = normal(query_heads) if with_sink else None
        positions = (torch.arange(anchors) * context) // anchors + 1
        ranges = [(0, position) for position in positions.tolist()]
        sizes = dict(slots=slots, context_length=context, head_dim=heads[-1], rule=rule)
        ranges = ContextRanges.of(ranges, device)
        self.attention = partial(block_attention, context_ranges=ranges, **sizes, **options)
        self.mask = context_mask(positions, context, slots, rule).to(device)  # [A*B, S + A*B]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """By NAMES."""
        sink = () if self.sink is None else (self.sink,)
        return self.query, *self.context_kv, *self.block_kv, *sink

    def in_fp32(self) -> "AttentionInputs":
        """The same numbers."""
        twin, pairs = copy.copy(self), (self.context_kv, self.block_kv)
        twin.query = self.query.detach().float().requires_grad_()
        twin.context_kv, twin.block_kv = (
            tuple(x.detach().float().requires_grad_() for x in pair) for pair in pairs
        )
        if self.sink is not None:
            twin.sink = self.sink.detach().float().requires_grad_()
        return twin

    def ours(self) -> tuple[Tensor, ...]:
        """Output and gradients. Its masks included: they are made once for all layers."""
        out = self.attention()(self.query, self.context_kv, self.block_kv, self.sink)
        return self._backward(out)

    def dense(self) -> tuple[Tensor, ...]:
        """One call over all blocks; the mask is there already. A sink is one more key of zeros,
        whose score the mask brings."""
        share = self.query.shape[2] // self.block_kv[0].shape[2]
        keys, values = (
            torch.cat([context, block.flatten(0, 1)]).repeat_interleave(share, dim=1)
            for context, block in zip(self.context_kv, self.block_kv, strict=True)
        )  # [S + A*B, a, d]
        mask = self.mask
        if self.sink is not None:
            keys, values = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (keys, values))
            hidden = torch.zeros_like(mask, dtype=keys.dtype).masked_fill(~mask, -math.inf)
            column = self.sink[:, None, None].expand(-1, len(mask), 1)
            mask = torch.cat([hidden.expand(len(self.sink), -1, -1), column], dim=-1)[None]
        sides = (x.transpose(0, 1)[None] for x in (self.query.flatten(0, 1), keys, values))
        out = F.scaled_dot_product_attention(*sides, attn_mask=mask)
        return self._backward(out[0].transpose(0, 1).reshape(self.query.shape))

    def _backward(self, out: Tensor) -> tuple[Tensor, ...]:
        """The output alone without gradients."""
        if not out.requires_grad:
            return (out,)
        upstream = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
        return out, *torch.autograd.grad(out, self.leaves, upstream.to(out.dtype))


def attention_curve(
    shape: DraftShape,
    anchors: list[int],
    context: int,
    device: torch.device,
    *,
    rounds: int,
    **options: Any,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows for each number of anchors and variant, and the fit of each variant. options: see
    AttentionInputs."""
    calls: dict[tuple[int, str], Callable] = {}
    for count in anchors:
        heads = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        inputs = AttentionInputs(heads, shape.block_size, count, context, device, **options)
        calls |= {(count, "ours"): inputs.ours, (count, "dense mask"): inputs.dense}
    peaks = {case: benchmarking.peak_memory(call, device) for case, call in calls.items()}
    seconds = benchmarking.interleaved_seconds(calls, device, rounds=rounds)
    rows = []
    for count, variant in calls:
        peak, time = peaks[count, variant], seconds[count, variant]
        work = count * shape.block_size * context
        row = {"anchors": count, "variant": variant, "MiB": peak / benchmarking.MIB}
        row |= {"ms": 1e3 * time, "ns / ABS": 1e9 * time / work, "bytes / ABS": peak / work}
        rows.append(row)
    fits = [_fit([r for r in rows if r["variant"] == name]) for name in ("ours", "dense mask")]
    return rows, fits


def _fit(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How a variant grows with A: 1 is linear, 2 is quadratic."""
    counts = [row["anchors"] for row in rows]
    logs = [math.log(count) for count in counts]
    times = [row["ms"] for row in rows]
    return {
        "variant": rows[0]["variant"],
        "time ~ A^": _line(logs, [math.log(time) for time in times])[0],
        "memory ~ A^": _line(logs, [math.log(row["MiB"]) for row in rows])[0],
        "R2 of time ~ ABS": _line(counts, times)[1],
    }


def _line(x: list[float], y: list[float]) -> tuple[float, float]:
    """Slope of the least-squares line and its R^2."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (x, y))
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    return float(slope), float(1 - ((y - slope * x) ** 2).sum() / (y @ y))
