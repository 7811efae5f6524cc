"""What a verification step of a target costs on this machine, as a table that SGLang reads.

    torchrun --nproc-per-node N tools/measure_sps.py --config run.yaml [section.key=value ...] \\
        --output sps.json [--batch-tokens 1 2 4 ...] [--requests 1 2 4 ...] [--context-length L]

Times the target's forward pass over B new tokens behind a context of L tokens, and its LM head on
all of them: medians of turns that go round. Without --requests the B tokens are of one request, and
the table has the steps per second of each B. With it, steps of R requests with one token each are
timed as well, and what they take beyond a single request's R tokens (the reading of R contexts) is
the table's cost by request. Not timed: drafting, sampling, gathering logits over ranks.
"""

import argparse
from pathlib import Path


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure a target's steps per second.")
    add = parser.add_argument
    add("--config", required=True, help="YAML file of a run; its target is measured")
    add("overrides", nargs="*", metavar="section.key=value")
    add("--output", type=Path, required=True, help="JSON, in SGLang's form")
    tokens = [1, 2, 4, 8, 16, 32, 64]
    add("--batch-tokens", type=int, nargs="+", default=tokens, help="verified in a step")
    add("--requests", type=int, nargs="+", default=[], help="measure the cost by request, too")
    add("--context-length", type=int, default=512, help="tokens before those of the step")
    add("--rounds", type=int, default=10, help="turns, of which the median counts")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    from dspark_megatron.run.ranks.launcher import end_with_launcher

    end_with_launcher()
    from dspark_megatron.run.ranks.runtime import launch

    with launch() as job:
        from verification_steps import run

        run(job, args)


if __name__ == "__main__":
    main()
