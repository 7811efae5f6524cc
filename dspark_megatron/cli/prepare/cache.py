"""`dspark cache`: write the target's states of a run's data to disk, for `target.provider: cache`.

Any layout that trains writes: tensor parallelism, sharding and expert parallelism as in the config;
data-parallel ranks share out the shards. It says first how much it will write and refuses what the
disk cannot hold. Killed at any point, the same command goes on where it was. `deepspec` is
DeepSpec's own layout (version 2): larger, for its trainer.
"""

import argparse
from pathlib import Path

from dspark_megatron.cli.config_argument import add_config, given_config
from dspark_megatron.cli.exit_codes import DONE
from dspark_megatron.cli.output import Output
from dspark_megatron.cli.train.launching import add_launch, run_on_ranks
from dspark_megatron.config.loading import load_config

EXAMPLES = """\
  dspark cache run.yaml --output /data/states --gpus 8
  dspark cache run.yaml --output /data/states --dtype float8 target.samples_per_pass=8"""
STOP = "stopping; whole shards are kept, and the same command goes on from there"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "YAML file of the run that is to read the states")
    add_states(parser)
    add_launch(parser)
    parser.set_defaults(dry_run=False)


def add_states(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    about = "an empty or new folder, or one to go on with (default: target.cache)"
    add("--output", type=Path, metavar="DIR", help=about)
    types = ["bfloat16", "float8", "float32"]
    about = "of the taps; float8: e4m3, scaled (default: bfloat16)"
    add("--dtype", choices=types, default="bfloat16", help=about)
    about = "layout of the files (default: rows)"
    add("--format", choices=["rows", "deepspec"], default="rows", help=about)
    about = "MiB of a shard, at most; a kill loses one a rank (default: 512)"
    add("--shard-mib", type=float, default=512, help=about)


def run(args: argparse.Namespace, output: Output) -> int:
    load_config(given_config(args), args.overrides)
    return run_on_ranks(args, output, rank, STOP)


def rank(args: argparse.Namespace, output: Output) -> int:
    from dspark_megatron.cli.train.rank import ends_by_signal, words_for
    from dspark_megatron.run.ranks.launcher import end_with_launcher

    end_with_launcher()
    with ends_by_signal(), words_for(output):
        from dspark_megatron.run.ranks.runtime import launch

        with launch() as job:
            from dspark_megatron.training.store_states import run as store_states

            folder = store_states(job, args)
    if job.rank == 0:
        output.result({"output": str(folder), "format": args.format, "dtype": args.dtype})
    return DONE
