"""Which layout a target needs on given GPUs: memory and communication of a rank, and a run's YAML.
Needs the target's `config.json` alone, and no GPU.

    python tools/plan.py --target models/Llama-3.1-70B-Instruct --gpus-per-node 8 --nodes 1 \\
        --gpu-memory-gib 80 [--output run.yaml] [section.key=value ...]

Of the layouts that fit, the one that sends least is chosen; the table in the comments of the YAML
has the others. A searched key that is given as an override stays as it is given.
"""

import argparse
import sys
from pathlib import Path

from dspark_megatron.errors import ConfigError, printable


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Plan a run from a target's config.json.")
    parser.add_argument("--target", required=True, help="the target's folder or config.json")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpu-memory-gib", type=float, default=74.5, help="default: 80 GB")
    parser.add_argument("--margin", type=float, default=0.9, help="share of it to be planned with")
    parser.add_argument("--node-gb-per-s", type=float, default=450, help="a GPU's, within a node")
    parser.add_argument("--network-gb-per-s", type=float, default=50, help="a GPU's, between nodes")
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--global-batch-size", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument(
        "--samples", type=int, help="training samples, for the size of their states"
    )
    parser.add_argument("--output", type=Path, help="write the YAML there, not to stdout")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.output is not None and not args.output.parent.is_dir():
        sys.exit(f"error: the folder of --output {args.output} must exist")
    from dspark_megatron.mcore.prepare import prepare_megatron

    prepare_megatron()
    from dspark_megatron.planning.layouts import Machine
    from dspark_megatron.planning.recommend import Wish, recommend
    from dspark_megatron.storage.writing import write_text

    machine = Machine(
        args.gpus_per_node,
        args.nodes,
        args.gpu_memory_gib,
        args.margin,
        args.node_gb_per_s,
        args.network_gb_per_s,
    )
    wish = Wish(
        args.target,
        args.seq_length,
        args.global_batch_size,
        args.micro_batch_size,
        args.samples,
        args.overrides,
    )
    try:
        text = recommend(wish, machine)
    except ConfigError as error:
        sys.exit(f"error: {printable(str(error))}")
    if args.output is None:
        print(text, end="")
    else:
        write_text(args.output, text)
        print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
