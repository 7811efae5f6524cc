"""Memory of a forward pass of the frozen target, beside what the plan says of it.

    torchrun --nproc-per-node 2 tools/benchmark_target.py [--hidden 512] [--json FILE]

Random targets of one size by family, dtype and layout: tensor-parallel, shared by data-parallel
ranks, with samples in pieces. Measured is what a pass takes above the weights, the states that it
returns included.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import benchmarking
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModel, PretrainedConfig

from dspark_megatron.config import TargetConfig
from dspark_megatron.data.batch import Batch
from dspark_megatron.planning.observing.cpu_kernels import cpu_kernels
from dspark_megatron.planning.observing.gpu_kernels import gpu_kernels
from dspark_megatron.planning.target.observed import ObservedTarget
from dspark_megatron.run.ranks.runtime import Runtime, launch
from dspark_megatron.targets.huggingface.split import TargetSplit
from dspark_megatron.targets.huggingface.target import HuggingFaceTarget

TAPS = (0, 2)
FORMATS = {"family": "", "dtype": "", "tp": "d", "shared by": "d", "pieces": "d"}
FORMATS |= {"MiB": ".1f", "planned": ".1f", "planned / measured": ".2f"}


class Case(NamedTuple):
    family: str
    dtype: str
    shards: int
    pieces: int


def cases(args: argparse.Namespace, dp_size: int) -> Iterator[Case]:
    """Every family in each type; of the first also a shared target and samples in pieces."""
    for family in args.families:
        yield from (Case(family, dtype, 1, 1) for dtype in args.dtypes)
    if dp_size > 1:
        yield Case(args.families[0], "float32", dp_size, 1)
    yield Case(args.families[0], "float32", 1, 4)


def family_config(family: str, args: argparse.Namespace) -> PretrainedConfig:
    """Eight experts, two for each token, where the family has experts. Values of latent attention
    are as wide as its keys: otherwise a CPU has no kernel that spares the matrix of scores."""
    width = args.hidden // args.heads
    latent = {"q_lora_rank": args.hidden // 2, "kv_lora_rank": args.hidden // 4}
    latent |= {"qk_nope_head_dim": width // 2, "qk_rope_head_dim": width // 2, "v_head_dim": width}
    extra = {
        "mixtral": {"num_local_experts": 8, "intermediate_size": args.ffn // 4},
        "deepseek_v3": latent
        | {"num_key_value_heads": args.heads, "n_routed_experts": 8, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": args.ffn // 4, "n_group": 1, "topk_group": 1},
    }
    base = {
        "vocab_size": 512,
        "hidden_size": args.hidden,
        "intermediate_size": args.ffn,
        "num_hidden_layers": 4,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "max_position_embeddings": args.seq_length,
    }
    return AutoConfig.for_model(family, **{**base, **extra.get(family, {})})


Planned = dict[tuple[int, Case], int]


def planned(args: argparse.Namespace) -> Planned:
    """Bytes of each case, by tensor-parallel size. A plan is made before the ranks join."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    kernels = gpu_kernels if torch.cuda.is_available() else cpu_kernels
    found: Planned = {}
    for tp in [size for size in args.tp if world % size == 0] or [1]:
        for case in cases(args, world // tp):
            most = args.seq_length // case.pieces
            target = ObservedTarget(
                TargetConfig(path="-", max_tokens_per_forward=most),
                family_config(case.family, args),
                benchmarking.DTYPES[case.dtype],
                TargetSplit(tp, world // tp, case.shards),
                TAPS,
                True,
                kernels,
            )
            parts = target.forward_pass((1, args.seq_length)).highest
            found[tp, case] = sum(parts.values())
    return found


def measured(
    case: Case, args: argparse.Namespace, runtime: Runtime, folder: Path, plan: Planned
) -> dict:
    config, dtype = family_config(case.family, args), benchmarking.DTYPES[case.dtype]
    split = TargetSplit(runtime.tp_group.size(), runtime.dp_group.size(), case.shards)
    path, max_tokens = folder / case.family / case.dtype, args.seq_length // case.pieces
    if runtime.is_main and not path.exists():
        model = AutoModel.from_config(config, dtype=dtype, trust_remote_code=False)
        model.save_pretrained(path)
    dist.barrier()
    target = HuggingFaceTarget(
        TargetConfig(path=str(path), max_tokens_per_forward=max_tokens),
        TAPS,
        split=split,
        dp_group=runtime.dp_group,
        device=runtime.device,
    )
    ids = torch.arange(args.seq_length)[None] % config.vocab_size
    peak = benchmarking.peak_memory(
        lambda: target.states(Batch(ids)), runtime.device, barrier=dist.barrier
    )
    expected = plan[split.tp_size, case]
    return {
        **{"family": case.family, "dtype": case.dtype, "tp": split.tp_size},
        **{"shared by": case.shards, "pieces": case.pieces},
        **{"MiB": peak / benchmarking.MIB, "planned": expected / benchmarking.MIB},
        "planned / measured": expected / peak,
    }


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Memory of a forward pass of the target.")
    benchmarking.add_target_options(parser, ("llama", "mixtral", "deepseek_v3"), seq_length=2048)
    types = tuple(benchmarking.DTYPES)
    parser.add_argument("--dtypes", nargs="+", choices=types, default=types, help="of weights")
    benchmarking.add_report_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    benchmarking.give_tensors_own_pages()
    plan = planned(args)
    with launch() as job, tempfile.TemporaryDirectory() as own:
        rows: list[dict[str, Any]] = []
        for runtime in benchmarking.runtime_of_each_size(job, args.tp):
            folder = [own]
            dist.broadcast_object_list(folder, 0)
            for case in cases(args, runtime.dp_group.size()):
                rows.append(measured(case, args, runtime, Path(folder[0]), plan))
        dist.barrier()
        if runtime.is_main:
            title = f"a pass of the target, hidden {args.hidden}, {args.seq_length} tokens, a rank"
            print(benchmarking.report({title: (rows, FORMATS)}, runtime.device, args.json))


if __name__ == "__main__":
    main()
