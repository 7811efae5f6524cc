"""Megatron-Core's writer of checkpoints, kept within this process.

Left to itself it is made for saves that go on in the background. Up to 0.18 each rank forks a
process for every file and waits for it without end: a killed one hangs the run, and they outlive a
killed rank. Every version starts one more, to serve a queue of their results. Here the files of a
rank are written by its own threads, so nothing outlives the rank and nothing else can be killed.
"""

import queue
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

_WRITERS = ("write_preloaded_data_multiproc", "write_preloaded_data_multithread")
"""Of megatron-core up to 0.18, and of 0.19."""


def write_in_this_process() -> None:
    """From now on, for the whole process."""
    writer: Any = FileSystemWriterAsync
    for name in _WRITERS:
        if hasattr(writer, name):
            setattr(writer, name, staticmethod(_write))
    filesystem_async._results_queue = queue.Queue()  # else it starts a process to serve one


def _write(transforms: list, use_msc: bool, rank: int, buckets: list, results: queue.Queue) -> None:
    """Write the files of this rank, a thread each; leave what was written, by file, or an error."""
    with ThreadPoolExecutor(max_workers=max(1, len(buckets))) as threads:
        write = partial(_write_file, transforms, use_msc)
        written = dict(enumerate(threads.map(write, buckets)))
    errors = [found for found in written.values() if isinstance(found, Exception)]
    results.put(errors[0] if errors else written)


def _write_file(transforms: list, use_msc: bool, bucket: Any) -> Any:
    """What Megatron-Core's own function says of one file: its entries, or an error."""
    said: queue.Queue = queue.Queue()
    running: queue.Queue = queue.Queue()
    running.put(0)
    FileSystemWriterAsync.write_preloaded_data(
        transforms, 0, bucket, said, running, True, use_msc=use_msc
    )
    _, entries = said.get_nowait()
    return entries
