"""Options of the commands that plan for a machine: its GPUs, their memory and their rates."""

import argparse

from dspark_megatron.planning.cost.machine import Machine
from dspark_megatron.planning.cost.rates import GPUS, Rates, rates_of


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Memory and rates that are left out are those of `--gpu`."""
    add = parser.add_argument
    add("--gpus-per-node", type=int, default=8)
    add("--gpu-memory-gib", type=float, help="default: that of --gpu")
    add("--margin", type=float, default=Machine.margin, help="share of it to be planned with")
    rates = parser.add_argument_group("rates of a GPU, with which times are worked out")
    add = rates.add_argument
    add("--gpu", choices=list(GPUS), default="h100", help="SXM modules of 8 in a node")
    add("--tflops", type=float, help="dense bf16, 10^12 a second, by the data sheet")
    add("--mfu", type=float, help=f"share of it that is reached ({Rates.mfu})")
    add("--hbm", type=float, help="memory, TB/s")
    add("--nvlink", "--node-gb-per-s", type=float, help="in one direction within a node, GB/s")
    add("--network", "--network-gb-per-s", type=float, help="in one direction between nodes, GB/s")
    share = "share of memory, NVLink and network rate that is reached "
    share += f"(default: {Rates.transfer_share})"
    add("--transfer-share", type=float, help=share)
    add("--latency-us", type=float, help=f"of a collective (default: {Rates.latency_us:g})")
    add("--disk", type=float, help=f"of all ranks together, GB/s (default: {Rates.disk:g})")
    overlap = "weights of a sharded target arrive while it computes (default: yes)"
    add("--overlap", action=argparse.BooleanOptionalAction, default=None, help=overlap)


def given_machine(args: argparse.Namespace, *, nodes: int) -> Machine:
    """ConfigError where a rate cannot be."""
    memory = args.gpu_memory_gib
    if memory is None:
        memory = GPUS[args.gpu].memory_gib
    return Machine(args.gpus_per_node, nodes, memory, args.margin, rates_of(args.gpu, vars(args)))
