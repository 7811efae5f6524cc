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
from dataclasses import replace
from itertools import product
from typing import Any

import benchmarking
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dspark_megatron.config import LossConfig
from dspark_megatron.data.blocks import draft_blocks, sample_anchors
from dspark_megatron.data.conversation import Sample
from dspark_megatron.planning.communication import StepSize, draft_collectives, ring_bytes
from dspark_megatron.run.ranks.runtime import Runtime, launch
from dspark_megatron.shape import DraftShape

FORMATS = {"tp": "d", "sequence parallel": "", "recompute": "", "vocabulary": ",d"}
FORMATS |= {
    "collective": "",
    "calls": "d",
    "counted bytes": ",d",
    "formula bytes": ",d",
    "sent on a ring": ",d",
}
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


def count_step(
    runtime: Runtime,
    shape: DraftShape,
    seq_length: int,
    num_anchors: int,
    **options: bool,
) -> tuple[CollectiveCounter, StepSize]:
    """One step on a random sample, with its collectives counted. Every rank calls it. options: of
    the draft."""
    from step_variants import Item, OurStep, build_draft, random_states

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, shape.vocab_size, (seq_length,), generator=generator)
    mask = torch.rand(seq_length, generator=generator) > 0.2
    anchors = sample_anchors(mask, num_anchors, seed=1)
    draft = build_draft(shape, runtime, torch.float32, **options)
    states = random_states(shape, seq_length, generator, draft.lm_head)
    step = OurStep(draft, runtime, LossConfig(chunk_rows=64))
    with CollectiveCounter(runtime.tp_group) as counter:
        step(Item(Sample(ids, mask), anchors, states))
    blocks = draft_blocks([ids], [mask], [anchors], shape.block_size)
    sizes = len(blocks.positions), len(blocks.context_positions), len(blocks.labels)
    return counter, StepSize(*sizes)


def table_rows(runtime: Runtime, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows for the tensor-parallel size that the runtime has. Raises ValueError where count and
    formula differ."""
    tp_size, rows = runtime.tp_group.size(), []
    modes = product((False, True) if tp_size > 1 else (False,), (False, True), args.vocab)
    for split, recompute, vocab_size in modes:
        shape = replace(SHAPE, vocab_size=vocab_size)
        options = dict(sequence_parallel=split, recompute_activations=recompute)
        counter, size = count_step(runtime, shape, args.seq_length, args.num_anchors, **options)
        expected = draft_collectives(
            shape, size, tp_size, itemsize=4, sequence_parallel=split, recompute=recompute
        )
        if counter.bytes != expected:
            raise ValueError(f"counted {dict(counter.bytes)}, by formula {expected}")
        row = {"tp": tp_size, "sequence parallel": _on(split), "recompute": _on(recompute)}
        rows += _collectives({**row, "vocabulary": vocab_size}, counter, expected, tp_size)
    return rows


def _on(flag: bool) -> str:
    return "on" if flag else "off"


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
