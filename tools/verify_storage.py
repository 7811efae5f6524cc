"""Read checkpoints, stored states and tokenized data in full and compare their checksums.

    python tools/verify_storage.py CHECKPOINT_OR_STORE [...]

Takes runs and `checkpoints` folders (all of their checkpoints), single `iter_*` folders, folders
of stored states in either layout, and `tokens_*` folders of tokenized data. Prints a line for each
file and, where all are sound, one for the folder. Folders of older versions have no checksums:
sizes and values are checked, and that is said. The exit code is 1 if anything is damaged, 2 for a
path that holds none of these.
"""

import argparse
import sys
from pathlib import Path

from dspark_megatron.errors import ConfigError, print_error, printable


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare checkpoints and stored states in full.")
    help_of_path = "a run, a checkpoint, or a folder of stored states or tokenized data"
    parser.add_argument("paths", nargs="+", type=Path, metavar="PATH", help=help_of_path)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    from dspark_megatron.mcore.prepare import prepare_megatron

    prepare_megatron()
    from dspark_megatron.run.verification import verify

    damaged = 0
    try:
        for path in args.paths:
            for verdict in verify(path):
                damaged += bool(verdict.damage)
                print(printable(str(verdict)), flush=True)
    except ConfigError as error:
        return print_error(error)
    print(f"{damaged} damaged" if damaged else "all is as it was written")
    return 1 if damaged else 0


if __name__ == "__main__":
    sys.exit(main())
