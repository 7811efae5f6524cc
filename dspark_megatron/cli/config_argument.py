"""How a command is given a run's config: `run.yaml section.key=value ...`."""

import argparse
from pathlib import Path

from dspark_megatron.errors import require


def add_config(parser: argparse.ArgumentParser, about: str = "YAML file of the run") -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG", help=about)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="keys that replace CONFIG's"
    )
    parser.add_argument("--config", dest="config_option", help=argparse.SUPPRESS)


def given_config(args: argparse.Namespace, *, needed: bool = True) -> str | None:
    """The file's name, which is then `args.config`, as `args.overrides` are the overrides alone. A
    run's folder stands for the config in it. Where no file is needed, keys may stand alone; else
    ConfigError without one."""
    if args.config_option is not None:  # as the older commands name it
        args.overrides = [*filter(None, [args.config]), *args.overrides]
        args.config = args.config_option
    if not needed and args.config is not None and "=" in args.config:
        args.config, args.overrides = None, [args.config, *args.overrides]
    if args.config is None and not needed:
        return None
    require(
        args.config is not None and "=" not in args.config,
        "the run's config is missing; name its YAML file first: run.yaml [section.key=value ...]",
    )
    if Path(args.config).is_dir():
        args.config = str(Path(args.config) / "config.yaml")
    return args.config
