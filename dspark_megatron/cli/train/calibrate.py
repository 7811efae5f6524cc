"""`dspark calibrate`: temperatures of a draft's confidence head from records of its evaluation.

Writes into the folder of a run or an export `dspark_sts.json` (for SGLang; an export carries the
run's along), `calibration.json` (all figures), `reliability.png` and `threshold_sweep.png`. See
docs/calibration.md.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from dspark_megatron.cli.output import Output
from dspark_megatron.errors import require

EXAMPLES = """\
  dspark calibrate runs/mine
  dspark calibrate --records runs/mine/drafts.safetensors --output runs/mine --labels expected

The records come from `dspark evaluate run.yaml evaluate.records=runs/mine/drafts.safetensors`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", metavar="RUN", help="the run's folder")
    parser.add_argument(
        "--records", nargs="+", type=Path, help="of one draft (RUN/drafts.safetensors)"
    )
    parser.add_argument("--output", type=Path, help="folder to write into (RUN)")
    about = "YAML of a run to evaluate first, on the ranks that are started with this command"
    parser.add_argument("--config", help=about)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of --config")
    parser.add_argument("--labels", default="observed", help="observed (default) or expected")
    parser.add_argument("--bins", type=int, default=20, help="of the calibration error")
    parser.add_argument("--fit-share", type=float, default=0.5, help="of the prompts")
    parser.add_argument("--widest-temperature", type=float, default=10.0, help="end of the grid")
    parser.add_argument("--seed", type=int, default=0, help="of the split by prompt")
    parser.add_argument("--force", action="store_true", help="replace temperatures of another kind")


def run(args: argparse.Namespace, output: Output) -> None:
    _place(args)
    from dspark_megatron.conversion.sidecar import SIDECAR, check_place, sidecar_json
    from dspark_megatron.evaluation.confidence.calibration import CalibrationSettings, calibrate
    from dspark_megatron.evaluation.confidence.calibration_records import load_records
    from dspark_megatron.evaluation.pages.plots import png, reliability_diagram, threshold_plot
    from dspark_megatron.storage.writing import json_text, write_files

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
    files = f"{{{SIDECAR},calibration.json,reliability.png,threshold_sweep.png}}"
    output.result(result, [_summary(result), f"wrote {args.output}/{files}"])


def _place(args: argparse.Namespace) -> None:
    """Records and output are those of the run, unless they are given."""
    if args.config is not None and args.run is not None:  # as the older command names it
        args.overrides, args.run = [args.run, *args.overrides], None
    settings = [text for text in (args.run, *args.overrides) if text and "=" in text]
    require(
        args.config is not None or not settings,
        f"{', '.join(settings)} goes with --config; name a run's folder, or --records and --output",
    )
    if args.run is not None:
        args.records = args.records or [Path(args.run) / "drafts.safetensors"]
        args.output = args.output or Path(args.run)
    require(
        bool(args.records) and args.output is not None,
        "name a run's folder, or both --records and --output",
    )
    missing = [] if args.config else [str(path) for path in args.records if not path.is_file()]
    require(
        not missing,
        f"{', '.join(missing)} is missing; an evaluation of the run writes it: "
        "dspark evaluate run.yaml evaluate.records=RUN/drafts.safetensors",
    )


def _evaluate(args: argparse.Namespace) -> bool:
    """Make the records; whether this is the rank that calibrates on them."""
    from dspark_megatron.cli.train.evaluate import rank
    from dspark_megatron.config.loading import load_config
    from dspark_megatron.run.known_draft import evaluated_draft, with_draft_of
    from dspark_megatron.storage.writing import claim_file

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
    draft = evaluated_draft(config)
    config = with_draft_of(config, draft) if draft else config
    require(
        config.model.enable_confidence_head,
        "model.enable_confidence_head is false: there is no head to calibrate",
    )
    claim_file(args.output / "calibration.json", "--output")
    rank(argparse.Namespace(config=args.config, overrides=overrides, drafts=[]), Output())
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
