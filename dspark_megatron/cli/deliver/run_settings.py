"""What a command takes from the folder of a run, where its options do not say it."""

import argparse
import re
from pathlib import Path

from dspark_megatron.cli.output import Output
from dspark_megatron.errors import require


def run_folder(path: Path) -> Path:
    """Of a run folder, its `checkpoints/` or one `iter_*` folder."""
    path = path.absolute() if path.name in ("", "..") else path
    if re.fullmatch(r"iter_\d+", path.name):
        path = path.parent
    return path.parent if path.name == "checkpoints" else path


def fill_from_run(args: argparse.Namespace, run: Path, output: Output) -> None:
    """Take `--target` and `--target-checkpoint` from the config that a run has saved, and say so.
    ConfigError where there is none and no target is given."""
    if args.target is not None:
        args.target_checkpoint = args.target_checkpoint or ""
        return
    file = run_folder(run) / "config.yaml"
    require(run.is_dir(), f"{run} is not a folder; give a run, checkpoints or iter_* folder")
    require(file.is_file(), f"{file} is not there, so the target is not known; give --target")
    from dspark_megatron.config.loading import load_config

    target = load_config(file, trains=False).target
    require(
        Path(target.path).is_dir(),
        f"{file} names the target {target.path}, which is no folder here; give --target",
    )
    args.target = Path(target.path)
    taken = [f"--target {target.path}"]
    if args.target_checkpoint is None:
        args.target_checkpoint = target.checkpoint
        taken += [f"--target-checkpoint {target.checkpoint}"] if target.checkpoint else []
    output.line(f"from {file}: {' '.join(taken)}")
