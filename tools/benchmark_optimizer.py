"""Time and state of Muon against AdamW.

    torchrun --nproc-per-node 2 tools/benchmark_optimizer.py --tp 1 2 [--layers 2 --hidden 1024]

A synthetic draft in bf16 with the distributed optimizer takes real steps over samples of random
states. Both optimizers take turns in every round. `step ms` is the whole step, `optimizer ms` what
follows the reduced gradients, and `state MiB` the fp32 main weights and moments of the first rank.
Medians over the rounds, after one that is not counted.
"""

import argparse
import statistics
import time
from typing import Any

import benchmarking
import torch
from random_step import RandomStep

from dspark_megatron.config import OptimizerConfig
from dspark_megatron.mcore.optimizer import make_state
from dspark_megatron.run.ranks.runtime import Runtime, launch

FORMATS = {"tp": "d", "dp": "d", "optimizer": "", "step ms": ".0f", "optimizer ms": ".0f"}
FORMATS |= {"step / AdamW": ".2f", "state MiB": ",.1f"}


class Run:
    """A draft that is trained on the same samples again and again."""

    def __init__(self, args: argparse.Namespace, runtime: Runtime, name: Any) -> None:
        self.device = runtime.device
        self.step = RandomStep(args, runtime, OptimizerConfig(name=name))
        self.optimizer = self.step.optimizer
        make_state(self.optimizer)

    def timed(self) -> tuple[float, float]:
        """Seconds of a step, and of the optimizer in it."""
        started = time.perf_counter()
        self.step.make_gradients()
        benchmarking.synchronize(self.device)
        reduced = time.perf_counter()
        self.optimizer.step()
        benchmarking.synchronize(self.device)
        ended = time.perf_counter()
        return ended - started, ended - reduced

    def state_bytes(self) -> int:
        tensors = [p for group in self.optimizer.param_groups for p in group["params"]]
        for one in self.optimizer.chained_optimizers:
            states = one.optimizer.state.values()
            tensors += [x for state in states for x in state.values() if torch.is_tensor(x)]
        return sum(tensor.nbytes for tensor in tensors)


def measure(args: argparse.Namespace, runtime: Runtime) -> list[dict[str, Any]]:
    runs = {name: Run(args, runtime, name) for name in ("adamw", "muon")}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(1 + args.rounds):
        for name, run in runs.items():
            found[name].append(run.timed())
    rows: list[dict[str, Any]] = []
    for name, run in runs.items():
        step, update = (
            1e3 * statistics.median(part) for part in zip(*found[name][1:], strict=True)
        )
        row = {"tp": runtime.tp_group.size(), "dp": runtime.dp_group.size(), "optimizer": name}
        row |= {"step ms": step, "optimizer ms": update}
        rows.append(row | {"state MiB": run.state_bytes() / benchmarking.MIB})
    for row in rows:
        row["step / AdamW"] = row["step ms"] / rows[0]["step ms"]
    return rows


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and state of Muon against AdamW.")
    for name, default in dict(layers=2, hidden=1024, seq_length=128, rounds=5).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    benchmarking.add_report_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args, rows = parse_arguments(argv), []
    with launch() as job:
        for runtime in benchmarking.runtime_of_each_size(job, args.tp):
            rows += measure(args, runtime)
        if runtime.is_main:
            title = f"a draft of {args.layers} layers, hidden {args.hidden}, bf16"
            print(benchmarking.report({title: (rows, FORMATS)}, runtime.device, args.json))


if __name__ == "__main__":
    main()
