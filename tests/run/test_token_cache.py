"""Tokenized data on disk: the same as in memory, made once, and never taken for others."""

import json
import os
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy
import pytest

from dspark_megatron.data.dataset import SampleArrays
from dspark_megatron.data.tokenizing.collecting import Tokenizing
from dspark_megatron.errors import ConfigError
from dspark_megatron.run import token_cache
from dspark_megatron.run.check import check
from dspark_megatron.run.data import load_run_data
from dspark_megatron.run.ranks.facts import file_facts
from dspark_megatron.run.token_cache import TokenCache
from dspark_megatron.run.token_facts import files_facts
from support.chat_lines import chat, tokens, write_jsonl
from support.full_disk import files_of_at_most
from support.samples import FORGETTING_TEMPLATE
from support.tiny_target import tiny_config

THINKING = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "<think>well</think>hello there then"},
]
LINES = [
    {"messages": THINKING * 2},
    tokens([1, 2, 3] * 4, [0, 1, 1] * 4),
    chat("hi", "no hill in the inn"),
    {"messages": []},
    chat("hi", "all in the hill " * 30),
    chat("hi"),
    tokens([4] * 9, [0] * 9),
]


@pytest.fixture
def said(monkeypatch):
    """What is said once."""
    found = []
    monkeypatch.setattr(token_cache, "say_once", found.append)
    return found


@pytest.fixture
def entries(tmp_path):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "docs.bin"), dtype=numpy.int32)
    for first in (40, 60):
        builder.add_item(torch.arange(first, first + 9))
        builder.end_document()
    builder.finalize(str(tmp_path / "docs.idx"))
    folder = tmp_path / "chats"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(folder / name, LINES)
    return [str(folder), str(tmp_path / "docs")]


@pytest.fixture
def load(tiny_run, tmp_path, entries):
    """The data of a run with these settings; cache_dir None: in memory."""

    def load(
        cache_dir="cache", weights=None, template=FORGETTING_TEMPLATE, entries=entries, **data
    ):
        data = {"skip_bad_lines": 0.5, "reasoning": "mask", **data}
        data["cache_dir"] = cache_dir and str(tmp_path / cache_dir)
        loss, storage = data.pop("loss", {}), data.pop("storage", {})
        config = tiny_config(tiny_run, data=data, loss=loss, storage=storage)
        plan = check(config, 1)
        plan.tokenizer.chat_template = template
        return load_run_data(plan, entries, weights=weights)

    return load


@pytest.fixture
def tokenized(monkeypatch):
    """How often something was tokenized."""
    calls, into = [], Tokenizing.into

    def counted(self, streams):
        calls.append(self)
        return into(self, streams)

    monkeypatch.setattr(Tokenizing, "into", counted)
    return calls


def stores(folder):
    return sorted(folder.glob("tokens_*"))


def assert_same(found, wanted):
    assert len(found) == len(wanted) > 0
    for mine, theirs in zip(found, wanted, strict=True):
        for part, other in zip(mine, theirs, strict=True):
            assert part.dtype == other.dtype and part.tolist() == other.tolist()
    assert found.lengths.tolist() == wanted.lengths.tolist()
    assert found.report.describe() == wanted.report.describe()
    assert found.shares == wanted.shares and found.fingerprint == wanted.fingerprint
    assert [found.origins[i] for i in range(len(found))] == [
        wanted.origins[i] for i in range(len(wanted))
    ]


@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
def test_samples_on_disk_are_those_in_memory_at_every_start(load, tokenized, weights):
    """Bad lines, split chats, masked reasoning, indexed datasets, weights."""
    in_memory = load(cache_dir=None, weights=weights)
    assert "left out 4 of 16 lines" in in_memory.report.describe()
    assert "2 chats were split" in in_memory.report.describe()
    assert_same(load(weights=weights), in_memory)
    assert len(tokenized) == 2
    again = load(weights=weights)
    assert_same(again, in_memory)
    assert len(tokenized) == 2, "the second start maps what the first has made"
    assert isinstance(again._arrays.token_ids, numpy.memmap)


def test_the_fingerprint_is_not_computed_again(load, monkeypatch):
    first = load(weights=[1, 2]).fingerprint
    from dspark_megatron.data import dataset

    monkeypatch.setattr(dataset, "fingerprint_of", None)
    assert load(weights=[1, 2]).fingerprint == first


