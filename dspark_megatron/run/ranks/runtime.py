"""A job of ranks: how all of them end together, their device and process groups."""

import atexit
import contextlib
import datetime
import math
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dspark_megatron.errors import BAD_INPUT, INTERRUPTED, ConfigError, require
from dspark_megatron.mcore.prepare import prepare_megatron
from dspark_megatron.run.ranks.ending import end_process
from dspark_megatron.run.ranks.job import Launch
from dspark_megatron.run.ranks.places import at, time_limit
from dspark_megatron.run.ranks.watching import Watch, fail, lost_ranks

_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Runtime:
    """Process groups and device of this rank."""

    rank: int
    world_size: int
    device: torch.device
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup

    @classmethod
    def joined(cls, device: torch.device) -> "Runtime":
        """Of a job whose groups Megatron-Core has made."""
        from megatron.core import parallel_state

        return cls(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            device=device,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        )

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextlib.contextmanager
def launch(*, with_megatron: bool = True) -> Iterator[Launch]:
    """Run a job so that the first failure of any rank ends every rank with that one message.

    A failing rank leaves its message in the store. Ranks that wait in a collective cannot raise,
    so a thread on each rank looks for the message and ends the process. with_megatron: false for a
    job that does without Megatron-Core, whose import takes seconds.
    """
    if with_megatron:
        prepare_megatron()
    try:
        job = Launch.from_environment()
    except ConfigError as error:
        end_process(f"error: {error}", BAD_INPUT)
        raise
    watch = Watch(job)
    watch.start()
    try:
        yield job
    except ConfigError as error:
        fail(job, f"error: {error}{job.whose()}", job.store, BAD_INPUT)
    except KeyboardInterrupt:  # whoever has sent the signal says so
        fail(job, "", job.store, INTERRUPTED)
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        fail(job, _described(job, error), job.store)
    finally:
        watch.done.set()
    if dist.is_initialized():
        dist.destroy_process_group()


def _described(job: Launch, error: BaseException) -> str:
    """What a rank says as it fails. A collective breaks when another rank is gone: it is named."""
    of_collective = isinstance(error, dist.DistError) or "gloo" in str(error)
    if job.world_size > 1 and isinstance(error, RuntimeError) and of_collective:
        seen, _, _ = str(error).partition(". ")
        if lost := lost_ranks(job):
            return f"error: {lost}. Start the run again to continue it. Seen as: {seen}"
    return f"rank {job.rank} failed:\n{''.join(traceback.format_exception(error))}"


def main_ranks_folder(folder: Path | None, runtime: "Runtime") -> Path | None:
    """The main rank's folder on every rank: a file system may show its files late to other nodes.
    One broadcast of an object. ConfigError where a rank does not see it."""
    chosen = from_main_rank(folder)
    require(
        chosen is None or chosen.is_dir(),
        f"rank {runtime.rank} does not see {chosen}, which the main rank reads; runs must be on a "
        "file system that all nodes share",
    )
    return chosen


def from_main_rank(value: Any) -> Any:
    """The main rank's value on every rank. One broadcast of an object."""
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def order_kernels(tensor_parallel: int, *, shards_target: bool) -> None:
    """Set CUDA_DEVICE_MAX_CONNECTIONS=1 where it helps, unless the user has set it; before a GPU is
    used.

    The backward pass of Megatron's split linears starts a collective and then the product that
    hides it, and a GPU is sure to take them up in that order through one connection only. Weights
    of a sharded target are fetched ahead on another stream, which one connection would hold up.
    """
    if tensor_parallel > 1 and not shards_target:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def start(
    job: Launch,
    tensor_parallel: int,
    *,
    shards_target: bool = False,
    uneven: bool = False,
) -> Runtime:
    """Join all ranks and make Megatron-Core's tensor- and data-parallel groups.

    NCCL on the GPU of `local_rank` where CUDA is available, gloo on the CPU otherwise.
    shards_target: the frozen target's weights travel between data-parallel ranks.
    uneven: data-parallel ranks have shares of work of their own, and may be done long before the
    others.
    """
    at("joining the ranks", longer=True)
    order_kernels(tensor_parallel, shards_target=shards_target)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    device, limit = _joined(job, uneven=uneven)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=math.ceil(limit.total_seconds() / 60),
    )
    # Megatron-Core's layers want its random states; no number of ours comes from them.
    model_parallel_cuda_manual_seed(1)
    return Runtime.joined(device)


def start_without_megatron(job: Launch) -> Runtime:
    """Join all ranks and make no groups: each of the runtime's is the world."""
    at("joining the ranks", longer=True)
    device, _ = _joined(job)
    world: Any = dist.group.WORLD
    return Runtime(dist.get_rank(), dist.get_world_size(), device, world, world)


def _joined(job: Launch, *, uneven: bool = False) -> tuple[torch.device, datetime.timedelta]:
    """This rank's device, once all ranks have joined, and how long they wait for each other."""
    limit = _DAY if uneven else datetime.timedelta(seconds=2 * time_limit(longer=True))
    if torch.cuda.is_available():
        device = torch.device("cuda", job.local_rank)
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if not dist.is_initialized():
        store = dist.PrefixStore("world", job.store)
        store.set_timeout(limit)  # NCCL makes its connections through it, when they are used
        dist.init_process_group(
            backend,
            store=store,
            rank=job.rank,
            world_size=job.world_size,
            timeout=limit,
        )
    return device, limit


def join(tensor_parallel: int | None = None) -> Runtime:
    """The groups of a program that is not one of our commands.

    Where Megatron-Core has groups they are taken as they are. Where torch.distributed alone is
    initialized, its ranks get tensor-parallel groups of this size; None takes all of them. Else
    this process becomes a job of one rank, which ends with it. Collective over the world where
    groups are made. ConfigError where the groups that are there do not suit.
    """
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        was_initialized, job = dist.is_initialized(), Launch.of_program()
        size = tensor_parallel or job.world_size
        require(
            job.world_size % size == 0,
            f"tensor_parallel ({size}) must divide the {job.world_size} ranks of torch.distributed",
        )
        runtime = start(job, size)
        if not was_initialized:
            atexit.register(dist.destroy_process_group)
        return runtime
    device = torch.device(torch.cuda.current_device() if torch.cuda.is_available() else "cpu")
    runtime = Runtime.joined(device)
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    contexts = parallel_state.get_context_parallel_world_size()
    require(
        stages == contexts == 1,
        f"Megatron-Core has groups of {stages} pipeline stages and {contexts} context-parallel "
        "ranks; a draft needs 1 of both",
    )
    found = runtime.tp_group.size()
    require(
        tensor_parallel in (None, found),
        f"tensor_parallel ({tensor_parallel}) must be that of the groups that Megatron-Core has "
        f"({found}); leave it out",
    )
    return runtime
