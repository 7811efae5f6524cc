"""What training needs of a machine, a finding for each: what is there, and the way out where it is
not."""

import importlib
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from dspark_megatron.errors import ConfigError
from dspark_megatron.mcore.prepare import silence_megatron
from dspark_megatron.run.ranks.job import Launch
from dspark_megatron.run.ranks.runtime import Runtime, start_without_megatron
from dspark_megatron.run.ranks.shared_folder import check_shared

OK, WARNING, MISSING = "ok", "warning", "missing"
GIB = 2**30
FILES, SHARED_GIB, DISK_GIB, WRITTEN = 4096, 1, 50, 64 * 2**20
EXTRAS = ("transformer-engine", "modelopt", "data")


class Finding(NamedTuple):
    name: str
    verdict: str
    text: str


def findings(job: Launch, folder: Path | None) -> Iterator[Finding]:
    """Of this rank; every rank of the job calls it, with the same folder."""
    yield python()
    yield from packages()
    if job.local_rank == 0:
        yield imports()
    yield gpus(job)
    if torch.cuda.is_available():
        yield from gpu_abilities()
    yield open_files()
    yield shared_memory()
    runtime = start_without_megatron(job)
    yield all_reduce(runtime)
    if folder is not None:
        yield from disk(folder, runtime)


def python() -> Finding:
    found = platform.python_version()
    good = sys.version_info >= (3, 10)
    return Finding("Python", OK if good else MISSING, found if good else f"{found}; take 3.10 up")


def packages() -> Iterator[Finding]:
    """By the ranges that this package was installed with; extras only where they are there."""
    try:
        needed = [Requirement(text) for text in requires("dspark-megatron") or ()]
    except PackageNotFoundError:
        text = "dspark-megatron is not installed, so versions are not compared; pip install -e ."
        yield Finding("packages", WARNING, text)
        return
    base = [one for one in needed if one.marker is None]
    problems = list(filter(None, map(_problem, base)))
    shown = ("torch", "megatron-core", "transformers")
    good = ", ".join(f"{name} {_version(name)}" for name in (*shown, "triton") if _version(name))
    yield Finding("packages", MISSING if problems else OK, "; ".join(problems) or good)
    for extra in EXTRAS:
        own = [one for one in needed if one.marker and one.marker.evaluate({"extra": extra})]
        problems = list(filter(None, map(_problem, own)))
        absent = _version(own[0].name) is None
        text = f"not installed; where it is needed: pip install 'dspark-megatron[{extra}]'"
        good = ", ".join(f"{one.name} {_version(one.name)}" for one in own)
        verdict = OK if absent or not problems else WARNING
        yield Finding(f"extra {extra}", verdict, text if absent else "; ".join(problems) or good)


def imports(module: str = "megatron.core") -> Finding:
    """Whether Megatron-Core can be imported with the kernels that it looks for by itself, of which
    one built for another PyTorch breaks it. One rank of a node is enough.

    As it is imported it calls torch.compile for its functions, which alone imports PyTorch's
    compiler: most of the time, and nothing that is looked at here.
    """
    silence_megatron()
    try:
        with mock.patch.object(torch, "compile", lambda function=None, **_: function or _same):
            importlib.import_module(module)
    except Exception as error:  # whatever an extension raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        text = f"{module} cannot be imported ({reason}); install again what this names, built for "
        return Finding("import", MISSING, f"{text}torch {torch.__version__}")
    return Finding("import", OK, f"{module} can be imported")


def _same(function: Any) -> Any:
    return function


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _problem(needed: Requirement) -> str:
    found = _version(needed.name)
    if found is not None and needed.specifier.contains(found, prereleases=True):
        return ""
    there = f"{needed.name} is {found}" if found else f"{needed.name} is not installed"
    return f"{there}; pip install '{needed.name}{needed.specifier}'"


def gpus(job: Launch) -> Finding:
    """Whether there is one for each rank of this node."""
    count, ranks = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not torch.cuda.is_available():
        driver = _driver()
        if not driver:
            text = "no GPU here: runs train on the CPU with gloo; real targets need GPUs"
            return Finding("GPU", WARNING, text)
        text = f"driver {driver} is there, and torch {torch.__version__} sees no GPU; install "
        return Finding("GPU", MISSING, f"{text}a torch for CUDA, and look at CUDA_VISIBLE_DEVICES")
    if count < ranks:
        text = f"{count} GPUs for {ranks} ranks of this node; start as many ranks as GPUs"
        return Finding("GPU", MISSING, text)
    device = torch.cuda.get_device_properties(job.local_rank)
    memory = f"{device.total_memory / GIB:.0f} GiB"
    text = f"{count} GPUs, {device.name}, {memory}, driver {_driver()}, CUDA {torch.version.cuda}"
    return Finding("GPU", OK, text)


