"""The way from `dspark COMMAND` to the module of the command.

A module of a command has `EXAMPLES`, `add_arguments(parser)` and `run(args, output)`, which returns
an exit code or nothing. What it imports at its top must be light, since `--help` shall be at once.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import dspark_megatron
from dspark_megatron.cli.exit_codes import DONE, EXIT_CODES, INTERRUPTED
from dspark_megatron.cli.output import Output
from dspark_megatron.errors import ConfigError, print_error


@dataclass(frozen=True)
class Command:
    name: str
    module: str
    """Below `dspark_megatron.cli`."""
    summary: str


GROUPS: dict[str, tuple[Command, ...]] = {
    "prepare": (
        Command("plan", "prepare.plan", "write the run that a target needs on given GPUs"),
    ),
    "train": (
        Command("report", "train.report", "curves, acceptance and calibration of runs on one page"),
    ),
    "deliver": (),
}
COMMANDS = {command.name: command for group in GROUPS.values() for command in group}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return DONE
    if words[0] == "--version":
        print(f"dspark-megatron {dspark_megatron.__version__}")
        return DONE
    if words[0] not in COMMANDS:
        return print_error(
            ConfigError(f"there is no command {words[0]!r}; `dspark --help` lists all of them")
        )
    return run_command(words[0], words[1:])


def run_command(name: str, argv: Sequence[str], prog: str | None = None) -> int:
    """Also for the older commands, which keep their names. prog: the name that the help shows."""
    command = COMMANDS[name]
    module = import_module(f"dspark_megatron.cli.{command.module}")
    parser = argparse.ArgumentParser(
        prog=prog or f"dspark {name}",
        description=f"{command.summary[0].upper()}{command.summary[1:]}.",
        epilog=f"examples:\n{module.EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    args = parser.parse_intermixed_args(argv)
    try:
        code = module.run(args, Output(json=args.json, quiet=args.quiet))
    except ConfigError as error:
        return print_error(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    return code or DONE


def overview() -> str:
    """The help of `dspark` itself."""
    lines = [
        "usage: dspark COMMAND [options]",
        "",
        "Train DSpark drafters for speculative decoding.",
    ]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:"]
        lines += [f"  {command.name:<10} {command.summary}" for command in commands]
    lines += ["", "exit codes:"]
    lines += [f"  {code.number:<10} {code.meaning}" for code in EXIT_CODES]
    lines += ["", "`dspark COMMAND --help` shows the options of a command, with examples."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
