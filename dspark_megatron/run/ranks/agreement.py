"""What all ranks must have in common, compared before anything depends on it.

Nodes may have other files, packages or settings than their neighbours. Ranks that go on with these
wait in different collectives, or train on different things without a word; so each says what it
has, in texts by field, and the ranks that differ are named.
"""

import datetime
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch.distributed as dist

from dspark_megatron.errors import ConfigError, require
from dspark_megatron.run.ranks.job import Launch
from dspark_megatron.run.ranks.places import at, time_limit

Facts = dict[str, str]
_GRACE_SECONDS = 30.0
_SHOWN_FIELDS, _SHOWN_TEXT = 8, 80


@dataclass(frozen=True)
class RankFacts:
    rank: int
    host: str
    facts: Facts


def agree_at_launch(job: Launch, facts: Facts) -> None:
    """ConfigError on every rank where the facts differ, or a rank does not come. Through the job's
    store, since ranks whose settings differ could not make the same process groups."""
    if job.world_size == 1:
        return
    at("comparing settings")
    # Numbered: a process may compare twice, and the store keeps the first answer.
    name = f"agreement/{job.store.add(f'agreement/count/{job.rank}', 1)}"
    mine = json.dumps({"host": socket.gethostname(), "facts": facts})
    job.store.set(f"{name}/{job.rank}", mine)
    if job.rank == 0:
        told = _told_by_all(job, name)
        found = disagreement([RankFacts(rank, **said) for rank, said in enumerate(told)])
        job.store.set(f"{name}/verdict", found)
    # The main rank waits for the others first, and names those that do not come.
    require(
        _comes(job, f"{name}/verdict", time_limit() + _GRACE_SECONDS),
        f"rank 0 did not compare the settings of all ranks within {time_limit() / 60:g} minutes "
        f"(train.timeout_minutes), and rank {job.rank} on {socket.gethostname()} waits for it at "
        f"{job.address}; start its node again",
    )
    if verdict := job.store.get(f"{name}/verdict").decode():
        job.store.set(f"{name}/read/{job.rank}", "")
        if job.rank == 0:  # its process may serve the store that the others read
            deadline = time.monotonic() + _GRACE_SECONDS
            for rank in range(job.world_size):
                _comes(job, f"{name}/read/{rank}", deadline - time.monotonic())
        raise ConfigError(verdict)


def _told_by_all(job: Launch, name: str) -> list[Any]:
    """What each rank has said of itself; ConfigError that names those that do not come."""
    keys = [f"{name}/{rank}" for rank in range(job.world_size)]
    deadline = time.monotonic() + time_limit()
    for key in keys:
        if not _comes(job, key, deadline - time.monotonic()):
            came = [rank for rank, key in enumerate(keys) if job.store.check([key])]
            absent = [rank for rank in range(job.world_size) if rank not in came]
            hosts = sorted({json.loads(job.store.get(keys[rank]))["host"] for rank in came})
            raise ConfigError(
                f"{ranks_text(absent)} of {job.world_size} did not come to {job.address} within "
                f"{time_limit() / 60:g} minutes (train.timeout_minutes), to compare settings; "
                f"those that came are on {', '.join(hosts)}. See what the others' nodes say, and "
                "start all nodes with the same command"
            )
    return [json.loads(job.store.get(key)) for key in keys]


def _comes(job: Launch, key: str, seconds: float) -> bool:
    """Whether somebody sets it in time."""
    try:
        job.store.wait([key], datetime.timedelta(seconds=max(0.001, seconds)))
    except dist.DistError:
        return False
    return True


def agree(facts: Facts) -> None:
    """ConfigError on every rank where the facts differ. One all-gather of an object over the
    world. A field is compared over the ranks that have it."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, RankFacts(dist.get_rank(), socket.gethostname(), facts))
    if found := disagreement(everyone):
        raise ConfigError(found)


def disagreement(everyone: list[RankFacts]) -> str:
    """The fields in which ranks differ, with each value and whose it is; empty where none do."""
    fields = dict.fromkeys(field for one in everyone for field in one.facts)
    different = []
    for field in fields:
        owners: dict[str, list[RankFacts]] = {}
        for one in everyone:
            if field in one.facts:
                owners.setdefault(one.facts[field], []).append(one)
        if len(owners) > 1:
            shown = _shortener(list(owners))
            parts = (f"{shown(value)} on {_places(ranks)}" for value, ranks in owners.items())
            different.append(f"{field} is {' and '.join(parts)}")
    if not different:
        return ""
    more = len(different) - _SHOWN_FIELDS
    rest = [f"{more} more"] if more > 0 else []
    return (
        f"all ranks must have the same, and they differ: "
        f"{'; '.join(different[:_SHOWN_FIELDS] + rest)}. Start all nodes with the same command, "
        "settings, packages and files"
    )


def _shortener(values: list[str]) -> Callable[[str], str]:
    """Long values are shown from where they begin to differ."""
    start = max(0, len(os.path.commonprefix(values)) - _SHOWN_TEXT // 2)

    def shown(value: str) -> str:
        if len(value) <= _SHOWN_TEXT:
            return value or "empty"
        end = start + _SHOWN_TEXT
        return f"{'...' * (start > 0)}{value[start:end]}{'...' * (end < len(value))}"

    return shown


def _places(owners: list[RankFacts]) -> str:
    """Ranks by host, neighbours as a range."""
    by_host = groupby(owners, key=lambda one: one.host)
    return ", ".join(
        f"{ranks_text([one.rank for one in group])} ({host})" for host, group in by_host
    )


def ranks_text(ranks: list[int]) -> str:
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(texts)}"
