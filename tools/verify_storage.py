"""Older door to `dspark verify`: python tools/verify_storage.py CHECKPOINT_OR_STORE [...]"""

import sys

from dspark_megatron.cli.main import run_command


def main(argv: list[str] | None = None) -> int:
    return run_command("verify", sys.argv[1:] if argv is None else argv, "verify_storage.py")


if __name__ == "__main__":
    sys.exit(main())
