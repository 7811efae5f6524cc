"""`dspark data`: what a run would train on.

Lengths, supervised tokens, candidate anchors, padding, what is dropped and why, and one decoded
sample with the learnt text in green (or ⟦so⟧ where the output is no terminal). It reads the config,
the data and the target's tokenizer, and loads no weights.
"""

import argparse

from dspark_megatron.cli.config_argument import add_config, given_config
from dspark_megatron.cli.output import Output

EXAMPLES = """\
  dspark data run.yaml
  dspark data run.yaml --sample 3 data.max_length=2048
  dspark data target.path=models/Qwen3-8B data.train_files=[chats.jsonl] model.block_size=7

Of the config it needs the target and the data; the draft is that of the model section, or of a
checkpoint."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, "YAML file of a run; or give its keys alone")
    parser.add_argument("--held-out", action="store_true", help="evaluate.heldout_files instead")
    parser.add_argument("--sample", type=int, default=0, help="which one to show, from 0")


def run(args: argparse.Namespace, output: Output) -> None:
    given_config(args, needed=False)
    from dspark_megatron.mcore.prepare import prepare_megatron

    prepare_megatron()
    from dspark_megatron.run.inspection import inspect_data

    text = inspect_data(args)
    output.result({"text": text}, [text])
