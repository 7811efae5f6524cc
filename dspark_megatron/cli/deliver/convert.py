"""`dspark convert`: a draft folder of one layout as a folder of another, which is then checked."""

import argparse
from pathlib import Path

from dspark_megatron.cli.deliver import draft_options
from dspark_megatron.cli.output import Output

EXAMPLES = """\
  dspark convert drafts/x --target models/Qwen3-8B --layout specforge --output drafts/x-specforge
  dspark convert drafts/modelopt --target models/Qwen3-8B --rope-theta 1e6 --output drafts/hf"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DRAFT", help="the draft's folder")
    draft_options.add_target(parser)
    draft_options.add_output(parser)
    draft_options.add_read_folder(parser)
    draft_options.add_written_folder(parser, dtype="same")
    draft_options.add_rope(parser)


def run(args: argparse.Namespace, output: Output) -> None:
    target = draft_options.given_target(args)
    from dspark_megatron.cli.deliver.draft_check import check_draft, way_back
    from dspark_megatron.conversion.export import convert_folder

    folder = convert_folder(
        args.folder,
        target,
        args.output,
        draft_options.write_options(args),
        layout=args.from_layout,
        allow_unknown=args.allow_unknown,
        rope=draft_options.given_rope(args),
    )
    output.line(f"wrote {folder}")
    way_back(folder, args.layout, output)
    record = check_draft(folder, args, output, layout=args.layout)
    output.result({**draft_options.written_record(folder, args), **record})
