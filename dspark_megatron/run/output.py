"""The folder of a run, claimed before any long work."""

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from dspark_megatron.config import Config
from dspark_megatron.errors import ConfigError, printable, require
from dspark_megatron.run.ranks.ending import at_end
from dspark_megatron.run.ranks.runtime import Runtime
from dspark_megatron.run.ranks.shared_folder import check_shared
from dspark_megatron.storage.checkpoints.tracker import BEST_TRACKER, TRACKER
from dspark_megatron.storage.checkpoints.whole import iterations_in
from dspark_megatron.storage.folder_lock import FolderLock
from dspark_megatron.storage.writing import claim_folder, leftovers_of, write_text


@contextlib.contextmanager
def own_folder(folder: Path, what: str, runtime: Runtime) -> Iterator[None]:
    """Within it this job alone writes into a folder; ConfigError if another does. It is let go when
    this process ends, however that is. what: the setting that names it."""
    if not runtime.is_main:
        yield
        return
    lock = FolderLock(folder, what)
    with at_end(lock.release):
        if said := lock.take():
            print(printable(said), flush=True)
        yield


@contextlib.contextmanager
def claimed_output(config: Config, runtime: Runtime) -> Iterator[Path]:
    """The folder of a run, made, locked, and seen to be the same for all ranks. ConfigError where
    one of that is impossible. Every rank calls it: a broadcast and an all-gather of objects."""
    output_dir = Path(config.train.output_dir)
    with own_folder(output_dir, "train.output_dir", runtime):
        if runtime.is_main:
            claim_output(output_dir, config)
        folders = output_dir, output_dir / "checkpoints"
        check_shared(f"train.output_dir {output_dir}", *folders, runtime=runtime)
        yield output_dir


def claim_output(output_dir: Path, config: Config) -> None:
    """Make the run's folder; ConfigError if that is impossible.

    A folder with checkpoints that are not to be continued is refused, so nothing is overwritten
    unasked.
    """
    checkpoints, train = output_dir / "checkpoints", config.train
    there = [] if train.resume else list(iterations_in(checkpoints).values())
    require(
        train.overwrite or not there,
        f"train.output_dir {output_dir} holds {len(there)} checkpoints and train.resume is false; "
        "name another folder, set train.resume=true to continue, or train.overwrite=true to set "
        "them aside",
    )
    what, ours = f"train.output_dir {output_dir}", ("config.yaml", "run_status", "shared")
    # An evaluation may be writing its own files there.
    claim_folder(output_dir, what, *map(leftovers_of, ours))
    claim_folder(checkpoints, what)


def set_aside(checkpoints: Path) -> str:
    """Move a run's checkpoints, which are not to be continued, into a folder beside them, when the
    new run is sure to start; what was done, empty where there are none."""
    there = list(iterations_in(checkpoints).values())
    if not there:
        return ""
    names = (checkpoints / f"replaced_{number}" for number in itertools.count(1))
    folder = next(name for name in names if not os.path.lexists(name))
    trackers = [checkpoints / name for name in (TRACKER, BEST_TRACKER)]
    try:
        folder.mkdir()
        # A kill on the way must not leave a tracker that names what is gone.
        for path in [*filter(os.path.lexists, trackers), *there]:
            path.rename(folder / path.name)
    except OSError as error:
        raise ConfigError(
            f"cannot set the checkpoints in {checkpoints} aside: {error.strerror}; move them away"
        ) from error
    return (
        f"train.overwrite: {len(there)} older checkpoints are now in {folder}, which can be "
        "deleted once they are not needed"
    )


def write_config(output_dir: Path, config: Config) -> None:
    """Write the resolved config, once the run is sure to be this one."""
    write_text(output_dir / "config.yaml", config.to_yaml())


def write_status(output_dir: Path, status: str) -> None:
    """Say how the run stands, for who started it: torchrun passes no exit code of its ranks on.

    `running` (also after a kill or a failure), `stopped` (saved; starting it again continues it)
    or `completed` (the last iteration is saved).
    """
    write_text(output_dir / "run_status", f"{status}\n")
