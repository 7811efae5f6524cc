"""Write the target's states of a run's data to disk, for `target.provider: cache`.

    torchrun --nproc-per-node N tools/prepare_target_cache.py --config run.yaml \\
        [--output DIR] [--dtype bfloat16|float8|float32] [--format rows|deepspec] \\
        [section.key=value ...]

The older name of `dspark cache`, for ranks that are started already.
"""

import argparse

from dspark_megatron.cli.output import Output
from dspark_megatron.cli.prepare.cache import add_states, rank


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Store the target's states.")
    parser.add_argument("--config", required=True, help="YAML file of the run that is to read it")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    add_states(parser)
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    rank(parse_arguments(argv), Output())


if __name__ == "__main__":
    main()
