"""Whether a process that a command was given starts the ranks of its node, or is one of them.

Under torchrun, srun with one task a rank, or whatever else sets RANK and WORLD_SIZE, it is a rank.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass

from dspark_megatron.cli.output import Output
from dspark_megatron.errors import require


@dataclass(frozen=True)
class Placement:
    """The processes that are to be started on this node."""

    processes: int
    """Of this node."""
    nodes: int = 1
    node_rank: int = 0
    rendezvous: str = ""
    node_address: str | None = None


def add_launch(parser: argparse.ArgumentParser, default: str = "all GPUs, or 1 process") -> None:
    """default: the processes where none are given, in words."""
    group = parser.add_argument_group(
        "processes", "Leave these out where torchrun, srun or the like starts one process a GPU."
    )
    add = group.add_argument
    about = "processes of this node, one for each of its GPUs; without a GPU they use the CPU"
    about += f" (default: {default})"
    add("--gpus", "--processes", dest="gpus", type=int, metavar="N", help=about)
    add("--nodes", type=int, metavar="N", help="start the command on each of them (default: 1)")
    about = "of this node, from 0; node 0 must be the host that --rendezvous names"
    add("--node-rank", type=int, metavar="R", help=about)
    about = "a free port of node 0 that all nodes reach, the same on each"
    add("--rendezvous", metavar="HOST:PORT", help=about)
    about = "name or address of this node for the others, where its host name is none"
    add("--node-address", metavar="HOST", help=about)
    add("--as-rank", action="store_true", help=argparse.SUPPRESS)


def is_rank(args: argparse.Namespace) -> bool:
    """Whether this process is one of the ranks. ConfigError where it is, and is to start some."""
    if args.as_rank:
        return True
    options = (args.gpus, args.nodes, args.node_rank, args.rendezvous, args.node_address)
    given = any(option is not None for option in options)
    require(
        not (given and "TORCHELASTIC_RUN_ID" in os.environ),
        "torchrun has started this process as one rank of many, so it cannot start others; leave "
        "--gpus, --nodes and the other options of processes out, or start it without torchrun",
    )
    if given:  # operators of Kubernetes set RANK for each pod
        return False
    return "RANK" in os.environ or _is_task_of_slurm()


def _is_task_of_slurm() -> bool:
    """Whether srun has started one task a rank; then its variables are made those of torchrun."""
    environment = os.environ
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return False
    require(
        "MASTER_ADDR" in environment and "MASTER_PORT" in environment,
        f"srun has started {environment['SLURM_STEP_NUM_TASKS']} tasks, which meet at "
        "MASTER_ADDR:MASTER_PORT, and these are not set; set them to the first node and a free "
        "port of it, or start one task a node with --gpus, --nodes, --node-rank and --rendezvous",
    )
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["GROUP_RANK"] = environment["SLURM_NODEID"]
    return True


def placement(args: argparse.Namespace) -> Placement:
    """What the options ask for; ConfigError where this node cannot do it."""
    nodes, rank = args.nodes or 1, args.node_rank or 0
    require(args.gpus is None or args.gpus > 0, f"--gpus ({args.gpus}) must be > 0")
    require(args.nodes is None or args.nodes > 0, f"--nodes ({args.nodes}) must be > 0")
    if nodes > 1:
        require(
            args.node_rank is not None and bool(args.rendezvous),
            f"--nodes {nodes} needs --node-rank (0 to {nodes - 1}) and --rendezvous HOST:PORT, so "
            "that the nodes find each other",
        )
        _, _, port = args.rendezvous.rpartition(":")
        require(
            ":" in args.rendezvous and port.isdigit(),
            f"--rendezvous ({args.rendezvous}) must be HOST:PORT, as in host0:29400",
        )
    require(
        0 <= rank < nodes, f"--node-rank ({rank}) must be from 0 to {nodes - 1}, --nodes is {nodes}"
    )
    count = processes_of(args)
    return Placement(count, nodes, rank, args.rendezvous or "", args.node_address)


def processes_of(args: argparse.Namespace) -> int:
    """Of this node; ConfigError if it has GPUs, and not so many."""
    import torch

    there = torch.cuda.device_count()
    require(
        not there or (args.gpus or 0) <= there or args.dry_run,
        f"--gpus ({args.gpus}) must be at most {there}, the GPUs that are seen on this node",
    )
    return args.gpus or there or 1


def run_on_ranks(
    args: argparse.Namespace,
    output: Output,
    rank: Callable[[argparse.Namespace, Output], int],
    stop_text: str,
) -> int:
    """The work of a command, in this process if that is a rank, else in the ranks of this node;
    returns the exit code. stop_text: what happens on the first Ctrl-C."""
    if is_rank(args):
        return rank(args, output)
    _load_torch()
    placed = placement(args)
    from dspark_megatron.cli.train.ranks import start_ranks

    return start_ranks([*args.words, "--as-rank"], placed, stop_text)


def _load_torch() -> None:
    """So that its C++ side speaks of errors only in this process, which reads that as it loads; the
    ranks are not told. A launcher says itself what is wrong, and would else add a stack trace
    whenever the node that serves the rendezvous ends first."""
    name = "TORCH_CPP_LOG_LEVEL"
    if name in os.environ:
        return
    os.environ[name] = "ERROR"
    try:
        import torch  # noqa: F401
    finally:
        del os.environ[name]
