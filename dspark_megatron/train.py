"""Train a drafter: `torchrun --nproc-per-node N -m dspark_megatron.train --config FILE ...`.

The older name of `dspark train`, for ranks that are started already.
"""

import argparse

from dspark_megatron.cli.output import Output
from dspark_megatron.cli.train.train import rank


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a DSpark drafter.")
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved config, layout, parameters and memory per rank; train nothing",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Ends well also where it was stopped before its first step: a launcher of ranks takes any
    other code for a failure."""
    rank(parse_arguments(argv), Output())


if __name__ == "__main__":
    main()
