"""Which layout a target needs on given GPUs: memory and time of a step, cost, and a run's YAML.
Needs the target's `config.json` alone, and no GPU.

    python tools/plan.py --target models/Llama-3.1-70B-Instruct --gpus-per-node 8 --nodes 1 \\
        --gpu h100 [--samples 1000000 --price-per-gpu-hour 2.5] [--output run.yaml] \\
        [section.key=value ...]

Of the layouts that fit, the one that takes least time at the rates is chosen; the table in the
comments of the YAML has the others. A searched key that is given as an override stays as it is
given.
"""

import argparse
import sys
from pathlib import Path

from machine_arguments import add_machine, given_machine

from dspark_megatron.errors import ConfigError, printable


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Plan a run from a target's config.json.")
    parser.add_argument("--target", required=True, help="the target's folder or config.json")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--global-batch-size", type=int, default=512)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument(
        "--taps", type=int, default=5, help="layers of the target, spread evenly over [1, L-3]"
    )
    parser.add_argument("--samples", type=int, help="of the training data, for hours and cost")
    parser.add_argument("--price-per-gpu-hour", type=float, help="in any currency")
    parser.add_argument("--output", type=Path, help="write the YAML there, not to stdout")
    add_machine(parser)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.output is not None and not args.output.parent.is_dir():
        sys.exit(f"error: the folder of --output {args.output} must exist")
    if args.output is not None and args.output.is_dir():
        sys.exit(f"error: --output {args.output} must be a file, and it is a folder")
    from dspark_megatron.mcore.prepare import prepare_megatron

    prepare_megatron()
    from dspark_megatron.planning.cost.run_cost import Bill
    from dspark_megatron.planning.recommend import Wish, recommend
    from dspark_megatron.storage.writing import write_text

    wish = Wish(
        args.target,
        args.seq_length,
        args.global_batch_size,
        args.micro_batch_size,
        Bill(args.samples, args.price_per_gpu_hour),
        args.overrides,
        args.taps,
    )
    try:
        text = recommend(wish, given_machine(args, nodes=args.nodes))
    except ConfigError as error:
        sys.exit(f"error: {printable(str(error))}")
    if args.output is None:
        print(text, end="")
    else:
        write_text(args.output, text)
        print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
