"""`dspark train`: train a drafter, or continue its run."""

import argparse
import gc
import os
from pathlib import Path
from typing import Any

from dspark_megatron.cli.config_argument import add_config, given_config
from dspark_megatron.cli.exit_codes import DONE, INTERRUPTED
from dspark_megatron.cli.output import Output
from dspark_megatron.cli.train.launching import (
    add_launch,
    is_rank,
    processes_of,
    run_on_ranks,
)
from dspark_megatron.config import Config
from dspark_megatron.config.loading import load_config

EXAMPLES = """\
  dspark train run.yaml
  dspark train run.yaml --gpus 8 parallel.tensor_parallel=4 optimizer.lr=3e-4
  dspark train run.yaml --gpus 8 --nodes 2 --dry-run
  dspark train run.yaml --gpus 8 --nodes 2 --node-rank 0 --rendezvous host0:29400

The same command continues a run that was stopped. Ctrl-C or SIGTERM saves and ends with code 0."""
STOP = (
    "stopping: the step under way ends and is saved, which may take minutes; a run that is still "
    "loading ends at its first step. Ctrl-C again ends at once"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config, layout, parameters and memory of a rank for these "
        "processes, which this machine need not have; train nothing",
    )
    add_launch(parser)


def run(args: argparse.Namespace, output: Output) -> int:
    file = given_config(args)
    config = load_config(file, args.overrides)  # a wrong value is said before all else
    if is_rank(args):
        return rank(args, output)
    if args.dry_run:
        os.environ.setdefault("WORLD_SIZE", str(processes_of(args) * (args.nodes or 1)))
        return rank(args, output)
    if said := _finished(config):
        output.result(record_of(config), [said])
        return DONE
    return run_on_ranks(args, output, rank, STOP)


def _finished(config: Config) -> str | None:
    """What is said of a run that these settings have completed; None for any other."""
    from dspark_megatron.training.ending.run_end import completed_text

    return completed_text(config)


def rank(args: argparse.Namespace, output: Output) -> int:
    """The imports within are slow, and no signal may be lost meanwhile; those of the work need the
    CPU support that `launch` installs."""
    from dspark_megatron.cli.train.rank import words_for
    from dspark_megatron.run.ranks.launcher import end_with_launcher
    from dspark_megatron.training.ending.stop_requests import stop_requests

    end_with_launcher()
    with stop_requests() as stop, words_for(output) as said:
        from dspark_megatron.run.ranks.runtime import launch

        with launch() as job:
            from dspark_megatron.planning.dry_run import describe_run
            from dspark_megatron.training.command import run as train

            # Megatron-Core collects garbage at each save. What modules hold is not looked at again.
            gc.freeze()
            state = train(job, args, stop, describe_run)
    if job.rank == 0 and args.dry_run:
        output.result({"dry_run": said.getvalue()})
    elif job.rank == 0:
        output.result(record_of(load_config(args.config, args.overrides)))
    return INTERRUPTED if state is not None and state.iteration == 0 else DONE


def record_of(config: Config) -> dict[str, Any]:
    """How a run stands, by its folder."""
    folder = Path(config.train.output_dir)
    checkpoints = folder / "checkpoints"
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    iteration = int(tracker.read_text(encoding="utf-8")) if tracker.exists() else 0
    return {
        "output_dir": str(folder),
        "run_status": (folder / "run_status").read_text(encoding="utf-8").strip(),
        "iteration": iteration,
        "checkpoint": str(checkpoints / f"iter_{iteration:07d}") if iteration else None,
    }
