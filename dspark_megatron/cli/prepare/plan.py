"""`dspark plan`: which layout a target needs on given GPUs, what a run costs there, and its YAML.
Needs no GPU, and without `--data` the target's `config.json` alone.

Of the layouts that fit, the one that takes least time at the rates is chosen; the table in the
comments of the YAML has the others. A searched key that is given as an override stays as it is
given.
"""

import argparse
import sys
from pathlib import Path

from dspark_megatron.cli.machine_arguments import add_machine, given_machine
from dspark_megatron.cli.output import Output
from dspark_megatron.errors import require

EXAMPLES = """\
  dspark plan --target models/Qwen3-8B --data data/train.jsonl --gpu h100 --nodes 2
  dspark plan --target models/Llama-3.1-70B-Instruct --samples 1000000 --price-per-gpu-hour 2.5 \\
      --output run.yaml optimizer.lr=3e-4"""
RUN_FILE = Path("run.yaml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--target", required=True, help="the target's folder or config.json")
    files = "files of chats: then the run starts as it is written"
    add("--data", nargs="+", default=[], metavar="FILE", help=files)
    prompts = "files of prompts that an evaluation decodes, or chat, maths, code"
    add("--prompts", nargs="+", default=[], metavar="FILE", help=prompts)
    held_out = "files of answers that are not trained on, to estimate tau on while it trains"
    add("--held-out", nargs="+", default=[], metavar="FILE", help=held_out)
    add("--nodes", type=int, default=1)
    length = "the most tokens of a sample; 4096, or what the longest sample of --data has"
    add("--seq-length", type=int, help=length)
    add("--global-batch-size", type=int, default=512, help="samples of a step")
    add("--micro-batch-size", type=int, default=1, help="samples that a GPU takes at once")
    add("--taps", type=int, default=5, help="layers of the target, spread evenly over [1, L-3]")
    add("--samples", type=int, help="of the training data, for hours and cost without --data")
    add("--price-per-gpu-hour", type=float, help="in any currency")
    output = f"write the YAML there; else to {RUN_FILE} with --data, and to stdout without"
    add("--output", type=Path, help=output)
    add_machine(parser)
    add("overrides", nargs="*", metavar="section.key=value")


def run(args: argparse.Namespace, output: Output) -> None:
    # Before a file name, overrides may be taken for one more of it.
    for files in (args.data, args.prompts, args.held_out):
        args.overrides += [word for word in files if _is_override(word)]
        files[:] = [word for word in files if not _is_override(word)]
    file = _output_file(args)
    from dspark_megatron.mcore.prepare import prepare_megatron

    prepare_megatron()
    from dspark_megatron.planning.cost.run_cost import Bill
    from dspark_megatron.planning.recommend import Wish, run_text, search
    from dspark_megatron.planning.record import plan_record, summary_lines
    from dspark_megatron.storage.writing import write_text

    wish = Wish(
        target=args.target,
        seq_length=args.seq_length,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        bill=Bill(args.samples, args.price_per_gpu_hour),
        overrides=args.overrides,
        taps=args.taps,
        data=args.data,
        prompts=args.prompts,
        held_out=args.held_out,
        show_progress=sys.stderr.isatty() and not args.quiet,
    )
    done = search(wish, given_machine(args, nodes=args.nodes))
    text, record = run_text(done), plan_record(done)
    if file is None:
        output.result({**record, "yaml": text}, [text.removesuffix("\n")])
        return
    write_text(file, text)
    output.result({**record, "file": str(file)}, [*summary_lines(done), *_next(args, file)])


def _is_override(word: str) -> bool:
    key, equals, _ = word.partition("=")
    return bool(equals) and "." in key and not Path(word).exists()


def _output_file(args: argparse.Namespace) -> Path | None:
    """Where the YAML goes; None for stdout. ConfigError where it cannot be written."""
    file = args.output
    if file is None:
        require(
            not (args.data and RUN_FILE.exists()),
            f"{RUN_FILE} is there already; name the file to write with --output",
        )
        return RUN_FILE if args.data else None
    require(file.parent.is_dir(), f"the folder of --output {file} must exist")
    require(not file.is_dir(), f"--output {file} must be a file, and it is a folder")
    return file


def _next(args: argparse.Namespace, file: Path) -> list[str]:
    if not args.data:
        return [f"wrote {file}"]
    nodes = f" --nodes {args.nodes}" * (args.nodes > 1)
    start = f"dspark train {file} --gpus {args.gpus_per_node}{nodes}"
    return [f"wrote {file}; next: {start}"]
