"""Seconds of calls that are to be compared."""

import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's mallopt."""


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved_seconds(
    calls: dict[Any, Callable[[], Any]],
    device: torch.device,
    *,
    rounds: int,
    warm_up: int = 1,
    barrier: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, float]:
    """Median seconds of each call. All take turns in every round, after `warm_up` rounds that are
    not counted, so that a machine that slows down does so for all of them. clock:
    `time.process_time` takes the processor time of all threads of this process instead, which
    other work on the machine moves less."""
    _use_heap_as_usual()
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(warm_up + rounds):
        for name, call in calls.items():
            barrier()
            synchronize(device)
            start = clock()
            call()
            synchronize(device)
            seconds[name].append(clock() - start)
    return {name: statistics.median(times[warm_up:]) for name, times in seconds.items()}


def _use_heap_as_usual() -> None:
    """Fresh pages cost time. These are the thresholds that glibc itself comes to in a long run."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 32 * 2**20)
        ctypes.CDLL(None).mallopt(TRIM_THRESHOLD, 64 * 2**20)
