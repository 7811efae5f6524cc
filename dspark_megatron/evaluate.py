"""Evaluate a drafter: `torchrun --nproc-per-node N -m dspark_megatron.evaluate --config FILE ...`.

The older name of `dspark evaluate`, for ranks that are started already.
"""

import argparse

from dspark_megatron.cli.output import Output
from dspark_megatron.cli.train.evaluate import rank


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a DSpark drafter.")
    parser.add_argument("--config", help="YAML file of a run; or give its keys as overrides")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.set_defaults(drafts=[])
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    rank(parse_arguments(argv), Output())


if __name__ == "__main__":
    main()