def test_what_decides_on_samples_decides_on_the_folder(load, tmp_path, entries):
    cache, file = tmp_path / "cache", Path(entries[0]) / "a.jsonl"
    load()
    for change in (
        {"max_length": 20},
        {"min_loss_tokens": 3},
        {"reasoning": "keep"},
        {"reasoning_tags": ["<a>", "</a>"]},
        {"template_date": "2026-01-01"},
        {"loss": {"anchor_rule": "token"}},
        {"template": "{# a comment #}" + FORGETTING_TEMPLATE},
        {"entries": entries[:1]},
        {"entries": entries[::-1]},
    ):
        before = len(stores(cache))
        load(**change)
        assert len(stores(cache)) == before + 1, change
    before, was = len(stores(cache)), file.stat()
    file.write_text(file.read_text().replace("hill", "well"))
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert file.stat().st_size == was.st_size and file.stat().st_mtime_ns == was.st_mtime_ns
    load()
    assert len(stores(cache)) == before + 1, "an edit that hides"


def test_what_does_not_decide_on_samples_makes_no_other_folder(load, tmp_path):
    load()
    load(skip_bad_lines=0.9)
    load(weights=[2, 1])
    load(loss={"ce_loss_alpha": 0.3}, group_by_length=True)
    assert len(stores(tmp_path / "cache")) == 1


def test_a_share_of_bad_lines_is_judged_at_every_start(load, tokenized):
    with pytest.raises(ConfigError, match=r"4 of 16 lines cannot be used; .*\(0.1\)") as first:
        load(skip_bad_lines=0.1)
    with pytest.raises(ConfigError) as second:
        load(skip_bad_lines=0.1)
    assert str(first.value) == str(second.value)
    assert "left out 4 of 16" in load(skip_bad_lines=0.25).report.describe()
    assert len(tokenized) == 1


def test_data_of_which_nothing_is_kept_are_refused_at_every_start(load):
    for _ in range(2):
        with pytest.raises(ConfigError, match="samples of .* were dropped"):
            load(min_loss_tokens=999)


@pytest.mark.parametrize("name", ["token_ids.npy", "lines.npy", "manifest.json", "checksums.json"])
def test_a_store_that_was_cut_short_is_said_and_made_anew(load, tmp_path, tokenized, said, name):
    wanted = load(cache_dir=None)
    load()
    [store] = stores(tmp_path / "cache")
    os.truncate(store / name, (store / name).stat().st_size - 9)
    assert_same(load(), wanted)
    assert len(tokenized) == 3
    assert any(f"made anew: {store / name}" in text for text in said)
    assert_same(load(), wanted)
    assert len(tokenized) == 3


def test_a_missing_file_is_made_anew(load, tmp_path, tokenized):
    load()
    [store] = stores(tmp_path / "cache")
    (store / "offsets.npy").unlink()
    load()
    assert len(tokenized) == 2


def test_a_flipped_bit_is_found_in_full(load, tmp_path, tokenized, monkeypatch, said):
    from dspark_megatron.storage import checksums

    monkeypatch.setattr(checksums, "_READ_ANYWAY", 0)
    load()
    [store] = stores(tmp_path / "cache")
    content = bytearray((store / "token_ids.npy").read_bytes())
    content[-4] ^= 1
    (store / "token_ids.npy").write_bytes(content)
    load()
    assert len(tokenized) == 1
    load(storage={"verify": "full"})
    assert len(tokenized) == 2 and any("token_ids.npy: its CRC-32 is" in text for text in said)


def test_the_check_of_storage_reads_tokenized_data(load, tmp_path):
    from dspark_megatron.run.verification import verify

    load(weights=[1, 2])
    [store] = stores(tmp_path / "cache")
    names = {verdict.path.name for verdict in verify(store)}
    assert names == {"manifest.json", *(f"{name}.npy" for name in SampleArrays._fields)}
    assert not any(verdict.damage for verdict in verify(store))
    (store / "lines.npy").write_bytes(b"")
    assert [v.path.name for v in verify(store) if v.damage] == ["lines.npy"]


def test_a_folder_of_something_else_is_refused_and_left(load, tmp_path):
    load()
    [store] = stores(tmp_path / "cache")
    shutil.rmtree(store)
    for make, message in (
        (lambda: store.write_text("mine"), "must be a folder of tokenized data and is none"),
        (lambda: store.mkdir(), "must hold tokenized data .*, and has nothing"),
        (lambda: (store / "notes.txt").write_text("mine"), "and has notes.txt; move it away"),
    ):
        make()
        with pytest.raises(ConfigError, match=message):
            load()
        if store.is_file():
            store.unlink()
    assert (store / "notes.txt").read_text() == "mine"


def test_a_folder_that_was_renamed_is_refused(load, tmp_path):
    load()
    [mine] = stores(tmp_path / "cache")
    load(max_length=20)
    [other] = [store for store in stores(tmp_path / "cache") if store != mine]
    shutil.rmtree(mine)
    other.rename(mine)
    with pytest.raises(ConfigError, match="holds samples of other rules .*: it was renamed"):
        load()


