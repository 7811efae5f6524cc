"""`dspark evaluate`: decode prompts by real speculative decoding with the target and report tau,
acceptance by position and speed, as a table and as JSON.

Of the config it needs the target, the prompts and a checkpoint, which knows its draft.
"""

import argparse

from dspark_megatron.cli.config_argument import add_config, given_config
from dspark_megatron.cli.exit_codes import DONE
from dspark_megatron.cli.output import Output
from dspark_megatron.cli.train.launching import add_launch, run_on_ranks
from dspark_megatron.config.loading import load_config

EXAMPLES = """\
  dspark evaluate runs/mine evaluate.prompt_files=[chats.jsonl] --gpus 8
  dspark evaluate run.yaml evaluate.temperature=1 evaluate.max_new_tokens=512"""
STOP = "stopping; nothing of an evaluation is kept"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "YAML file of the run, or its folder")
    add_launch(parser)
    parser.set_defaults(dry_run=False)


def run(args: argparse.Namespace, output: Output) -> int:
    load_config(given_config(args), args.overrides, trains=False)
    return run_on_ranks(args, output, rank, STOP)


def rank(args: argparse.Namespace, output: Output) -> int:
    """The imports within are slow; those of the work need the CPU support that `launch`
    installs."""
    from dspark_megatron.cli.train.rank import ends_by_signal, words_for
    from dspark_megatron.run.ranks.launcher import end_with_launcher

    end_with_launcher()
    with ends_by_signal(), words_for(output):
        from dspark_megatron.run.ranks.runtime import launch

        with launch() as job:
            from dspark_megatron.evaluation.command import run as evaluate

            figures = evaluate(job, args)
    if job.rank == 0:
        output.result(figures)
    return DONE
