"""The folder of a run, claimed before any long work."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from dspark_megatron.config import Config
from dspark_megatron.errors import ConfigError
from dspark_megatron.run.ranks.ending import at_end
from dspark_megatron.run.ranks.runtime import Runtime
from dspark_megatron.run.ranks.shared_folder import check_shared
from dspark_megatron.storage.folder_lock import FolderLock
from dspark_megatron.storage.training_checkpoint import latest_iteration
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
            print(said, flush=True)
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

    A folder with checkpoints that are not to be continued is refused, so nothing is overwritten.
    """
    checkpoints = output_dir / "checkpoints"
    if not config.train.resume and latest_iteration(checkpoints) is not None:
        raise ConfigError(
            f"train.output_dir {output_dir} holds checkpoints and train.resume is false; "
            "name another folder, or set train.resume=true"
        )
    what, ours = f"train.output_dir {output_dir}", ("config.yaml", "run_status", "shared")
    # An evaluation may be writing its own files there.
    claim_folder(output_dir, what, *map(leftovers_of, ours))
    claim_folder(checkpoints, what)


def write_config(output_dir: Path, config: Config) -> None:
    """Write the resolved config, once the run is sure to be this one."""
    write_text(output_dir / "config.yaml", config.to_yaml())


def write_status(output_dir: Path, status: str) -> None:
    """Say how the run stands, for who started it: torchrun passes no exit code of its ranks on.

    `running` (also after a kill or a failure), `stopped` (saved; starting it again continues it)
    or `completed` (the last iteration is saved).
    """
    write_text(output_dir / "run_status", f"{status}\n")
