"""How fast an export is, and how much memory it takes, beside a plain copy of what it wrote.

    python tools/benchmark_export.py [--gigabytes 2] [--rounds 3] [--folder DIR]

A synthetic draft of random bf16 weights, as a checkpoint that one rank would have saved, and a
target of a small vocabulary go into a temporary folder (about four times --gigabytes). Copy and
export take turns after one export that is not counted. Each writes to a new folder; the export runs
in a process of its own, which times the call alone (no imports) and reports the highest resident
memory of its whole life.

Nothing is dropped from the page cache: all files are read from it where memory allows, as they were
just written. The export waits until its files are on the disk (fsync), the copy does not; the disk
is waited for before each measurement, so that none pays for another's pages. A --folder in /dev/shm
leaves the disk out.
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import shutil
import statistics
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import benchmarking
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from dspark_megatron.conversion.export import export_checkpoint
from dspark_megatron.conversion.layouts.names import hugging_face_shapes, megatron_shapes
from dspark_megatron.shape import DraftShape

DTYPE = torch.bfloat16
VOCAB_SIZE = 1024
ITERATION = 1
FILE_BYTES = 5 * 10**9
"""Of an export's files, at most; one of them is in memory at a time."""
FORMATS = {
    "variant": "",
    "GB": ".2f",
    "seconds": ".2f",
    "MB/s": ",.0f",
    "time / copy": ".2f",
    "peak MiB": ",.0f",
    "imports MiB": ",.0f",
    "largest tensor MiB": ",.0f",
    "largest file MiB": ",.0f",
}


def make_shape(gigabytes: float, hidden_size: int) -> DraftShape:
    """Qwen3's proportions, and as many layers as come closest to the size."""
    heads = max(1, hidden_size // 128)
    shape = DraftShape(
        hidden_size=hidden_size,
        ffn_hidden_size=3 * hidden_size,
        num_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        head_dim=128,
        vocab_size=VOCAB_SIZE,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        max_position_embeddings=32768,
        num_target_layers=36,
        target_layer_ids=(1, 9, 17, 25, 33),
        mask_token_id=VOCAB_SIZE - 1,
        block_size=7,
        markov_rank=256,
        markov_head_type="vanilla",
        enable_confidence_head=True,
        confidence_head_with_markov=True,
    )
    one, two = (sum(sizes(replace(shape, num_layers=n))) for n in (1, 2))
    return replace(shape, num_layers=1 + max(0, round((gigabytes * 1e9 - one) / (two - one))))


def sizes(shape: DraftShape) -> list[int]:
    """Bytes of every tensor of the export."""
    return [math.prod(size) * DTYPE.itemsize for size in hugging_face_shapes(shape).values()]


class RandomPlanner(distributed_checkpoint.DefaultSavePlanner):
    """Makes each tensor's values when its turn to be written comes; until then a tensor is one
    number that is repeated without being stored."""

    def transform_object(self, write_item: Any, object: Any) -> Tensor:
        return torch.empty(object.shape, dtype=object.dtype).normal_(std=0.02)


def make_checkpoint(run: Path, shape: DraftShape) -> Path:
    """A run with one checkpoint, as training leaves it."""
    folder = run / "checkpoints" / f"iter_{ITERATION:07}"
    folder.mkdir(parents=True)
    number = torch.zeros((), dtype=DTYPE)
    state = {name: number.expand(size) for name, size in megatron_shapes(shape).items()}
    with warnings.catch_warnings():
        # PyTorch wonders whether a single process is meant; it is.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        distributed_checkpoint.save(
            state, checkpoint_id=folder, planner=RandomPlanner(), no_dist=True
        )
    meta = {
        "format": 1,
        "iteration": ITERATION,
        "consumed_samples": 8,
        "shape": shape.to_dict(),
        "num_anchors": 512,
        "initializer_range": 0.02,
        "confidence_head_alpha": 1.0,
        "target_fingerprint": "none",
    }
    (folder / "dspark.json").write_text(json.dumps(meta))
    (folder.parent / "latest_checkpointed_iteration.txt").write_text(f"{ITERATION}\n")
    return run


