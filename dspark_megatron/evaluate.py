"""Evaluate a drafter: `torchrun --nproc-per-node N -m dspark_megatron.evaluate --config FILE ...`.

Of the config it needs the target, the prompts and a checkpoint, which knows its draft. Decodes
prompt files by real speculative decoding with the target and reports tau, acceptance by position
and speed, as a table and as JSON.
"""

import argparse

from dspark_megatron.run.ranks.launcher import end_with_launcher


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a DSpark drafter.")
    parser.add_argument("--config", help="YAML file of a run; or give its keys as overrides")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    """The imports within are slow; those of the work need the CPU support that `launch`
    installs."""
    arguments = parse_arguments(argv)
    end_with_launcher()
    from dspark_megatron.run.ranks.runtime import launch

    with launch() as job:
        from dspark_megatron.evaluation.command import run

        run(job, arguments)


if __name__ == "__main__":
    main()
