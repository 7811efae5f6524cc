"""Megatron-Core's writer of checkpoints, kept within this process, in three parts: plan, write and
finalize.

Left to itself it is made for saves that go on in other processes. Up to 0.18 each rank forks one
for every file and waits for it without end: a killed one hangs the run, and they outlive a killed
rank. Every version starts one more, to serve a queue of their results, and the queue of requests
that goes with it needs CUDA. Here the files of a rank are written by its own threads, so nothing
outlives the rank and nothing else can be killed.
"""

import inspect
import queue
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch import Tensor

_WRITERS = ("write_preloaded_data_multiproc", "write_preloaded_data_multithread")
"""Of megatron-core up to 0.18, and of 0.19."""
_OWN_REQUEST = {"async_strategy": "mcore"}
"""From 0.17 on the default is another package's."""


@dataclass(frozen=True)
class PlannedSave:
    """The files of this rank, as all ranks have planned them."""

    request: AsyncRequest

    @classmethod
    def of(
        cls, state: dict, folder: Path, *, content_metadata: dict[str, Any], copies: bool
    ) -> "PlannedSave":
        """Plan a save of a sharded state dict, and take what is on a device to the host.

        copies: take what is on the host already, too, so that the state may change from now on;
        else it must not before `write` has returned. Collective over the world: Megatron-Core
        gathers plans.
        """
        write_in_this_process()
        theirs = set(_memory(state))
        known = inspect.signature(dist_checkpointing.save).parameters
        request = dist_checkpointing.save(
            state,
            str(folder),
            async_sharded_save=True,
            content_metadata=content_metadata,
            **{name: value for name, value in _OWN_REQUEST.items() if name in known},
        )
        if request.async_fn is not None:
            _, buckets, _ = request.async_fn_args
            _take_to_host(buckets, theirs if copies else set())
        return cls(request)

    def write(self) -> None:
        """Write them to the disk; any thread may. No collective. OSError or RuntimeError where a
        file is not written."""
        if self.request.async_fn is not None:  # else this rank has none
            self.request.async_fn(*self.request.async_fn_args, **self.request.async_fn_kwargs)

    def finalize(self) -> None:
        """Write the metadata, once all ranks have written. Collective over the world: a gather of
        an object, a broadcast of one number, a barrier. CheckpointException on all ranks."""
        for call in self.request.finalize_fns:
            call()


def _memory(state: dict) -> list[int]:
    """Where the tensors of a sharded state dict are."""
    held = (getattr(value, "data", value) for value in nested_values(state))
    return [one.untyped_storage().data_ptr() for one in held if isinstance(one, Tensor)]


def _take_to_host(buckets: list, theirs: set[int]) -> None:
    """Replace the tensors of a plan by some in host memory (pinned, where they were on a GPU) and
    by copies where they are in memory of the addresses `theirs`. One at a time: Megatron-Core has
    already copied what is part of a larger tensor, and that needs no room twice."""
    for _, _, (_, tensors) in buckets:
        for place, (item, tensor) in enumerate(tensors):
            copies = tensor.untyped_storage().data_ptr() in theirs
            tensors[place] = item, tensor.to("cpu", non_blocking=True, copy=copies)
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def write_in_this_process() -> None:
    """From now on, for the whole process."""
    writer: Any = FileSystemWriterAsync
    for name in _WRITERS:
        if hasattr(writer, name):
            setattr(writer, name, staticmethod(_write))
    filesystem_async._results_queue = queue.Queue()  # else it starts a process to serve one


def _write(transforms: list, use_msc: bool, rank: int, buckets: list, results: queue.Queue) -> None:
    """Write the files of this rank, a thread each, and leave what was written, by file."""
    with ThreadPoolExecutor(max_workers=max(1, len(buckets))) as threads:
        write = partial(_write_file, transforms, use_msc)
        results.put(dict(enumerate(threads.map(write, buckets))))


def _write_file(transforms: list, use_msc: bool, bucket: Any) -> list:
    """The entries of one file, by Megatron-Core's own function; raises the error it returns."""
    said: queue.Queue = queue.Queue()
    running: queue.Queue = queue.Queue()
    running.put(0)
    FileSystemWriterAsync.write_preloaded_data(
        transforms, 0, bucket, said, running, True, use_msc=use_msc
    )
    _, entries = said.get_nowait()
    if isinstance(entries, Exception):
        raise entries
    return entries
