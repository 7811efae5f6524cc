"""Cost of a draft's attention by the window of its layers and the length of a sample.

    python tools/benchmark_window.py [--seq-length 2048 8192 --windows 512 2048] [--answer 1024]

Measured are the projections of the context and the attention of all layers, forward and backward,
of one sample whose anchors are evenly spread over its last `--answer` tokens (0: over all of it).
`context` is how many tokens are projected. Memory is the highest above weights and inputs.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import benchmarking
import torch

from dspark_megatron.data.blocks import draft_blocks
from dspark_megatron.run.ranks.runtime import Runtime, launch, start
from dspark_megatron.shape import DraftShape
from dspark_megatron.shape.attention import DraftAttention

FORMATS = {"tokens": ",d", "window": "", "context": ",d", "ms": ",.1f", "MiB": ",.1f"}
FORMATS |= {"time / full": ".3f", "memory / full": ".3f"}


def attention_pass(runtime: Runtime, shape: DraftShape, tokens: int, args: Any) -> tuple:
    """How many tokens are projected, and a function that goes forward and backward."""
    from step_variants import build_draft

    dtype, k = benchmarking.DTYPES[args.dtype], shape.block_size
    draft = build_draft(shape, runtime, dtype, attention_backend=args.attention_backend)
    first = max(1, tokens - args.answer) if args.answer else 1
    anchors = torch.linspace(first, tokens - k - 1, args.anchors).long()
    ids, mask = torch.zeros(1, tokens).long(), torch.ones(1, tokens, dtype=torch.bool)
    reach = shape.attention.reach(shape.num_layers)
    blocks = draft_blocks(ids, mask, [anchors], k, reach=reach).to(runtime.device)
    place = dict(dtype=dtype, device=runtime.device)
    width = len(shape.target_layer_ids) * shape.hidden_size
    taps = torch.randn(1, tokens, width, **place)
    inputs = torch.randn(len(anchors) * k, shape.hidden_size, **place, requires_grad=True)

    def call() -> None:
        draft.zero_grad(set_to_none=True)
        context_kv = draft.encode_context(blocks.context_of(taps), blocks.context_positions)
        rope, hidden = draft.rotary(blocks.positions, dtype), inputs
        for layer, kv, attend in zip(
            draft.layers, context_kv, draft.attention_of(blocks), strict=True
        ):
            hidden = hidden + layer.self_attention(hidden, kv, attend, rope)
        hidden.sum().backward()

    return len(blocks.context_positions), call


def measure(runtime: Runtime, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    calls: dict[Any, Callable[[], None]] = {}
    every_layer = tuple(range(args.layers))
    for tokens in args.seq_length:
        for window in (None, *args.windows):
            case = tokens, str(window or "-")
            sliding = every_layer if window else ()
            attention = DraftAttention(window=window, sliding_layers=sliding)
            shape = replace(draft_shape(args), attention=attention)
            seen, calls[case] = attention_pass(runtime, shape, tokens, args)
            rows[case] = {"tokens": tokens, "window": case[1], "context": seen}
    for case, call in calls.items():
        peak = benchmarking.peak_memory(partial(call), runtime.device)
        rows[case]["MiB"] = peak / benchmarking.MIB
    seconds = benchmarking.interleaved_seconds(calls, runtime.device, rounds=args.rounds)
    for case, row in rows.items():
        full = case[0], "-"
        row["ms"] = 1e3 * seconds[case]
        row["time / full"] = seconds[case] / seconds[full]
        row["memory / full"] = row["MiB"] / rows[full]["MiB"]
    return list(rows.values())


def draft_shape(args: argparse.Namespace) -> DraftShape:
    return DraftShape(
        hidden_size=args.hidden,
        ffn_hidden_size=64,
        num_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.hidden // args.heads,
        vocab_size=1024,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=max(args.seq_length),
        num_target_layers=8,
        target_layer_ids=(1, 3, 5),
        mask_token_id=1,
        block_size=7,
        markov_rank=0,
        markov_head_type="vanilla",
        enable_confidence_head=False,
        confidence_head_with_markov=False,
    )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cost of attention by window and length.")
    sizes = dict(hidden=512, layers=2, heads=8, kv_heads=4, anchors=128, answer=1024, rounds=3)
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--seq-length", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--windows", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--attention-backend", choices=("sdpa", "flex"), default="sdpa")
    parser.add_argument("--dtype", choices=benchmarking.DTYPES, default="float32")
    benchmarking.add_report_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    benchmarking.give_tensors_own_pages()
    with launch() as job:
        runtime = start(job, 1)
        where = f"its last {args.answer} tokens" if args.answer else "a sample"
        title = f"{args.layers} layers, {args.anchors} anchors over {where}"
        tables = {title: (measure(runtime, args), FORMATS)}
        print(benchmarking.report(tables, runtime.device, args.json))


if __name__ == "__main__":
    main()
