"""Useful tokens per second of a training step with and without padding, on one process.

    python tools/benchmark_packing.py [--config FILE --steps 1 --rounds 3] [section.key=value ...]

The same samples of a config's first steps in every variant: as they come, dealt out by length
(`data.group_by_length`), packed (`target.packing`), and both. Timed are the target's forward
passes alone and the whole step but for the optimizer. A useful token is one of a sample. Before
anything is timed the losses of all variants must agree.
"""

import argparse
from dataclasses import replace
from functools import partial
from typing import Any

import benchmarking

from dspark_megatron.config import Config
from dspark_megatron.config.loading import load_config
from dspark_megatron.data.dataset import ConversationDataset
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.run.ranks.runtime import Runtime, launch, start
from dspark_megatron.targets.huggingface.packing import SequencePacker

VARIANTS = {
    "as they come": (False, False),
    "grouped by length": (True, False),
    "packed": (False, True),
    "both": (True, True),
}
"""By name: whether grouped, whether packed."""
FORMATS = {"variant": "", "padding": ".1%", "target, ms": ",.0f", "step, ms": ",.0f"}
FORMATS |= {"useful tokens/s": ",.1f", "tokens/s, ratio": ".2f", "target alone, ratio": ".2f"}


def micro_batches(
    config: Config, dataset: ConversationDataset, steps: int, grouped: bool, runtime: Runtime
) -> list:
    """Of the first steps."""
    from dspark_megatron.data.batch import MicroBatches

    data = replace(config.data, group_by_length=grouped)
    batches = MicroBatches(replace(config, data=data), dataset, dp_group=runtime.dp_group)
    size = config.train.global_batch_size
    return [batch for step in range(steps) for batch in batches.of_step(step * size)]


class Variants:
    """One draft and one target, whose ways of taking samples change."""

    def __init__(self, config: Config, runtime: Runtime, steps: int) -> None:
        from dspark_megatron.mcore.optimizer import wrap_data_parallel
        from dspark_megatron.run.build import build_draft, build_target
        from dspark_megatron.run.check import check
        from dspark_megatron.run.data import load_run_data
        from dspark_megatron.training.step import GradientStep

        plan = check(config, runtime.world_size)
        self.drafted, self.device = plan.shape.num_draft_tokens, runtime.device
        dataset = load_run_data(plan, config.data.train_files, weights=config.data.weights)
        self.batches = {
            grouped: micro_batches(config, dataset, steps, grouped, runtime)
            for grouped in (False, True)
        }
        self.planner = SequencePacker.of(config.target, plan.shape.hidden_size)
        self.target = build_target(plan, runtime, with_last_hidden=config.needs_target_logits)
        self.step = GradientStep(
            config.loss,
            wrap_data_parallel(build_draft(plan, runtime), config.optimizer),
            self.target,
            plan.target_transform,
            tp_group=runtime.tp_group,
            dp_group=runtime.dp_group,
            device=runtime.device,
        )

    @property
    def tokens(self) -> int:
        return sum(sum(batch.lengths) for batch in self.batches[False])

    def run_target(self, grouped: bool, packed: bool) -> None:
        self.target.packer = self.planner if packed else None
        for batch in self.batches[grouped]:
            self.target.states(batch)

    def run_step(self, grouped: bool, packed: bool) -> dict[str, Any]:
        """The metrics."""
        from dspark_megatron.training.metrics import MetricSums

        self.target.packer = self.planner if packed else None
        metrics = MetricSums.zeros(self.drafted, self.device)
        self.step.run(self.batches[grouped], metrics)
        return metrics.means(self.step.forward_step.term_weights)


def measure(variants: Variants, rounds: int) -> list[dict[str, Any]]:
    """The rows of the table."""
    metrics = {name: variants.run_step(*how) for name, how in VARIANTS.items()}
    check_losses({name: row["loss"] for name, row in metrics.items()})
    calls = {("target", name): partial(variants.run_target, *how) for name, how in VARIANTS.items()}
    calls |= {("step", name): partial(variants.run_step, *how) for name, how in VARIANTS.items()}
    seconds = benchmarking.interleaved_seconds(calls, variants.device, rounds=rounds, warm_up=0)
    return [
        {
            "variant": name,
            "padding": metrics[name]["sampler/padding_share"],
            "target, ms": 1e3 * seconds["target", name],
            "step, ms": 1e3 * seconds["step", name],
            "useful tokens/s": variants.tokens / seconds["step", name],
            "tokens/s, ratio": seconds["step", "as they come"] / seconds["step", name],
            "target alone, ratio": seconds["target", "as they come"] / seconds["target", name],
        }
        for name in VARIANTS
    ]


def check_losses(losses: dict[str, float]) -> None:
    """Raise ValueError where a variant computes something else: its time would mean nothing."""
    first = losses["as they come"]
    for name, loss in losses.items():
        if not abs(loss / first - 1) < 1e-2:
            raise ValueError(f"the loss {name!r} is {loss}, that of samples as they come {first}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What padding costs, and what packing gains.")
    parser.add_argument("--config", default="examples/quickstart/chats.yaml")
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps' samples a variant")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    benchmarking.add_report_options(parser)
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with launch() as job:
        config = load_config(args.config, ["parallel.tensor_parallel=1", *args.overrides])
        require(
            config.target.provider == "huggingface" and config.train.micro_batch_size > 1,
            "there is nothing to pack: this needs target.provider=huggingface "
            f"({config.target.provider}) and train.micro_batch_size > 1 "
            f"({config.train.micro_batch_size})",
        )
        if job.world_size > 1:
            raise ConfigError(f"this runs on one process, not on {job.world_size}: use python")
        runtime = start(job, 1)
        variants = Variants(config, runtime, args.steps)
        train = config.train
        title = (
            f"{variants.tokens:,} tokens, {train.micro_batch_size} samples a micro-batch, "
            f"{train.global_batch_size} a step"
        )
        tables = {title: (measure(variants, args.rounds), FORMATS)}
        print(benchmarking.report(tables, runtime.device, args.json))


if __name__ == "__main__":
    main()
