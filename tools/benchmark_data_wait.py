"""Share of a step that the loop waits for its micro-batches, made ahead by a thread and not.

    python tools/benchmark_data_wait.py [--seq-length 4096] [--num-anchors 512] [--json FILE]

Long samples with many anchors, the real step of a small draft on states that are there already.
Steps with and without the thread take turns in one process; their losses are compared. What is
waited for is one core's work and the same for a large draft, whose step takes longer.
"""

import argparse
import statistics
import time
from typing import Any

import benchmarking
import torch
from torch import Tensor

from dspark_megatron.config import Config, LossConfig
from dspark_megatron.config.loading import config_from_dict
from dspark_megatron.data.ahead import StepsAhead
from dspark_megatron.data.batch import Batch, MicroBatches
from dspark_megatron.data.conversation import Sample
from dspark_megatron.run.ranks.runtime import Runtime, launch, start
from dspark_megatron.shape import DraftShape
from dspark_megatron.targets.base import StatesSource, TargetStates

FORMATS = {"made": "", "ms a step": ",.1f", "ms waited": ",.1f", "share waited": ".1%"}
MADE = {"when asked for": 0, "a step ahead": 1}


class Samples:
    """Random ones, with every other token to be learnt; in place of a data set."""

    shares = None

    def __init__(self, count: int, length: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self._ids = torch.randint(2, 500, (count, length), generator=generator)
        self._masks = torch.rand(count, length, generator=generator) > 0.5

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self._ids[index], self._masks[index])


class SameStates(StatesSource):
    """One sample's states for all."""

    lockstep = False

    def __init__(self, states: TargetStates) -> None:
        self._states = states

    def states(self, batch: Batch) -> TargetStates:
        return self._states


def shape_of(args: argparse.Namespace) -> DraftShape:
    return DraftShape(
        hidden_size=args.hidden,
        ffn_hidden_size=2 * args.hidden,
        num_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=args.hidden // 4,
        vocab_size=512,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=args.seq_length,
        num_target_layers=4,
        target_layer_ids=(0, 2),
        mask_token_id=1,
        block_size=7,
        markov_rank=8,
        markov_head_type="vanilla",
        enable_confidence_head=True,
        confidence_head_with_markov=True,
    )


def run_config(args: argparse.Namespace) -> Config:
    train = {"global_batch_size": args.micro_batches, "micro_batch_size": 1}
    return config_from_dict({"model": {"num_anchors": args.num_anchors}, "train": train})


def gradient_step(args: argparse.Namespace, runtime: Runtime) -> Any:
    from step_variants import build_draft, random_states

    from dspark_megatron.config import OptimizerConfig
    from dspark_megatron.mcore.optimizer import wrap_data_parallel
    from dspark_megatron.training.step import GradientStep

    shape, generator = shape_of(args), torch.Generator().manual_seed(2)
    draft = build_draft(shape, runtime, torch.float32)
    states = random_states(shape, args.seq_length, generator, draft.lm_head)
    return GradientStep(
        LossConfig(),
        wrap_data_parallel(draft, OptimizerConfig(use_distributed_optimizer=False)),
        SameStates(states),
        tp_group=runtime.tp_group,
        dp_group=runtime.dp_group,
        device=runtime.device,
    )


def table_rows(args: argparse.Namespace, runtime: Runtime) -> list[dict[str, Any]]:
    from dspark_megatron.training.metrics import MetricSums

    step, config = gradient_step(args, runtime), run_config(args)
    data: Any = Samples(2 * args.micro_batches, args.seq_length)
    batches = MicroBatches(config, data, dp_group=runtime.dp_group)
    options = dict(step_samples=args.micro_batches, device=runtime.device)
    sources = {name: StepsAhead(batches, **options, ahead=n) for name, n in MADE.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sources}
    for number in range(args.rounds + 1):  # the first is not counted
        losses: list[Tensor] = []
        for name, source in sources.items():
            benchmarking.synchronize(runtime.device)
            start_, metrics = time.perf_counter(), MetricSums.zeros(7, runtime.device)
            step.run(source.of_step(number * args.micro_batches), metrics)
            benchmarking.synchronize(runtime.device)
            times[name].append((time.perf_counter() - start_, source.seconds_waited()))
            losses.append(metrics.scalars["ce_sum"])
        if losses[0] != losses[1]:
            raise ValueError(f"the steps learn from other micro-batches: {losses}")
    for source in sources.values():
        source.__exit__(None, None, None)
    return [row_of(name, of_steps[1:]) for name, of_steps in times.items()]


def row_of(name: str, of_steps: list[tuple[float, float]]) -> dict[str, Any]:
    whole, waited = (1e3 * statistics.median(column) for column in zip(*of_steps, strict=True))
    return {"made": name, "ms a step": whole, "ms waited": waited, "share waited": waited / whole}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Waiting for micro-batches.")
    sizes = {"seq-length": 4096, "num-anchors": 512, "micro-batches": 4, "hidden": 32}
    for name, size in {**sizes, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    benchmarking.add_report_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with launch() as job:
        runtime = start(job, 1)
        rows = table_rows(args, runtime)
        title = (
            f"a step of {args.micro_batches} samples of {args.seq_length} tokens, at most "
            f"{args.num_anchors} anchors in each, a draft of hidden {args.hidden}"
        )
        print(benchmarking.report({title: (rows, FORMATS)}, runtime.device, args.json))


if __name__ == "__main__":
    main()
