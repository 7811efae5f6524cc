"""Documents of a Megatron indexed dataset: PREFIX.bin with tokens, and PREFIX.idx that says where
each sequence is. The index is checked whole first, since a pointer that lies reads other tokens.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from torch import Tensor

from dspark_megatron.errors import ConfigError, require

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")
"""Version, code of the type, sequences, and bounds of documents."""


def read_indexed(prefix: Path) -> Iterator[Tensor]:
    """The documents of a Megatron indexed dataset, each the tokens of its sequences one after the
    other: [s] int64. ConfigError, at once, for files that are none or do not belong together."""
    _check_index(prefix)
    try:
        return _documents(IndexedDataset(str(prefix)))
    except (AssertionError, ValueError, OSError) as error:
        raise ConfigError(f"{prefix}.idx is no index of a Megatron dataset: {error}") from error


def _documents(dataset: IndexedDataset) -> Iterator[Tensor]:
    bounds = dataset.document_indices.tolist()
    for first, end in zip(bounds[:-1], bounds[1:], strict=True):
        sequences = [dataset[i].astype(numpy.int64) for i in range(first, end)]
        yield torch.from_numpy(numpy.concatenate([numpy.empty(0, numpy.int64), *sequences]))


def _check_index(prefix: Path) -> None:
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index, tokens):
        require(path.is_file(), f"the indexed dataset {prefix} lacks {path}")
    size, start = index.stat().st_size, len(_MAGIC) + _HEADER.size
    with index.open("rb") as file:
        head = file.read(start)
    none = f"{index} is no index of a Megatron dataset"
    require(len(head) == start and head.startswith(_MAGIC), f"{none}: it begins otherwise")
    version, code, sequences, documents = _HEADER.unpack(head[len(_MAGIC) :])
    require(version == 1, f"{none} of version 1, but {version}")
    require(code in [kind.value for kind in DType], f"{none}: it has no type of number {code}")
    dtype = DType.dtype_from_code(code)
    require(
        issubclass(dtype, numpy.integer),
        f"{prefix} must hold token ids and holds {dtype.__name__}",
    )
    wanted = start + 12 * sequences + 8 * documents
    require(
        size in (wanted, wanted + sequences),  # a mode for each sequence, of multimodal data
        f"{none}: it speaks of {sequences:,} sequences and {documents:,} bounds of documents, "
        f"which take {wanted:,} bytes, and has {size:,}",
    )
    _check_pointers(prefix, start, sequences, documents, numpy.dtype(dtype).itemsize)


def _check_pointers(
    prefix: Path, start: int, sequences: int, documents: int, token_bytes: int
) -> None:
    """Each sequence must begin where the one before ends, each document too."""
    content = numpy.memmap(f"{prefix}.idx", mode="r", offset=start)
    lengths = content[: 4 * sequences].view("<i4").astype(numpy.int64)
    pointers = content[4 * sequences : 12 * sequences].view("<i8")
    bounds = content[12 * sequences : 12 * sequences + 8 * documents].view("<i8")
    damaged = f"{prefix}.idx is damaged"
    require(not (lengths < 0).any(), f"{damaged}: a sequence has a negative length")
    ends = numpy.cumsum(lengths) * token_bytes
    wanted, found = int(ends[-1]) if sequences else 0, Path(f"{prefix}.bin").stat().st_size
    require(
        wanted == found,
        f"{prefix}.bin must have the {wanted:,} bytes that {prefix}.idx speaks of, and has "
        f"{found:,}; write the dataset again",
    )
    wrong = numpy.flatnonzero(pointers != ends - lengths * token_bytes)
    require(
        not len(wrong),
        f"{damaged}: {len(wrong):,} of its {sequences:,} sequences do not begin where the one "
        f"before ends, the first of them sequence {wrong[0] if len(wrong) else 0:,}; write the "
        "dataset again",
    )
    good = documents > 0 and bounds[0] == 0 and bounds[-1] == sequences
    require(
        good and not (numpy.diff(bounds) < 0).any(),
        f"{damaged}: the bounds of its documents must rise from 0 to {sequences:,}; write the "
        "dataset again",
    )
