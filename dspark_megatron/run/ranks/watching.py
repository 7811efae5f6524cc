"""The thread of each rank that looks after its main thread, which may be inside a collective.

It ends the rank when another one has failed, when the job's store is gone, and when ranks wait for
each other beyond the time limit; and it tells the others where this rank is.
"""

import contextlib
import socket
import threading
import time

import torch.distributed as dist

from dspark_megatron.errors import FAILED
from dspark_megatron.run.ranks.absent import Sign, absence, goes_on, silent
from dspark_megatron.run.ranks.ending import end_process, say, tell_torchrun
from dspark_megatron.run.ranks.job import Launch
from dspark_megatron.run.ranks.launcher import launcher_is_gone
from dspark_megatron.run.ranks.places import look, time_limit

_FAILURE_KEY, _SIGN_KEY = "dspark_failure", "dspark_sign"
_CHECK_SECONDS = 1.0
_STORE_SECONDS = 15.0
_SURE_SECONDS = 5.0
"""So long no rank's sign of life may stay out, at least, before it counts as gone."""


class Watch:
    def __init__(self, job: Launch) -> None:
        self.job, self.done = job, threading.Event()
        self._thread = threading.get_ident()
        self._host = socket.gethostname()
        self._seen, self._beat, self._seconds = look(self._thread), 0, 0.0
        self._last_tick = self._last_answer = time.monotonic()
        self._next = 0.0
        """Not before that it judges: the store of a large job has enough to do."""

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                self._tick()
                self._last_answer = time.monotonic()
            except dist.DistError as error:
                self._store_is_silent(error)
            if self.done.wait(_CHECK_SECONDS):
                return

    def _tick(self) -> None:
        self._look()
        # Not all at once: the first rank that is sure ends the others.
        patience = time_limit() + min(self.job.rank, 30)
        if self._seconds > patience and time.monotonic() > self._next and not self.done.is_set():
            self._judge()

    def _look(self) -> None:
        """See whether another rank has failed, count how long the main thread has been inside one
        call, and tell the others. Time in which the whole process was stopped does not count."""
        if launcher_is_gone():
            return  # and so may the store be; another thread ends this rank
        if self.job.watch_store.check([_FAILURE_KEY]) and not self.done.is_set():
            end_after_another(self.job, self.job.watch_store)
        if self.job.world_size == 1:
            return
        now, seen = time.monotonic(), look(self._thread)
        passed, self._last_tick = min(now - self._last_tick, 2 * _CHECK_SECONDS), now
        has_moved = (seen.marks, seen.stack) != (self._seen.marks, self._seen.stack)
        self._seen, self._seconds = seen, 0.0 if has_moved else self._seconds + passed
        self._beat += 1
        sign = Sign(
            *(self.job.rank, self._host, self._beat, seen.text, seen.marks),
            *(seen.line, seen.collective, self._seconds, time_limit()),
        )
        self.job.watch_store.set(f"{_SIGN_KEY}/{self.job.rank}", sign.written())

    def _judge(self) -> None:
        """End the run unless some rank still gets on."""
        before = signs(self.job, self.job.watch_store)
        until = time.monotonic() + max(_SURE_SECONDS, min(30.0, time_limit() / 10))
        while time.monotonic() < until:
            if self.done.wait(_CHECK_SECONDS):
                return
            self._look()
        after = signs(self.job, self.job.watch_store)
        if goes_on(before, after):
            self._next = time.monotonic() + max(30.0, self.job.world_size / 2)
            return
        text = absence(before, after, self.job.world_size, self._seconds)
        fail(self.job, f"error: {text}", self.job.watch_store)

    def _store_is_silent(self, error: Exception) -> None:
        if time.monotonic() - self._last_answer > _STORE_SECONDS and not self.done.is_set():
            end_process(
                f"error: rank {self.job.rank} on {self._host} ends, since its job's store at "
                f"{self.job.address} is gone, which the launcher of the first node serves: "
                f"{str(error).splitlines()[0]}; start the run again to continue it"
            )


def signs(job: Launch, store: dist.Store) -> dict[int, Sign]:
    """What the ranks have said last."""
    keys = {rank: f"{_SIGN_KEY}/{rank}" for rank in range(job.world_size)}
    return {r: Sign.read(store.get(key)) for r, key in keys.items() if store.check([key])}


def lost_ranks(job: Launch) -> str:
    """Why a collective may have broken: ranks without a sign of life, empty if there are none. Ends
    this rank if another one says that it failed."""
    if launcher_is_gone():
        time.sleep(5 * _CHECK_SECONDS)  # this rank ends meanwhile
    try:
        before = signs(job, job.store)
        deadline = time.monotonic() + _SURE_SECONDS
        while time.monotonic() < deadline:
            if job.store.check([_FAILURE_KEY]):
                end_after_another(job, job.store)
            time.sleep(0.2)
        after = signs(job, job.store)
    except dist.DistError:
        return f"the job's store at {job.address} is gone, which the first node's launcher serves"
    gone = sorted(silent(before, after))
    return "; ".join(
        f"{after[r].who} is gone; it was last heard of at {after[r].where}" for r in gone
    )


def fail(job: Launch, message: str, store: dist.Store, code: int = FAILED) -> None:
    """Publish message and exit code if no rank was faster, print the message once, end this process
    with that code."""
    # A collective that broke because its peer failed must not hide the peer's own message.
    with contextlib.suppress(Exception):
        mine = f"{job.rank}\n{job.node}\n{code}\n{message}"
        if store.compare_set(_FAILURE_KEY, "", mine).decode() != mine:
            end_after_another(job, store)
    tell_torchrun(job.rank)
    end_process(message, code)


def end_after_another(job: Launch, store: dist.Store) -> None:
    """End as another rank has, with its exit code. One rank of each other node says what that one
    said."""
    rank, node, code, message = store.get(_FAILURE_KEY).decode().split("\n", 3)
    if message and node != job.node and job.local_rank == 0:
        say(f"rank {rank} on another node has ended the run:\n{message}")
    end_process(code=int(code))
