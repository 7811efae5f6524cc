"""Temperatures of a draft's confidence head from records of its evaluation (`evaluate.records`).

    python tools/calibrate_confidence.py --records runs/x/drafts.safetensors [...] --output DIR \\
        [--labels observed|expected] [--bins 20] [--fit-share 0.5] [--force]
    torchrun --nproc-per-node N tools/calibrate_confidence.py --config run.yaml \\
        --records runs/x/drafts.safetensors --output DIR [section.key=value ...]

The second form evaluates the draft first, without plain decoding, and leaves its records in that
file. Writes into DIR, a run's or an export's folder: `dspark_sts.json` (for SGLang; an export
carries the run's along), `calibration.json` (all figures), `reliability.png` and
`threshold_sweep.png`. See docs/calibration.md.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from dspark_megatron import evaluate
from dspark_megatron.config.loading import load_config
from dspark_megatron.conversion.sidecar import SIDECAR, check_place, sidecar_json
from dspark_megatron.errors import ConfigError, printable, require
from dspark_megatron.evaluation.confidence.calibration import CalibrationSettings, calibrate
from dspark_megatron.evaluation.confidence.calibration_records import load_records
from dspark_megatron.evaluation.pages.plots import png, reliability_diagram, threshold_plot
from dspark_megatron.run.known_draft import evaluated_checkpoint, with_draft_of
from dspark_megatron.storage.writing import claim_file, json_text, write_files


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Calibrate a draft's confidence head.")
    parser.add_argument("--records", required=True, nargs="+", type=Path, help="of one draft")
    parser.add_argument("--config", help="YAML of the run to evaluate first")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of --config")
    parser.add_argument("--output", required=True, type=Path, help="folder to write into")
    parser.add_argument("--labels", default="observed", help="observed (default) or expected")
    parser.add_argument("--bins", type=int, default=20, help="of the calibration error")
    parser.add_argument("--fit-share", type=float, default=0.5, help="of the prompts")
    parser.add_argument("--widest-temperature", type=float, default=10.0, help="end of the grid")
    parser.add_argument("--seed", type=int, default=0, help="of the split by prompt")
    parser.add_argument("--force", action="store_true", help="replace temperatures of another kind")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        _calibrate(args)
    except ConfigError as error:
        sys.exit(f"error: {printable(str(error))}")


def _calibrate(args: argparse.Namespace) -> None:
    settings = CalibrationSettings(
        labels=args.labels,
        bins=args.bins,
        fit_share=args.fit_share,
        widest_temperature=args.widest_temperature,
        seed=args.seed,
    )
    if args.config and not _evaluate(args):
        return
    records = load_records(args.records)
    check_place(args.output, records.num_draft_tokens, records.facts, args.force)
    result = calibrate(records, settings)
    texts = {"calibration.json": json_text(result, indent=1) + "\n", SIDECAR: sidecar_json(result)}
    write_files(
        args.output,
        {
            "reliability.png": png(reliability_diagram(result["survival"])),
            "threshold_sweep.png": png(threshold_plot(result["threshold_sweep"])),
            **{name: text.encode() for name, text in texts.items()},
        },
    )
    print(_summary(result))
    print(f"wrote {args.output}/{{{SIDECAR},calibration.json,reliability.png,threshold_sweep.png}}")


def _evaluate(args: argparse.Namespace) -> bool:
    """Make the records; whether this is the rank that calibrates on them."""
    require(
        len(args.records) == 1 and args.records[0].parent.is_dir(),
        f"with --config one file of --records is written, in a folder that exists; got "
        f"{', '.join(map(str, args.records))}",
    )
    records = args.records[0]
    own = {
        "output": records.with_suffix(".json"),  # not the run's own evaluation
        "records": records,
        "compare_plain": "false",
        "scheduler": "none",
        "sps_table": "''",
        "temperatures": "''",
    }
    overrides = [*args.overrides, *(f"evaluate.{key}={value}" for key, value in own.items())]
    config = load_config(args.config, overrides, trains=False)
    checkpoint = evaluated_checkpoint(config)
    config = with_draft_of(config, checkpoint) if checkpoint else config
    require(
        config.model.enable_confidence_head,
        "model.enable_confidence_head is false: there is no head to calibrate",
    )
    claim_file(args.output / "calibration.json", "--output")
    evaluate.main(["--config", args.config, *overrides])
    return os.environ.get("RANK", "0") == "0"


def _summary(result: dict[str, Any]) -> str:
    """The figures of survival by slot, as a table."""
    fit, held_out = result["fit"], result["held_out"]
    lines = [
        f"temperatures fitted on {fit['rounds']} rounds of {fit['prompts']} prompts, figures of "
        f"{held_out['rounds']} rounds of {held_out['prompts']} others; {result['labels']} labels",
        f"{'slot':<6}{'T':>8}{'ECE':>9}{'after':>9}{'floor':>9}{'AUC':>9}{'after':>9}{'Brier':>9}"
        f"{'after':>9}",
    ]
    before, after = result["survival"]["before"], result["survival"]["after"]
    for slot, temperature in enumerate(result["temperatures"]):
        columns = [before["ece"], after["ece"], after["noise_floor"], before["auc"], after["auc"]]
        columns += [before["brier"], after["brier"]]
        cells = "".join(f"{_show(column[slot]):>9}" for column in columns)
        lines.append(f"{slot:<6}{temperature:>8.3f}{cells}")
    return "\n".join([*lines, result["verdict"], *result["notes"]])


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    main()
