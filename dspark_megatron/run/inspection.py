"""What `dspark data` says of a run's data."""

import sys
from argparse import Namespace

from dspark_megatron.config.loading import load_config
from dspark_megatron.data.conversation import BRACKETS, GREEN, describe_sample
from dspark_megatron.data.report import describe_data
from dspark_megatron.errors import require
from dspark_megatron.run.check import check
from dspark_megatron.run.data import load_run_data
from dspark_megatron.run.identity import fix_template_day
from dspark_megatron.run.known_draft import with_some_draft


def inspect_data(args: Namespace) -> str:
    config = with_some_draft(load_config(args.config, args.overrides, trains=False))
    layout = config.parallel
    ranks = layout.tensor_parallel * max(1, config.target.shard_across_data_parallel)
    plan = check(config, max(ranks, layout.expert_parallel))  # the smallest job that it allows
    fix_template_day(plan, lambda choose: choose())
    data = config.data
    entries = config.evaluate.heldout_files if args.held_out else data.train_files
    name, other = "data.train_files", "give --held-out"
    if args.held_out:
        name, other = "evaluate.heldout_files", "leave out --held-out"
    require(bool(entries), f"{name} is empty; name files, or {other}")
    weights = None if args.held_out else data.weights
    dataset = load_run_data(plan, entries, weights=weights, show_progress=sys.stderr.isatty())
    require(
        0 <= args.sample < len(dataset),
        f"--sample ({args.sample}) must be one of the {len(dataset):,} samples, from 0",
    )
    marks = GREEN if sys.stdout.isatty() else BRACKETS
    shown = describe_sample(dataset[args.sample], plan.tokenizer, marks)
    return f"{describe_data(config, dataset)}\n\n{shown}"
