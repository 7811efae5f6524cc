"""Bytes that a rank keeps for the backward pass of the draft, counted.

    torchrun --nproc-per-node 4 tools/benchmark_activations.py [--hidden 1024] [--json FILE]
    python tools/benchmark_activations.py --seq-length 2048 8192 32768

Counted is every tensor that autograd saves in a forward pass of the backbone and its heads, weights
aside, each piece of memory once. The count does not depend on the machine.
"""

import argparse
from itertools import product
from typing import Any

import benchmarking
import torch
from torch import Tensor

from dspark_megatron.data.blocks import draft_blocks
from dspark_megatron.run.ranks.runtime import Runtime, launch
from dspark_megatron.shape import DraftShape

FORMATS = {"tokens": ",d", "tp": "d", "sequence parallel": "", "recompute": "", "MiB": ".1f"}
FORMATS |= {"of TP 1": ".3f", "of the same without": ".3f", "KiB a token more": ".2f"}


def saved_bytes(draft: torch.nn.Module, tokens: int, num_anchors: int) -> int:
    """What a pass of a draft model over one sample with evenly spread anchors keeps."""
    shape, device = draft.shape, draft.embed_tokens.weight.device
    ids = torch.arange(tokens)[None] % shape.vocab_size
    anchors = torch.linspace(1, tokens - shape.block_size - 1, num_anchors).long()
    mask = torch.ones(1, tokens, dtype=torch.bool)
    blocks = draft_blocks(ids, mask, [anchors], shape.num_draft_tokens).to(device)
    width = len(shape.target_layer_ids) * shape.hidden_size
    taps = torch.zeros(1, tokens, width, dtype=draft.config.params_dtype, device=device)
    weights = {p.untyped_storage().data_ptr() for p in draft.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = draft(taps, blocks)
    del output  # until here what was saved is alive, so no address is counted for two tensors
    return sum(kept.values())


def table_rows(runtime: Runtime, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows for the tensor-parallel size that the runtime has."""
    from step_variants import build_draft

    tp_size, rows = runtime.tp_group.size(), []
    dtype = benchmarking.DTYPES[args.dtype]
    for recompute, split in product((False, True), (False, True) if tp_size > 1 else (False,)):
        options = dict(sequence_parallel=split, recompute_activations=recompute)
        draft = build_draft(draft_shape(args), runtime, dtype, **options)
        row = {"tp": tp_size, "sequence parallel": _on(split), "recompute": _on(recompute)}
        for tokens in args.seq_length:
            size = saved_bytes(draft, tokens, args.num_anchors) / benchmarking.MIB
            rows.append({"tokens": tokens, **row, "MiB": size})
    return rows


def _on(flag: bool) -> str:
    return "on" if flag else "off"


def compare(rows: list[dict[str, Any]]) -> None:
    """With one rank, with no sequence parallelism, and with the length before."""
    names = "tokens", "tp", "sequence parallel", "recompute"
    sizes = {tuple(row[name] for name in names): row["MiB"] for row in rows}
    lengths = sorted({row["tokens"] for row in rows})
    for row in rows:
        tokens, tp, split, recompute = (row[name] for name in names)
        if (tokens, 1, "off", recompute) in sizes:
            row["of TP 1"] = row["MiB"] / sizes[tokens, 1, "off", recompute]
        if split == "on":
            row["of the same without"] = row["MiB"] / sizes[tokens, tp, "off", recompute]
        if tokens > lengths[0]:
            before = lengths[lengths.index(tokens) - 1]
            more = row["MiB"] - sizes[before, tp, split, recompute]
            row["KiB a token more"] = more * 1024 / (tokens - before)


def draft_shape(args: argparse.Namespace) -> DraftShape:
    return DraftShape(
        hidden_size=args.hidden,
        ffn_hidden_size=args.ffn,
        num_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.hidden // args.heads,
        vocab_size=1024,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=max(args.seq_length),
        num_target_layers=8,
        target_layer_ids=(0, 1, 2, 3, 4),
        mask_token_id=1,
        block_size=7,
        markov_rank=256,
        markov_head_type="vanilla",
        enable_confidence_head=True,
        confidence_head_with_markov=True,
    )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Bytes kept for the backward pass of the draft.")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ffn", type=int, default=3584)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--seq-length", type=int, nargs="+", default=[512])
    parser.add_argument("--num-anchors", type=int, default=64)
    parser.add_argument("--dtype", choices=benchmarking.DTYPES, default="bfloat16")
    benchmarking.add_report_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with launch() as job:
        rows = []
        for runtime in benchmarking.runtime_of_each_size(job, args.tp):
            rows += table_rows(runtime, args)
        compare(rows)
        sizes = f"{args.layers} layers, {args.num_anchors} blocks"
        if runtime.is_main:
            tables = {f"kept for backward, {sizes}, a rank": (rows, FORMATS)}
            print(benchmarking.report(tables, runtime.device, args.json))


if __name__ == "__main__":
    main()
