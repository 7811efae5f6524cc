"""What a run would train on: lengths, supervised tokens, candidate anchors, padding, what is
dropped and why, and one decoded sample with the learnt text in green (or ⟦so⟧ where the output is
no terminal). Reads the config, the data and the target's tokenizer; loads no weights. Of the config
it needs the target and the data; the draft is that of the model section, or of a checkpoint.

    python tools/inspect_data.py --config run.yaml [--sample 3] [section.key=value ...]
"""

import argparse
import sys

from dspark_megatron.errors import ConfigError, print_error, printable


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Inspect the training data of a run.")
    parser.add_argument("--config", help="YAML file of a run; or give its keys as overrides")
    parser.add_argument("--held-out", action="store_true", help="evaluate.heldout_files instead")
    parser.add_argument("--sample", type=int, default=0, help="which one to show, from 0")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    from dspark_megatron.mcore.prepare import prepare_megatron

    prepare_megatron()
    from dspark_megatron.run.inspection import inspect_data

    try:
        print(printable(inspect_data(args)))
    except ConfigError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