def make_target(folder: Path, shape: DraftShape) -> Path:
    """What an export needs of the target: its config and its two matrices."""
    LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_target_layers,
        num_attention_heads=shape.num_attention_heads,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    size = (shape.vocab_size, shape.hidden_size)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    save_file({name: torch.randn(size).to(DTYPE) for name in names}, folder / "model.safetensors")
    return folder


@dataclass(frozen=True)
class Measured:
    seconds: float
    imports: int | None = None
    """Resident bytes before the call."""
    peak: int | None = None


def timed_export(checkpoint: Path, target: Path, output: Path) -> Measured:
    """To be called in a new process: a peak never goes down."""
    imports, start = _resident("VmRSS"), time.perf_counter()
    export_checkpoint(checkpoint, target, output)
    return Measured(time.perf_counter() - start, imports, _resident("VmHWM"))


def timed_copy(source: Path, output: Path) -> Measured:
    start = time.perf_counter()
    output.mkdir()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, output / path.name)
    return Measured(time.perf_counter() - start)


def in_new_process(function: Any, *arguments: Any) -> Any:
    # Not getrusage's maximum in the child: that one begins at the parent's resident memory.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(folder: Path, shape: DraftShape, rounds: int) -> dict[str, list[Measured]]:
    """Every round of copy and export."""
    checkpoint = make_checkpoint(folder / "run", shape)
    target = make_target(folder / "target", shape)
    source = folder / "first"
    in_new_process(timed_export, checkpoint, target, source)
    measured: dict[str, list[Measured]] = {"copy": [], "export": []}
    for i in range(rounds):
        copied, exported = folder / f"copy-{i}", folder / f"export-{i}"
        os.sync()
        measured["copy"].append(timed_copy(source, copied))
        os.sync()
        measured["export"].append(in_new_process(timed_export, checkpoint, target, exported))
        _check_same_files(source, exported)
        shutil.rmtree(copied)
        shutil.rmtree(exported)
    return measured


def table_rows(measured: dict[str, list[Measured]], shape: DraftShape) -> list[dict[str, Any]]:
    total, largest = sum(sizes(shape)), max(sizes(shape))
    copy = statistics.median(run.seconds for run in measured["copy"])
    rows = []
    for name, runs in measured.items():
        seconds = statistics.median(run.seconds for run in runs)
        row = {"variant": name, "GB": total / 1e9, "seconds": seconds}
        row |= {"MB/s": total / 1e6 / seconds, "time / copy": seconds / copy}
        if name == "export":
            row |= {
                "peak MiB": statistics.median(run.peak for run in runs) / benchmarking.MIB,
                "imports MiB": statistics.median(run.imports for run in runs) / benchmarking.MIB,
                "largest tensor MiB": largest / benchmarking.MIB,
                "largest file MiB": min(total, FILE_BYTES) / benchmarking.MIB,
            }
        rows.append(row)
    return rows


def _check_same_files(first: Path, second: Path) -> None:
    """Names and sizes: whether all runs did the same work."""
    a, b = (
        {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
        for folder in (first, second)
    )
    if a != b:
        raise ValueError(f"two exports must have the same files, they have {a} and {b}")


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="An export beside a plain copy of its files.")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the export, about")
    parser.add_argument("--hidden", type=int, default=4096, help="width of the draft")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made")
    benchmarking.add_report_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    shape = make_shape(args.gigabytes, args.hidden)
    with tempfile.TemporaryDirectory(prefix="benchmark-export-", dir=args.folder) as folder:
        measured = measure(Path(folder), shape, args.rounds)
    title = f"draft of {shape.num_layers} layers, hidden {shape.hidden_size}, bf16 to bf16"
    tables = {title: (table_rows(measured, shape), FORMATS)}
    print(benchmarking.report(tables, torch.device("cpu"), args.json))


if __name__ == "__main__":
    main()
