"""Training checkpoints, read by one plain process: no process groups, one tensor at a time.

Megatron-Core's `torch_dist` format is PyTorch's distributed checkpoint, so PyTorch reads it at
global shapes, whatever layout wrote it. `dspark.json` beside the tensors says what they are.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark_megatron.errors import require
from dspark_megatron.shape import DraftShape
from dspark_megatron.storage.checkpoint_metadata import META, damaged
from dspark_megatron.storage.torch_dist_folder import TorchDistFolder

FORMAT = 1
TRACKER = "latest_checkpointed_iteration.txt"
BEST_TRACKER = "best_checkpointed_iteration.txt"
BEST = "best"
"""In place of an iteration: the one of the best held-out tau."""
OPTIMIZER_PREFIX = "optimizer."
KEYS = (
    *("iteration", "consumed_samples", "target_fingerprint", "num_anchors", "initializer_range"),
    "confidence_head_alpha",
)
"""What every `dspark.json` has, beside format and shape."""


class CheckpointReader:
    """The draft's tensors of one `iter_*` folder; optimizer state is passed over."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.meta = read_meta(self.path)
        try:
            self.shape = DraftShape.from_dict(self.meta["shape"])
            _ = [self.meta[key] for key in KEYS]
        except (KeyError, TypeError) as error:
            raise damaged(self.path / META, error) from error
        self._folder = TorchDistFolder(self.path)

    def names(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every tensor, vocabulary padding included."""
        return _of_draft(self._folder.shapes)

    def dtypes(self) -> dict[str, torch.dtype]:
        """Type that each tensor is stored in."""
        return _of_draft(self._folder.dtypes)

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, in the type it was saved in. KeyError when there is none."""
        return self._folder.tensor(name)


def _of_draft(tensors: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in tensors.items() if not k.startswith(OPTIMIZER_PREFIX)}


def find_checkpoint(path: str | Path, iteration: int | str | None = None) -> Path:
    """The `iter_*` folder that is meant by a run folder, its `checkpoints/` folder or the folder
    itself. `iteration`: None takes the newest complete one, `BEST` the best."""
    path = Path(os.path.abspath(path))  # `.` has no name, and links keep theirs
    require(path.is_dir(), f"{path} is not a folder; give a run, checkpoints or iter_* folder")
    if _iteration_of(path) is not None:
        require(
            iteration in (None, _iteration_of(path)),
            f"{path} is iteration {_iteration_of(path)}, and {iteration!r} is asked for; give the "
            "run's folder, or ask for no other",
        )
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    there: dict[int | str | None, Path] = {
        number: p for p in sorted(folder.iterdir()) if (number := _iteration_of(p)) is not None
    }
    listing = ", ".join(p.name for p in there.values()) or "none"
    if iteration in (None, BEST):
        kind, tracker = ("best", BEST_TRACKER) if iteration else ("newest", TRACKER)
        iteration = _tracked_iteration(folder / tracker)
        require(
            iteration is not None,
            f"{folder} has no {tracker}, so its {kind} checkpoint is unknown; iter_* folders "
            f"there: {listing}; name one of them, or a run or checkpoints folder (runs with "
            "evaluate.every keep a best one)",
        )
    require(
        iteration in there,
        f"{folder} has no checkpoint of iteration {iteration}; there: {listing}",
    )
    return there[iteration]


def _iteration_of(path: Path) -> int | None:
    match = re.fullmatch(r"iter_(\d+)", path.name)
    return int(match[1]) if match and path.is_dir() else None


def latest_iteration(checkpoints: Path) -> int | None:
    """The newest complete checkpoint of a checkpoints folder, or None when it has no tracker file.
    ConfigError when the tracker names none that is there."""
    return _tracked_iteration(checkpoints / TRACKER)


def _tracked_iteration(tracker: Path) -> int | None:
    if not tracker.is_file():
        return None
    text, checkpoints = tracker.read_text(encoding="utf-8").strip(), tracker.parent
    require(
        text.isdecimal() and iteration_folder(checkpoints, int(text)).is_dir(),
        f"{tracker} names iteration {text!r}, but there is no such checkpoint in {checkpoints}; "
        "write the number of one that is there into it",
    )
    return int(text)


def iteration_folder(checkpoints: Path, iteration: int) -> Path:
    return checkpoints / f"iter_{iteration:07d}"


def read_meta(path: Path) -> dict[str, Any]:
    """What `dspark.json` says of a checkpoint folder; ConfigError if it is not whole. Megatron's
    `pretrain()` has one for all of its checkpoints, beside them."""
    file, iteration = path / META, _iteration_of(path)
    if iteration is not None and not file.is_file() and (path.parent / META).is_file():
        file = path.parent / META
    require(
        file.is_file(),
        f"{path} has no dspark.json: it is not a complete checkpoint of dspark-megatron; "
        "use another iteration",
    )
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(file, error) from error
    if not isinstance(meta, dict):
        raise damaged(file, TypeError(f"it holds {type(meta).__name__}"))
    require(
        meta.get("format") == FORMAT,
        f"{file} has format {meta.get('format')}, this version reads format {FORMAT}; "
        "use the version that wrote it",
    )
    if file.parent != path:
        consumed = iteration * meta["global_batch_size"]
        meta |= {"iteration": iteration, "consumed_samples": consumed}
    return meta
