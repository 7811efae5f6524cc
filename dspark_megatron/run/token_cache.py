"""Tokenized data of a run, made once for all ranks that see one folder and mapped by each of them.

A store's folder is named by the digest of all that decides on its samples, and is never changed. So
whatever is found under that name is right, and runs on other data have others beside it.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from dspark_megatron.config import Config
from dspark_megatron.data.dataset import ConversationDataset, dataset_of
from dspark_megatron.data.rules import SampleRules
from dspark_megatron.data.token_store import Facts, TokenStore, store_name, write_store
from dspark_megatron.data.tokenizing.collecting import Tokenizing
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.run.ranks.ending import at_end
from dspark_megatron.run.ranks.runtime import Runtime
from dspark_megatron.run.ranks.shared_folder import who_writes
from dspark_megatron.run.ranks.together import finish_together
from dspark_megatron.run.token_facts import files_facts
from dspark_megatron.storage.checksums import NotAsWritten
from dspark_megatron.storage.folder_lock import FolderLock, FolderTaken
from dspark_megatron.storage.new_folder import new_folder
from dspark_megatron.storage.notices import say_once

_PATIENCE_SECONDS = 600.0
"""How long another process that makes the same store may give no sign."""
_SIGN_SECONDS = 5.0
_LATE_SECONDS = 60.0
"""How long a network file system may take to show a folder."""


def cache_folder(config: Config) -> Path | None:
    """None where a run has no folder either."""
    if config.data.cache_dir is not None:
        return Path(config.data.cache_dir)
    output_dir = config.train.output_dir
    return Path(output_dir) / "token_cache" if output_dir else None


@dataclass(frozen=True)
class TokenCache:
    """Where the samples of some entries are, or are to be."""

    folder: Path
    """Absolute."""
    facts: Facts
    work: Callable[[], Tokenizing]
    """Begins to make it."""
    is_full: bool
    """Whether every byte of a store is compared (storage.verify)."""

    @property
    def store(self) -> Path:
        return self.folder / store_name(self.facts)

    def find(self) -> TokenStore | None:
        """None where there is none, or one that is damaged, which is said."""
        require(
            os.path.isdir(self.folder) or not os.path.lexists(self.folder),
            f"data.cache_dir {self.folder} must be a folder, and is none; name another one",
        )
        try:
            return TokenStore.open(self.store, self.facts, full=self.is_full)
        except NotAsWritten as error:
            say_once(f"tokenized data are damaged and made anew: {error}")
            return None

    def make(self) -> Iterator[None]:
        """Make the store unless another process does: then wait for that one. A step now and
        then."""
        self._check_writable()
        lock = FolderLock(self.folder / f".{self.store.name}.making", "the tokenized data")
        with at_end(lock.release):
            yield from _taken(lock)
            if self.find() is None:
                with new_folder(self.store) as new:
                    yield from _signed(self._write(new), lock.path)
        with contextlib.suppress(OSError):  # somebody has it now
            lock.path.parent.rmdir()

    def _write(self, new: Path) -> Iterator[None]:
        work = self.work()
        before = files_facts(work.entries)
        yield from write_store(new, self.facts, work)
        require(
            files_facts(work.entries) == before,
            "a data file was written to while it was tokenized; start again when all of them "
            "are complete",
        )
        say_once(f"{work.speed}; kept in {self.store}")

    def _check_writable(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise ConfigError(
                f"data.cache_dir {self.folder} does not have the tokenized data of this run and "
                f"must be writable: {error.strerror}; name another folder"
            ) from error


def _signed(work: Iterator[None], file: Path) -> Iterator[None]:
    """Steps of work, of which a file's time of change tells other processes."""
    last = time.monotonic()
    for _ in work:
        if time.monotonic() - last > _SIGN_SECONDS:
            last = time.monotonic()
            with contextlib.suppress(OSError):  # deleted by hand, to have another process begin
                os.utime(file)
        yield


def _taken(lock: FolderLock) -> Iterator[None]:
    """Take it, once who has it lets it go; a step each second. ConfigError for one that gives no
    sign."""
    seen, since = 0, time.monotonic()
    while True:
        try:
            if said := lock.take():
                say_once(said)
            return
        except FolderTaken as error:
            say_once(f"waiting: {error}")
            if (sign := _sign(lock.path)) != seen:
                seen, since = sign, time.monotonic()
            if time.monotonic() - since > _PATIENCE_SECONDS:
                raise
        except ConfigError as error:
            if not isinstance(error.__cause__, FileNotFoundError):  # just let go
                raise
        yield
        time.sleep(1)


def _sign(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def load_together(cache: TokenCache, runtime: Runtime, place: str) -> TokenStore:
    """The store of a run, which some ranks make if it is not there. Every rank calls it:
    all-gathers of objects over the world, as many as the work takes. place: what they are at."""
    found = _found_by_all(cache)
    if found is None:
        makes = who_writes(cache.folder, runtime) == runtime.rank
        finish_together(cache.make() if makes else None, place)
        opened: list[TokenStore] = []
        finish_together(_open(cache, runtime, opened), place)
        [found] = opened
    return found


def _found_by_all(cache: TokenCache) -> TokenStore | None:
    """This rank's store, if every rank has one."""
    found, problem = None, ""
    try:
        found = cache.find()
    except ConfigError as error:
        problem = str(error)
    everyone = [(False, "")] * dist.get_world_size()
    dist.all_gather_object(everyone, (found is not None, problem))
    if problems := [said for _, said in everyone if said]:
        raise ConfigError(problems[0])
    return found if all(has for has, _ in everyone) else None


def _open(cache: TokenCache, runtime: Runtime, opened: list[TokenStore]) -> Iterator[None]:
    """Put a store there that was just made, maybe by another node. A step for each look."""
    deadline = time.monotonic() + _LATE_SECONDS
    while (found := cache.find()) is None:
        require(
            time.monotonic() < deadline,
            f"rank {runtime.rank} does not see {cache.store}, which another rank has written; "
            "name a data.cache_dir on a file system that works, or one of each node's own",
        )
        yield
        time.sleep(0.2)
        with contextlib.suppress(OSError):
            list(cache.folder.iterdir())  # has a network file system look again
    opened.append(found)


def load_alone(cache: TokenCache, *, makes: bool) -> TokenStore | None:
    """The same for one process, which may leave it at what is there."""
    if (found := cache.find()) is None and makes:
        for _ in cache.make():
            pass
        found = cache.find()
    return found


def dataset_in(
    store: TokenStore, entries: list[str], rules: SampleRules, weights: list[float] | None
) -> ConversationDataset:
    """ConfigError as of `load_samples`."""
    dataset = dataset_of(store.samples, entries, rules, weights)
    known = store.fingerprint(dataset.shares)
    if known is not None:
        dataset.fingerprint = known
    elif dataset.shares is not None:
        store.keep_fingerprint(dataset.shares, dataset.fingerprint)
    return dataset