def test_a_cache_that_is_a_file_is_refused(load, tmp_path):
    (tmp_path / "cache").write_text("mine")
    with pytest.raises(ConfigError, match="data.cache_dir .*cache must be a folder, and is none"):
        load()


def test_a_cache_within_a_file_is_refused(load, tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ConfigError, match="must be writable: Not a directory; name another"):
        load(cache_dir="notes/cache")


def test_a_lock_that_was_deleted_stops_nobody(caches, monkeypatch):
    monkeypatch.setattr(token_cache, "_SIGN_SECONDS", 0)
    work = caches[0].make()
    next(work)
    shutil.rmtree(next(caches[0].folder.glob(".*.making")))
    list(work)
    assert caches[0].find() is not None


def test_a_read_only_cache_serves_what_it_has(load, tmp_path, monkeypatch):
    wanted = load(weights=[1, 2])

    def refused(**arguments):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(token_cache.tempfile, "TemporaryFile", refused)
    before = sorted((tmp_path / "cache").rglob("*"))
    assert_same(load(weights=[1, 2]), wanted)
    message = "cache does not have the tokenized data of this run and must be writable: Read-only"
    with pytest.raises(ConfigError, match=message):
        load(max_length=20)
    assert sorted((tmp_path / "cache").rglob("*")) == before


def test_a_full_disk_is_one_sentence_and_leaves_nothing(load, tmp_path):
    message = "cannot write .*tokens_.*: File too large; make room there or choose another folder"
    with files_of_at_most(300), pytest.raises(ConfigError, match=message):
        load()
    assert not list((tmp_path / "cache").iterdir())
    load()


def test_a_run_that_fails_on_the_way_leaves_nothing(load, tmp_path, entries):
    write_jsonl(Path(entries[0]) / "c.jsonl", [{"messages": []}] * 1200)
    with pytest.raises(ConfigError, match="1,000 of 1,0.. lines cannot be used"):
        load(skip_bad_lines=0.0)
    assert not list((tmp_path / "cache").iterdir())


def test_what_a_killed_writer_left_is_removed(load, tmp_path):
    load()
    [store] = stores(tmp_path / "cache")
    shutil.rmtree(store)
    left = tmp_path / "cache" / f".{store.name}.abcd1234" / "new"
    left.mkdir(parents=True)
    (left / "token_ids.npy").write_bytes(b"half")
    lock = tmp_path / "cache" / f".{store.name}.making" / "run.lock"
    lock.parent.mkdir()
    lock.write_text(
        json.dumps({"host": os.uname().nodename, "pid": 1 << 22, "started": 0, "since": ""})
    )
    load()
    assert list((tmp_path / "cache").iterdir()) == [store]


def test_data_that_change_while_they_are_read_are_refused(load, tmp_path, entries, monkeypatch):
    into = Tokenizing.into

    def changing(self, streams):
        yield from into(self, streams)
        with (Path(entries[0]) / "a.jsonl").open("a") as file:
            file.write("\n")

    monkeypatch.setattr(Tokenizing, "into", changing)
    with pytest.raises(ConfigError, match="was written to while it was tokenized"):
        load()
    assert not stores(tmp_path / "cache")


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, monkeypatch):
    """Wherever it is looked at first."""
    file = write_jsonl(tmp_path / "a.jsonl", LINES)

    def refused(path, *_arguments, **_more):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refused)
    for look in (partial(file_facts, "data.train_files"), files_facts):
        with pytest.raises(ConfigError, match="cannot read .*a.jsonl: Permission denied"):
            look([str(file)])


# Two runs


@pytest.fixture
def caches(load, tmp_path, monkeypatch):
    """The cache of a run twice, before anything is made; `load` fills it."""
    made = []
    find = TokenCache.find
    monkeypatch.setattr(TokenCache, "find", lambda self: made.append(self) or find(self))
    load()
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "cache")
    return made[0], replace(made[0])


def test_of_two_runs_at_once_one_makes_and_the_other_waits(caches, said, tokenized):
    first, second = (cache.make() for cache in caches)
    next(first)  # is at work
    next(second)
    next(second)
    assert len(tokenized) == 1
    [waiting] = {text for text in said if text.startswith("waiting: the tokenized data")}
    assert f"is in use by process {os.getpid()} on" in waiting
    list(first)
    list(second)
    assert len(tokenized) == 1
    assert caches[1].find() is not None


def test_a_run_makes_what_another_gave_up(caches, tokenized, said):
    first, second = (cache.make() for cache in caches)
    next(first)
    next(second)
    first.close()
    list(second)
    assert len(tokenized) == 2 and caches[1].find() is not None
    assert list(caches[0].folder.iterdir()) == [caches[0].store]


