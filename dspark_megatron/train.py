"""Train a drafter: `torchrun --nproc-per-node N -m dspark_megatron.train --config FILE ...`."""

import argparse

from dspark_megatron.run.ranks.launcher import end_with_launcher
from dspark_megatron.training.stop_requests import stop_requests


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
    """The imports within are slow, and no signal may be lost meanwhile; those of the work need the
    CPU support that `launch` installs."""
    arguments = parse_arguments(argv)
    end_with_launcher()
    with stop_requests() as stop:
        from dspark_megatron.run.ranks.runtime import launch

        with launch() as job:
            from dspark_megatron.planning.dry_run import describe_run
            from dspark_megatron.training.command import run

            run(job, arguments, stop, describe_run)


if __name__ == "__main__":
    main()
