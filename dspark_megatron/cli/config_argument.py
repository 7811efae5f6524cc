"""How a command is given a run's config: `run.yaml section.key=value ...`."""

import argparse
from pathlib import Path

from dspark_megatron.errors import require


def add_config(parser: argparse.ArgumentParser, about: str = "YAML file of the run") -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG", help=about)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="before CONFIG's")
    parser.add_argument("--config", dest="config_option", help=argparse.SUPPRESS)


def given_config(args: argparse.Namespace) -> str:
    """The file's name, which is then `args.config`, as `args.overrides` are the overrides alone. A
    run's folder stands for the config in it. ConfigError without a file."""
    if args.config_option is not None:  # as the older commands name it
        args.overrides = [*filter(None, [args.config]), *args.overrides]
        args.config = args.config_option
    require(
        args.config is not None and "=" not in args.config,
        "the run's config is missing; name its YAML file first: run.yaml [section.key=value ...]",
    )
    if Path(args.config).is_dir():
        args.config = str(Path(args.config) / "config.yaml")
    return args.config
