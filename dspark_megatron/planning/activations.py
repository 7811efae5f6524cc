"""What a pass of the draft keeps for its backward pass, by formula: bytes of a rank.

The terms are those that autograd saves on a CPU in the code of `model/`, where a test counts them.
A GPU's fused norm keeps less than the fp32 copies that are counted here.

Shapes: t context tokens, h hidden, m taps, r Markov rank, d head width, a/tp and g/tp query and
key/value heads of a rank, f/tp FFN columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from dspark_megatron.shape import DraftShape

FP32 = 4


@dataclass(frozen=True)
class DraftPass:
    """What the memory of a forward and backward pass depends on, beside the shape."""

    samples: int
    seq_length: int
    """All of it context: the last anchor stands at its end."""
    num_anchors: int
    """Blocks of a sample, anchors spread evenly. Those of a short answer to a long prompt all see
    nearly the whole context, and attention then keeps up to twice as much."""
    itemsize: int
    """Bytes of a number of the model."""
    tp_size: int = 1
    sequence_parallel: bool = False
    recompute: bool = False
    attention_backend: str = "sdpa"
    """`sdpa` or `flex`."""
    attention_group_size: int = 16

    @property
    def blocks(self) -> int:
        return self.samples * min(self.num_anchors, self.seq_length - 1)

    @property
    def context(self) -> int:
        return self.samples * self.seq_length

    def between_linears(self, rows: int) -> int:
        """Rows that norms and residuals of this rank have."""
        return -(-rows // self.tp_size) if self.sequence_parallel else rows

    def groups(self) -> Iterator[tuple[int, int]]:
        """Blocks and visible context of each attention call of a sample."""
        blocks = self.blocks // self.samples
        cuts = [*range(0, blocks, self.attention_group_size), blocks]
        for first, end in pairwise(cuts):
            yield end - first, self.seq_length * end // blocks


def kept_bytes(shape: DraftShape, one: DraftPass) -> int:
    """All that waits for the backward pass when the forward pass is done."""
    layer = _layer_inputs(shape, one) if one.recompute else layer_bytes(shape, one)
    every = shape.num_layers * (layer + _context_keys(shape, one))
    # The input of the first norm takes no gradient: it is made of frozen embeddings.
    first = (
        0 if one.recompute else FP32 * one.between_linears(_slots(shape, one)) * shape.hidden_size
    )
    return every - first + _around_layers(shape, one)


def layer_bytes(shape: DraftShape, one: DraftPass) -> int:
    """A layer that is not recomputed, or while it is."""
    slots, tp, e = _slots(shape, one), one.tp_size, one.itemsize
    rows, h = one.between_linears(slots), shape.hidden_size
    heads, kv_heads = shape.num_attention_heads // tp, shape.num_key_value_heads // tp
    norms = 2 * _norm(rows, h) + e * (slots + rows) * h  # their results: inputs of the linears
    norms += _norm(slots * (heads + kv_heads), shape.head_dim)
    rotary_and_projection = e * slots * heads * shape.head_dim
    mlp = 5 * e * slots * shape.ffn_hidden_size // tp
    return norms + rotary_and_projection + _attention(shape, one) + mlp


def gradient_bytes(shape: DraftShape, one: DraftPass) -> int:
    """While a layer goes backward: gradients of the residual and of what the MLP or the attention
    has between its linears, and of one weight before it joins its fp32 bucket."""
    slots, tp, e = _slots(shape, one), one.tp_size, one.itemsize
    width, kv_width = shape.num_attention_heads // tp, 2 * shape.num_key_value_heads // tp
    attention = (3 * slots * width + 2 * (one.context + slots) * kv_width) * shape.head_dim
    mlp = 4 * slots * shape.ffn_hidden_size // tp
    weight = 2 * shape.ffn_hidden_size * shape.hidden_size // tp
    return e * (2 * slots * shape.hidden_size + max(attention, mlp) + weight)


def _attention(shape: DraftShape, one: DraftPass) -> int:
    """Queries, outputs and their log-sum-exps, gathered keys and values; with `sdpa` also the mask
    of each group, as a number for each query (those of a key head side by side) and key."""
    slots, tp, e = _slots(shape, one), one.tp_size, one.itemsize
    heads, kv_width = shape.num_attention_heads // tp, 2 * shape.num_key_value_heads // tp
    own = slots * heads * (2 * e * shape.head_dim + FP32)
    if one.attention_backend == "flex":
        return own + e * (one.context + slots) * kv_width * shape.head_dim
    keys = masks = 0
    for blocks, context in one.groups():
        queries = blocks * shape.block_size
        keys += context + queries
        masks += queries * (context + queries)
    share = shape.num_attention_heads // shape.num_key_value_heads
    return own + one.samples * e * (keys * kv_width * shape.head_dim + masks * share)


def _layer_inputs(shape: DraftShape, one: DraftPass) -> int:
    """What a recomputed layer keeps: its rows, and keys and values of the context, the latter with
    the keys before their norm, whose memory they share (in fp32 they are the norm's own input)."""
    rows = one.between_linears(_slots(shape, one)) * shape.hidden_size
    kv_width = shape.num_key_value_heads // one.tp_size * shape.head_dim
    parts = 2 if one.itemsize == FP32 else 3
    return one.itemsize * (rows + parts * one.context * kv_width)


def _context_keys(shape: DraftShape, one: DraftPass) -> int:
    """The norm of a layer's context keys, which is outside of what is recomputed."""
    return _norm(one.context * shape.num_key_value_heads // one.tp_size, shape.head_dim)


def _around_layers(shape: DraftShape, one: DraftPass) -> int:
    """Taps, encoded context, rotary tables, last norm, inputs of the heads."""
    slots, t, h, e = _slots(shape, one), one.context, shape.hidden_size, one.itemsize
    context = e * t * (len(shape.target_layer_ids) + 1) * h + _norm(one.between_linears(t), h)
    rotary = 2 * e * (t + slots) * shape.head_dim
    last = _norm(one.between_linears(slots), h)
    heads = {"vanilla": 0, "gated": h + 3 * shape.markov_rank, "rnn": h + 8 * shape.markov_rank}
    width = heads[shape.markov_head_type] if shape.markov_rank else 0
    if shape.enable_confidence_head:
        width += h + (shape.markov_rank if shape.confidence_head_with_markov else 0)
    return context + rotary + last + slots * (e * width + 9)  # ids of previous tokens, a mask


def _norm(rows: int, width: int) -> int:
    """Its input and the normed input, both in fp32, and the root mean squares."""
    return FP32 * rows * (2 * width + 1)


def _slots(shape: DraftShape, one: DraftPass) -> int:
    return one.blocks * shape.block_size
