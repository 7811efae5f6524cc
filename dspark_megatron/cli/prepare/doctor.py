"""`dspark doctor`: whether this machine, or each rank of a job, has what training needs.

Started by torchrun it is a rank of that job; else it starts `--gpus` ranks on this machine.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dspark_megatron.cli.exit_codes import DONE, NOT_SOUND
from dspark_megatron.cli.output import Output
from dspark_megatron.errors import ConfigError, require

EXAMPLES = """\
  dspark doctor
  dspark doctor --gpus 8 run.yaml
  torchrun --nnodes 2 --nproc-per-node 8 -m dspark_megatron doctor --folder /shared/runs"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", nargs="?", metavar="CONFIG", help="YAML of a run: its folder must be shared")
    add("--gpus", type=int, help="ranks to start on this machine (default: 1)")
    add("--folder", type=Path, help="another folder that all ranks must see")
    add("overrides", nargs="*", metavar="section.key=value")


def run(args: argparse.Namespace, output: Output) -> int:
    require(args.gpus is None or 1 <= args.gpus <= 64, f"--gpus ({args.gpus}) must be 1 to 64")
    folder = _folder(args)
    is_rank = "RANK" in os.environ
    require(
        not (is_rank and args.gpus),
        "torchrun has started this process as a rank of its own; leave out --gpus",
    )
    ranks = args.gpus or 1
    told = check_rank(folder) if is_rank or ranks == 1 else _started(ranks, folder)
    found = list(_merged(told))
    sound = all(finding["verdict"] != "missing" for finding in found)
    if int(os.environ.get("RANK", 0)) == 0:
        lines = [
            f"{one['verdict']:<8} {one['check']:<24} {one['text']}{_whose(one['ranks'], len(told))}"
            for one in found
        ]
        output.result({"ranks": len(told), "findings": found, "sound": sound}, lines)
    return DONE if sound else NOT_SOUND


def check_rank(folder: Path | None) -> list[list[tuple[str, str, str]]]:
    """The findings of all ranks, on each of them."""
    from dspark_megatron.run.ranks.places import set_time_limit
    from dspark_megatron.run.ranks.runtime import launch

    with launch(with_megatron=False) as job:
        import torch.distributed as dist

        from dspark_megatron.cli.prepare.machine_checks import findings

        set_time_limit(1)
        told: list[Any] = [None] * job.world_size
        mine = [tuple(finding) for finding in findings(job, folder)]
        dist.all_gather_object(told, mine)
    return told


def _started(ranks: int, folder: Path | None) -> list[list[tuple[str, str, str]]]:
    """The same by as many ranks on this machine."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        run_id="doctor",
        nproc_per_node=ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        return elastic_launch(config, check_rank)(folder)[0]
    except ChildFailedError as error:
        raise ConfigError(
            f"a rank of {ranks} on this machine ended before its checks were done; its lines above "
            "say why. Try fewer --gpus, and NCCL_DEBUG=INFO"
        ) from error


def _folder(args: argparse.Namespace) -> Path | None:
    """The folder to look at: of a run the nearest one that is there, since a run makes its own."""
    require(
        args.folder is None or args.config is None,
        f"give either CONFIG ({args.config}) or --folder ({args.folder})",
    )
    if args.config is None:
        return args.folder
    from dspark_megatron.config.loading import load_config

    folder = Path(load_config(args.config, args.overrides).train.output_dir).absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def _merged(told: list[list[tuple[str, str, str]]]) -> Iterator[dict[str, Any]]:
    """Each finding once, with the ranks that have it, in the order of the checks."""
    ranks: dict[tuple[str, str, str], list[int]] = {}
    for rank, findings in enumerate(told):
        for finding in findings:
            ranks.setdefault(finding, []).append(rank)
    order = {name: place for place, (name, *_) in enumerate(told[0])}
    for finding in sorted(ranks, key=lambda one: order.get(one[0], len(order))):
        name, verdict, text = finding
        yield {"check": name, "verdict": verdict, "text": text, "ranks": ranks[finding]}


def _whose(ranks: list[int], world_size: int) -> str:
    if len(ranks) == world_size or world_size == 1:
        return ""
    return f" (rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))})"