def test_a_run_whose_lock_was_deleted_by_hand_comes_to_its_end(caches, tokenized, monkeypatch):
    monkeypatch.setattr(token_cache, "_SIGN_SECONDS", -1.0)
    first, second = (cache.make() for cache in caches)
    next(first)
    [lock] = caches[0].folder.glob(".*.making/run.lock")
    lock.unlink()
    list(second)
    list(first)
    assert len(tokenized) == 2 and caches[0].find() is not None
    assert list(caches[0].folder.iterdir()) == [caches[0].store]


def test_a_run_does_not_wait_for_ever_for_one_that_gives_no_sign(caches, monkeypatch, said):
    first, second = (cache.make() for cache in caches)
    next(first)
    monkeypatch.setattr(token_cache, "_PATIENCE_SECONDS", 0.5)
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on"):
        list(second)
    list(first)


# Ranks


def cached_by_ranks(runtime, config, folders):
    """On each rank: the data, and whether it has tokenized them; folders: where each one is."""
    before = os.getcwd()
    os.chdir(folders[runtime.rank])
    calls, into = [], Tokenizing.into
    Tokenizing.into = lambda self, streams: calls.append(self) or into(self, streams)
    try:
        plan = check(config, runtime.world_size)
        data = load_run_data(plan, config.data.train_files, runtime=runtime)
        return data.fingerprint, len(calls), type(data._arrays.token_ids).__name__
    finally:
        Tokenizing.into = into
        os.chdir(before)


def test_one_rank_tokenizes_for_all_that_see_its_folder(pool, tiny_run, tmp_path):
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    run = partial(pool.run, cached_by_ranks, world=2, tp=1, folders=folders)
    shared = run(config=tiny_config(tiny_run, data={"cache_dir": str(tmp_path / "shared")}))
    own = run(config=tiny_config(tiny_run, data={"cache_dir": "own"}))
    again = run(config=tiny_config(tiny_run, data={"cache_dir": "own"}))
    assert [calls for _, calls, _ in shared] == [1, 0]
    assert [calls for _, calls, _ in own] == [1, 1], "each has a folder of its own"
    assert [calls for _, calls, _ in again] == [0, 0]
    assert len({fingerprint for fingerprint, _, _ in shared + own + again}) == 1
    assert {kind for _, _, kind in shared + own + again} == {"memmap"}


def test_ranks_end_together_where_one_cannot_tokenize(pool, tiny_run, tmp_path):
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"messages": []}])
    data = {"train_files": [str(bad)], "cache_dir": str(tmp_path / "cache")}
    folders = [tmp_path] * 2
    with pytest.raises(AssertionError) as error:
        config = tiny_config(tiny_run, data=data)
        pool.run(cached_by_ranks, world=2, tp=1, config=config, folders=folders)
    assert str(error.value).count("bad.jsonl:1: ") >= 2 and "no answer" not in str(error.value)


def work_together(runtime, failing):
    """The steps that each rank has done; rank 0 has none, and others wait for the last."""
    from dspark_megatron.run.ranks import together

    together._SECONDS = 0.05
    done = []

    def steps():
        try:
            for step in range(4 * runtime.rank):
                time.sleep(0.02)
                done.append(step)
                if step == 5 and failing:
                    raise ConfigError(f"rank {runtime.rank} cannot go on")
                yield
        finally:
            done.append("over")

    try:
        together.finish_together(steps() if runtime.rank else None, "a test")
    except ConfigError as error:
        done.append(str(error))
    return done


def test_ranks_wait_for_the_work_of_others_and_fail_with_it(pool):
    none, short, long, longest = pool.run(work_together, world=4, tp=1, failing=False)
    assert (none, short[-1], long[-2:], longest[-2:]) == ([], "over", [7, "over"], [11, "over"])
    for done in pool.run(work_together, world=4, tp=1, failing=True):
        assert done[-1] in ("rank 2 cannot go on", "rank 3 cannot go on")
        assert done[:-1] == [] or done[-2] == "over", "the others clear up"


def cached_by_ranks_of_a_slow_disk(runtime, config, folders):
    """The last rank never sees what the others write."""
    find, late = TokenCache.find, token_cache._LATE_SECONDS
    token_cache._LATE_SECONDS = 0.1
    if runtime.rank == runtime.world_size - 1:
        TokenCache.find = lambda self: None
    try:
        return cached_by_ranks(runtime, config, folders)
    finally:
        TokenCache.find, token_cache._LATE_SECONDS = find, late


def test_ranks_end_together_where_one_does_not_see_the_store(pool, tiny_run, tmp_path):
    config = tiny_config(tiny_run, data={"cache_dir": str(tmp_path / "cache")})
    with pytest.raises(AssertionError) as error:
        run = cached_by_ranks_of_a_slow_disk
        pool.run(run, world=2, tp=1, config=config, folders=[tmp_path] * 2)
    said = str(error.value)
    assert said.count("rank 1 does not see ") >= 2 and "no answer" not in said
