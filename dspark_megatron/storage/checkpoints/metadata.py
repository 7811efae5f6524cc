"""The `.metadata` of PyTorch's distributed checkpoints. It is a pickle, which could run any code:
only the classes that belong in it are loaded. It says how large the other files are, which is
checked before any of them is opened.
"""

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from dspark_megatron.errors import ConfigError, require
from dspark_megatron.storage.checkpoints.damage import Damage
from dspark_megatron.storage.checksums import NotAsWritten, compare_size

META = "dspark.json"
"""Beside the tensors of our own checkpoints: what they are."""
OPTIMIZER_PREFIX = "optimizer."
"""Of the names of its tensors."""
AVERAGE_PREFIX = f"{OPTIMIZER_PREFIX}ema."
"""Of the moving average of the draft's tensors; what follows is a tensor's own name."""
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
    """Damage when there is none or it is not whole, ConfigError for what does not belong there."""
    file = checkpoint / ".metadata"
    if not file.is_file():
        raise Damage(f"{checkpoint} has no .metadata: its save was not completed")
    try:
        with file.open("rb") as opened:
            metadata = _Unpickler(opened).load()
        _check_entries(metadata)
    except ConfigError:
        raise
    except Exception as error:  # bytes that are no pickle lead to any of them
        raise Damage.of(file, error) from error
    return metadata


def check_shards(checkpoint: Path, metadata: Metadata) -> None:
    """Damage that names the first file that is missing, cannot be read or has another size than
    when it was saved. Reads nothing."""
    sizes: dict[str, int] = {}
    for stored in metadata.storage_data.values():
        end = stored.offset + stored.length
        sizes[stored.relative_path] = max(end, sizes.get(stored.relative_path, 0))
    for name, size in sorted(sizes.items()):
        try:
            compare_size(checkpoint / name, size)
        except NotAsWritten as error:
            raise Damage.of(error.path, error.reason) from error
        if not os.access(checkpoint / name, os.R_OK):
            raise Damage.of(checkpoint / name, "it may not be read")


def unreadable_shard(checkpoint: Path) -> Path:
    """The first file whose tensors cannot be read, to say which it is once a load has failed; the
    folder if all can. Reads all of them."""
    for index, stored in read_metadata(checkpoint).storage_data.items():
        file = checkpoint / stored.relative_path
        try:
            with file.open("rb") as opened:
                opened.seek(stored.offset)
                content = io.BytesIO(opened.read(stored.length))
            if not index.fqn.startswith("common_state/"):
                torch.load(content, map_location="cpu", weights_only=True)
        except Exception:
            return file
    return checkpoint


def _check_entries(metadata: Any) -> None:
    """TypeError unless a file is named for every chunk of a tensor, and every object."""
    if not isinstance(metadata, Metadata):
        raise TypeError(f"it holds {type(metadata).__name__}")
    entries = TensorStorageMetadata | BytesStorageMetadata
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(entry, entries):
            raise TypeError(f"{name!r:.80} is {type(entry).__name__}")
        chunks = entry.chunks if isinstance(entry, TensorStorageMetadata) else []
        wanted = [MetadataIndex(name, chunk.offsets) for chunk in chunks] or [MetadataIndex(name)]
        if any(place not in metadata.storage_data for place in wanted):
            raise TypeError(f"it does not say where {name:.80} is")
    for stored in metadata.storage_data.values():
        name, numbers = stored.relative_path, (stored.offset, stored.length)
        if not isinstance(name, str) or Path(name).name != name:
            raise TypeError(f"{name!r:.80} is the name of no file beside it")
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise TypeError(f"{numbers} is no place in {name}")


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
