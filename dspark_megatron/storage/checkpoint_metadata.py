"""The `.metadata` of PyTorch's distributed checkpoints, which is pickled: read with the classes
that belong in it and no others, since a pickle can otherwise run whatever it likes.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from dspark_megatron.config import ConfigError, require

_DCP = "torch.distributed.checkpoint"
_PLANS = ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
_ENTRIES = ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING")
_ENTRIES += ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")
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


def damaged(path: Path, error: BaseException) -> ConfigError:
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return ConfigError(
        f"{path} is damaged or incomplete ({reason}); copy it again or use another iteration"
    )


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        require(
            (module, name) in _KNOWN,
            f"the checkpoint's .metadata names {module}.{name}, which has no place in it and could "
            "run foreign code; nothing of it was run; get the checkpoint from whom you trust",
        )
        return super().find_class(module, name)
