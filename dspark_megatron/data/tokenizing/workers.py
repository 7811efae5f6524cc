"""Batches of lines encoded by several processes, in their order.

The processes come from a fork server that has imported the encoder, so that each costs a fork: not
from this process, which may have threads and a GPU.
"""

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, resource_tracker

import torch

from dspark_megatron.data.tokenizing.batches import LineBatch
from dspark_megatron.data.tokenizing.encoding import (
    Encoded,
    Line,
    LineEncoder,
    received,
    transportable,
)
from dspark_megatron.errors import ConfigError

_SMALL_BYTES = 16 * 2**20
_MOST_WORKERS = 32
"""The process that reads lines and writes tokens keeps no more busy."""
_AHEAD = 3
"""Batches in flight for each process."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_encoder: LineEncoder | None = None
"""Of a process that encodes."""

EncodedBatches = Iterator[tuple[LineBatch, Encoded]]


def chosen_workers(wanted: int | None, nbytes: int) -> int:
    """Processes for files of so many bytes. What is small is done before others have started."""
    if wanted is not None:
        return wanted
    return 0 if nbytes < _SMALL_BYTES else min(_MOST_WORKERS, len(os.sched_getaffinity(0)))


def encoded_batches(
    batches: Iterator[LineBatch], encoder: LineEncoder, workers: int
) -> EncodedBatches:
    """In the order of the batches. workers: processes; with 0 or 1 it is this one. ConfigError when
    one of them dies, or where the reading of batches ends with one, once what stood before it is
    given."""
    if workers <= 1:
        for batch in batches:
            yield batch, encoder.encode(batch.lines)
        return
    with _pool(encoder, workers) as pool:
        try:
            yield from _in_order(batches, pool, _AHEAD * workers)
        except BrokenProcessPool as error:
            raise ConfigError(
                f"one of {workers} processes that tokenize the data has ended before its work, "
                "killed by the system or by hand, or for lack of memory; start again, with fewer "
                f"processes if memory is short (data.tokenize_workers is {workers} here)"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _pool(encoder: LineEncoder, workers: int) -> ProcessPoolExecutor:
    try:
        pickled = pickle.dumps(encoder)
    except Exception as error:  # a tokenizer's own class may raise anything
        raise ConfigError(
            f"the tokenizer cannot be sent to other processes ({error}); set "
            "data.tokenize_workers=0, which tokenizes in one"
        ) from error
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # Signals to the job are this process's to answer; the server inherits what is blocked. The
    # tracker comes first, since its start unblocks some.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return ProcessPoolExecutor(workers, context, _begin, (pickled,))


def _in_order(batches: Iterator[LineBatch], pool: ProcessPoolExecutor, most: int) -> EncodedBatches:
    waiting: deque[tuple[LineBatch, Future[Encoded]]] = deque()
    error: ConfigError | None = None
    is_over = False
    while waiting or not is_over:
        while not is_over and len(waiting) < most:
            try:
                batch = next(batches, None)
            except ConfigError as found:
                batch, error = None, found
            if batch is None:
                is_over = True
            else:
                waiting.append((batch, pool.submit(_encode, transportable(batch.lines))))
        if waiting:
            batch, future = waiting.popleft()
            yield batch, future.result()
    if error is not None:
        raise error


def _begin(pickled: bytes) -> None:
    """In a new process. It leaves the job's group of processes, whose signals are for its parent,
    and takes those that it gets itself."""
    global _encoder
    os.setpgid(0, 0)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # forgets one that the group got until now
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores
    torch.set_num_threads(1)
    _encoder = pickle.loads(pickled)


def _end_with_the_parent() -> None:
    """One that was killed cannot say so, and its processes would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "started by hand"
    parent.join()
    os._exit(1)


def _encode(lines: list[Line]) -> Encoded:
    assert _encoder is not None, "_begin makes it"
    return _encoder.encode(received(lines))
