"""The way from `dspark COMMAND` to the module of the command.

A module of a command has `EXAMPLES`, `add_arguments(parser)` and `run(args, output)`, which returns
an exit code or nothing; `args.words` are the command and its arguments as they were given. What it
imports at its top must be light, since `--help` shall be at once.
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import dspark_megatron
from dspark_megatron.cli.exit_codes import DONE, EXIT_CODES, INTERRUPTED
from dspark_megatron.cli.output import Output
from dspark_megatron.errors import ConfigError, print_error


@dataclass(frozen=True)
class Command:
    name: str
    """One word, or two where a command has several actions."""
    module: str
    """Below `dspark_megatron.cli`."""
    summary: str


GROUPS: dict[str, tuple[Command, ...]] = {
    "prepare": (
        Command("plan", "prepare.plan", "write the run that a target needs on given GPUs"),
        Command("doctor", "prepare.doctor", "see whether a machine has what training needs"),
        Command("data", "prepare.data", "show what a run would train on"),
        Command("generate", "prepare.generate", "let a target answer prompts, to train on"),
        Command("cache", "prepare.cache", "store the target's states of a run's data on disk"),
    ),
    "train": (
        Command("train", "train.train", "train a drafter, or continue a run that was stopped"),
        Command(
            "evaluate", "train.evaluate", "measure a drafter by decoding prompts with its target"
        ),
        Command("calibrate", "train.calibrate", "fit temperatures of a draft's confidence head"),
        Command("report", "train.report", "curves, acceptance and calibration of runs on one page"),
    ),
    "deliver": (
        Command("export", "deliver.export", "write a run's draft as a folder that engines load"),
        Command("import", "deliver.import_draft", "make a checkpoint of a draft's folder"),
        Command("convert", "deliver.convert", "write a draft's folder in another layout"),
        Command("verify", "deliver.verify", "check a draft's folder, a run or stored data"),
        Command("served engines", "deliver.served.engines", "say what each engine reads"),
        Command(
            "served measure", "deliver.served.measure", "time verification steps of a run's target"
        ),
        Command(
            "served simulate",
            "deliver.served.simulate",
            "replay recorded drafts as an engine would serve them",
        ),
    ),
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
    name, rest = split_command(words)
    if name in COMMANDS:
        return run_command(name, rest)
    actions = [command for command in COMMANDS.values() if command.name.startswith(f"{name} ")]
    if actions and rest[:1] in ([], ["-h"], ["--help"]):
        print("\n".join([f"usage: dspark {name} ACTION [options]", "", *map(_row, actions)]))
        return DONE
    unknown, of = (" ".join(words[:2]), f" {name}") if actions else (name, "")
    return print_error(
        ConfigError(f"there is no command {unknown!r}; `dspark{of} --help` lists all of them")
    )


def split_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """The name of the command, of one word or two, and its arguments."""
    two = " ".join(words[:2])
    return (two, list(words[2:])) if two in COMMANDS else (words[0], list(words[1:]))


def run_command(name: str, argv: Sequence[str], prog: str | None = None) -> int:
    """Also for the older commands, which keep their names. prog: the name that the help shows."""
    # PyTorch and Megatron-Core make so many objects as they load that the collector, at its usual
    # pace, takes a sixth of a rank's start.
    gc.set_threshold(10_000, 50)
    parser = parser_of(name, prog)
    args = parser.parse_intermixed_args(argv, argparse.Namespace(words=[*name.split(), *argv]))
    try:
        code = module_of(name).run(args, Output(json=args.json, quiet=args.quiet))
    except ConfigError as error:
        return print_error(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    return code or DONE


class _Help(argparse.RawDescriptionHelpFormatter):
    """Ends the help of an option with its default, unless that is nothing or is told already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = "default" in (action.help or "") or not action.option_strings
        nothing = action.default in (None, "", [], (), argparse.SUPPRESS) or action.default is False
        if told or nothing:
            return action.help
        return f"{action.help} (default: %(default)s)"


def module_of(name: str) -> Any:
    return import_module(f"dspark_megatron.cli.{COMMANDS[name].module}")


def parser_of(name: str, prog: str | None = None) -> argparse.ArgumentParser:
    """All options of a command."""
    command, module = COMMANDS[name], module_of(name)
    parser = argparse.ArgumentParser(
        prog=prog or f"dspark {name}",
        description=f"{command.summary[0].upper()}{command.summary[1:]}.",
        epilog=f"examples:\n{module.EXAMPLES}",
        formatter_class=_Help,
    )
    module.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return parser


def overview() -> str:
    """The help of `dspark` itself."""
    lines = [
        "usage: dspark COMMAND [options]",
        "",
        "Train DSpark drafters for speculative decoding.",
    ]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:"]
        lines += map(_row, commands)
    lines += ["", "exit codes:"]
    lines += [f"  {code.number:<16} {code.meaning}" for code in EXIT_CODES]
    lines += ["", "`dspark COMMAND --help` shows the options of a command, with examples."]
    return "\n".join(lines)


def _row(command: Command) -> str:
    return f"  {command.name:<16} {command.summary}"


if __name__ == "__main__":
    sys.exit(main())
