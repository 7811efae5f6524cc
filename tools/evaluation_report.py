"""One self-contained HTML page of an evaluation, from the JSON files alone.

    python tools/evaluation_report.py runs/x/evaluation.json \\
        [--calibration runs/x/calibration.json] [--simulation simulation.json] --output report.html

--calibration: of tools/calibrate_confidence.py, for the same draft. --simulation: of
tools/simulate_serving.py.
"""

import argparse
import sys
from pathlib import Path

from dspark_megatron.errors import ConfigError, printable


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Report an evaluation as an HTML page.")
    parser.add_argument("evaluation", type=Path, help="evaluation.json of a run")
    parser.add_argument("--calibration", type=Path, help="calibration.json of the same draft")
    parser.add_argument("--simulation", type=Path, help="JSON of a serving simulation")
    parser.add_argument("--output", required=True, type=Path, help="the HTML file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        _report(args)
    except ConfigError as error:
        sys.exit(f"error: {printable(str(error))}")


def _report(args: argparse.Namespace) -> None:
    from dspark_megatron.evaluation.pages.report_inputs import (
        read_calibration,
        read_evaluation,
        read_simulation,
    )
    from dspark_megatron.evaluation.pages.report_page import report_page
    from dspark_megatron.storage.writing import write_text

    evaluation = read_evaluation(args.evaluation)
    calibration = args.calibration and read_calibration(args.calibration, evaluation)
    simulation = args.simulation and read_simulation(args.simulation, evaluation)
    text = report_page(evaluation, calibration, simulation)
    write_text(args.output, text)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
