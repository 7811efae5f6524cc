"""The place of a rank in its job: environment, device, process groups, and how all ranks end
together. The environment that torchrun sets is read here and nowhere else.
"""

import contextlib
import datetime
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dspark_megatron.errors import ConfigError, require
from dspark_megatron.mcore.prepare import prepare_megatron

_FAILURE_KEY, _MAIN_RANKS_KEY = "dspark_failure", "dspark_main_ranks"
_CHECK_SECONDS = 1.0


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


@dataclass(frozen=True)
class Launch:
    """What torchrun tells a process; a plain `python` start is a job of one rank."""

    rank: int
    world_size: int
    local_rank: int
    store: dist.Store
    watch_store: dist.Store
    """A connection of its own for the watching thread: a blocked one is locked."""

    @classmethod
    def from_environment(cls) -> "Launch":
        rank = int(os.environ.get("RANK", 0))
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        host = os.environ.get("MASTER_ADDR", "localhost")
        port = int(os.environ.get("MASTER_PORT", 0))
        # torchrun's agent may already serve a store at that address.
        serve = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and rank == 0
        store = dist.TCPStore(host, port, world_size, serve, wait_for_workers=False)
        watch = dist.TCPStore(host, store.port, world_size, False, wait_for_workers=False)
        attempt = f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        stores = (dist.PrefixStore(attempt, s) for s in (store, watch))
        return cls(rank, world_size, local_rank, *stores)

    @classmethod
    def alone(cls) -> "Launch":
        """A job of this process only, whatever the environment says."""
        store = dist.HashStore()
        return cls(0, 1, 0, store, store)

    def main_ranks(self, make: Callable[[], str]) -> str:
        """What `make` returns on the main rank, on every rank; before there are process groups.
        Every rank calls it, at most once in a job."""
        if self.rank == 0:
            self.store.set(_MAIN_RANKS_KEY, make())
        return self.store.get(_MAIN_RANKS_KEY).decode()


@contextlib.contextmanager
def launch() -> Iterator[Launch]:
    """Run a job so that the first failure of any rank ends every rank with that one message.

    A failing rank leaves its message in the store. Ranks that wait in a collective cannot raise,
    so a thread on each rank looks for the message and ends the process.
    """
    prepare_megatron()
    job = Launch.from_environment()
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(job, done), daemon=True)
    watcher.start()
    try:
        yield job
    except ConfigError as error:
        _fail(job, f"error: {error}{_whose(job)}")
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            raise
        _fail(job, f"rank {job.rank} failed:\n{''.join(traceback.format_exception(error))}")
    finally:
        done.set()
    if dist.is_initialized():
        dist.destroy_process_group()


def _whose(job: Launch) -> str:
    """Which node an error is of, where there are several and each has files of its own."""
    if os.environ.get("LOCAL_WORLD_SIZE", str(job.world_size)) == str(job.world_size):
        return ""
    return f" (rank {job.rank} on {socket.gethostname()})"


def _fail(job: Launch, message: str) -> None:
    """Publish the message if no rank was faster, print it once, end this process with code 1."""
    # A collective that broke because its peer failed must not hide the peer's own message.
    with contextlib.suppress(Exception):
        first = job.store.compare_set(_FAILURE_KEY, "", f"{job.rank}\n{message}").decode()
        if int(first.partition("\n")[0]) != job.rank:
            _exit()
    print(message, file=sys.stderr, flush=True)
    _exit()


def _exit() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # other threads may be inside a collective that never returns


def _watch(job: Launch, done: threading.Event) -> None:
    while not done.wait(_CHECK_SECONDS):
        try:
            failed = job.watch_store.check([_FAILURE_KEY])
        except Exception:  # the store went away with the launcher
            return
        if failed and not done.is_set():
            _exit()


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


def start(job: Launch, tensor_parallel: int, *, shards_target: bool = False) -> Runtime:
    """Join all ranks and make Megatron-Core's tensor- and data-parallel groups.

    NCCL on the GPU of `local_rank` where CUDA is available, gloo on the CPU otherwise.
    shards_target: the frozen target's weights travel between data-parallel ranks.
    """
    order_kernels(tensor_parallel, shards_target=shards_target)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if torch.cuda.is_available():
        device = torch.device("cuda", job.local_rank)
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if not dist.is_initialized():
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("world", job.store),
            rank=job.rank,
            world_size=job.world_size,
            timeout=datetime.timedelta(minutes=30),
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_parallel, create_gloo_process_groups=False
    )
    # Megatron-Core's layers want its random states; no number of ours comes from them.
    model_parallel_cuda_manual_seed(1)
    return Runtime.joined(device)
