"""A checkpoint is taken when all of it is there; what prevents that leaves the older ones alone."""

import os
from pathlib import Path

import pytest

from support.full_disk import files_of_at_most
from support.tiny_target import tiny_config


def save(runtime, config, iteration, fault=None):
    """Save weights, with something wrong on the last rank."""
    from dspark_megatron.run.build import build_draft
    from dspark_megatron.run.check import check
    from dspark_megatron.run.checkpoints import commit, saving
    from dspark_megatron.run.checkpoints.state import RunState
    from dspark_megatron.run.identity import export_settings, run_identity

    plan = check(config, runtime.world_size)
    draft = build_draft(plan, runtime)
    meta = {"format": 1, **run_identity(plan), **export_settings(plan)}
    checkpoints = Path(config.train.output_dir, "checkpoints")
    late, commit._LATE_SECONDS = commit._LATE_SECONDS, 0.1
    is_last = runtime.rank == runtime.world_size - 1
    written = []
    try:
        with FAULTS[fault if is_last else None](written):
            state = RunState(iteration, 8 * iteration)
            saving.save_checkpoint(checkpoints, state, meta, draft, None, keep_last=1)
    finally:
        commit._LATE_SECONDS = late
    return written


class Writer:
    """Megatron-Core's function for one file, and what happens to the file after it."""

    def __init__(self, written):
        from megatron.core.dist_checkpointing.strategies.filesystem_async import (
            FileSystemWriterAsync,
        )

        self.owner, self.written = FileSystemWriterAsync, written
        self.before = FileSystemWriterAsync.write_preloaded_data

    def __enter__(self):
        def write(transforms, place, bucket, *rest, **more):
            self.before(transforms, place, bucket, *rest, **more)
            self.written.append(os.getpid())
            self.after(bucket[0])

        self.owner.write_preloaded_data = staticmethod(write)

    def __exit__(self, *_):
        self.owner.write_preloaded_data = staticmethod(self.before)

    def after(self, file):
        pass


class Elsewhere(Writer):
    """As on a disk that is not the main rank's."""

    def after(self, file):
        os.unlink(file)


class Short(Writer):
    def after(self, file):
        os.truncate(file, os.path.getsize(file) - 1)


class OutOfMemory(Writer):
    """No kind of error that a disk has."""

    def after(self, file):
        raise MemoryError


FAULTS = {
    None: Writer,
    "elsewhere": Elsewhere,
    "short": Short,
    "full": lambda written: files_of_at_most(100),
    "memory": OutOfMemory,
}


@pytest.mark.parametrize("fault", ["elsewhere", "short", "full", "memory"])
def test_what_one_rank_does_not_write_leaves_the_older_checkpoint(pool, tiny_run, tmp_path, fault):
    config = tiny_config(
        tiny_run, train={"output_dir": str(tmp_path)}, parallel={"tensor_parallel": 2}
    )
    checkpoints = tmp_path / "checkpoints"
    pool.run(save, world=2, tp=2, config=config, iteration=1)
    before = {file: file.read_bytes() for file in checkpoints.rglob("*") if file.is_file()}
    with pytest.raises(AssertionError) as error:
        pool.run(save, world=2, tp=2, config=config, iteration=2, fault=fault)
    said = str(error.value)
    assert said.count("checkpoint iter_0000002 could not be saved: ") == 2, said
    cause = {
        "elsewhere": "__1_0.distcp is damaged or incomplete (it is not there, and had",
        "short": "__1_0.distcp is damaged or incomplete (cut short: it has",
        "full": "File too large",
        "memory": "could not be saved: MemoryError. Older",
    }
    assert cause[fault] in said, said
    assert "Older ones in" in said
    assert ("on a file system that all nodes share" in said) == (fault in ("elsewhere", "short"))
    after = {file: file.read_bytes() for file in checkpoints.rglob("*") if file.is_file()}
    assert after == before
    pool.run(save, world=2, tp=2, config=config, iteration=2)
    assert [path.name for path in checkpoints.glob("iter_*")] == ["iter_0000002"]


def test_ranks_write_their_files_themselves(pool, tiny_run, tmp_path):
    """A process for it could be killed, or outlive the rank."""
    config = tiny_config(tiny_run, train={"output_dir": str(tmp_path)})
    (written,) = pool.run(save, world=1, tp=1, config=config, iteration=1)
    (rank,) = pool.run(number, world=1, tp=1)
    assert written and set(written) == {rank[0]} and not rank[1]


def number(runtime):
    import psutil

    return os.getpid(), [child.cmdline() for child in psutil.Process().children()]


def test_a_link_among_unfinished_saves_is_not_followed(pool, tiny_run, tmp_path):
    config = tiny_config(tiny_run, train={"output_dir": str(tmp_path / "run")})
    kept, checkpoints = tmp_path / "kept", tmp_path / "run" / "checkpoints"
    kept.mkdir()
    (kept / "file").touch()
    checkpoints.mkdir(parents=True)
    (checkpoints / ".partial_iter_0000001").symlink_to(kept)
    (checkpoints / ".partial_iter_0000007_abcd").mkdir()
    pool.run(save, world=1, tp=1, config=config, iteration=1)
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "iter_0000001",
        "latest_checkpointed_iteration.txt",
    ]
    assert [path.name for path in kept.iterdir()] == ["file"]
