"""The place of a process in its job. The environment that torchrun sets is read here."""

import datetime
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from dspark_megatron.errors import ConfigError, require

_MAIN_RANKS_KEY = "dspark_main_ranks"
_JOIN_MINUTES = 10.0
"""For the first connection, before there is a config."""


@dataclass(frozen=True)
class Launch:
    """What torchrun tells a process; a plain `python` start is a job of one rank."""

    rank: int
    world_size: int
    local_rank: int
    store: dist.Store
    watch_store: dist.Store
    """A connection of its own for the watching thread: a blocked one is locked."""
    address: str = ""
    """host:port of the store."""
    node: str = "0"
    """The same for the ranks of one launcher."""
    has_rank: bool = True
    """Whether the environment gives it a rank. One without may plan for a job of WORLD_SIZE ranks,
    of which no other is started."""

    @classmethod
    def from_environment(cls) -> "Launch":
        """ConfigError where the store of the job is not found."""
        rank = int(os.environ.get("RANK", 0))
        world_size = int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        host = os.environ.get("MASTER_ADDR", "localhost")
        port = int(os.environ.get("MASTER_PORT", 0))
        # torchrun's agent may already serve a store at that address.
        serve = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and rank == 0
        store = _connected(host, port, rank, serve=serve)
        watch = _connected(host, store.port, rank, serve=False)
        attempt = f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        return cls(
            *(rank, world_size, local_rank),
            store=dist.PrefixStore(attempt, store),
            watch_store=dist.PrefixStore(attempt, watch),
            address=f"{host}:{store.port}",
            node=os.environ.get("GROUP_RANK", "0"),
            has_rank="RANK" in os.environ,
        )

    @classmethod
    def alone(cls) -> "Launch":
        """A job of this process only, whatever the environment says."""
        store = dist.HashStore()
        return cls(0, 1, 0, store, store)

    @classmethod
    def of_program(cls) -> "Launch":
        """The job of a program that is not one of our commands: the ranks that torch.distributed
        has, else this process. ConfigError where the environment tells of ranks that are not joined
        yet."""
        local_rank, store = int(os.environ.get("LOCAL_RANK", 0)), dist.HashStore()
        if dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), local_rank, store, store)
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        require(
            ranks == 1,
            f"WORLD_SIZE says that this process is one of {ranks}, and torch.distributed is not "
            "initialized; call torch.distributed.init_process_group() first, or unset WORLD_SIZE "
            "for a process of its own",
        )
        return cls(0, 1, local_rank, store, store)

    def main_ranks(self, make: Callable[[], str]) -> str:
        """What `make` returns on the main rank, on every rank; before there are process groups.
        Every rank calls it, at most once in a job."""
        if self.rank == 0:
            self.store.set(_MAIN_RANKS_KEY, make())
        return self.store.get(_MAIN_RANKS_KEY).decode()

    def whose(self) -> str:
        """Which node an error is of, where there are several and each has files of its own."""
        if ranks_of_node(self.world_size) == self.world_size:
            return ""
        return f" (rank {self.rank} on {socket.gethostname()})"


def ranks_of_node(world_size: int) -> int:
    """How many of a job's ranks this node has: all of them where nothing says otherwise."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def _connected(host: str, port: int, rank: int, *, serve: bool) -> dist.TCPStore:
    limit = datetime.timedelta(minutes=_JOIN_MINUTES)
    try:
        return dist.TCPStore(host, port, None, serve, limit, wait_for_workers=False)
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        if serve:
            raise ConfigError(
                f"rank 0 on {socket.gethostname()} cannot serve the rendezvous of its job at port "
                f"{port}: {reason}; set MASTER_PORT to one that is free, the same on all nodes"
            ) from error
        raise ConfigError(
            f"rank {rank} on {socket.gethostname()} waited {_JOIN_MINUTES:g} minutes for its job "
            f"at {host}:{port}, where rank 0 or its launcher answers, and it did not come: "
            f"{reason}; start that node as well, or correct its address"
        ) from error
