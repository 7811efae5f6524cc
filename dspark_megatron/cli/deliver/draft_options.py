"""Options of the commands that read and write drafts; each name means the same in all of them."""

import argparse
from pathlib import Path
from typing import Any

from dspark_megatron.errors import require

LAYOUTS = ("hf", "speculators", "modelopt", "specforge")
"""As `conversion.layouts.table` has them; a test compares, since that takes long to import."""
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
BEST = "best"


def add_target(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """default: where it is taken from without the option, which is needed where there is none."""
    about = f"the target's folder ({f'default: {default}' if default else 'needed'})"
    parser.add_argument("--target", type=Path, metavar="DIR", help=about)
    parser.add_argument(
        "--target-checkpoint",
        metavar="DIR",
        help="the Megatron-LM checkpoint with the target's weights, where training had "
        "target.checkpoint",
    )


def given_target(args: argparse.Namespace) -> Path:
    """ConfigError without one."""
    require(args.target is not None, "the target is not known; give --target")
    return args.target


def add_output(
    parser: argparse.ArgumentParser, *, metavar: str = "DIR", default: str | None = None
) -> None:
    """default: the folder that is written without the option, which is needed where there is
    none."""
    what = "the folder that is written" if metavar == "DIR" else "the run folder that is written"
    about = f"{what} ({default or 'needed'})"
    parser.add_argument("--output", type=Path, metavar=metavar, required=not default, help=about)


def written_record(output: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What was written, and whose target the draft has, as JSON has it."""
    checkpoint = args.target_checkpoint or None
    return {
        "output": str(output),
        "target": str(args.target),
        "target_checkpoint": checkpoint,
    }


def add_checkpoint_choice(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint of a run, and which of its weights."""
    parser.add_argument(
        "--iteration",
        type=_iteration,
        metavar="N",
        help="a number, or `best`: of the best held-out tau (default: the newest)",
    )
    parser.add_argument(
        "--weights",
        choices=("trained", "ema"),
        default="trained",
        help="`ema`: their moving average (optimizer.ema_decay); default: trained",
    )


def add_written_folder(parser: argparse.ArgumentParser, *, dtype: str) -> None:
    add = parser.add_argument
    add("--layout", choices=LAYOUTS, default="hf", help="of the folder that is written")
    add(
        "--dtype",
        choices=[*DTYPES, "same"],
        default=dtype,
        help=f"of the weights that are written; `same`: as the source has them ({dtype})",
    )
    add("--max-shard-size", default="5GB", metavar="SIZE", help="of a safetensors file")
    add(
        "--no-shared-weights",
        action="store_true",
        help="leave out the target's embedding and LM head (DeepSpec needs them)",
    )
    add("--force", action="store_true", help="replace what an earlier command wrote there")
    add("--target-name", metavar="ID", help="the target's hub id, for config and model card")


def add_read_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from-layout",
        choices=("auto", *LAYOUTS),
        default="auto",
        help="of the folder that is read (auto: found by what it holds)",
    )
    parser.add_argument(
        "--allow-unknown",
        metavar="KEY",
        action="append",
        default=[],
        help="a key of the read config.json that is not known and means nothing for the draft",
    )


def add_rope(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rope-theta",
        type=float,
        metavar="X",
        help="that the draft was trained with, where its config.json says another (ModelOpt)",
    )
    parser.add_argument(
        "--partial-rotary-factor",
        type=float,
        metavar="X",
        help="share of each head that the draft was trained to turn; without it only a config.json "
        "with a rope_dim has one",
    )


def add_skip_logits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--skip-logits",
        action="store_true",
        help="do not run both sides to compare logits (it takes a whole draft in memory)",
    )


def given_rope(args: argparse.Namespace) -> dict[str, float]:
    """What the user says of the draft's RoPE, where its config does not."""
    names = ("rope_theta", "partial_rotary_factor")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def write_options(args: argparse.Namespace) -> Any:
    """The `WriteOptions` of the arguments."""
    import torch

    from dspark_megatron.conversion.folder_writer import WriteOptions

    return WriteOptions(
        layout=args.layout,
        dtype=getattr(torch, DTYPES[args.dtype]) if args.dtype in DTYPES else None,
        max_shard_size=args.max_shard_size,
        shared_weights=not args.no_shared_weights,
        force=args.force,
        target_name=args.target_name,
        target_checkpoint=args.target_checkpoint or "",
    )


def _iteration(text: str) -> int | str:
    return text if text == BEST else int(text)