def _driver() -> str:
    """Its version; empty without a driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else ""


def gpu_abilities() -> Iterator[Finding]:
    good = torch.cuda.is_bf16_supported(including_emulation=False)
    way_out = "this GPU has no bf16; set train.dtype=float32 and target.dtype=float32"
    yield Finding("bf16", OK if good else WARNING, "supported" if good else way_out)
    count = torch.cuda.device_count()
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if pairs:
        text = f"{len(apart)} of {len(pairs)} pairs of GPUs go through host memory, which is slow"
        yield Finding("peer access", WARNING if apart else OK, text if apart else "all pairs")
    triton = _version("triton")
    way_out = "not installed; pip install triton, or set model.attention_backend=sdpa"
    yield Finding("triton", OK if triton else WARNING, triton or way_out)
    there = bool(shutil.which(os.environ.get("CC", "gcc")) or shutil.which("clang"))
    way_out = "none; install gcc, or set model.attention_backend=sdpa and loss.compile=false"
    yield Finding("C compiler", OK if there else WARNING, "found" if there else way_out)


def open_files() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    good = soft >= FILES or soft == resource.RLIM_INFINITY
    text = "without a limit" if soft == resource.RLIM_INFINITY else f"{soft:,} at once"
    more = "" if good else f"; many ranks may need more: ulimit -n {16 * FILES}"
    return Finding("open files", OK if good else WARNING, text + more)


def shared_memory(path: str = "/dev/shm") -> Finding:
    if not os.path.isdir(path):
        return Finding(path, WARNING, "is not there; NCCL needs it between GPUs of a node")
    free = shutil.disk_usage(path).free / GIB
    more = "" if free >= SHARED_GIB else "; give a container more: --shm-size 16g"
    return Finding(path, WARNING if more else OK, f"{free:,.1f} GiB free{more}")


def all_reduce(runtime: Runtime) -> Finding:
    """A sum over all ranks."""
    world = runtime.world_size
    total = torch.full((1024,), float(runtime.rank + 1), device=runtime.device)
    dist.all_reduce(total)
    right = bool((total == world * (world + 1) / 2).all())
    name = f"{dist.get_backend()} all-reduce"
    if not right:
        return Finding(
            name, MISSING, f"a sum over {world} ranks is wrong; test with NCCL_DEBUG=INFO"
        )
    return Finding(name, OK, f"works over {world} rank{'s' * (world > 1)}")


def disk(folder: Path, runtime: Runtime) -> Iterator[Finding]:
    """Whether all ranks see one folder; its free space and, roughly, how fast it is written."""
    there: list[bool | None] = [None] * runtime.world_size
    dist.all_gather_object(there, folder.is_dir() and os.access(folder, os.W_OK))
    if not all(there):
        absent = [rank for rank, seen in enumerate(there) if not seen]
        text = f"{folder} is no folder that can be written to, on ranks {absent}; make it, on a "
        yield Finding("shared folder", MISSING, f"{text}file system that all nodes share")
        return
    try:
        check_shared(str(folder), folder, runtime=runtime)
    except ConfigError as error:
        yield Finding("shared folder", MISSING, str(error))
        return
    yield Finding("shared folder", OK, f"all ranks see the same {folder}")
    free = shutil.disk_usage(folder).free / GIB
    more = "" if free >= DISK_GIB else f"; checkpoints of large drafts need more than {DISK_GIB}"
    rate = _write_rate(folder) if runtime.is_main else None
    speed = f", written at about {rate:,.0f} MB/s" if rate else ""
    if rate or more:
        yield Finding("disk", WARNING if more else OK, f"{free:,.0f} GiB free{speed}{more}")


def _write_rate(folder: Path) -> float:
    """MB/s of one file with a sync."""
    begin = time.monotonic()
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(os.urandom(WRITTEN))
        file.flush()
        os.fsync(file.fileno())
    return WRITTEN / 1e6 / (time.monotonic() - begin)
