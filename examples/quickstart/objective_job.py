"""One job of compare_objectives.py, in a process of its own: train a draft, then evaluate it.

    python examples/quickstart/objective_job.py FOLDER

reads FOLDER/settings.json and writes FOLDER/figures.json. Killed, it goes on from its newest
checkpoint. The draft is deleted at the end.
"""

import argparse
import json
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dspark_megatron.config import Config
from dspark_megatron.config.loading import config_from_dict
from dspark_megatron.run.ranks.runtime import Launch, Runtime, launch, start
from dspark_megatron.storage.writing import write_json
from dspark_megatron.training.ending.stop_requests import StopReason, StopRequests

if TYPE_CHECKING:
    from dspark_megatron.evaluation.decoding import Decoder
    from dspark_megatron.evaluation.run import FileResult
    from dspark_megatron.run.check import RunPlan

BINS = 20
"""Of the calibration error."""


class StepClock(StopRequests):
    """Notes the time whenever a run asks whether it is to stop, which is after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[tuple[float, float]] = []
        """Of this process on its CPUs, and on the clock."""

    def reason(self, exit_duration_minutes: float | None) -> StopReason:
        self.times.append((time.process_time(), time.perf_counter()))
        return super().reason(exit_duration_minutes)

    def seconds(self) -> dict[str, float] | None:
        """Of a step, the median; None without a step."""
        pairs = zip(self.times, self.times[1:], strict=False)
        steps = [(end[0] - start[0], end[1] - start[1]) for start, end in pairs]
        if not steps:
            return None
        cpu, wall = (statistics.median(column) for column in zip(*steps, strict=True))
        return {"cpu_seconds": cpu, "seconds": wall}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train and evaluate one draft of a comparison.")
    parser.add_argument("folder", type=Path, help="with settings.json")
    folder = parser.parse_args(argv).folder
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    with launch() as job:
        run(job, config_from_dict(settings["config"]), folder)


def run(job: Launch, config: Config, folder: Path) -> None:
    """Imports of what needs Megatron-Core wait for `launch`."""
    from dspark_megatron.run.check import check
    from dspark_megatron.training.loop import train

    config.train.output_dir = str(folder / "run")
    config.validate()
    plan = check(config, job.world_size, use="train")
    runtime = start(job, config.parallel.tensor_parallel)
    clock, timing = StepClock(), folder / "seconds.json"
    train(plan, runtime, clock)
    if seconds := clock.seconds():  # none where only the evaluation was left
        write_json(timing, seconds)
    seconds = json.loads(timing.read_text(encoding="utf-8"))
    write_json(folder / "figures.json", {**seconds, **evaluate(job, config, runtime)})
    shutil.rmtree(folder / "run" / "checkpoints")


def evaluate(job: Launch, config: Config, runtime: Runtime) -> dict[str, Any]:
    """What decoding the held-out prompts gains, what the estimate says of the file's own answers,
    and how far the confidence head is off."""
    from dspark_megatron.data.prompts.chat_prompts import load_prompts
    from dspark_megatron.evaluation.command import build_decoder
    from dspark_megatron.evaluation.drafts import with_known_draft
    from dspark_megatron.evaluation.run import all_figures, evaluate_prompts
    from dspark_megatron.run.check import check

    target = replace(config.target, provider="huggingface", cache="")
    config, checkpoint = with_known_draft(replace(config, target=target))
    plan, settings = check(config, job.world_size, use="evaluate"), config.evaluate
    (file,) = settings.prompt_files
    limits = settings.max_prompts, settings.max_prompt_length
    prompts = {file: load_prompts(file, plan.tokenizer, *limits)}
    first = torch.tensor([prompts[file][0].input_ids])
    decoder, _ = build_decoder(plan, runtime, checkpoint, first, None)
    found: dict[str, Any] = {"estimate": estimate(plan, decoder, runtime)}
    for name, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        decoder.sampling = replace(decoder.sampling, temperature=temperature)
        group = runtime.dp_group
        results = evaluate_prompts(decoder, prompts, settings, dp_group=group, show_progress=False)
        found[name] = all_figures(results, plan.shape.num_draft_tokens)[file]
    return {**found, "ece": calibration_error(results, plan.shape.num_draft_tokens)}


def estimate(plan: "RunPlan", decoder: "Decoder", runtime: Runtime) -> dict[str, Any]:
    """At `evaluate.temperature`, on the answers of the file of prompts."""
    from dspark_megatron.evaluation.estimate import EstimateSettings, estimate_acceptance
    from dspark_megatron.run.data import load_run_data

    config = plan.config
    answers = load_run_data(plan, config.evaluate.prompt_files, name="evaluate.prompt_files")
    count = min(len(answers), config.evaluate.heldout_samples or len(answers))
    return estimate_acceptance(
        decoder.draft,
        decoder.target,
        decoder.target_head,
        [answers[i] for i in range(count)],
        EstimateSettings.of(config, decoder.draft),
        dp_group=runtime.dp_group,
    )


def calibration_error(results: dict[str, "FileResult"], num_draft_tokens: int) -> float | None:
    """Of the confidence head, over the slots that decoding reached: the chance that the token is
    kept against the overlap of both distributions. None without the head."""
    from dspark_megatron.evaluation.confidence.probability_metrics import binned
    from dspark_megatron.evaluation.confidence.temperature_scaling import confidence, kept_labels
    from dspark_megatron.evaluation.run import draft_records

    records = draft_records(results, num_draft_tokens, facts={})
    predictions = confidence(records.confidence_logits, [1.0] * num_draft_tokens)
    labels = kept_labels(records, "expected")
    known = ~labels.isnan() & ~predictions.isnan()
    if not known.any():
        return None
    return binned(predictions[known], labels[known], BINS).calibration_error


if __name__ == "__main__":
    main()
