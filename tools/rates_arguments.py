"""Options of the commands that work out times: a GPU's rates."""

import argparse

from dspark_megatron.planning.cost.rates import GPUS, Rates, rates_of


def add_rates(parser: argparse.ArgumentParser) -> None:
    """Each rate that is left out is that of `--gpu`."""
    rates = parser.add_argument_group("rates of a GPU (arithmetic uses them, nothing is measured)")
    add = rates.add_argument
    add("--gpu", choices=list(GPUS), default="h100", help="SXM modules of 8 in a node")
    add("--tflops", type=float, help="dense bf16, 10^12 a second, by the data sheet")
    add("--mfu", type=float, help=f"share of it that is reached ({Rates.mfu})")
    add("--hbm", type=float, help="memory, TB/s")
    add("--nvlink", "--node-gb-per-s", type=float, help="in one direction within a node, GB/s")
    add("--network", "--network-gb-per-s", type=float, help="in one direction between nodes, GB/s")
    add("--transfer-share", type=float, help="share of these three that is reached (0.8)")
    add("--latency-us", type=float, help=f"of a collective ({Rates.latency_us:g})")
    add("--disk", type=float, help=f"of all ranks together, GB/s ({Rates.disk:g})")
    add(
        "--overlap",
        action=argparse.BooleanOptionalAction,
        help="whether weights of a sharded target arrive while it computes (default: they do)",
    )


def given_rates(args: argparse.Namespace) -> Rates:
    return rates_of(args.gpu, vars(args))
