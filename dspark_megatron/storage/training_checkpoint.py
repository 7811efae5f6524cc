"""Training checkpoints, read by one plain process: no process groups, one tensor at a time.

Megatron-Core's `torch_dist` format is PyTorch's distributed checkpoint, so PyTorch reads it at
global shapes, whatever layout wrote it. `dspark.json` beside the tensors says what they are.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark_megatron.errors import require
from dspark_megatron.shape import DraftShape
from dspark_megatron.storage.checkpoints.meta import iteration_of, parse_meta
from dspark_megatron.storage.checkpoints.metadata import OPTIMIZER_PREFIX
from dspark_megatron.storage.checkpoints.tracker import (
    BEST,
    best_iteration,
    iterations_in,
    latest_iteration,
)
from dspark_megatron.storage.checkpoints.whole import way_out_named
from dspark_megatron.storage.torch_dist_folder import TorchDistFolder


class CheckpointReader:
    """The draft's tensors of one `iter_*` folder; optimizer state is passed over."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with way_out_named(self.path):
            self.meta = parse_meta(self.path)
            self.shape = DraftShape.from_dict(self.meta["shape"])
            self._folder = TorchDistFolder(self.path)

    def names(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every tensor, vocabulary padding included."""
        return _of_draft(self._folder.shapes)

    def dtypes(self) -> dict[str, torch.dtype]:
        """Type that each tensor is stored in."""
        return _of_draft(self._folder.dtypes)

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, in the type it was saved in. KeyError when there is none."""
        with way_out_named(self.path):
            return self._folder.tensor(name)


def _of_draft(tensors: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in tensors.items() if not k.startswith(OPTIMIZER_PREFIX)}


def find_checkpoint(path: str | Path, iteration: int | str | None = None) -> Path:
    """The `iter_*` folder that is meant by a run folder, its `checkpoints/` folder or the folder
    itself. `iteration`: None takes the newest complete one, `BEST` the best."""
    path = Path(os.path.abspath(path))  # `.` has no name, and links keep theirs
    require(path.is_dir(), f"{path} is not a folder; give a run, checkpoints or iter_* folder")
    if (own := iteration_of(path)) is not None:
        require(
            iteration in (None, own),
            f"{path} is iteration {own}, and {iteration!r} is asked for; give the run's folder, or "
            "ask for no other",
        )
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    there = iterations_in(folder)
    if iteration == BEST:
        return there[best_iteration(folder)]
    number = latest_iteration(folder) if iteration is None else iteration
    require(number is not None, f"{folder} has no checkpoint; name another folder")
    listing = ", ".join(p.name for p in there.values()) or "none"
    found = next((there[i] for i in there if i == number), None)
    require(
        found is not None,
        f"{folder} has no checkpoint of iteration {number}; there: {listing}",
    )
    assert found is not None
    return found


def read_meta(path: Path) -> dict[str, Any]:
    """What `dspark.json` says of a checkpoint folder; ConfigError if it is not whole."""
    with way_out_named(path):
        return parse_meta(path)
