"""Turn training checkpoints into Hugging Face folders, and check such folders.

    python tools/convert_checkpoint.py export --checkpoint runs/my-run --target DIR --output DIR
    python tools/convert_checkpoint.py verify --input DIR [--checkpoint runs/my-run] [--target DIR]

--checkpoint is a run folder, its checkpoints/ folder or one iter_* folder.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch

from dspark_megatron.config import ConfigError
from dspark_megatron.conversion.export import export_checkpoint
from dspark_megatron.conversion.verify import verify_export
from dspark_megatron.target_folder import target_fingerprint

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def export(args: argparse.Namespace) -> list[str]:
    output = export_checkpoint(
        args.checkpoint,
        args.target,
        args.output,
        iteration=args.iteration,
        dtype=DTYPES[args.dtype],
        max_shard_size=args.max_shard_size,
        shared_weights=not args.no_shared_weights,
        fingerprint=target_fingerprint,
    )
    return verify_export(output, args.checkpoint, args.target, args.iteration)


def verify(args: argparse.Namespace) -> list[str]:
    return verify_export(args.input, args.checkpoint, args.target, args.iteration)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Convert and check draft checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="export|verify")

    command = commands.add_parser("export", help="checkpoint to Hugging Face folder, then verify")
    command.set_defaults(run=export)
    command.add_argument("--checkpoint", type=Path, required=True)
    command.add_argument("--target", type=Path, required=True, help="the target's folder")
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--iteration", type=int, help="default: the newest")
    command.add_argument("--dtype", choices=DTYPES, default="bf16")
    command.add_argument("--max-shard-size", default="5GB")
    command.add_argument(
        "--no-shared-weights",
        action="store_true",
        help="leave out the target's embedding and LM head (DeepSpec needs them)",
    )

    command = commands.add_parser("verify", help="check a Hugging Face folder")
    command.set_defaults(run=verify)
    command.add_argument("--input", type=Path, required=True)
    command.add_argument("--checkpoint", type=Path, help="compare every trained tensor")
    command.add_argument("--target", type=Path, help="compare embedding and LM head")
    command.add_argument("--iteration", type=int, help="default: the newest")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s")
    args = parse_arguments(argv)
    try:
        for line in args.run(args):
            print(line)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
