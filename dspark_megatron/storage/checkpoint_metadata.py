"""The `.metadata` of PyTorch's distributed checkpoints. It is a pickle, which could run any code:
only the classes that belong in it are loaded. It says how large the other files are, which is
checked before any of them is opened.
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from dspark_megatron.errors import ConfigError, require

META = "dspark.json"
"""Beside the tensors of our own checkpoints: what they are."""
_DCP = "torch.distributed.checkpoint"
_PLANS = ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
_ENTRIES = (
    *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
)
_KNOWN = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    *((f"{_DCP}.metadata", name) for name in _ENTRIES),
    *((f"{_DCP}.planner", name) for name in _PLANS),
    *((m, f"{x}Path") for m in ("pathlib", "pathlib._local") for x in ("Posix", "Windows")),
}
"""Beside the types of tensors."""


def read_metadata(checkpoint: Path) -> Metadata:
    """ConfigError when there is none, it is not whole, or it holds what does not belong there."""
    file = checkpoint / ".metadata"
    require(
        file.is_file(),
        f"{checkpoint} has no .metadata: its save was not completed; use another iteration",
    )
    try:
        with file.open("rb") as opened:
            metadata = _Unpickler(opened).load()
    except ConfigError:
        raise
    except Exception as error:  # bytes that are no pickle lead to any of them
        raise damaged(file, error) from error
    if not isinstance(metadata, Metadata):
        raise damaged(file, TypeError(f"it holds {type(metadata).__name__}"))
    return metadata


def check_shards(checkpoint: Path, metadata: Metadata) -> None:
    """ConfigError that names the first file that is missing or has another size than when it was
    saved. Reads nothing."""
    sizes: dict[str, int] = {}
    for stored in metadata.storage_data.values():
        end = stored.offset + stored.length
        sizes[stored.relative_path] = max(end, sizes.get(stored.relative_path, 0))
    for name, size in sorted(sizes.items()):
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else None
        if found is None:
            raise damaged(file, FileNotFoundError(f"it had {size:,} bytes when it was saved"))
        if found != size:
            how = "cut short" if found < size else "of another save"
            text = f"{how}: it has {found:,} bytes, and had {size:,} when it was saved"
            raise damaged(file, EOFError(text))


def check_whole(checkpoint: Path) -> None:
    """ConfigError unless all is there that Megatron-Core loads of a checkpoint."""
    metadata = read_metadata(checkpoint)
    check_shards(checkpoint, metadata)
    others, common = [checkpoint / "metadata.json"], checkpoint / "common.pt"
    if not any(name.startswith("common_state/") for name in metadata.state_dict_metadata):
        others.append(common)  # where it is not among the tensors
    for file in others:
        if not file.is_file():
            raise damaged(file, FileNotFoundError("it is not there"))
    if common in others and not zipfile.is_zipfile(common):
        raise damaged(common, EOFError("cut short, or no file of PyTorch's"))


def damaged(path: Path, error: BaseException) -> ConfigError:
    """The error for a checkpoint's folder, or a file in it, that is not as it was saved; it says
    which other checkpoints there are."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    way_out = _way_out(path if path.is_dir() else path.parent)
    return ConfigError(f"{path} is damaged or incomplete ({reason}); copy it again or {way_out}")


def _way_out(checkpoint: Path) -> str:
    others = sorted(
        folder.name
        for folder in checkpoint.parent.glob("iter_*")
        if (folder / ".metadata").is_file() and folder != checkpoint
    )
    if not others or not (checkpoint / META).is_file():  # the latter: Megatron-LM's own
        return "use another iteration"
    newest = int(others[-1].removeprefix("iter_"))
    return (
        f"use another iteration of the run (there: {', '.join(others)}): "
        f"train.resume_from={newest} continues from that one, evaluate.checkpoint or "
        "--iteration names it to other commands"
    )


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        require(
            (module, name) in _KNOWN,
            f"the checkpoint's .metadata names {module}.{name}, which has no place in it and could "
            "run foreign code; nothing of it was run; get the checkpoint from someone you trust",
        )
        return super().find_class(module, name)
