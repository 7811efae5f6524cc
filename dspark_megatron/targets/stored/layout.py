"""What all layouts of stored states share: a manifest that is there once all else is.

Shapes: s tokens of a sample, c of them seen as context, u whose last hidden state is compared with,
m target layers, h hidden size.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from dspark_megatron.data.conversation import Sample
from dspark_megatron.errors import ConfigError, require

MANIFEST = "manifest.json"
UNFINISHED = "unfinished_manifest.json"
"""Its name while shards are missing."""
MAPPED_SHARDS = 1024
"""At one time, by a reader; the system allows a process about 65,000."""


class KeptStates(NamedTuple):
    """States of one sample, as far as they are kept."""

    taps: Tensor
    """[c, m*h] of the first c positions."""
    last_hidden: Tensor | None
    """[u, h]; None where the loss compares with no target."""
    positions: Tensor
    """[u] int64, ascending: where they stand in the sample."""


def sample_key(input_ids: Tensor, loss_mask: Tensor | None = None) -> bytes:
    """16 bytes that name a sample by its content. [s], [s] bool; without a mask, by its tokens."""
    digest = hashlib.sha256(input_ids.int().numpy().data)
    if loss_mask is not None:
        digest.update(loss_mask.numpy().data)
    return digest.digest()[:16]


class StatesLayout(Protocol):
    """How states are written: samples side by side in shards."""

    index: ClassVar[str]
    """The file that says where each sample is."""

    def entry(self, sample: Sample) -> Any:
        """What the index has to know of a sample; its bytes in a shard are `nbytes`."""

    def shard_name(self, shard: int) -> str: ...

    def sample_tensors(
        self, sample: Sample, taps: Tensor, last_hidden: Tensor | None
    ) -> dict[str, Tensor]:
        """What is kept of taps [s, m*h] and last_hidden [s, h]: new tensors on the CPU."""

    def is_whole(self, path: Path, nbytes: int) -> bool:
        """Whether a shard, whose samples have so many bytes, was not cut short."""

    def write_shard(self, path: Path, samples: list[dict[str, Tensor]]) -> None: ...

    def write_index(self, folder: Path, entries: list[Any], starts: list[int]) -> None:
        """starts: the first sample of each shard, and behind them the number of samples."""

    def manifest(self, facts: dict[str, Any], starts: list[int]) -> dict[str, Any]:
        """facts: of target, data and rules, which a reader can compare."""


class StatesReader(Protocol):
    """A finished folder; its samples by their place in it."""

    path: Path
    facts: dict[str, Any]
    """As they were given to `StatesLayout.manifest`; those that the layout knows, at least."""

    def keys(self) -> list[bytes]:
        """Of every sample, as `key` has it."""

    def key(self, input_ids: Tensor, loss_mask: Tensor) -> bytes:
        """What names a sample; input_ids [s], loss_mask [s] bool."""

    def states(self, place: int) -> KeptStates:
        """States of a sample; parts of mapped files."""

    def shards(self) -> dict[str, Sequence[int]]:
        """The places of the samples in each file."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished folder; ConfigError for anything else."""
    require(
        not (folder / UNFINISHED).is_file(),
        f"the stored states {folder} are not finished; the command that began them continues it",
    )
    return read_json(folder / MANIFEST)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} must be the readable manifest of stored states ({error}); write them with "
            "`dspark cache`"
        ) from error
    require(isinstance(content, dict), f"{path} must hold a JSON object")
    return content


def differences(there: dict[str, Any], here: dict[str, Any], prefix: str = "") -> list[str]:
    """`name: X there, Y here` for every key of `here` that `there` has otherwise or not at all."""
    found = []
    for name, value in here.items():
        other = there.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            found += differences(other, value, f"{prefix}{name}.")
        elif other != value:
            found.append(f"{prefix}{name}: {other} there, {value} here")
    return found
