"""Ranks that do not come are named, with where they and the others are."""

import threading
import time
from dataclasses import replace

import pytest
import torch.distributed as dist

from dspark_megatron.errors import ConfigError
from dspark_megatron.run.ranks import agreement, places
from dspark_megatron.run.ranks.absent import Sign, absence, goes_on
from dspark_megatron.run.ranks.agreement import agree_at_launch
from dspark_megatron.run.ranks.runtime import Launch

STUCK = Sign(0, "a", 7, "step 12", 20, "training/loop.py:1 in run", "all_reduce", 700.0, 600.0)


def signs(*changes):
    """What each rank says, and what it says a little later; `beat=None`: nothing more."""
    before = {
        i: replace(STUCK, rank=i, **more) for i, more in enumerate(changes) if more is not None
    }
    after = {i: replace(sign, beat=sign.beat + 1) for i, sign in before.items()}
    return before, after


def stopped(before, after, rank):
    return before, {**after, rank: before[rank]}


def test_a_rank_without_a_sign_of_life_is_named_with_host_step_and_place():
    before, after = stopped(*signs({}, {"host": "b", "place": "step 11"}, {}), 1)
    said = absence(before, after, 3, 600)
    assert (
        "ranks waited 10 minutes for each other (train.timeout_minutes): rank 1 (b) gives" in said
    )
    assert "it was last heard of at step 11 (all_reduce, training/loop.py:1 in run)" in said
    assert "Waiting: ranks 0, 2 at step 12 (all_reduce" in said
    assert not goes_on(before, after)


def test_a_rank_that_never_came_is_named():
    said = absence(*signs({}, None, None), 3, 6)
    assert "waited 6 seconds" in said and "ranks 1-2 never gave a sign of life" in said


def test_a_rank_that_is_behind_is_named_though_it_is_alive():
    behind = {"place": "reading data.train_files", "marks": 3, "collective": ""}
    said = absence(*signs({}, behind), 2, 600)
    assert "rank 1 (a) is still at reading data.train_files (training/loop.py" in said
    assert "Waiting: rank 0 at step 12" in said


def test_a_rank_that_is_in_no_collective_while_the_others_are_is_named():
    said = absence(*signs({}, {"collective": "", "line": "data/x.py:3 in read"}), 2, 600)
    assert "rank 1 (a) is still at step 12 (data/x.py:3 in read)" in said


def test_ranks_in_different_collectives_are_all_listed():
    said = absence(*signs({}, {"collective": "broadcast"}), 2, 600)
    assert "all are alive, and wait for each other" in said
    assert "rank 0 at step 12 (all_reduce" in said and "rank 1 at step 12 (broadcast" in said


def test_a_rank_that_gets_on_keeps_the_others_waiting():
    before, after = signs({}, {"seconds": 1.0})
    assert goes_on(before, after)
    assert not goes_on(*stopped(before, after, 1)), "it did, and is gone"


@pytest.fixture
def short_limit():
    places.set_time_limit(0.02)
    yield
    places.set_time_limit(10)


def test_the_main_rank_names_the_ranks_that_do_not_come_to_the_launch(short_limit, monkeypatch):
    monkeypatch.setattr(agreement, "_GRACE_SECONDS", 0.5)
    store, said = dist.HashStore(), {}

    def start(rank):
        try:
            agree_at_launch(Launch(rank, 4, 0, store, store, "host0:29400"), {"a": "1"})
        except ConfigError as error:
            said[rank] = str(error)

    threads = [threading.Thread(target=start, args=(rank,)) for rank in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert "ranks 1, 3 of 4 did not come to host0:29400 within 0.02 minutes" in said[0]
    assert "rank 0 did not compare the settings" in said[2] and "at host0:29400" in said[2]


def test_a_main_thread_is_seen_to_move_or_to_hang():
    lock = threading.Lock()
    with lock:
        thread = threading.Thread(target=lock.acquire)
        thread.start()
        while not is_still(thread.ident):
            time.sleep(0.01)
        places.at("somewhere else")
        marked = places.look(thread.ident)
        places.at("and somewhere else")
        assert places.look(thread.ident).marks == marked.marks + 1
        assert places.look(thread.ident).stack == marked.stack != ()
    thread.join()
    assert places.look(thread.ident).stack == ()
    mine = places.look(threading.get_ident())
    assert mine.stack != places.look(threading.get_ident()).stack, "it has gone on"


def is_still(thread):
    first = places.look(thread).stack
    time.sleep(0.05)
    return first == places.look(thread).stack
