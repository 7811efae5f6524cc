"""`dspark import`: a draft folder of any layout as a checkpoint to start a run from."""

import argparse
from pathlib import Path

from dspark_megatron.cli.deliver import draft_options
from dspark_megatron.cli.output import Output

EXAMPLES = """\
  dspark import models/dspark_qwen3_8b_block7 --target models/Qwen3-8B --output runs/published
  dspark import drafts/x --target models/Qwen3-8B --output runs/x --tensor-parallel 8"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DRAFT", help="the draft's folder")
    draft_options.add_target(parser)
    draft_options.add_output(parser, metavar="RUN")
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="size to check and pad for; the checkpoint loads at others",
    )
    draft_options.add_read_folder(parser)
    draft_options.add_rope(parser)


def run(args: argparse.Namespace, output: Output) -> None:
    target = draft_options.given_target(args)
    from dspark_megatron.cli.deliver.draft_check import fingerprint_of
    from dspark_megatron.conversion.import_draft import import_folder

    checkpoint = import_folder(
        args.folder,
        target,
        args.output,
        fingerprint=fingerprint_of(args),
        target_checkpoint=args.target_checkpoint or "",
        layout=args.from_layout,
        tensor_parallel=args.tensor_parallel,
        allow_unknown=args.allow_unknown,
        rope=draft_options.given_rope(args),
    )
    output.result(
        {**draft_options.written_record(args.output, args), "checkpoint": str(checkpoint)},
        [
            f"wrote {checkpoint}",
            f"start a run from it: train.initial_checkpoint={args.output}",
        ],
    )
