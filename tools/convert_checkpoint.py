"""Draft checkpoints from and to every layout: training checkpoints, and the folders of DeepSpec
(`hf`), speculators, ModelOpt and SpecForge.

    export    training checkpoint -> folder, then verify
    import    folder -> training checkpoint to start a run from
    convert   folder of one layout -> folder of another, then verify
    verify    check a folder; say which engines load it
    engines   what each engine reads, by version

--checkpoint is a run folder, its checkpoints/ folder or one iter_* folder.
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import torch
import torch.distributed as dist

from dspark_megatron.config.evaluate import Weights
from dspark_megatron.conversion.draft_folder import read_config
from dspark_megatron.conversion.engines.listing import engine_lines, engine_record, find_engines
from dspark_megatron.conversion.export import convert_folder, export_checkpoint
from dspark_megatron.conversion.folder_writer import WriteOptions
from dspark_megatron.conversion.import_draft import import_folder
from dspark_megatron.conversion.layouts.foreign_configs import TargetFacts
from dspark_megatron.conversion.layouts.rope_config import rope_of_config, way_back_to_modelopt
from dspark_megatron.conversion.layouts.table import LAYOUTS
from dspark_megatron.conversion.verify import verify_folder
from dspark_megatron.errors import ConfigError, print_error, printable, require
from dspark_megatron.storage.checkpoints.tracker import BEST
from dspark_megatron.storage.target_folder import load_target_config
from dspark_megatron.storage.target_weights import weights_fingerprint

ITERATION_HELP = "a number, or `best`: of the best held-out tau; default: the newest"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def options(args: argparse.Namespace) -> WriteOptions:
    return WriteOptions(
        layout=args.layout,
        dtype=DTYPES.get(args.dtype),
        max_shard_size=args.max_shard_size,
        shared_weights=not args.no_shared_weights,
        force=args.force,
        target_name=args.target_name,
        target_checkpoint=args.target_checkpoint,
    )


def fingerprint(args: argparse.Namespace) -> Callable[[str | Path], str]:
    return lambda target_dir: weights_fingerprint(target_dir, args.target_checkpoint)


def export(args: argparse.Namespace) -> Iterator[str]:
    output = export_checkpoint(
        args.checkpoint,
        args.target,
        args.output,
        options(args),
        iteration=args.iteration,
        weights=args.weights,
        fingerprint=fingerprint(args),
    )
    args.input = output
    yield f"wrote {output}"
    yield from way_back(args)
    yield from verify(args)


def import_(args: argparse.Namespace) -> list[str]:
    checkpoint = import_folder(
        args.input,
        args.target,
        args.output,
        fingerprint=fingerprint(args),
        target_checkpoint=args.target_checkpoint,
        layout=args.layout,
        tensor_parallel=args.tensor_parallel,
        allow_unknown=args.allow_unknown,
        rope=trained_rope(args),
    )
    return [f"wrote {checkpoint}", f"start a run from it: train.initial_checkpoint={args.output}"]


def trained_rope(args: argparse.Namespace) -> dict[str, float]:
    """What the user says of the draft's RoPE, where its config does not."""
    said = {
        "rope_theta": args.rope_theta,
        "partial_rotary_factor": args.partial_rotary_factor,
    }
    return {key: value for key, value in said.items() if value is not None}


def convert(args: argparse.Namespace) -> list[str]:
    output = convert_folder(
        args.input,
        args.target,
        args.output,
        options(args),
        layout=args.from_layout,
        allow_unknown=args.allow_unknown,
        rope=trained_rope(args),
    )
    lines = verify_folder(
        output,
        layout=args.layout,
        target_dir=args.target,
        target_checkpoint=args.target_checkpoint,
    )
    return [f"wrote {output}", *way_back(args), *lines]


def way_back(args: argparse.Namespace) -> list[str]:
    """What the program of a layout must be told to train the draft on."""
    if args.layout != "modelopt":
        return []
    return [way_back_to_modelopt(rope_of_config(read_config(args.output)))]


def verify(args: argparse.Namespace) -> Iterator[str]:
    with_logits = args.checkpoint is not None and not args.skip_logits
    require(
        args.target is not None or not with_logits,
        "comparing logits with the checkpoint needs --target: the embedding and LM head are there; "
        "give it, or --skip-logits",
    )
    yield from verify_folder(
        args.input,
        layout=args.layout,
        checkpoint=args.checkpoint,
        target_dir=args.target,
        iteration=args.iteration,
        weights=args.weights,
        target_checkpoint=args.target_checkpoint,
        allow_unknown=getattr(args, "allow_unknown", ()),
    )
    if with_logits:
        yield from compare(args)


def engines(args: argparse.Namespace) -> Iterator[str]:
    found = find_engines(args.engine)
    if args.json:
        yield json.dumps([engine_record(engine) for engine in found], indent=2)
        return
    for engine in found:
        yield from engine_lines(engine)


