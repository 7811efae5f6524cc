"""Time and peak memory of a draft step against a plain implementation, on one process.

    python tools/benchmark_step.py --data synthetic [--seq-length 1024 --num-anchors 512 ...]
    python tools/benchmark_step.py --data quickstart [--target DIR --samples 24]
    python tools/benchmark_step.py --attention-curve [--seq-length 1024 --anchors 64 128 256 512]

A step is context encoding, backbone, heads, loss and backward; no target, whose states are random
here, and no optimizer. A synthetic sample is full: every token is supervised, every anchor real.
The quickstart's are those of its `chats.yaml`, with the paper's 512 anchors.

plain             `PlainDraft` and `plain_loss` of the tests. As DeepSpec does it computes
                  num_anchors blocks of every sample, fillers without weight, and all their slots
plain, SDPA       the same with its dense masked attention in scaled_dot_product_attention
ours              `DSparkDraftModel` and `GradientStep`
ours, recompute   the same with `recompute_activations`

Memory is the highest above weights, gradients and inputs, of the sample with most anchors. Before
anything is measured all losses of the first sample must agree.
"""

import argparse
from functools import partial
from typing import Any

import benchmarking
import torch

from dspark_megatron.config import LossConfig
from dspark_megatron.config.loading import load_config
from dspark_megatron.data.blocks import anchor_seed, sample_anchors
from dspark_megatron.data.conversation import Sample
from dspark_megatron.data.dataset import load_samples
from dspark_megatron.errors import ConfigError
from dspark_megatron.run.ranks.runtime import Runtime, launch, start
from dspark_megatron.shape import DraftShape
from dspark_megatron.storage.target_folder import load_tokenizer

QUICKSTART = "examples/quickstart/chats.yaml"
FORMATS = {"variant": "", "MiB": ",.1f", "memory / plain": ".3f", "ms per sample": ",.1f"}
FORMATS |= {"time / plain": ".3f", "time / plain, SDPA": ".3f"}


def draft_shape(args: argparse.Namespace) -> DraftShape:
    return DraftShape(
        hidden_size=args.hidden,
        ffn_hidden_size=args.ffn,
        num_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        vocab_size=args.vocab,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        max_position_embeddings=8192,
        num_target_layers=30,
        target_layer_ids=tuple(range(args.target_layers)),
        mask_token_id=args.vocab - 1,
        block_size=args.block_size,
        markov_rank=args.rank,
        markov_head_type="vanilla",
        enable_confidence_head=True,
        confidence_head_with_markov=True,
    )


def synthetic_samples(args: argparse.Namespace) -> list[Sample]:
    generator = torch.Generator().manual_seed(args.seed)
    size = (args.seq_length,)
    everywhere = torch.ones(size, dtype=torch.bool)
    return [
        Sample(torch.randint(0, args.vocab - 1, size, generator=generator), everywhere)
        for _ in range(args.samples)
    ]


def quickstart_samples(args: argparse.Namespace) -> list[Sample]:
    """The first samples of a config's training files, tokenized and cut as training does."""
    from dspark_megatron.run.data import sample_rules

    config = load_config(args.config)
    tokenizer = load_tokenizer(args.target or config.target.path)
    dataset = load_samples(
        config.data.train_files,
        tokenizer,
        args.vocab,
        sample_rules(config),
    )
    return [dataset[i] for i in range(min(args.samples, len(dataset)))]


def make_items(args: argparse.Namespace, device: torch.device) -> list[Any]:
    from step_variants import Item, random_states

    shape = draft_shape(args)
    samples = synthetic_samples(args) if args.data == "synthetic" else quickstart_samples(args)
    generator = torch.Generator().manual_seed(args.seed)
    like = torch.empty(0, dtype=benchmarking.DTYPES[args.dtype], device=device)
    items = []
    for i, sample in enumerate(samples):
        seed = anchor_seed(args.seed, 0, i)
        # Synthetic blocks end inside the sample.
        cut = -args.block_size if args.data == "synthetic" else None
        anchors = sample_anchors(sample.loss_mask[:cut], args.num_anchors, seed)
        states = random_states(shape, len(sample.input_ids), generator, like)
        items.append(Item(sample, anchors, states))
    return items


