"""A Megatron-LM checkpoint of a GPTModel, read by one plain process: its arguments, single rows,
its fingerprint. `targets/megatron/` loads it into a model.

    <folder>/latest_checkpointed_iteration.txt     a number, or `release`
    <folder>/iter_0000100/                         torch_dist: .metadata, *.distcp, common.pt
"""

import argparse
import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark_megatron.errors import require
from dspark_megatron.storage.checkpoints.tracker import TRACKER
from dspark_megatron.storage.torch_dist_folder import TorchDistFolder

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
MODEL_PARTS = ("embedding.", "decoder.", "output_layer.", "mtp.", "rotary_pos_emb.")
"""What the names of a GPTModel's tensors begin with."""


class GPTCheckpoint:
    """One iteration of a run."""

    def __init__(self, path: str | Path) -> None:
        """path: an `iter_*` or `release` folder, or one with a tracker file. ConfigError when it
        holds no GPTModel in the torch_dist format, or more than data."""
        self.path = _iteration_folder(Path(path))
        self.folder = TorchDistFolder(self.path)
        found = [name for name in self.folder.shapes if name.endswith(EMBEDDING)]
        found = [name for name in found if not name.startswith("optimizer.")]
        require(
            len(found) == 1,
            f"{self.path} must hold one {EMBEDDING}, and has {found or 'none'}; give the "
            "checkpoint of a GPTModel",
        )
        self.prefix = found[0].removesuffix(EMBEDDING)
        """What stands before every name."""

    @cached_property
    def args(self) -> argparse.Namespace:
        """The command line that trained the model."""
        common = self.folder.common()
        args: Any = common.get("args") if isinstance(common, dict) else None
        require(
            isinstance(args, argparse.Namespace),
            f"{self.path} must hold Megatron-LM's arguments ('args'), which say what the model is; "
            "save it with Megatron-LM's save_checkpoint",
        )
        return args

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the model's tensors, by their names in a GPTModel. Layers, and experts, are stacked on
        dimensions of their own, or have their numbers in the names."""
        cut = len(self.prefix)
        return {
            name[cut:]: shape
            for name, shape in self.folder.shapes.items()
            if name.startswith(self.prefix) and name[cut:].startswith(MODEL_PARTS)
        }

    @property
    def dtype(self) -> torch.dtype:
        """That of the embedding."""
        return self.folder.dtypes[self.prefix + EMBEDDING]

    def rows(self, name: str, start: int, end: int) -> Tensor:
        """Rows [start, end) of a matrix of the vocabulary; those past its end are zero."""
        total, width = self.shapes[name]
        there = max(min(end, total) - start, 0)
        found = self.part(name, [start, 0], [there, width])
        return torch.cat([found, found.new_zeros(end - start - there, width)])

    def part(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The block of one of `shapes` that begins at `offsets`."""
        return self.folder.part(self.prefix + name, offsets, sizes)

    def fingerprint(self) -> str:
        """Hex digest of every tensor's name and shape and its first row, of stacked layers in the
        first and the last: the same however the checkpoint was split, and different for another
        fine-tune of the same model unless that left these rows alone. Vocabularies, which each
        layout pads otherwise, count by their first row. Every row read costs the reading of a
        layer, so there are few."""
        digest, dtypes = hashlib.sha256(), self.folder.dtypes
        for name, shape in sorted(self.shapes.items()):
            vocabulary = name in (EMBEDDING, HEAD)
            digest.update(f"{name}{shape[1:] if vocabulary else shape}".encode())
            digest.update(str(dtypes[self.prefix + name]).encode())
            row = [*([1] * (len(shape) - 1)), *shape[-1:]]
            is_stacked = name.startswith("decoder.layers.") and not name.split(".")[2].isdecimal()
            for place in sorted({0, shape[0] - 1} if is_stacked else {0}):
                found = self.part(name, [place, *[0] * (len(shape) - 1)], row)
                digest.update(found.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _iteration_folder(path: Path) -> Path:
    require(path.is_dir(), f"target.checkpoint {path} is not a folder")
    tracker = path / TRACKER
    if tracker.is_file():
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()[:80]
        name = f"iter_{int(text):07d}" if text.isdecimal() else text
        require(
            name.startswith("iter_") or name == "release",
            f"{tracker} must hold the number of an iteration or `release`, and holds {text!r}",
        )
        require((path / name).is_dir(), f"{tracker} names {text}, and {path / name} is not there")
        path = path / name
    require(
        (path / ".metadata").is_file(),
        f"target.checkpoint {path} holds no checkpoint of Megatron's torch_dist format (no "
        f".metadata) and no {TRACKER}; give such a folder, or save the model again with "
        "--ckpt-format torch_dist",
    )
    return path
