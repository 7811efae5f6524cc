"""Bytes that a rank hands to collectives, by kind and group.

Those of the draft's tensor-parallel group are counted in real steps by
`tools/benchmark_communication.py`, which stops where count and formula differ; the rest is formula.

Shapes: n blocks, k slots, t context tokens, h hidden, r Markov rank, d head width.
"""

from collections import Counter
from dataclasses import dataclass

from dspark_megatron.shape import DraftShape

GATHERED_FLOATS, REDUCED_FLOATS = 5, 2
"""Of each slot, as the docstring of `HeadLoss` has it."""


@dataclass(frozen=True)
class StepSize:
    """What the communication of a micro-batch depends on, beside the shape."""

    blocks: int
    context: int
    """Context tokens that some block sees."""
    rows: int
    """Supervised slots."""


def draft_collectives(
    shape: DraftShape,
    size: StepSize,
    tp_size: int,
    itemsize: int,
    *,
    sequence_parallel: bool,
    recompute: bool = False,
) -> dict[str, int]:
    """Bytes that a rank hands to each kind of collective in one micro-batch's forward and
    backward pass; none on one rank. `itemsize`: bytes of a number of the model. The vocabulary
    size is nowhere in it.

    In either mode, all-reduce: the embedding of anchors and the mask token [n + 1, h] and of
    previous tokens [n, k, r]; gradients of the loss [rows, h + r] and REDUCED_FLOATS a row;
    gradients of the query and key norms, which a rank has of its own heads only, 2 * d floats a
    layer. All-gather: GATHERED_FLOATS a row of the loss.
    """
    if tp_size == 1:
        return {}
    h, rows, layers = shape.hidden_size, size.rows, shape.num_layers
    embeddings = (size.blocks + 1) * h + size.blocks * shape.block_size * shape.markov_rank
    floats = REDUCED_FLOATS * rows + layers * 2 * shape.head_dim
    moves = _split_rows if sequence_parallel else _whole_rows
    counts = moves(shape, size, tp_size, recompute)
    total = Counter({name: itemsize * count for name, count in counts.items()})
    total["all-reduce"] += itemsize * (embeddings + rows * (h + shape.markov_rank)) + 4 * floats
    total["all-gather"] += 4 * GATHERED_FLOATS * rows
    if sequence_parallel:  # gradients of the norms: a rank has those of its rows only
        total["all-reduce"] += 4 * (2 * layers + 2) * h
    return dict(total)


def _whole_rows(shape: DraftShape, size: StepSize, tp_size: int, recompute: bool) -> dict[str, int]:
    """Numbers that move between the linears. All-reduce: after attention and after the MLP
    [n, k, h] in each layer, as often again where it is recomputed, and as much in backward;
    backward of the context, once for all layers, [t, h]. All-gather: this rank's part of the
    encoded context [t, h / tp]."""
    slots, h = size.blocks * shape.block_size, shape.hidden_size
    return {
        "all-reduce": shape.num_layers * (4 + 2 * recompute) * slots * h + size.context * h,
        "all-gather": size.context * h // tp_size,
    }


def _split_rows(shape: DraftShape, size: StepSize, tp_size: int, recompute: bool) -> dict[str, int]:
    """The same with sequence parallelism, rows padded to a multiple of tp. For each all-reduce of a
    layer an all-gather of this rank's rows and a reduce-scatter of all; in backward the MLP gathers
    its input again; at the end one all-gather. The context: an all-to-all [t, h / tp] and its
    backward, an all-gather and its backward."""
    slots, context = (
        -(-rows // tp_size) * tp_size for rows in (size.blocks * shape.block_size, size.context)
    )
    h, layers, again = shape.hidden_size, shape.num_layers, 2 * recompute
    return {
        "all-gather": (((5 + again) * layers + 1) * slots + context) * h // tp_size,
        "reduce-scatter": ((4 + again) * layers * slots + context) * h,
        "all-to-all": 2 * context * h // tp_size,
    }


def ring_bytes(collective: str, handed: int, group_size: int) -> int:
    """Bytes that a rank sends when the collective runs on a ring, from what it hands over: the
    measure in which an all-reduce is a reduce-scatter and an all-gather."""
    others = group_size - 1
    return round(
        handed
        * {
            "all-reduce": 2 * others / group_size,
            "all-gather": others,
            "reduce-scatter": others / group_size,
            "all-to-all": others / group_size,
        }[collective]
    )
