"""A draft folder, checked and judged, with its tensors and logits compared with a run's."""

import argparse
from pathlib import Path
from typing import Any

from dspark_megatron.cli.output import Output


def fingerprint_of(args: argparse.Namespace) -> Any:
    """How training fingerprinted the target."""
    from dspark_megatron.storage.target_weights import weights_fingerprint

    return lambda target_dir: weights_fingerprint(target_dir, args.target_checkpoint or "")


def check_draft(
    folder: Path,
    args: argparse.Namespace,
    output: Output,
    *,
    run: Path | None = None,
    layout: str = "auto",
    allow_unknown: list[str] | None = None,
) -> dict[str, Any]:
    """The record of a sound folder, whose lines are printed on the way. run: compared with it,
    too. ConfigError that lists what is wrong."""
    from dspark_megatron.conversion.verify import check_folder

    report = check_folder(
        folder,
        layout=layout,
        checkpoint=run,
        target_dir=args.target,
        iteration=args.iteration if run else None,
        weights=args.weights if run else "trained",
        target_checkpoint=args.target_checkpoint or "",
        allow_unknown=allow_unknown or (),
    )
    for line in report.lines():
        output.line(line)
    record: dict[str, Any] = {"folder": str(folder), **report.record()}
    if run is not None and not args.skip_logits:
        differences = _logits(folder, run, args, layout, allow_unknown or [])
        for difference in differences:
            output.line(str(difference))
        record["logits"] = [vars(difference) for difference in differences]
    return record


def way_back(folder: Path, layout: str, output: Output) -> None:
    """What the program of a layout must be told to train the draft on."""
    if layout != "modelopt":
        return
    from dspark_megatron.conversion.draft_folder import read_config
    from dspark_megatron.conversion.layouts.rope_config import rope_of_config, way_back_to_modelopt

    output.line(way_back_to_modelopt(rope_of_config(read_config(folder))))


def _logits(
    folder: Path, run: Path, args: argparse.Namespace, layout: str, allow_unknown: list[str]
) -> list[Any]:
    """Differences of both sides; needs Megatron-Core and room for one whole draft in fp32."""
    import torch.distributed as dist

    from dspark_megatron.mcore.prepare import prepare_megatron
    from dspark_megatron.run.ranks.runtime import Launch, start

    prepare_megatron()
    from dspark_megatron.conversion.draft_folder import DraftFolder
    from dspark_megatron.conversion.layouts.foreign_configs import TargetFacts
    from dspark_megatron.conversion.logit_check import compare_logits
    from dspark_megatron.conversion.sources import CheckpointSource
    from dspark_megatron.storage.target_folder import load_target_config

    runtime = start(Launch.alone(), 1)
    try:
        facts = TargetFacts.of(load_target_config(args.target), args.target.resolve().name)
        return compare_logits(
            DraftFolder(folder, layout, facts, allow_unknown=allow_unknown),
            CheckpointSource(run, args.iteration, args.weights),
            args.target,
            tp_group=runtime.tp_group,
            target_checkpoint=args.target_checkpoint or "",
        )
    finally:
        dist.destroy_process_group()
