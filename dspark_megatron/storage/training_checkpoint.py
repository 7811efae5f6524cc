"""Training checkpoints, read by one plain process: no process groups, one tensor at a time.

Megatron-Core's `torch_dist` format is PyTorch's distributed checkpoint, so PyTorch reads it at
global shapes, whatever layout wrote it. `dspark.json` beside the tensors says what they are.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark_megatron.config.evaluate import Weights
from dspark_megatron.errors import require
from dspark_megatron.shape import DraftShape
from dspark_megatron.storage.checkpoints.meta import iteration_of, parse_meta
from dspark_megatron.storage.checkpoints.metadata import AVERAGE_PREFIX, OPTIMIZER_PREFIX
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

    def __init__(self, path: str | Path, weights: Weights = "trained") -> None:
        """weights: `ema` gives the moving average of every tensor; ConfigError where there is
        none."""
        self.path, self._is_average = Path(path), weights == "ema"
        with way_out_named(self.path):
            self.meta = parse_meta(self.path)
            self.shape = DraftShape.from_dict(self.meta["shape"])
            self._folder = TorchDistFolder(self.path)
        check_has(self.path, weights)

    def names(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every tensor, vocabulary padding included."""
        return self._of_draft(self._folder.shapes)

    def dtypes(self) -> dict[str, torch.dtype]:
        """Type that each tensor is stored in."""
        return self._of_draft(self._folder.dtypes)

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, in the type it was saved in. KeyError when there is none."""
        with way_out_named(self.path):
            return self._folder.tensor(AVERAGE_PREFIX + name if self._is_average else name)

    def _of_draft(self, tensors: dict[str, Any]) -> dict[str, Any]:
        if not self._is_average:
            return {k: v for k, v in tensors.items() if not k.startswith(OPTIMIZER_PREFIX)}
        found = {k: v for k, v in tensors.items() if k.startswith(AVERAGE_PREFIX)}
        return {k.removeprefix(AVERAGE_PREFIX): v for k, v in found.items()}


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


def check_has(path: Path, weights: Weights) -> None:
    """ConfigError unless a checkpoint holds these weights."""
    require(
        weights == "trained" or has_average(path),
        f"{path} has no moving average of the weights: it was saved with optimizer.ema_decay=null; "
        "take its trained weights, or a checkpoint of a run with optimizer.ema_decay",
    )


def has_average(path: Path) -> bool:
    """Whether a checkpoint holds a moving average of the weights."""
    return read_meta(path).get("ema_decay") is not None


def read_meta(path: Path) -> dict[str, Any]:
    """What `dspark.json` says of a checkpoint folder; ConfigError if it is not whole."""
    with way_out_named(path):
        return parse_meta(path)
