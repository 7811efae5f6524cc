"""How the passes of `logit_terms.py` run over a chunk: a few rows at a time in room made once, or
compiled."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_megatron.ops import logit_terms


class Passes(NamedTuple):
    statistics: Callable[..., Tensor]
    distances: Callable[..., Tensor]
    gradient: Callable[..., None]
    all_passes: Callable[..., Tensor]


PASSES = Passes(
    logit_terms.statistics, logit_terms.distances, logit_terms.gradient, logit_terms.all_passes
)


@functools.cache
def compiled_passes() -> Passes:
    """The passes, each fused by torch.compile for every shape it meets. `fullgraph`: more shapes
    than PyTorch's limit are an error, not a silent return to passes that are not fused."""
    options = dict(dynamic=False, fullgraph=True)
    return Passes(*(torch.compile(function, **options) for function in PASSES))


def tiled_passes(tile_rows: int, like: Tensor) -> Passes:
    """The passes a few rows at a time, in room made once: bounds what they take, and keeps it in
    the cache. like [..., v/tp]: a tensor of the logits' device and type."""
    room = like.new_empty(3, tile_rows, like.shape[-1], dtype=logit_terms.precise(like.dtype))
    return Passes(*(in_tiles(function, room) for function in PASSES))


def in_tiles(function: Callable, room: Tensor) -> Callable:
    """`function` on a few rows of its tensors at a time, its results [..., c] put together.
    room [rooms, tile rows, v/tp]"""

    def run(*arguments: object) -> Tensor | None:
        parts, whole = [], len(arguments[0])
        for start in range(0, whole, room.shape[1]):
            rows = slice(start, min(start + room.shape[1], whole))
            own = (x[rows] if isinstance(x, Tensor) else x for x in arguments)
            parts.append(function(*own, room=tuple(room[:, : rows.stop - start])))
        return None if parts[0] is None else torch.cat(parts, dim=-1)

    return run
