"""How fast stored states are read, against plain reads of the same files.

    python tools/benchmark_cache.py --folder DIR [--gib 1] [--rounds 5]

Stores random states (h = 1,024, five taps, 1,024 tokens a sample, half of them
supervised) with the writer's own code, then reads it in turns: the files from start to end in
blocks of 8 MiB, each sample's states once, in random order, as training does, and the check of
checksums and values that a run makes in the background. Before each turn the system is told to
forget the files (posix_fadvise), so that they come from the disk. One reading thread each.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import benchmarking
import torch

from dspark_megatron.data.batch import Batch
from dspark_megatron.data.blocks import DEFAULT_LOSS
from dspark_megatron.data.conversation import Sample
from dspark_megatron.targets.base import TargetStates
from dspark_megatron.targets.stored.layout import read_manifest
from dspark_megatron.targets.stored.safetensors_layout import SafetensorsLayout, SafetensorsStates
from dspark_megatron.targets.stored.target import StoredStates
from dspark_megatron.targets.stored.verification import ShardChecks, known_checksums

HIDDEN, TAPS, TOKENS = 1024, 5, 1024
BLOCK = 8 * 2**20


class RandomTarget:
    """Stands for the target."""

    lockstep = False

    def states(self, batch: Batch) -> TargetStates:
        taps = torch.rand(*batch.input_ids.shape, TAPS * HIDDEN, dtype=torch.bfloat16)
        return TargetStates(taps, taps[..., :HIDDEN])


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure reading stored states.")
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure")
    parser.add_argument("--gib", type=float, default=1.0, help="size of the states, about")
    parser.add_argument("--rounds", type=int, default=5, help="turns, of which the median counts")
    return parser.parse_args(argv)


def store_states(folder: Path, samples: list[Sample]) -> None:
    from dspark_megatron.mcore.prepare import prepare_megatron
    from dspark_megatron.run.ranks.runtime import Launch, start
    from dspark_megatron.targets.stored.writer import StatesWriter

    prepare_megatron()
    runtime = start(Launch.alone(), 1)
    layout = SafetensorsLayout(HIDDEN, TAPS, "bfloat16", 7, DEFAULT_LOSS)
    writer = StatesWriter(layout, samples, folder, {}, shard_bytes=512 * 2**20)
    groups = dict(tp_group=runtime.tp_group, dp_group=runtime.dp_group)
    writer.write(writer.claim(), RandomTarget(), micro_batch_size=1, **groups)
    writer.finish()


def make_samples(gib: float) -> list[Sample]:
    count = max(1, round(gib * 2**30 / (TOKENS * HIDDEN * 2 * (TAPS + 0.5))))
    mask = torch.arange(TOKENS) >= TOKENS // 2
    return [Sample(torch.randint(50_000, (TOKENS,)), mask) for _ in range(count)]


def forget(files: list[Path]) -> None:
    """Drop the files from the system's memory."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(files: list[Path]) -> None:
    buffer = bytearray(BLOCK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def read_states(folder: Path, samples: list[Sample]) -> None:
    reader = SafetensorsStates(folder, read_manifest(folder))
    target = StoredStates(reader, samples, device=torch.device("cpu"))
    for i in torch.randperm(len(samples)).tolist():
        target.states(Batch(samples[i].input_ids[None], sample_indices=(i,)))


def check_states(folder: Path) -> None:
    reader = SafetensorsStates(folder, read_manifest(folder))
    ShardChecks(reader, known_checksums(folder), rank=0, ranks=1).check()


def measure(
    folder: Path, files: list[Path], samples: list[Sample], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each turn."""
    turns = {
        "plain reads": lambda: read_plainly(files),
        "states": lambda: read_states(folder, samples),
        "checks": lambda: check_states(folder),
    }
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            forget(files)
            start = time.perf_counter()
            turn()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    samples = make_samples(args.gib)
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch)
        store_states(folder, samples)
        files = sorted(folder.glob("shard_*"))
        size = sum(path.stat().st_size for path in files)
        seconds = measure(folder, files, samples, args.rounds)
    rates = {name: size / median(taken) / 1e9 for name, taken in seconds.items()}
    rows = [
        {"read as": name, "GB / s": rate, "of plain": rate / rates["plain reads"]}
        for name, rate in rates.items()
    ]
    print(f"{size / 2**30:.2f} GiB in {len(files)} shards, {len(samples)} samples")
    print(benchmarking.text_table(rows, {"read as": "s", "GB / s": ".2f", "of plain": ".0%"}))


if __name__ == "__main__":
    main()
