"""`dspark served simulate` under the name of earlier versions."""

import sys

from dspark_megatron.cli.main import run_command


def main(argv: list[str] | None = None) -> int:
    return run_command(
        "served simulate", sys.argv[1:] if argv is None else argv, prog="tools/simulate_serving.py"
    )


if __name__ == "__main__":
    sys.exit(main())
