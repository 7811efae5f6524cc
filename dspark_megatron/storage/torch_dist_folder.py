"""A folder of PyTorch's distributed checkpoints (Megatron-Core's `torch_dist`), read by one plain
process: no process groups, any part of a tensor at its global shape, whatever layout wrote it.
"""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from dspark_megatron.errors import require
from dspark_megatron.storage.checkpoints.damage import Damage
from dspark_megatron.storage.checkpoints.data_only import load_data
from dspark_megatron.storage.checkpoints.metadata import (
    check_shards,
    read_metadata,
    unreadable_shard,
)

COMMON = "common.pt"
"""What is no tensor, in checkpoints of Megatron-Core before 0.19."""


class TorchDistFolder:
    """Reads the metadata once; files are opened when something is asked of them."""

    def __init__(self, path: str | Path) -> None:
        """Damage when its metadata is not there or not whole, and when a file is missing or of
        another size; ConfigError when it holds foreign classes."""
        self.path = Path(path)
        self._storage = _Storage(self.path)
        metadata = self._storage.read_metadata()
        check_shards(self.path, metadata)
        stored = metadata.state_dict_metadata.items()
        self._tensors: dict[str, TensorStorageMetadata] = {
            name: entry for name, entry in stored if isinstance(entry, TensorStorageMetadata)
        }
        self.objects = {name for name, _ in stored} - self._tensors.keys()
        """Names of what is no tensor."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every tensor, vocabulary padding included."""
        return {name: tuple(entry.size) for name, entry in self._tensors.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Type that each tensor is stored in."""
        return {name: entry.properties.dtype for name, entry in self._tensors.items()}

    def tensor(self, name: str) -> Tensor:
        """One whole tensor, in the type it was saved in. KeyError when there is none."""
        size = self._tensors[name].size
        return self.part(name, [0] * len(size), size)

    def part(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The block of a tensor that begins at `offsets`. Reads the saved chunks that it meets."""
        entry = self._tensors[name]
        block = torch.empty(torch.Size(sizes), dtype=entry.properties.dtype)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        self._load(name, block, create_read_items_for_chunk_list(name, entry, [chunk]))
        return block

    def object(self, name: str) -> io.BytesIO:
        """The bytes of an object, as `torch.save` wrote them. KeyError when there is none."""
        if name not in self.objects:
            raise KeyError(name)
        index, nothing = MetadataIndex(name), torch.Size((0,))
        length = torch.Size((self._storage.read_metadata().storage_data[index].length,))
        item = ReadItem(LoadItemType.BYTE_IO, index, nothing, index, nothing, length)
        state = self._load(name, io.BytesIO(), [item])
        return state[name]

    def common(self) -> Any:
        """What is neither a tensor nor a shard of anything, such as arguments and the settings of
        an optimizer; {} where there is nothing. Newer Megatron-Core keeps it among the tensors."""
        separate = self.path / COMMON
        stored = [name for name in self.objects if name.startswith("common_state/")]
        if separate.is_file():
            return load_data(separate, io.BytesIO(separate.read_bytes()))
        if not stored:
            return {}
        require(
            len(stored) == 1,
            f"{self.path} must hold its common state once, and has it as {sorted(stored)}; save "
            "the model again with Megatron-LM's save_checkpoint",
        )
        content = load_data(self.path, self.object(stored[0]))
        return content[0] if isinstance(content, list) and content else content

    def _load(self, name: str, into: Any, items: list[ReadItem]) -> dict[str, Any]:
        state = {name: into}
        with warnings.catch_warnings():
            # PyTorch wonders whether a single process is meant; it is.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            try:
                distributed_checkpoint.load(
                    state, storage_reader=self._storage, planner=_Parts(items), no_dist=True
                )
            except CheckpointException as error:
                cause = cause_of(error)
                if isinstance(cause, KeyboardInterrupt):
                    raise cause from None
                raise Damage.of(unreadable_shard(self.path), cause) from error
        return state


class _Storage(distributed_checkpoint.FileSystemReader):
    """Reads the pickled metadata safely, and once, not for every tensor: it lists each shard of the
    optimizer state as well and grows with the number of ranks."""

    _kept: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._kept is None:
            self._kept = read_metadata(Path(self.path))
        return self._kept


class _Parts(distributed_checkpoint.DefaultLoadPlanner):
    """Reads given items, and leaves objects as bytes, which PyTorch's own would unpickle."""

    def __init__(self, items: list[ReadItem]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._items = items

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan(self._items)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = value

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn]


def cause_of(error: BaseException) -> BaseException:
    """What went wrong in a save or load of PyTorch's, which wraps it; others are their own."""
    if not isinstance(error, CheckpointException):
        return error
    cause, _ = next(iter(error.failures.values()))
    return cause
