"""Bytes that a rank hands to tensor-parallel collectives in a draft step, counted and by formula.

    torchrun --nproc-per-node 8 tools/benchmark_communication.py [--vocab 1024 4096] [--json FILE]

Counted are the real collectives of a whole forward and backward pass, Megatron-Core's among them,
as PyTorch dispatches them. The vocabulary is no part of the formula, so it must be none of the
count. What is compared does not depend on speed: any sizes and machine will do.

Shapes: n blocks, k slots, t context tokens, h hidden, r Markov rank, d head width.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import benchmarking
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dspark_megatron.config import LossConfig
from dspark_megatron.data.conversation import Sample
from dspark_megatron.ops.anchors import draft_blocks, sample_anchors
from dspark_megatron.shape import DraftShape
from dspark_megatron.training.runtime import Runtime, launch

FORMATS = {"tp": "d", "sequence parallel": "", "vocabulary": ",d", "collective": "", "calls": "d"}
FORMATS |= {"counted bytes": ",d", "formula bytes": ",d", "sent on a ring": ",d"}
SHAPE = DraftShape(
    hidden_size=64,
    ffn_hidden_size=96,
    num_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=8,
    vocab_size=1024,
    rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    max_position_embeddings=1024,
    num_target_layers=4,
    target_layer_ids=(0, 2),
    mask_token_id=1,
    block_size=7,
    markov_rank=16,
    markov_head_type="vanilla",
    enable_confidence_head=True,
    confidence_head_with_markov=True,
)
# By operator: its name here, and which argument holds what this rank hands over. The group follows.
OPERATORS = {
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::allreduce_coalesced_": ("all-reduce", 0),
    "c10d::allgather_": ("all-gather", 1),
    "c10d::_allgather_base_": ("all-gather", 1),
    "c10d::allgather_into_tensor_coalesced_": ("all-gather", 1),
    "c10d::reduce_scatter_": ("reduce-scatter", 1),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::alltoall_": ("all-to-all", 1),
    "c10d::alltoall_base_": ("all-to-all", 1),
}


GATHERED_FLOATS, REDUCED_FLOATS = 5, 2
"""Of each row of the loss, as the docstring of `head_loss` has it."""


class CollectiveCounter(TorchDispatchMode):
    """Calls and bytes of a group's collectives inside a `with`, those of backward included."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group_name = group.group_name
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            if func._schema.name not in OPERATORS:
                raise ValueError(f"{func._schema.name} must be added to OPERATORS")
            name, argument = OPERATORS[func._schema.name]
            if dist.ProcessGroup.unbox(args[argument + 1]).group_name == self.group_name:
                self.calls[name] += 1
                self.bytes[name] += sum(x.nbytes for x in _tensors(args[argument]))
        return func(*args, **(kwargs or {}))


