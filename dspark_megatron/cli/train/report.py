"""`dspark report`: training curves, acceptance and calibration of runs on one HTML page, or of one
evaluation. The page needs no network and no other file."""

import argparse
from pathlib import Path
from typing import Any

from dspark_megatron.cli.output import Output
from dspark_megatron.errors import require

EXAMPLES = """\
  dspark report runs/a
  dspark report runs/a runs/b --output report.html
  dspark report runs/a/evaluation.json --calibration runs/a/calibration.json --output page.html"""
PAGE = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run's folder (train.output_dir), several to compare, or one evaluation.json",
    )
    parser.add_argument(
        "--output", type=Path, help=f"the HTML file (default for one run: RUN/{PAGE})"
    )
    parser.add_argument(
        "--calibration", type=Path, help="calibration.json of the only RUN, if it lies elsewhere"
    )
    parser.add_argument(
        "--simulation", type=Path, help="JSON of a serving simulation of the only RUN's draft"
    )


def run(args: argparse.Namespace, output: Output) -> None:
    single = len(args.runs) == 1
    is_file = single and args.runs[0].is_file()
    require(
        args.output is not None or (single and not is_file),
        "--output is missing: name the HTML file; only a page of one run has a place of its own",
    )
    require(
        single or args.calibration is None and args.simulation is None,
        "--calibration and --simulation belong to one run, and several are named; in a run's "
        "folder calibration.json and serving.json are found",
    )
    page = args.output or args.runs[0] / PAGE
    require(not page.is_dir(), f"--output {page} is a folder; name a file in it")
    from dspark_megatron.storage.writing import write_text

    text, record, lines = _of_evaluation(args) if is_file else _of_runs(args)
    write_text(page, text)
    output.result({"output": str(page), **record}, [*lines, f"wrote {page}"])


def _of_evaluation(args: argparse.Namespace) -> tuple[str, dict[str, Any], list[str]]:
    from dspark_megatron.evaluation.pages.report_inputs import (
        read_calibration,
        read_evaluation,
        read_simulation,
    )
    from dspark_megatron.evaluation.pages.report_page import report_page

    evaluation = read_evaluation(args.runs[0])
    calibration = args.calibration and read_calibration(args.calibration, evaluation)
    simulation = args.simulation and read_simulation(args.simulation, evaluation)
    return report_page(evaluation, calibration, simulation), {}, []


def _of_runs(args: argparse.Namespace) -> tuple[str, dict[str, Any], list[str]]:
    """The page, its table for programs, and how many lines of each run say what is not shown."""
    from dspark_megatron.evaluation.pages.run_pages.comparison import check_runs, summary
    from dspark_megatron.evaluation.pages.run_pages.run_files import read_run
    from dspark_megatron.evaluation.pages.run_pages.runs_page import name_runs, runs_page

    check_runs(args.runs)
    runs = [read_run(folder, args.calibration, args.simulation) for folder in args.runs]
    name_runs(runs)
    text = runs_page(runs)
    record = [{**summary(run), "not_shown": [note.text for note in run.notes]} for run in runs]
    lines = [f"{run.name}: {note.text}" for run in runs for note in run.notes]
    return text, {"runs": record}, lines
