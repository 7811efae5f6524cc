"""Provider `megatron` beside provider `huggingface`: memory and time of the same target's forward
pass, as ratios.

    torchrun --nproc-per-node 2 tools/benchmark_target_providers.py [--hidden 512] [--json FILE]

Random targets of one size, a dense one and one with experts, loaded by both from the same folder.
Their states are compared first: what is not the same is not measured.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import benchmarking
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from dspark_megatron.config import TargetConfig
from dspark_megatron.data.batch import Batch
from dspark_megatron.run.ranks.runtime import Runtime, launch
from dspark_megatron.storage.target_folder import load_target_config
from dspark_megatron.targets.base import Target
from dspark_megatron.targets.huggingface.split import TargetSplit
from dspark_megatron.targets.huggingface.target import HuggingFaceTarget
from dspark_megatron.targets.megatron.groups import target_groups
from dspark_megatron.targets.megatron.source import GPTSource
from dspark_megatron.targets.megatron.target import MegatronTarget

TAPS = (0, 2)
PROVIDERS = ("huggingface", "megatron")
FORMATS = {"family": "", "tp": "d", "ep": "d", "huggingface": ".2f", "megatron": ".2f"}
FORMATS |= {"megatron / huggingface": ".2f"}
UNITS = {"weights": benchmarking.MIB, "peak": benchmarking.MIB, "time": 1e-3}


def family_config(family: str, args: argparse.Namespace) -> PretrainedConfig:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": args.ffn // 4}
    return AutoConfig.for_model(
        family,
        vocab_size=512,
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=4,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.hidden // args.heads,
        max_position_embeddings=args.seq_length,
        **(experts if family == "qwen3_moe" else {}),
    )


def build(provider: str, path: Path, ep: int, runtime: Runtime) -> Target:
    tp, dp = runtime.tp_group.size(), runtime.dp_group.size()
    config = TargetConfig(path=str(path), provider=provider)
    if provider == "huggingface":
        return HuggingFaceTarget(
            config,
            TAPS,
            split=TargetSplit(tp, dp, 1, ep),
            dp_group=runtime.dp_group,
            device=runtime.device,
        )
    groups = target_groups(tp_group=runtime.tp_group, ep_size=ep)
    source = GPTSource.open(config, load_target_config(path))
    return MegatronTarget(
        source.model(groups, device=runtime.device), TAPS, with_output_layer=False
    )


def both(family: str, ep: int, runtime: Runtime, folder: Path) -> dict[str, Target]:
    targets = {name: build(name, folder / family, ep, runtime) for name in PROVIDERS}
    ids = torch.arange(24)[None] * 7 % 512
    theirs, ours = (target.states(Batch(ids)) for target in targets.values())
    torch.testing.assert_close(ours.taps, theirs.taps, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.last_hidden, theirs.last_hidden, rtol=1e-3, atol=1e-4)
    return targets


def weight_bytes(target: Target) -> int:
    parts = target.model.parameters()
    return sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in parts)


def memory(targets: dict[str, Target], ids: torch.Tensor, device: torch.device) -> dict[str, dict]:
    """Bytes on this rank: of the weights, and of a pass above them."""
    peaks = {}
    for name, target in targets.items():
        peaks[name] = benchmarking.peak_memory(
            lambda target=target: target.states(Batch(ids)), device, barrier=dist.barrier
        )
    return {"weights": {n: weight_bytes(t) for n, t in targets.items()}, "peak": peaks}


def seconds(
    targets: dict[str, Target], ids: torch.Tensor, device: torch.device, rounds: int
) -> dict:
    calls = {name: lambda t=target: t.states(Batch(ids)) for name, target in targets.items()}
    return benchmarking.interleaved_seconds(
        calls, device, rounds=rounds, warm_up=2, barrier=dist.barrier
    )


def row(case: dict[str, Any], figures: dict[str, float], unit: float) -> dict[str, Any]:
    ratio = figures["megatron"] / figures["huggingface"]
    scaled = {name: value / unit for name, value in figures.items()}
    return {**case, **scaled, "megatron / huggingface": ratio}


def measure(job: Any, args: argparse.Namespace, folder: Path) -> dict[str, list[dict]]:
    """Memory of all cases first: on a CPU, timing makes it inexact."""
    rows: dict[str, list[dict]] = {name: [] for name in UNITS}
    ids = torch.arange(args.samples * args.seq_length).view(args.samples, -1) % 512
    for timed in (False, True):
        for runtime in benchmarking.runtime_of_each_size(job, args.tp):
            tp, device = runtime.tp_group.size(), runtime.device
            for family in args.families:
                for ep in sorted({1, tp if family == "qwen3_moe" else 1}):
                    case = {"family": family, "tp": tp, "ep": ep}
                    targets = both(family, ep, runtime, folder)
                    if timed:
                        found = {"time": seconds(targets, ids, device, args.rounds)}
                    else:
                        found = memory(targets, ids, device)
                    for name, figures in found.items():
                        rows[name].append(row(case, figures, UNITS[name]))
    return rows


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Target providers side by side.")
    benchmarking.add_target_options(parser, ("llama", "qwen3_moe"), seq_length=1024)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    benchmarking.add_report_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    benchmarking.give_tensors_own_pages()
    with launch() as job, tempfile.TemporaryDirectory() as own:
        runtime = next(benchmarking.runtime_of_each_size(job, [1]))
        folder = [own]
        dist.broadcast_object_list(folder, 0)
        if runtime.is_main:
            for family in args.families:
                config = family_config(family, args)
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
                model.save_pretrained(Path(own) / family)
        dist.barrier()
        rows = measure(job, args, Path(folder[0]))
        dist.barrier()
        if runtime.is_main:
            titles = {
                "weights": "weights of the target on a rank, MiB",
                "peak": "a pass above them, states included, MiB",
                "time": "a pass, ms",
            }
            tables = {titles[name]: (found, FORMATS) for name, found in rows.items()}
            print(benchmarking.report(tables, runtime.device, args.json))


if __name__ == "__main__":
    main()
