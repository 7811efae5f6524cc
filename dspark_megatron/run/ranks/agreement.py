"""What all ranks must have in common, compared before anything depends on it.

Nodes may have other files, packages or settings than their neighbours. Ranks that go on with these
wait in different collectives, or train on different things without a word; so each says what it
has, in texts by field, and the ranks that differ are named.
"""

import datetime
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch.distributed as dist

from dspark_megatron.errors import ConfigError
from dspark_megatron.run.ranks.runtime import Launch

Facts = dict[str, str]
_WAIT = datetime.timedelta(minutes=30)
_SHOWN_FIELDS, _SHOWN_TEXT = 8, 80


@dataclass(frozen=True)
class RankFacts:
    rank: int
    host: str
    facts: Facts


def agree_at_launch(job: Launch, facts: Facts) -> None:
    """ConfigError on every rank where the facts differ. Through the job's store, since ranks whose
    settings differ could not make the same process groups."""
    if job.world_size == 1:
        return
    # Numbered: a process may compare twice, and the store keeps the first answer.
    name = f"agreement/{job.store.add(f'agreement/count/{job.rank}', 1)}"
    mine = json.dumps({"host": socket.gethostname(), "facts": facts})
    job.store.set(f"{name}/{job.rank}", mine)
    if job.rank == 0:
        told = (json.loads(_told(job, f"{name}/{rank}")) for rank in range(job.world_size))
        found = disagreement([RankFacts(rank, **said) for rank, said in enumerate(told)])
        job.store.set(f"{name}/verdict", found)
    if verdict := _told(job, f"{name}/verdict"):
        raise ConfigError(verdict)


def _told(job: Launch, key: str) -> str:
    job.store.wait([key], _WAIT)
    return job.store.get(key).decode()


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
    return ", ".join(f"{_ranks([one.rank for one in group])} ({host})" for host, group in by_host)


def _ranks(ranks: list[int]) -> str:
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(texts)}"