def _tensors(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    else:
        for part in argument:
            yield from _tensors(part)


@dataclass(frozen=True)
class StepSize:
    """What a step's communication depends on, beside the shape."""

    blocks: int
    context: int
    """Context tokens that some block sees."""
    rows: int
    """Supervised slots."""


def formula(
    shape: DraftShape, size: StepSize, tp_size: int, itemsize: int, *, sequence_parallel: bool
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
    total = Counter({name: itemsize * count for name, count in moves(shape, size, tp_size).items()})
    total["all-reduce"] += itemsize * (embeddings + rows * (h + shape.markov_rank)) + 4 * floats
    total["all-gather"] += 4 * GATHERED_FLOATS * rows
    if sequence_parallel:  # gradients of the norms: a rank has those of its rows only
        total["all-reduce"] += 4 * (2 * layers + 2) * h
    return dict(total)


def _whole_rows(shape: DraftShape, size: StepSize, tp_size: int) -> dict[str, int]:
    """Numbers that move between the linears. All-reduce: after attention and after the MLP
    [n, k, h] in each layer, and as much in backward; backward of the context, once for all layers,
    [t, h]. All-gather: this rank's part of the encoded context [t, h / tp]."""
    slots, h = size.blocks * shape.block_size, shape.hidden_size
    return {
        "all-reduce": shape.num_layers * 4 * slots * h + size.context * h,
        "all-gather": size.context * h // tp_size,
    }


def _split_rows(shape: DraftShape, size: StepSize, tp_size: int) -> dict[str, int]:
    """The same with sequence parallelism, rows padded to a multiple of tp. For each all-reduce of a
    layer an all-gather of this rank's rows and a reduce-scatter of all; in backward the MLP gathers
    its input again; at the end one all-gather. The context: an all-to-all [t, h / tp] and its
    backward, an all-gather and its backward."""
    slots, context = (
        -(-rows // tp_size) * tp_size for rows in (size.blocks * shape.block_size, size.context)
    )
    h, layers = shape.hidden_size, shape.num_layers
    return {
        "all-gather": ((5 * layers + 1) * slots + context) * h // tp_size,
        "reduce-scatter": (4 * layers * slots + context) * h,
        "all-to-all": 2 * context * h // tp_size,
    }


def ring_bytes(collective: str, handed: int, tp_size: int) -> int:
    """Bytes that a rank sends when the collective runs on a ring, from what it hands over: the
    measure in which an all-reduce is a reduce-scatter and an all-gather."""
    others = tp_size - 1
    return round(
        handed
        * {
            "all-reduce": 2 * others / tp_size,
            "all-gather": others,
            "reduce-scatter": others / tp_size,
            "all-to-all": others / tp_size,
        }[collective]
    )


def count_step(
    runtime: Runtime,
    shape: DraftShape,
    seq_length: int,
    num_anchors: int,
    *,
    sequence_parallel: bool,
) -> tuple[CollectiveCounter, StepSize]:
    """One step on a random sample, with its collectives counted. Every rank calls it."""
    from step_variants import Item, OurStep, build_draft, random_states

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, shape.vocab_size, (seq_length,), generator=generator)
    mask = torch.rand(seq_length, generator=generator) > 0.2
    anchors = sample_anchors(mask, num_anchors, seed=1)
    options = dict(sequence_parallel=sequence_parallel)
    draft = build_draft(shape, runtime, torch.float32, **options)
    states = random_states(shape, seq_length, generator, draft.lm_head)
    step = OurStep(draft, runtime, LossConfig(chunk_rows=64))
    with CollectiveCounter(runtime.tp_group) as counter:
        step(Item(Sample(ids, mask), anchors, states))
    blocks = draft_blocks([ids], [mask], [anchors], shape.block_size)
    context = blocks.visible_context(seq_length).index
    return counter, StepSize(blocks.num_blocks, len(context), int(blocks.eval_mask.sum()))


def table_rows(runtime: Runtime, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows for the tensor-parallel size that the runtime has. Raises ValueError where count and
    formula differ."""
    tp_size, rows = runtime.tp_group.size(), []
    for split in (False, True) if tp_size > 1 else (False,):
        for vocab_size in args.vocab:
            shape = replace(SHAPE, vocab_size=vocab_size)
            sizes = args.seq_length, args.num_anchors
            counter, size = count_step(runtime, shape, *sizes, sequence_parallel=split)
            expected = formula(shape, size, tp_size, itemsize=4, sequence_parallel=split)
            if counter.bytes != expected:
                raise ValueError(f"counted {dict(counter.bytes)}, by formula {expected}")
            row = {"tp": tp_size, "sequence parallel": "on" if split else "off"}
            rows += _collectives({**row, "vocabulary": vocab_size}, counter, expected, tp_size)
    return rows


def _collectives(
    row: dict[str, Any], counter: CollectiveCounter, expected: dict[str, int], tp_size: int
) -> list[dict[str, Any]]:
    """A row for each kind of collective and one for all of them."""
    rows = []
    for name in sorted(expected):
        counts = {"calls": counter.calls[name], "counted bytes": counter.bytes[name]}
        sent = ring_bytes(name, counter.bytes[name], tp_size)
        counts |= {"formula bytes": expected[name], "sent on a ring": sent}
        rows.append({**row, "collective": name, **counts})
    names = ("calls", "counted bytes", "formula bytes", "sent on a ring")
    total = {name: sum(part[name] for part in rows) for name in names}
    return [*rows, {**row, "collective": "all", **total}]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Bytes handed to collectives in a draft step.")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--vocab", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--seq-length", type=int, default=96)
    parser.add_argument("--num-anchors", type=int, default=24)
    benchmarking.add_report_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with launch() as job:
        rows = []
        for runtime in benchmarking.runtime_of_each_size(job, args.tp):
            rows += table_rows(runtime, args)
        title = f"one step, {args.seq_length} tokens, at most {args.num_anchors} anchors, a rank"
        if runtime.is_main:
            print(benchmarking.report({title: (rows, FORMATS)}, runtime.device, args.json))


if __name__ == "__main__":
    main()
