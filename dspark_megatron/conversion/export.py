"""Drafts to folders: a training checkpoint, or a folder of one layout to that of another."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from dspark_megatron.config.evaluate import Weights
from dspark_megatron.conversion.folder_writer import WriteOptions, write_draft_folder
from dspark_megatron.conversion.sources import CheckpointSource, FolderSource
from dspark_megatron.conversion.target_match import open_draft_folder
from dspark_megatron.errors import require
from dspark_megatron.storage.training_checkpoint import CheckpointReader

Fingerprint = Callable[[Path], str]


def export_checkpoint(
    checkpoint: str | Path,
    target_dir: str | Path,
    output_dir: str | Path,
    options: WriteOptions | None = None,
    *,
    iteration: int | str | None = None,
    weights: Weights = "trained",
    fingerprint: Fingerprint | None = None,
) -> Path:
    """Write the draft of a run, checkpoints or `iter_*` folder to output_dir and return it.

    fingerprint: how training fingerprinted the target; None skips that comparison. Raises
    ConfigError before anything is written when the export could not be used.
    """
    source = CheckpointSource(checkpoint, iteration, weights)
    _check_fingerprint(source.reader, Path(target_dir), fingerprint)
    options = options or WriteOptions()
    return write_draft_folder(source, Path(target_dir), Path(output_dir), options)


def convert_folder(
    input_dir: str | Path,
    target_dir: str | Path,
    output_dir: str | Path,
    options: WriteOptions,
    *,
    layout: str = "auto",
    rope: dict[str, Any] | None = None,
    allow_unknown: Collection[str] = (),
) -> Path:
    """Write the draft of a folder in another layout. layout: that of the input. rope,
    allow_unknown: as DraftFolder has them."""
    require(
        Path(input_dir).resolve() != Path(output_dir).resolve(),
        f"{output_dir} is the input itself; choose another folder for the output",
    )
    draft = open_draft_folder(
        input_dir,
        target_dir,
        layout,
        target_checkpoint=options.target_checkpoint,
        rope=rope,
        allow_unknown=allow_unknown,
    )
    source = FolderSource(draft)
    return write_draft_folder(source, Path(target_dir), Path(output_dir), options)


def _check_fingerprint(
    reader: CheckpointReader, target_dir: Path, fingerprint: Fingerprint | None
) -> None:
    if fingerprint is None:
        return
    found, wanted = fingerprint(target_dir), reader.meta["target_fingerprint"]
    require(
        found == wanted,
        f"{target_dir} has fingerprint {found[:12]}, the draft was trained for {wanted[:12]}; "
        "give the target's folder as it was in training (same weights, same type)",
    )
