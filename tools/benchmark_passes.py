"""Time and gathered bytes of the frozen target's passes, by how many samples share one.

    torchrun --nproc-per-node 2 tools/benchmark_passes.py [--samples-per-pass 1 4 8] [--json FILE]

A random Llama, held whole by every rank and shared by all of them, gives a step's micro-batches of
one sample their states. The numbers of samples take turns in one process, and their states are
compared before anything is timed.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmarking
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaModel

from dspark_megatron.config import TargetConfig
from dspark_megatron.data.batch import Batch
from dspark_megatron.run.ranks.runtime import Runtime, launch, start
from dspark_megatron.targets.huggingface.split import TargetSplit
from dspark_megatron.targets.huggingface.target import HuggingFaceTarget
from dspark_megatron.targets.shared_pass import SharedPasses
from support.sharded_targets import GatheredBytes

TAPS = (0, 2)
FORMATS = {"shared by": "d", "samples per pass": "d", "passes": "d", "ms": ",.0f"}
FORMATS |= {"time / one by one": ".2f", "gathered MiB": ",.1f", "gathered / one by one": ".3f"}


def random_target(args: argparse.Namespace, folder: Path, runtime: Runtime) -> Path:
    """Saved by the main rank; its folder."""
    path = folder / "target"
    if runtime.is_main and not path.exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=args.hidden,
            intermediate_size=args.ffn,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads,
            max_position_embeddings=args.longest,
        )
        LlamaModel(config).save_pretrained(path)
    dist.barrier()
    return path


def micro_batches(args: argparse.Namespace, rank: int) -> list[Batch]:
    """Of one sample each, other ones on each rank."""
    generator = torch.Generator().manual_seed(rank)
    bounds = args.shortest, args.longest + 1
    lengths = torch.randint(*bounds, (args.micro_batches,), generator=generator).tolist()
    ids = [torch.randint(512, (1, length), generator=generator) for length in lengths]
    return [Batch(one, [one.shape[1]], (i,)) for i, one in enumerate(ids)]


def step_of(target: HuggingFaceTarget, batches: list[Batch], samples: int) -> Callable[[], Any]:
    """The states of every micro-batch, each dropped when it has been looked at."""
    source = SharedPasses(target, samples) if samples > 1 else target

    def step() -> list[float]:
        source.expect(batches)
        return [source.states(batch).hidden.double().sum().item() for batch in batches]

    return step


def check_equal(sums: list[float], expected: list[float]) -> None:
    """ValueError where the states of some micro-batch are others."""
    pair = torch.tensor(sums), torch.tensor(expected)
    if not torch.allclose(*pair, rtol=1e-3, atol=1e-2):
        raise ValueError(f"the states of a pass of several are others: {sums}, {expected}")


def table_rows(args: argparse.Namespace, runtime: Runtime, folder: Path) -> list[dict[str, Any]]:
    path, rows = random_target(args, folder, runtime), []
    ranks, batches = runtime.dp_group.size(), micro_batches(args, runtime.rank)
    for shards in sorted({1, ranks}):
        target = HuggingFaceTarget(
            TargetConfig(path=str(path)),
            TAPS,
            split=TargetSplit(1, ranks, shards),
            dp_group=runtime.dp_group,
            device=runtime.device,
        )
        steps = {samples: step_of(target, batches, samples) for samples in args.samples_per_pass}
        expected, passes, gathered = step_of(target, batches, 1)(), {}, {}
        for samples, step in steps.items():
            count: list[int] = []
            hook = target.model.register_forward_pre_hook(lambda *_, to=count: to.append(1))
            with GatheredBytes() as counter:
                check_equal(step(), expected)
            hook.remove()
            passes[samples], gathered[samples] = len(count), counter.bytes
        seconds = benchmarking.interleaved_seconds(
            steps, runtime.device, rounds=args.rounds, barrier=dist.barrier
        )
        first = args.samples_per_pass[0]
        for samples in steps:
            row = {"shared by": shards, "samples per pass": samples, "passes": passes[samples]}
            row |= {"ms": 1e3 * seconds[samples]}
            row |= {"time / one by one": seconds[samples] / seconds[first]}
            row |= {"gathered MiB": gathered[samples] / benchmarking.MIB}
            if gathered[first]:
                row["gathered / one by one"] = gathered[samples] / gathered[first]
            rows.append(row)
    return rows


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Passes of the target by samples in one.")
    parser.add_argument("--samples-per-pass", type=int, nargs="+", default=[1, 4, 8])
    sizes = {"hidden": 512, "ffn": 1792, "heads": 8, "kv-heads": 2, "layers": 4}
    sizes |= {"micro-batches": 16, "shortest": 16, "longest": 48, "rounds": 5}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    benchmarking.add_report_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with launch() as job, tempfile.TemporaryDirectory() as own:
        runtime, folder = start(job, 1), [own]
        dist.broadcast_object_list(folder, 0)
        rows = table_rows(args, runtime, Path(folder[0]))
        if runtime.is_main:
            title = (
                f"states of {args.micro_batches} micro-batches of one sample, {args.shortest} to "
                f"{args.longest} tokens, hidden {args.hidden}; what a rank hands to all-gathers"
            )
            print(benchmarking.report({title: (rows, FORMATS)}, runtime.device, args.json))


if __name__ == "__main__":
    main()
