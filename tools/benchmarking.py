"""What the benchmarks share: peak memory, fair timing, the machine, tables.

Importing it makes `reference`, the plain twin of the tests, importable: what a benchmark compares
with is what the tests compare with.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dspark_megatron.evaluation.report import text_table
from dspark_megatron.evaluation.serving.timing import MMAP_THRESHOLD, synchronize
from dspark_megatron.evaluation.serving.timing import interleaved_seconds as interleaved_seconds

TESTS = str(Path(__file__).resolve().parents[1] / "tests")
if TESTS not in sys.path:
    sys.path.append(TESTS)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MIB = 2**20
Tables = dict[str, tuple[list[dict[str, Any]], dict[str, str]]]
"""By title: rows, and a format of each column; see `text_table`."""


def peak_memory(
    call: Callable[[], Any],
    device: torch.device,
    *,
    repeats: int = 3,
    barrier: Callable[[], None] = lambda: None,
) -> int:
    """Bytes that a call takes at its highest above what was resident before it; the median of
    `repeats` calls after one that is not counted.

    CUDA: the caching allocator's own count. CPU (Linux, glibc): the resident set's high-water mark,
    exact after `give_tensors_own_pages` and as long as nothing was timed.
    """
    once = _peak_cuda if device.type == "cuda" else _peak_resident
    call()
    peaks = []
    for _ in range(repeats):
        gc.collect()
        barrier()
        peaks.append(once(call, device))
    return int(statistics.median(peaks))


def _peak_cuda(call: Callable[[], Any], device: torch.device) -> int:
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_resident(call: Callable[[], Any], device: torch.device) -> int:
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def give_tensors_own_pages() -> None:
    """From now on a tensor's pages go back to the system when it is freed; to be called before the
    first large tensor is made.

    By default glibc keeps tensors below 32 MiB in a heap whose holes count as resident: up to
    four times of what is alive. With pages of their own the high-water mark is within 1% of the
    bytes that PyTorch's allocator reports.
    """
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 64 * 1024)
    gc.freeze()  # `peak_memory` collects garbage before each call; not among what modules hold


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}: peak memory on the CPU needs Linux")


def runtime_of_each_size(job: Any, sizes: list[int]) -> Iterator[Any]:
    """A job's `Runtime` at one tensor-parallel size after the other, of those its world allows;
    what is left of the world is data-parallel. Every rank goes through all of them."""
    from megatron.core import parallel_state

    from dspark_megatron.run.ranks.runtime import start

    for tp_size in [size for size in sizes if job.world_size % size == 0] or [1]:
        parallel_state.destroy_model_parallel()
        yield start(job, tp_size)


def machine(device: torch.device) -> dict[str, str]:
    """What the figures depend on, beside the options."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{_cpu_model()}, {torch.get_num_threads()} thread(s) a rank"
    return {
        "machine": where,
        "ranks": str(dist.get_world_size() if dist.is_initialized() else 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": version("megatron-core"),
        "command": _command(),
    }


def _cpu_model() -> str:
    cores = len(os.sched_getaffinity(0))
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{cores} cores of {line.partition(':')[2].strip()}"
    return f"{cores} cores of {platform.machine()}"


def _command() -> str:
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    launcher = "python" if ranks == 1 else f"torchrun --nproc-per-node {ranks}"
    return " ".join([launcher, f"tools/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def add_target_options(
    parser: argparse.ArgumentParser, families: tuple[str, ...], *, seq_length: int
) -> None:
    """Which made-up targets, and how they are split."""
    parser.add_argument("--families", nargs="+", choices=families, default=families)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    for name, size in {"hidden": 512, "ffn": 1792, "heads": 8, "kv-heads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--seq-length", type=int, default=seq_length)


def add_report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")


def report(
    tables: Tables,
    device: torch.device,
    json_file: Path | None,
) -> str:
    """Everything as text: the machine, then each table under its title. Writes the figures as
    JSON where asked."""
    about = machine(device)
    if json_file is not None:
        figures = {title: rows for title, (rows, _) in tables.items()}
        json_file.write_text(json.dumps({**about, "tables": figures}, indent=2) + "\n")
    parts = ["\n".join(f"{name}: {value}" for name, value in about.items())]
    parts += [f"{title}\n{text_table(rows, formats)}" for title, (rows, formats) in tables.items()]
    return "\n\n".join(parts)
