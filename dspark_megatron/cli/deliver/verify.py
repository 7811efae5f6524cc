"""`dspark verify`: whether folders are sound, each by what lies in it.

A draft's folder is read strictly and judged for each engine. Checkpoints, stored states and
tokenized data are read in full and compared with their checksums.
"""

import argparse
from pathlib import Path
from typing import Any

from dspark_megatron.cli.deliver import draft_options
from dspark_megatron.cli.deliver.run_settings import fill_from_run
from dspark_megatron.cli.exit_codes import DONE, NOT_SOUND
from dspark_megatron.cli.output import Output
from dspark_megatron.errors import ConfigError, printable, require

EXAMPLES = """\
  dspark verify runs/x/export
  dspark verify runs/x/export --run runs/x
  dspark verify runs/x states/x"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    about = (
        "a draft's folder, a run, a checkpoint, stored states (dspark cache) or a tokens_* folder"
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help=about)
    add = parser.add_argument_group("for a draft's folder").add_argument
    add("--run", type=Path, metavar="RUN", help="compare tensors and logits with this run's")
    draft_options.add_target(parser, default="that of --run")
    draft_options.add_checkpoint_choice(parser)
    draft_options.add_read_folder(parser)
    draft_options.add_skip_logits(parser)


def run(args: argparse.Namespace, output: Output) -> int:
    """NOT_SOUND if any folder is not."""
    drafts = [folder for folder in args.folders if _is_draft(folder)]
    for folder in args.folders:
        require(folder.is_dir(), f"{folder} is not a folder; give a draft's, a run's or a store's")
    require(args.run is None or bool(drafts), "--run is compared with a draft's folder; give one")
    if drafts:
        _check_input(args, drafts, output)
    records = [
        (_verify_draft if folder in drafts else _verify_stored)(folder, args, output)
        for folder in args.folders
    ]
    sound = all(record["sound"] for record in records)
    stored = [file for record in records for file in record.get("files", ())]
    damaged = sum(bool(file["damage"]) for file in stored)
    if stored:
        output.line(f"{damaged} damaged" if damaged else "all is as it was written")
    output.result({"sound": sound, "folders": records})
    return DONE if sound else NOT_SOUND


def _is_draft(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not (folder / "checkpoints").is_dir()


def _check_input(args: argparse.Namespace, drafts: list[Path], output: Output) -> None:
    """ConfigError for what could not be compared at all, and for folders of no DSpark draft."""
    from dspark_megatron.conversion.draft_folder import read_config
    from dspark_megatron.conversion.layouts.table import detect_layout
    from dspark_megatron.storage.target_folder import load_target_config
    from dspark_megatron.storage.training_checkpoint import find_checkpoint

    if args.run is not None:
        find_checkpoint(args.run, args.iteration)
        if not args.skip_logits:
            fill_from_run(args, args.run, output)
    if args.target is not None:
        load_target_config(args.target)
    for folder in drafts:
        config = read_config(folder)
        if args.from_layout == "auto":
            try:
                detect_layout(config, ())
            except ConfigError as error:
                raise ConfigError(f"{folder}: {error}") from error


def _verify_draft(folder: Path, args: argparse.Namespace, output: Output) -> dict[str, Any]:
    from dspark_megatron.cli.deliver.draft_check import check_draft

    layout, allowed = args.from_layout, args.allow_unknown
    record: dict[str, Any] = {"folder": str(folder), "kind": "draft", "sound": True}
    try:
        return record | check_draft(
            folder, args, output, run=args.run, layout=layout, allow_unknown=allowed
        )
    except ConfigError as error:
        output.line(f"{folder} is not sound: {error}")
        return record | {"sound": False, "problems": [printable(str(error))]}


def _verify_stored(folder: Path, args: argparse.Namespace, output: Output) -> dict[str, Any]:
    from dspark_megatron.mcore.prepare import prepare_megatron

    prepare_megatron()
    from dspark_megatron.run.verification import verify

    files, damaged = [], []
    for verdict in verify(folder):
        output.line(str(verdict))
        one = {"path": str(verdict.path), "damage": verdict.damage, "note": verdict.note}
        files.append(
            {key: value for key, value in one.items() if key != "note" or not one["damage"]}
        )
        damaged += [verdict] if verdict.damage else []
    return {"folder": str(folder), "kind": "stored", "sound": not damaged, "files": files}
