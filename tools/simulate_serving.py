"""Throughput of serving many requests at once, by what decides how much of each draft is verified.

    python tools/simulate_serving.py --records drafts.safetensors --sps sps.json \\
        --output serving.json [--requests 1 4 16 64 256] [--temperatures FOLDER] [--interpolate]

Replays the drafts that an evaluation recorded (`evaluate.records`) with the step times of a table
(tools/measure_sps.py, or SGLang's profiler), and compares no drafting, fixed lengths, static
confidence thresholds and the prefix scheduler. Writes the figures as JSON and a picture beside it.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import benchmarking

from dspark_megatron.conversion.sidecar import SIDECAR, read_temperatures
from dspark_megatron.errors import ConfigError, print_error, require
from dspark_megatron.evaluation.draft_records import DraftRecords
from dspark_megatron.evaluation.pages.plots import png
from dspark_megatron.evaluation.serving.serving_plot import serving_plot
from dspark_megatron.evaluation.serving.serving_simulation import ServingSettings, simulate_serving
from dspark_megatron.evaluation.serving.sps_table import read_sps_table
from dspark_megatron.storage.checkpoints.named import NamedCheckpoint
from dspark_megatron.storage.writing import json_text, write_files

FORMATS = {"requests": "d", "policy": "", "tokens_per_second": ",.1f", "per_request": ",.1f"}
FORMATS |= {"tau": ".3f", "verified": ".3f", "speedup": ".3f"}
DEFAULTS = ServingSettings()


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Simulate serving with a prefix scheduler.")
    add = parser.add_argument
    add("--records", type=Path, required=True, help="drafts that an evaluation recorded")
    add("--sps", type=Path, required=True, help="table of steps per second, as SGLang has it")
    add("--output", type=Path, required=True, help="JSON; the picture is written beside it")
    add("--requests", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="served at once")
    add("--temperatures", type=Path, metavar="FOLDER", help=f"with {SIDECAR}; default: all 1")
    add("--interpolate", action="store_true", help="see docs/scheduling.md")
    add("--thresholds", type=float, nargs="*", default=DEFAULTS.thresholds, help="static policies")
    add("--lag", type=int, default=DEFAULTS.lag, help="age in steps of a budget's confidences")
    add("--draft-seconds", type=float, default=0.0, help="time of the drafts of a step")
    add("--rounds", type=int, default=DEFAULTS.rounds, help="replayed by each policy, at least")
    add("--seed", type=int, default=0, help="of the order of the prompts")
    return parser.parse_args(argv)


def simulate(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures by requests and policy, which are written to `args.output` as well."""
    require(
        args.output.parent.is_dir() and args.output.suffix == ".json",
        f"--output {args.output} must name a .json file in a folder that exists",
    )
    records = DraftRecords.load(args.records)
    table = read_sps_table(args.sps)
    temperatures = None
    if args.temperatures:
        draft = records.facts.get("iteration"), NamedCheckpoint.of_facts(records.facts)
        temperatures = read_temperatures(args.temperatures, records.num_draft_tokens, *draft)
    settings = ServingSettings(
        temperatures=temperatures,
        thresholds=tuple(args.thresholds),
        lag=args.lag,
        draft_seconds=args.draft_seconds,
        rounds=args.rounds,
        interpolate=args.interpolate,
        seed=args.seed,
    )
    figures = simulate_serving(records, table, args.requests, settings)
    about = {"records": str(args.records), "sps_table": str(args.sps), **vars(settings)}
    about["drafts"] = records.facts
    text = json_text({**about, "figures": figures}, indent=2) + "\n"
    picture = args.output.with_suffix(".png").name
    contents = {picture: png(serving_plot(figures)), args.output.name: text.encode()}
    write_files(args.output.parent, contents)
    return figures


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        figures = simulate(args)
    except ConfigError as error:
        return print_error(error)
    print(benchmarking.table(figures, FORMATS))
    print(f"wrote {args.output} and {args.output.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