def measure(runtime: Runtime, args: argparse.Namespace, items: list[Any]) -> list[dict[str, Any]]:
    """The rows of the table."""
    from step_variants import step_variants

    device = runtime.device
    steps = step_variants(
        draft_shape(args),
        runtime,
        args.num_anchors,
        benchmarking.DTYPES[args.dtype],
        LossConfig(memory_budget_mb=args.memory_budget_mb),
        attention_backend=args.attention_backend,
        attention_group_size=args.attention_group_size,
    )
    check_losses({name: step(items[0]) for name, step in steps.items()}, args.dtype)
    largest = max(items, key=lambda item: len(item.anchors))
    peaks = {
        name: benchmarking.peak_memory(partial(step, largest), device)
        for name, step in steps.items()
    }
    calls = {
        (name, i): partial(steps[name], item) for i, item in enumerate(items) for name in steps
    }
    times = benchmarking.interleaved_seconds(calls, device, rounds=args.rounds, warm_up=0)
    seconds = {name: sum(times[name, i] for i in range(len(items))) for name in steps}
    return [
        {
            "variant": name,
            "MiB": peaks[name] / benchmarking.MIB,
            "memory / plain": peaks[name] / peaks["plain"],
            "ms per sample": 1e3 * seconds[name] / len(items),
            "time / plain": seconds[name] / seconds["plain"],
            "time / plain, SDPA": seconds[name] / seconds["plain, SDPA"],
        }
        for name in steps
    ]


def describe(items: list[Any], args: argparse.Namespace) -> str:
    tokens, anchors = (
        sum(len(x) for x in part) / len(items)
        for part in ([item.sample.input_ids for item in items], [item.anchors for item in items])
    )
    return (
        f"draft step, {args.data} data: {len(items)} sample(s) of {tokens:.0f} tokens and "
        f"{anchors:.0f} anchors on average, num_anchors {args.num_anchors}"
    )


def check_losses(losses: dict[str, float], dtype: str) -> None:
    """Raise ValueError where a variant computes something else: its time would mean nothing."""
    tolerance = {"float32": 1e-4, "bfloat16": 3e-2}[dtype]
    for name, loss in losses.items():
        if not abs(loss / losses["plain"] - 1) < tolerance:
            raise ValueError(f"the loss of {name!r} is {loss}, the plain one {losses['plain']}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and memory of a draft step.")
    parser.add_argument("--data", choices=("synthetic", "quickstart"), default="synthetic")
    parser.add_argument("--attention-curve", action="store_true", help="the attention alone")
    parser.add_argument("--config", default=QUICKSTART, help="of --data quickstart")
    parser.add_argument("--target", help="folder with its tokenizer; default: the config's")
    parser.add_argument("--samples", type=int, help="default: 1, with quickstart 24")
    sizes = dict(hidden=576, ffn=1536, layers=2, heads=9, kv_heads=3, head_dim=64, vocab=49152)
    sizes |= dict(rank=256, block_size=7, target_layers=3, seq_length=1024, num_anchors=512)
    sizes |= dict(memory_budget_mb=256, attention_group_size=16, rounds=3, seed=1)
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--attention-backend", choices=("sdpa", "flex"), default="sdpa")
    parser.add_argument("--anchors", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--dtype", choices=benchmarking.DTYPES, default="float32")
    benchmarking.add_report_options(parser)
    args = parser.parse_args(argv)
    args.samples = args.samples or (1 if args.data == "synthetic" else 24)
    return args


def make_tables(runtime: Runtime, args: argparse.Namespace) -> benchmarking.Tables:
    if not args.attention_curve:
        items = make_items(args, runtime.device)
        return {describe(items, args): (measure(runtime, args, items), FORMATS)}
    from attention_curve import CURVE_FORMATS, FIT_FORMATS, attention_curve

    rows, fits = attention_curve(
        draft_shape(args),
        args.anchors,
        args.seq_length,
        runtime.device,
        rounds=args.rounds,
        backend=args.attention_backend,
        group_size=args.attention_group_size,
    )
    title = f"attention, forward and backward, S = {args.seq_length}"
    return {title: (rows, CURVE_FORMATS), "growth with A": (fits, FIT_FORMATS)}


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    benchmarking.give_tensors_own_pages()
    with launch() as job:
        if job.world_size > 1:
            raise ConfigError(f"this runs on one process, not on {job.world_size}: use python")
        runtime = start(job, 1)
        print(benchmarking.report(make_tables(runtime, args), runtime.device, args.json))


if __name__ == "__main__":
    main()
