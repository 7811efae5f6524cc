"""`dspark plan`: which layout a target needs on given GPUs, what a step costs there, and a run's
YAML. Needs the target's `config.json` alone, and no GPU.

Of the layouts that fit, the one that takes least time at the rates is chosen; the table in the
comments of the YAML has the others. A searched key that is given as an override stays as it is
given.
"""

import argparse
from pathlib import Path

from dspark_megatron.cli.machine_arguments import add_machine, given_machine
from dspark_megatron.cli.output import Output
from dspark_megatron.errors import require

EXAMPLES = """\
  dspark plan --target models/Llama-3.1-70B-Instruct --gpu h100 --nodes 1
  dspark plan --target models/Llama-3.1-70B-Instruct --samples 1000000 --price-per-gpu-hour 2.5 \\
      --output run.yaml optimizer.lr=3e-4"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
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


def run(args: argparse.Namespace, output: Output) -> None:
    require(
        args.output is None or args.output.parent.is_dir(),
        f"the folder of --output {args.output} must exist",
    )
    require(
        args.output is None or not args.output.is_dir(),
        f"--output {args.output} must be a file, and it is a folder",
    )
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
    text = recommend(wish, given_machine(args, nodes=args.nodes))
    if args.output is None:
        output.result({"yaml": text}, [text.removesuffix("\n")])
    else:
        write_text(args.output, text)
        output.result({"output": str(args.output)}, [f"wrote {args.output}"])
