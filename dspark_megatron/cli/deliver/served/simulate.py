"""`dspark served simulate`: throughput of serving many requests at once, by what decides how much
of each draft is verified.

Replays the drafts that an evaluation recorded (`evaluate.records`) with the step times of a table
(`dspark served measure`, or SGLang's profiler), and compares no drafting, fixed lengths, static
confidence thresholds and the prefix scheduler. Writes the figures as JSON and a picture beside it.
"""

import argparse
from pathlib import Path

from dspark_megatron.cli.output import Output
from dspark_megatron.evaluation.serving.settings import ServingSettings

EXAMPLES = """\
  dspark served simulate --records drafts.safetensors --sps sps.json --output serving.json
  dspark served simulate --records runs/mine/drafts.safetensors --sps sps.json \\
      --output serving.json --requests 1 2 4 8 --temperatures runs/mine

The records come from `dspark evaluate run.yaml evaluate.records=drafts.safetensors`, the table from
`dspark served measure run.yaml --output sps.json`."""
DEFAULTS = ServingSettings()
REQUESTS = (1, 4, 16, 64, 256)
COLUMNS = {"requests": "d", "policy": "", "tokens_per_second": ",.1f", "per_request": ",.1f"}
COLUMNS |= {"tau": ".3f", "verified": ".3f", "speedup": ".3f"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    about = "drafts that an evaluation recorded"
    add("--records", type=Path, required=True, metavar="FILE", help=about)
    about = "table of steps per second, as SGLang has it"
    add("--sps", type=Path, required=True, metavar="FILE", help=about)
    about = "JSON; the picture is written beside it"
    add("--output", type=Path, required=True, metavar="FILE", help=about)
    about = f"served at once (default: {' '.join(map(str, REQUESTS))})"
    add("--requests", type=int, nargs="+", metavar="R", default=REQUESTS, help=about)
    about = "of a calibrated draft, with its dspark_sts.json (default: all temperatures are 1)"
    add("--temperatures", type=Path, metavar="FOLDER", help=about)
    about = "the scheduler reads straight lines between the points of the table"
    add("--interpolate", action="store_true", help=about)
    about = f"static policies (default: {' '.join(map(str, DEFAULTS.thresholds))})"
    add("--thresholds", type=float, nargs="*", metavar="T", default=DEFAULTS.thresholds, help=about)
    about = "age in steps of a budget's confidences"
    add("--lag", type=int, metavar="N", default=DEFAULTS.lag, help=about)
    about = "time of the drafts of a step"
    add("--draft-seconds", type=float, metavar="S", default=DEFAULTS.draft_seconds, help=about)
    about = "replayed by each policy, at least"
    add("--rounds", type=int, metavar="N", default=DEFAULTS.rounds, help=about)
    about = "of the order of the prompts"
    add("--seed", type=int, metavar="N", default=DEFAULTS.seed, help=about)


def run(args: argparse.Namespace, output: Output) -> None:
    from dspark_megatron.evaluation.report import text_table
    from dspark_megatron.evaluation.serving.simulation_files import picture_of, simulate_files

    settings = ServingSettings(
        thresholds=tuple(args.thresholds),
        lag=args.lag,
        draft_seconds=args.draft_seconds,
        rounds=args.rounds,
        interpolate=args.interpolate,
        seed=args.seed,
    )
    result = simulate_files(
        args.records,
        args.sps,
        args.output,
        requests=list(args.requests),
        settings=settings,
        temperatures=args.temperatures,
    )
    wrote = f"wrote {args.output} and {picture_of(args.output)}"
    output.result(result, [text_table(result["figures"], COLUMNS), wrote])
