"""Rank processes that live as long as the test session, so that a parallel test costs no start-up.

`pool.run(function, world=2, tp=2, **arguments)` calls a module-level function on each rank with its
`Runtime` and returns the results in rank order.
"""

import datetime
import functools
import importlib
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing import connection, forkserver
from typing import Any

import torch.distributed as dist

MAX_RANKS = 4
TIMEOUT_SECONDS = 600
MOST_LAYOUTS = 16
"""Process groups that are made one after another before the ranks start anew: gloo keeps threads of
groups that are gone, and a thousand of them keep a machine busy."""


class RankPool:
    def __init__(self, ranks: int = MAX_RANKS) -> None:
        self._ranks = ranks
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        self._layout: tuple[int, int] | None = None
        self._generation = 0

    def run(self, function: Callable, *, world: int, tp: int, **arguments: Any) -> list[Any]:
        if self._layout != (world, tp):
            self._layout, self._generation = (world, tp), self._generation + 1
            if self._generation % MOST_LAYOUTS == 0:
                self.close()
        if not self._processes:
            self._start()
        layout = (world, tp, self._generation)
        # Named, not pickled: a test module is imported under pytest's name for it.
        call = (function.__module__, function.__name__, layout, arguments)
        for pipe in self._pipes[:world]:
            pipe.send(call)
        answers, failures, silent = self._answers(world)
        if failures:
            self._layout = None  # groups in which something failed are not used again
            if silent:
                self.close()
            raise AssertionError("\n".join(failures))
        return [answers[rank] for rank in range(world)]

    def _answers(self, world: int) -> tuple[dict[int, Any], list[str], bool]:
        """What the ranks say: results by rank, failures, and whether a rank said nothing."""
        waiting = {self._pipes[rank]: rank for rank in range(world)}
        answers, failures = {}, []
        while waiting:
            # After one failure the others may wait for it in a collective for ever.
            ready = connection.wait(list(waiting), 5 if failures else TIMEOUT_SECONDS)
            if not ready:
                failures += [f"rank {rank}: no answer" for rank in waiting.values()]
                return answers, failures, True
            for pipe in ready:
                rank = waiting.pop(pipe)
                ok, value = pipe.recv()
                if ok:
                    answers[rank] = value
                else:
                    failures.append(f"rank {rank}:\n{value}")
        return answers, failures, False

    def _start(self) -> None:
        context = _context()
        self._store = dist.TCPStore("localhost", 0, None, True, wait_for_workers=False)
        for rank in range(self._ranks):
            ours, theirs = context.Pipe()
            arguments = (rank, self._store.port, theirs)
            process = context.Process(target=_serve, args=arguments)
            process.start()
            self._processes.append(process)
            self._pipes.append(ours)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


@functools.cache
def _context() -> Any:
    """Starts processes as forks of one that has imported what ranks need, which takes seconds. That
    one has no threads and no process group."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.imported"])
    own = os.environ.get("PYTHONPATH")
    if own is not None:
        os.environ["PYTHONPATH_OF_TESTS"] = own
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        forkserver.ensure_running()
    finally:
        for name in ("PYTHONPATH", "PYTHONPATH_OF_TESTS"):
            os.environ.pop(name, None)
        if own is not None:
            os.environ["PYTHONPATH"] = own
    return context


def _end_with_the_session() -> None:
    """A rank that waits in a collective does not see its pipe close."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _serve(rank: int, port: int, pipe: Any) -> None:
    threading.Thread(target=_end_with_the_session, daemon=True).start()
    import torch

    from dspark_megatron.mcore.prepare import prepare_megatron

    prepare_megatron()
    torch.set_num_threads(1)
    store = dist.TCPStore("localhost", port, None, False)
    current, runtime = None, None
    while True:
        try:
            module, name, layout, arguments = pipe.recv()
        except EOFError:  # the test session is gone
            return
        try:
            if current != layout:
                world, tp, generation = current = layout
                runtime = _join(dist.PrefixStore(f"{generation}", store), rank, world, tp)
            function = getattr(importlib.import_module(module), name)
            pipe.send((True, function(runtime, **arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _join(store: Any, rank: int, world: int, tp: int) -> Any:
    from megatron.core import parallel_state
    from torch.distributed.tensor._redistribute import clear_redistribute_planner_cache
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    from dspark_megatron.run.ranks.runtime import Launch, start

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        # A mesh of the same shape counts as the same: what is kept of it would name lost groups.
        _clear_sharding_prop_cache()
        clear_redistribute_planner_cache()
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=TIMEOUT_SECONDS),
    )
    return start(Launch(rank, world, 0, store, store), tp)
