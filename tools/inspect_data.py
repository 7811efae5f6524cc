"""What a run would train on: lengths, supervised tokens, candidate anchors, padding, what is
dropped and why, and one decoded sample with the learnt text in green (or ⟦so⟧ where the output is
no terminal). Reads the config, the data and the target's tokenizer; loads no weights. Of the config
it needs the target and the data; the draft is that of the model section, or of a checkpoint.

    python tools/inspect_data.py --config run.yaml [--sample 3] [section.key=value ...]
"""

import argparse
import sys

from dspark_megatron.errors import ConfigError, require


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Inspect the training data of a run.")
    parser.add_argument("--config", help="YAML file of a run; or give its keys as overrides")
    parser.add_argument("--held-out", action="store_true", help="evaluate.heldout_files instead")
    parser.add_argument("--sample", type=int, default=0, help="which one to show, from 0")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(argv)


def inspect(args: argparse.Namespace) -> str:
    from dspark_megatron.config.loading import load_config
    from dspark_megatron.data.conversation import BRACKETS, GREEN, describe_sample
    from dspark_megatron.run.check import check_run
    from dspark_megatron.run.data import load_run_data
    from dspark_megatron.run.data_report import describe_data
    from dspark_megatron.run.known_draft import with_some_draft
    from dspark_megatron.run.template_day import fix_template_day

    config = with_some_draft(load_config(args.config, args.overrides, trains=False))
    layout = config.parallel
    ranks = layout.tensor_parallel * max(1, config.target.shard_across_data_parallel)
    plan = check_run(config, max(ranks, layout.expert_parallel))  # the smallest job that it allows
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


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    from dspark_megatron.mcore.prepare import prepare_megatron

    prepare_megatron()
    try:
        print(inspect(args))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
