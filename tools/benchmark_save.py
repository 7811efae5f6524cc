"""How long a run stands still for a save: written while it waits, and in the background.

    python tools/benchmark_save.py [--layers 2 --hidden 1024 --rounds 5 --folder DIR]
    torchrun --nproc-per-node 2 tools/benchmark_save.py --tp 1 2

A synthetic draft with AdamW takes real steps over samples of random states, with the distributed
optimizer and without; at TP 1 two ranks are data-parallel. Both kinds of save take turns in every
round, through the code of the training loop, each followed by steps until it is finished, and by as
many steps that nothing is written beside.

waits               `train.async_save` false
in the background   true

`start s` is the time of the call that saves (checks, planning, host copies; with all of the writing
where it waits), `finish s` that of what follows at a step boundary, once all ranks have written,
and `pause s` their sum. Of it, `state s` is what Megatron-Core takes to name what is to be saved:
it gathers the state of the distributed optimizer. `written s` is from the start to the end, and
`host MiB` what a save adds to the memory of the main rank while it is written, by the kernel's
count. Medians over the rounds, after one that is not counted.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import benchmarking
import psutil
import torch
import torch.distributed as dist
from random_step import RandomStep

from dspark_megatron.config import OptimizerConfig, TrainConfig
from dspark_megatron.run.checkpoints import saving, sharding
from dspark_megatron.run.checkpoints.state import RunState
from dspark_megatron.run.ranks.runtime import Runtime, from_main_rank, launch
from dspark_megatron.training.saves import Saves

VARIANTS = {"waits": False, "in the background": True}
SECONDS = ("state s", "start s", "finish s", "pause s", "written s")
FORMATS = {"tp": "d", "dp": "d", "optimizer": "", "save": "", **dict.fromkeys(SECONDS, ".3f")}
FORMATS |= {"pause / waiting": ".3f", "step ms": ".0f", "step ms meanwhile": ".0f"}
FORMATS |= {"host MiB": ",.0f", "checkpoint MiB": ",.0f"}


class Run:
    """A draft that is trained on the same samples again and again, and saved."""

    def __init__(
        self, args: argparse.Namespace, runtime: Runtime, folder: Path, *, distributed: bool
    ) -> None:
        self.runtime = runtime
        settings = OptimizerConfig(use_distributed_optimizer=distributed)
        self.step = RandomStep(args, runtime, settings)
        self.draft, self.optimizer = self.step.draft, self.step.optimizer
        meta = {
            "format": 1,
            "shape": self.step.shape.to_dict(),
            "num_anchors": 5,
            "initializer_range": 0.02,
        }
        meta |= {"confidence_head_alpha": 1.0, "target_fingerprint": "none"}
        self.saves = {
            name: Saves(
                TrainConfig(async_save=in_background, keep_last=1),
                folder / name,
                meta,
                self.draft,
                self.optimizer,
                average=None,
            )
            for name, in_background in VARIANTS.items()
        }
        for name in VARIANTS:
            (folder / name).mkdir(exist_ok=True)
        self.iteration, self.state_seconds = 0, 0.0

    def sharded_state(self, *args: Any, **kwargs: Any) -> dict:
        started = time.perf_counter()
        state = sharding.sharded_state(*args, **kwargs)
        self.state_seconds = time.perf_counter() - started
        return state

    def timed_step(self) -> float:
        started = time.perf_counter()
        self.optimizer.zero_grad()
        self.step.make_gradients()
        self.optimizer.step()
        self.iteration += 1
        benchmarking.synchronize(self.runtime.device)
        return time.perf_counter() - started

    def save(self, name: str) -> dict[str, float]:
        """One save of a variant, with steps until it is finished and some more."""
        saves, process = self.saves[name], psutil.Process()
        dist.barrier()
        before, started = process.memory_info().rss, time.perf_counter()
        with mock.patch.object(saving, "sharded_state", self.sharded_state):
            saves.save(RunState(self.iteration, self.iteration), waits=False)
        found = {"start s": saves.seconds(), "state s": self.state_seconds, "host MiB": 0.0}
        if saves.is_writing:
            found["host MiB"] = (process.memory_info().rss - before) / benchmarking.MIB
        meanwhile = []
        while self._anywhere(saves.is_writing):
            meanwhile.append(self.timed_step())
        saves.finish()
        found |= {"finish s": saves.seconds(), "written s": time.perf_counter() - started}
        found["pause s"] = found["start s"] + found["finish s"]
        alone = [self.timed_step() for _ in range(max(3, len(meanwhile)))]
        found["step ms"] = 1e3 * statistics.median(alone)
        if meanwhile:
            found["step ms meanwhile"] = 1e3 * statistics.median(meanwhile)
        return found

    def _anywhere(self, is_writing: bool) -> bool:
        flag = torch.tensor(float(is_writing), device=self.runtime.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)


def measure(
    args: argparse.Namespace, runtime: Runtime, folder: Path, *, distributed: bool
) -> list[dict[str, Any]]:
    run = Run(args, runtime, folder, distributed=distributed)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(1 + args.rounds):
        for name, found in rounds.items():
            found.append(run.save(name))
    rows = []
    for name, found in rounds.items():
        keys = dict.fromkeys(key for one in found[1:] for key in one)
        medians = {k: statistics.median(one[k] for one in found[1:] if k in one) for k in keys}
        size = sum(file.stat().st_size for file in (folder / name).rglob("*.distcp"))
        place = {"tp": runtime.tp_group.size(), "dp": runtime.dp_group.size(), "save": name}
        place["optimizer"] = "distributed" if distributed else "plain"
        rows.append({**place, **medians, "checkpoint MiB": size / benchmarking.MIB})
    for row in rows:
        row["pause / waiting"] = row["pause s"] / rows[0]["pause s"]
    return rows


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The pause of a save, waiting and not.")
    sizes = dict(layers=2, hidden=1024, seq_length=128, rounds=5)
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    benchmarking.add_report_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    with launch() as job:
        rows: list[dict[str, Any]] = []
        for runtime in benchmarking.runtime_of_each_size(job, args.tp):
            for distributed in (True, False):
                # Every rank makes a folder; all write into the main rank's.
                temporary = tempfile.TemporaryDirectory(prefix="benchmark-save-", dir=args.folder)
                with temporary as folder:
                    place = Path(from_main_rank(folder))
                    rows += measure(args, runtime, place, distributed=distributed)
                    dist.barrier()
        if runtime.is_main:
            title = f"a draft of {args.layers} layers, hidden {args.hidden}, bf16 with AdamW"
            print(benchmarking.report({title: (rows, FORMATS)}, runtime.device, args.json))


if __name__ == "__main__":
    main()
