"""`dspark served engines`: what each engine reads of a draft's folder, by version."""

import argparse

from dspark_megatron.cli.output import Output

EXAMPLES = """\
  dspark served engines
  dspark served engines --engine vLLM --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", metavar="NAME", help="only this one (default: all)")


def run(args: argparse.Namespace, output: Output) -> None:
    from dspark_megatron.conversion.engines.listing import (
        engine_lines,
        engine_record,
        find_engines,
    )

    found = find_engines(args.engine)
    lines = (line for engine in found for line in engine_lines(engine))
    output.result({"engines": [engine_record(engine) for engine in found]}, lines)