def compare(args: argparse.Namespace) -> list[str]:
    """The logits of both sides; needs Megatron-Core and room for one whole draft in fp32."""
    from dspark_megatron.mcore.prepare import prepare_megatron
    from dspark_megatron.run.ranks.runtime import Launch, start

    prepare_megatron()
    from dspark_megatron.conversion.draft_folder import DraftFolder
    from dspark_megatron.conversion.logit_check import compare_logits
    from dspark_megatron.conversion.sources import CheckpointSource

    runtime = start(Launch.alone(), 1)
    try:
        source = CheckpointSource(args.checkpoint, args.iteration, args.weights)
        facts = TargetFacts.of(load_target_config(args.target), args.target.resolve().name)
        folder = DraftFolder(
            args.input, args.layout, facts, allow_unknown=getattr(args, "allow_unknown", ())
        )
        return compare_logits(
            folder,
            source,
            args.target,
            tp_group=runtime.tp_group,
            target_checkpoint=args.target_checkpoint,
        )
    finally:
        dist.destroy_process_group()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="export|import|convert|verify|engines")

    command = commands.add_parser("export", help="training checkpoint to folder, then verify")
    command.set_defaults(run=export)
    command.add_argument("--checkpoint", type=Path, required=True)
    _add_checkpoint_options(command)
    _add_output_options(command, dtype="bf16")
    _add_skip_logits(command)

    command = commands.add_parser("import", help="folder to training checkpoint")
    command.set_defaults(run=import_)
    command.add_argument("--input", type=Path, required=True)
    _add_target(command, required=True)
    command.add_argument("--output", type=Path, required=True, help="a new run folder")
    command.add_argument("--layout", choices=["auto", *LAYOUTS], default="auto")
    command.add_argument(
        "--tensor-parallel", type=int, default=1, help="size to check and pad for; loads at others"
    )
    _add_allow_unknown(command)
    _add_rope(command)

    command = commands.add_parser("convert", help="folder to another layout, then verify")
    command.set_defaults(run=convert)
    command.add_argument("--input", type=Path, required=True)
    command.add_argument("--from-layout", choices=["auto", *LAYOUTS], default="auto")
    _add_allow_unknown(command)
    _add_output_options(command, dtype="same")
    _add_rope(command)

    command = commands.add_parser("verify", help="check a folder and judge the engines")
    command.set_defaults(run=verify)
    command.add_argument("--input", type=Path, required=True)
    command.add_argument("--layout", choices=["auto", *LAYOUTS], default="auto")
    command.add_argument("--checkpoint", type=Path, help="compare tensors and logits")
    _add_allow_unknown(command)
    _add_target(command, required=False)
    _add_checkpoint_options(command)
    _add_skip_logits(command)

    command = commands.add_parser("engines", help="what each engine reads, by version")
    command.set_defaults(run=engines)
    command.add_argument("--engine", help="only this one")
    command.add_argument("--json", action="store_true")
    return parser.parse_args(argv)


def iteration(text: str) -> int | str:
    return text if text == BEST else int(text)


def _add_checkpoint_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--iteration", type=iteration, help=ITERATION_HELP)
    command.add_argument(
        "--weights",
        choices=get_args(Weights),
        default="trained",
        help="`ema`: their moving average (optimizer.ema_decay); default: trained",
    )


def _add_output_options(command: argparse.ArgumentParser, dtype: str) -> None:
    _add_target(command, required=True)
    command.add_argument("--output", type=Path, required=True)
    command.add_argument("--layout", choices=LAYOUTS, default="hf", help="of the output")
    command.add_argument("--dtype", choices=[*DTYPES, "same"], default=dtype)
    command.add_argument("--max-shard-size", default="5GB")
    command.add_argument(
        "--no-shared-weights",
        action="store_true",
        help="leave out the target's embedding and LM head (DeepSpec needs them)",
    )
    command.add_argument("--force", action="store_true", help="replace an earlier export")
    command.add_argument("--target-name", help="the target's hub id, for config and model card")


def _add_target(command: argparse.ArgumentParser, *, required: bool) -> None:
    command.add_argument(
        "--target", type=Path, required=required, help="the target's folder, for its embedding too"
    )
    command.add_argument(
        "--target-checkpoint",
        default="",
        help="the Megatron-LM checkpoint with its weights, where training had target.checkpoint",
    )


def _add_allow_unknown(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--allow-unknown",
        metavar="KEY",
        action="append",
        default=[],
        help="a key of the input's config.json that is not known and means nothing for the draft",
    )


def _add_rope(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--rope-theta",
        type=float,
        metavar="X",
        help="that the draft was trained with, where its config.json says another (ModelOpt)",
    )
    command.add_argument(
        "--partial-rotary-factor",
        type=float,
        metavar="X",
        help="share of each head that the draft was trained to turn; without it only a config.json "
        "with a rope_dim has one",
    )


def _add_skip_logits(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--skip-logits",
        action="store_true",
        help="do not run both sides to compare logits (it takes a whole draft in memory)",
    )


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s")
    args = parse_arguments(argv)
    try:
        for line in args.run(args):
            print(printable(line), flush=True)
    except ConfigError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
