"""Where a draft to be written comes from: a training checkpoint, a folder of any layout, memory."""

import functools
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dspark_megatron.bounded_text import read_json
from dspark_megatron.config.evaluate import Weights
from dspark_megatron.conversion.draft_folder import DraftFolder
from dspark_megatron.conversion.layouts.hf_config import DraftDescription
from dspark_megatron.conversion.layouts.names import (
    check_megatron_tensors,
    hugging_face_shapes,
    to_hugging_face,
)
from dspark_megatron.errors import ConfigError
from dspark_megatron.storage.checkpoints.named import NamedCheckpoint, is_same_checkpoint
from dspark_megatron.storage.checkpoints.whole import check_whole
from dspark_megatron.storage.training_checkpoint import CheckpointReader, find_checkpoint


class DraftSource(Protocol):
    """A draft, one tensor at a time."""

    description: DraftDescription
    path: Path

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every trained tensor by its canonical name, in the order of `hugging_face_shapes`."""

    def dtype(self) -> torch.dtype:
        """The type that holds every trained tensor without loss."""

    def neighbours(self) -> Path:
        """The folder that holds what belongs to the draft beside its tensors."""

    def history(self) -> dict[str, Any]:
        """What is known of its training, for the model card."""


class CheckpointSource:
    """A training checkpoint, by `find_checkpoint`. Raises ConfigError that lists every wrong
    tensor."""

    def __init__(
        self,
        path: str | Path,
        iteration: int | str | None = None,
        weights: Weights = "trained",
    ) -> None:
        self.reader = CheckpointReader(find_checkpoint(path, iteration), weights)
        self.weights = weights
        self.path = self.reader.path
        check_whole(self.path)
        check_megatron_tensors(self.reader.shape, self.reader.names(), str(self.path))
        self.description = DraftDescription.of_checkpoint(self.reader.meta)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return to_hugging_face(self.reader.shape, self.reader.tensor)

    def dtype(self) -> torch.dtype:
        return _widest(self.reader.dtypes().values())

    def neighbours(self) -> Path:
        """The run's folder."""
        return self.path.parents[1] if self.path.parent.name == "checkpoints" else self.path

    def history(self) -> dict[str, Any]:
        return {
            "iterations": self.reader.meta["iteration"],
            "samples": self.reader.meta["consumed_samples"],
            "weights": self.weights,
            "ema_decay": self.reader.meta.get("ema_decay"),
            "evaluation": self._evaluation,
        }

    @cached_property
    def _evaluation(self) -> dict[str, Any] | None:
        """The run's evaluation, if it is of this checkpoint."""
        file = self.neighbours() / "evaluation.json"
        if not file.is_file():
            return None
        try:
            found: Any = read_json(file)
            named = NamedCheckpoint.of_facts(found)
            evaluated = is_same_checkpoint(named, NamedCheckpoint.at(self.path, self.weights))
            figures = {
                name: {"prompts": int(x["prompts"]), "tau": x["tau"] and float(x["tau"])}
                for name, x in found["files"].items()
            }
            evaluation = {"temperature": float(found["temperature"]), "files": figures}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{file} is not as evaluation writes it ({error!r}); evaluate again, or move the "
                "file away"
            ) from error
        return evaluation if evaluated else None


class FolderSource:
    """A draft folder of any layout."""

    def __init__(self, folder: DraftFolder) -> None:
        self.folder, self.path = folder, folder.path
        self.description = folder.description
        self._names = hugging_face_shapes(folder.shape, shared_weights=False)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.folder.tensor(name)) for name in self._names)

    def dtype(self) -> torch.dtype:
        return _widest(self.folder.dtype(name) for name in self._names)

    def neighbours(self) -> Path:
        return self.path

    def history(self) -> dict[str, Any]:
        return {}


class ChangedDraft:
    """A draft whose weights are no longer those of its source: what belonged to them beside the
    tensors, temperatures for one, is not carried on."""

    def __init__(self, source: DraftSource, tensors: dict[str, Tensor]) -> None:
        """tensors: whole, by canonical name."""
        self.description, self.path = source.description, source.path
        self._tensors = tensors

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self._tensors.items())

    def dtype(self) -> torch.dtype:
        return _widest(tensor.dtype for tensor in self._tensors.values())

    def neighbours(self) -> Path:
        """Where there is nothing."""
        return Path(os.devnull)

    def history(self) -> dict[str, Any]:
        return {}


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return functools.reduce(torch.promote_types, dtypes)
