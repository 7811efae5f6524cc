"""`dspark served measure`: what a verification step of a target costs on this machine, as the table
that SGLang reads.

Times the target's forward pass over B new tokens behind a context of L tokens, and its LM head on
all of them: medians of turns that go round. Without --requests the B tokens are of one request, and
the table has the steps per second of each B. With it, steps of R requests with one token each are
timed as well, and what they take beyond a single request's R tokens (the reading of R contexts) is
the table's cost by request. Not timed: drafting, sampling, gathering logits over ranks.
"""

import argparse
from pathlib import Path

from dspark_megatron.cli.config_argument import add_config, given_config
from dspark_megatron.cli.exit_codes import DONE
from dspark_megatron.cli.output import Output
from dspark_megatron.cli.train.launching import add_launch, is_rank, run_on_ranks
from dspark_megatron.config import Config
from dspark_megatron.config.loading import load_config
from dspark_megatron.evaluation.serving.settings import StepSettings

EXAMPLES = """\
  dspark served measure runs/mine --output sps.json
  dspark served measure run.yaml parallel.tensor_parallel=8 --output sps.json --requests 4 16"""
STOP = "stopping; no table is written"
DEFAULTS = StepSettings()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "YAML file of a run, or its folder; the run's target is measured")
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FILE", help="JSON, in SGLang's form")
    about = f"verified in a step (default: {' '.join(map(str, DEFAULTS.batch_tokens))})"
    tokens = DEFAULTS.batch_tokens
    add("--batch-tokens", type=int, nargs="+", metavar="B", default=tokens, help=about)
    about = "measure the cost by request, too, of so many"
    add("--requests", type=int, nargs="+", metavar="R", default=DEFAULTS.requests, help=about)
    about = "tokens before those of the step"
    length = DEFAULTS.context_length
    add("--context-length", type=int, metavar="L", default=length, help=about)
    about = "turns, of which the median counts"
    add("--rounds", type=int, metavar="N", default=DEFAULTS.rounds, help=about)
    add_launch(parser, "parallel.tensor_parallel of the run")
    parser.set_defaults(dry_run=False)


def run(args: argparse.Namespace, output: Output) -> int:
    config = load_config(given_config(args), args.overrides, trains=False)
    settings_of(args).check()
    if args.gpus is None and not is_rank(args):
        args.gpus = ranks_of_a_node(config, args.nodes or 1)
    return run_on_ranks(args, output, rank, STOP)


def rank(args: argparse.Namespace, output: Output) -> int:
    from dspark_megatron.cli.train.rank import ends_by_signal, words_for
    from dspark_megatron.run.ranks.launcher import end_with_launcher

    end_with_launcher()
    with ends_by_signal(), words_for(output):
        from dspark_megatron.run.ranks.runtime import launch

        with launch() as job:
            from dspark_megatron.evaluation.serving.measuring import lines
            from dspark_megatron.evaluation.serving.measuring import run as measure

            config = load_config(args.config, args.overrides, trains=False)
            record = measure(job, config, settings_of(args), args.output)
    if job.rank == 0:
        output.result(record, lines(record))
    return DONE


def settings_of(args: argparse.Namespace) -> StepSettings:
    return StepSettings(
        batch_tokens=tuple(args.batch_tokens),
        requests=tuple(args.requests),
        context_length=args.context_length,
        rounds=args.rounds,
    )


def ranks_of_a_node(config: Config, nodes: int) -> int:
    """One copy of the target is measured, so there are as many ranks as it is split over."""
    return max(1, config.parallel.tensor_parallel // nodes)
