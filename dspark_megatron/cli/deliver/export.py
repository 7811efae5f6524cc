"""`dspark export`: the draft of a run as a folder that engines load, which is then checked."""

import argparse
from pathlib import Path

from dspark_megatron.cli.deliver import draft_options
from dspark_megatron.cli.deliver.run_settings import fill_from_run, run_folder
from dspark_megatron.cli.output import Output

EXAMPLES = """\
  dspark export runs/x
  dspark export runs/x --iteration best --layout speculators --output exports/x-speculators
  dspark export runs/x --target models/Qwen3-8B --target-name Qwen/Qwen3-8B --dtype fp32"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    about = "a run, its checkpoints/ or one iter_* folder"
    parser.add_argument("run", type=Path, metavar="RUN", help=about)
    draft_options.add_target(parser, default="the run's")
    draft_options.add_output(parser, default="RUN/export")
    draft_options.add_checkpoint_choice(parser)
    draft_options.add_written_folder(parser, dtype="bf16")
    draft_options.add_skip_logits(parser)


def run(args: argparse.Namespace, output: Output) -> None:
    fill_from_run(args, args.run, output)
    if args.output is None:
        args.output = run_folder(args.run) / "export"
    from dspark_megatron.cli.deliver.draft_check import check_draft, fingerprint_of, way_back
    from dspark_megatron.conversion.export import export_checkpoint
    from dspark_megatron.storage.training_checkpoint import find_checkpoint

    checkpoint = find_checkpoint(args.run, args.iteration)
    folder = export_checkpoint(
        checkpoint,
        args.target,
        args.output,
        draft_options.write_options(args),
        weights=args.weights,
        fingerprint=fingerprint_of(args),
    )
    output.line(f"wrote {folder}")
    way_back(folder, args.layout, output)
    record = check_draft(folder, args, output, run=args.run, layout=args.layout)
    made = draft_options.written_record(folder, args)
    output.result({**made, "checkpoint": str(checkpoint), **record})
