"""The folder of a run, claimed before any long work."""

from pathlib import Path

from dspark_megatron.config import Config
from dspark_megatron.errors import ConfigError
from dspark_megatron.storage.checkpoints.tracker import latest_iteration
from dspark_megatron.storage.writing import claim_folder, leftovers_of, write_text


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
    what, ours = f"train.output_dir {output_dir}", ("config.yaml", "run_status")
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
