"""A draft folder of any layout to a training checkpoint: weights to start from, no optimizer state.

Written by one plain process, one tensor at a time, in the format that Megatron-Core's `torch_dist`
reads at every tensor-parallel size.
"""

import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem

from dspark_megatron.conversion.draft_folder import DraftFolder
from dspark_megatron.conversion.layouts.names import (
    megatron_shapes,
    name_table,
    raise_if_any,
    to_megatron,
)
from dspark_megatron.conversion.sidecar import carry_sidecar, check_sidecar
from dspark_megatron.conversion.sources import FolderSource
from dspark_megatron.conversion.target_match import not_finite, open_draft_folder
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.shape import DraftShape
from dspark_megatron.shape.layout import check_draft_split, padded_vocab_size
from dspark_megatron.storage.checkpoints.meta import FORMAT
from dspark_megatron.storage.checkpoints.metadata import META
from dspark_megatron.storage.checkpoints.tracker import TRACKER
from dspark_megatron.storage.checkpoints.whole import iteration_folder
from dspark_megatron.storage.checksums import write_checksums
from dspark_megatron.storage.new_folder import new_folder
from dspark_megatron.storage.torch_dist_folder import cause_of
from dspark_megatron.storage.training_checkpoint import CheckpointReader, find_checkpoint
from dspark_megatron.storage.writing import write_json, write_text

BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""Megatron-Core's metadata.json."""


def import_folder(
    input_dir: str | Path,
    target_dir: str | Path,
    output_dir: str | Path,
    *,
    fingerprint: Callable[[str | Path], str],
    layout: str = "auto",
    tensor_parallel: int = 1,
    target_checkpoint: str | Path = "",
    rope: dict[str, Any] | None = None,
    allow_unknown: Collection[str] = (),
) -> Path:
    """Write run folder output_dir with one checkpoint, of iteration 0, and return that.

    tensor_parallel: the size that it is meant for: checked, and the vocabulary is padded as such a
    run does it; the checkpoint loads at other sizes, too. rope, allow_unknown: as DraftFolder has
    them. Raises ConfigError, before anything is written, for a folder that is no draft of this
    target, and when output_dir holds anything but an import of the same draft.
    """
    draft = open_draft_folder(
        input_dir,
        target_dir,
        layout,
        target_checkpoint=target_checkpoint,
        rope=rope,
        allow_unknown=allow_unknown,
    )
    source, shape = FolderSource(draft), draft.shape
    check_draft_split(shape, tensor_parallel)
    check_sidecar(draft.path, shape.num_draft_tokens)
    run = Path(output_dir).resolve()
    meta = _meta_of(draft, fingerprint(target_dir))

    def get(name: str) -> Tensor:
        tensor = draft.tensor(name)
        raise_if_any(not_finite(name, tensor), str(draft.path))
        return tensor

    padded = padded_vocab_size(shape.vocab_size, tensor_parallel)
    if run.exists() and not (run.is_dir() and not any(run.iterdir())):
        require(
            _holds_import(run, meta, shape, get, source.dtype(), padded),
            f"{run} is there already and not empty; choose a new run folder",
        )
        return iteration_folder(run / "checkpoints", 0)
    try:
        with new_folder(run) as folder:
            checkpoint = iteration_folder(folder / "checkpoints", 0)
            checkpoint.mkdir(parents=True)
            _write_tensors(checkpoint, shape, get, source.dtype(), padded)
            write_json(checkpoint / "metadata.json", BACKEND)
            torch.save({}, checkpoint / "common.pt")
            write_json(checkpoint / META, meta)
            write_checksums(checkpoint)
            write_text(checkpoint.parent / TRACKER, "0\n")
            carry_sidecar(draft.path, folder)
    except (OSError, CheckpointException) as error:  # the latter is what a full disk becomes
        if isinstance(cause := cause_of(error), ConfigError | KeyboardInterrupt):
            raise cause from None
        raise ConfigError(f"cannot write {run}: {cause}; nothing was kept") from error
    return iteration_folder(run / "checkpoints", 0)


def _meta_of(draft: DraftFolder, target_fingerprint: str) -> dict[str, Any]:
    """The `dspark.json` of an import."""
    return {
        "format": FORMAT,
        "shape": draft.shape.to_dict(),
        **draft.description.facts(),
        "target_fingerprint": target_fingerprint,
        "weights_only": True,
        "imported_from": {"folder": draft.path.resolve().name, "layout": draft.layout.name},
        "iteration": 0,
        "consumed_samples": 0,
        "open_metrics": [],
    }


def _holds_import(
    run: Path,
    meta: dict[str, Any],
    shape: DraftShape,
    get: Callable[[str], Tensor],
    dtype: torch.dtype,
    padded_vocab_size: int,
) -> bool:
    """Whether a folder is what an earlier import of the same draft wrote."""
    try:
        reader = CheckpointReader(find_checkpoint(run))
    except ConfigError:
        return False
    return reader.meta == meta and all(
        torch.equal(reader.tensor(name), tensor.to(dtype))
        for name, tensor in to_megatron(shape, get, padded_vocab_size)
    )


def _write_tensors(
    checkpoint: Path,
    shape: DraftShape,
    get: Callable[[str], Tensor],
    dtype: torch.dtype,
    padded_vocab_size: int,
) -> None:
    sizes = megatron_shapes(shape, padded_vocab_size)
    planned = {name: torch.empty(size, dtype=dtype, device="meta") for name, size in sizes.items()}
    table = {entry.megatron: [entry] for entry in name_table(shape)}

    def tensor(name: str) -> Tensor:
        ((_, whole),) = to_megatron(shape, get, padded_vocab_size, entries=table[name])
        return whole.to(dtype)

    with warnings.catch_warnings():
        # PyTorch wonders whether a single process is meant; it is.
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled")
        distributed_checkpoint.save(
            planned, checkpoint_id=checkpoint, planner=_Streaming(tensor), no_dist=True
        )


class _Streaming(DefaultSavePlanner):
    """Makes each tensor when it is written: the state dict that it plans from has shapes only."""

    def __init__(self, tensor: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._tensor = tensor

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self._tensor(write_item.index.fqn)
