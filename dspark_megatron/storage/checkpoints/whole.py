"""Whether a checkpoint is as it was saved, and which other one is where it is not.

Only what is small is read, unless all is asked for: the sizes of the large files are known.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from dspark_megatron.errors import ConfigError
from dspark_megatron.storage.checkpoints.damage import Damage, reason_of
from dspark_megatron.storage.checkpoints.meta import iteration_of, parse_meta
from dspark_megatron.storage.checkpoints.metadata import META, OPTIMIZER_PREFIX
from dspark_megatron.storage.checksums import CHECKSUMS, NotAsWritten, compare, read_checksums
from dspark_megatron.storage.notices import say_once
from dspark_megatron.storage.torch_dist_folder import COMMON, TorchDistFolder

Verify = Literal["size", "full"]
_BACKEND = "torch_dist"


def check_whole(checkpoint: Path, verify: Verify = "size") -> None:
    """ConfigError, with the newest older checkpoint that is whole, unless all is there and sound
    that is loaded of this one. `full` reads every file and compares its checksum."""
    with way_out_named(checkpoint):
        has_checksums = _check(checkpoint, verify)
    if not has_checksums:
        say_once(
            f"{checkpoint} has no {CHECKSUMS} (an older version saved it): only the sizes of its "
            "files were checked"
        )


def is_whole(checkpoint: Path) -> bool:
    """As far as `check_whole` sees without reading all of it."""
    try:
        _check(checkpoint, "size")
    except (ConfigError, OSError):
        return False
    return True


def iteration_folder(checkpoints: Path, iteration: int) -> Path:
    return checkpoints / f"iter_{iteration:07d}"


def iterations_in(checkpoints: Path) -> dict[int, Path]:
    """The `iter_*` folders of a checkpoints folder, the newest last; none where it is not there."""
    try:
        folders = list(checkpoints.iterdir()) if checkpoints.is_dir() else []
        found = {number: f for f in folders if (number := iteration_of(f)) is not None}
        found = {n: f for n, f in found.items() if f == iteration_folder(checkpoints, n)}
    except OSError as error:
        raise ConfigError(f"cannot read {checkpoints}: {error.strerror}") from error
    return dict(sorted(found.items()))


def newest_whole(checkpoints: Path, *, before: int | None = None) -> Path | None:
    """The newest whole checkpoint of a checkpoints folder, or of those before an iteration."""
    for number, folder in reversed(iterations_in(checkpoints).items()):
        if (before is None or number < before) and is_whole(folder):
            return folder
    return None


@contextmanager
def way_out_named(checkpoint: Path) -> Iterator[None]:
    """Damage to this checkpoint becomes an error that says how to go on."""
    try:
        yield
    except Damage as error:
        raise _with_way_out(checkpoint, error) from error
    except OSError as error:
        damage = Damage.of(Path(error.filename or checkpoint), error)
        raise _with_way_out(checkpoint, damage) from error


def _with_way_out(checkpoint: Path, damage: Damage) -> ConfigError:
    folder, number = checkpoint.parent, iteration_of(checkpoint)
    other = newest_whole(folder, before=number)
    if other is not None:
        which = "the newest older one that is whole"
    else:
        other, which = newest_whole(folder), "no older one is whole, the newest whole one"
    if other is None or other == checkpoint:
        return ConfigError(f"{damage.what}; copy it again: no other checkpoint there is whole")
    iteration = iteration_of(other)
    return ConfigError(
        f"{damage.what}; copy it again or use another iteration of the run ({which} is "
        f"{other.name}): train.resume_from={iteration} continues from that one, and its folder or "
        f"--iteration {iteration} names it to other commands"
    )


def _check(checkpoint: Path, verify: Verify) -> bool:
    """Whether it has checksums, which then were compared. Damage, ConfigError or OSError unless it
    is whole."""
    if not checkpoint.is_dir():
        raise Damage.of(checkpoint, "it is no folder")
    folder = TorchDistFolder(checkpoint)
    try:
        checksums = read_checksums(checkpoint)
        if checksums is not None:
            compare(checkpoint, checksums, full=verify == "full")
    except NotAsWritten as error:
        raise Damage.of(error.path, f"{error.reason}, by {CHECKSUMS}") from error
    parse_meta(checkpoint)
    _check_backend(checkpoint / "metadata.json")
    _check_common(folder)
    return checksums is not None


def _check_backend(file: Path) -> None:
    """Megatron-Core's own word on the format."""
    if not file.is_file():
        raise Damage.of(file, "it is not there")
    try:
        backend = json.loads(file.read_text(encoding="utf-8"))["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Damage.of(file, error) from error
    if backend != _BACKEND:
        raise Damage.of(file, f"sharded_backend is {backend!r:.80} and must be {_BACKEND!r}")


def _check_common(folder: TorchDistFolder) -> None:
    """What is no tensor must be data; the settings of an optimizer belong to its state."""
    inside = any(name.startswith("common_state/") for name in folder.objects)
    file = folder.path if inside else folder.path / COMMON
    if not inside and not file.is_file():
        raise Damage.of(file, "it is not there")
    common = folder.common()
    if not isinstance(common, dict):
        raise Damage.of(file, f"it holds {type(common).__name__}, no dictionary")
    has_optimizer = any(name.startswith(OPTIMIZER_PREFIX) for name in folder.shapes)
    if has_optimizer and (folder.path / META).is_file():  # those of Megatron's loop differ
        try:
            _check_groups(common["optimizer"])
        except (KeyError, TypeError, AttributeError) as error:
            text = f"no parameter groups of an optimizer, {reason_of(error)}"
            raise Damage.of(file, text) from error


def _check_groups(optimizer: Any) -> None:
    groups = parameter_groups(optimizer)
    if not groups or not all(type(g) is dict for g in groups):
        raise TypeError(f"param_groups is {groups!r:.80}")


def parameter_groups(optimizer: dict) -> list[dict]:
    """Of an optimizer's state in a checkpoint, or of those that Megatron-Core chains, by number."""
    parts = optimizer.values() if 0 in optimizer else [optimizer]
    return [group for part in parts for group in part.get("optimizer", part)["param_groups"]]
