"""Memory that is alive, by what holds it, and the moment when it was most."""

import weakref
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Storage = torch.UntypedStorage


@dataclass(frozen=True)
class Peak:
    """The highest moment of a phase."""

    total: int = 0
    alive: dict[str, int] = field(default_factory=dict)
    """Bytes by kind."""


class Storages:
    """Bytes of the storages of one device, from when they are first seen until they die."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.alive: Counter[str] = Counter()
        self.total = 0
        self._known: dict[int, tuple[str, int, weakref.ref]] = {}

    def follow(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count those that are new. Views and results in place share a storage that is known."""
        for tensor in tensors:
            if tensor.device.type != self.device.type:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._add(storage, kind)

    def rename(self, tensors: Iterable[Tensor], kind: str, of: Collection[str] = ()) -> None:
        """Say what holds these storages, known or not; `of`: only if it is one of these kinds."""
        for tensor in tensors:
            if tensor.device.type != self.device.type:
                continue
            storage = tensor.untyped_storage()
            known = self._known.get(storage._cdata)
            if known is None:
                self._add(storage, kind)
            elif known[0] != kind and (not of or known[0] in of):
                self._count(known[0], -known[1])
                self._count(kind, known[1])
                self._known[storage._cdata] = (kind, *known[1:])

    def resized(self, storage: Storage) -> None:
        """Of a storage whose size has changed."""
        if known := self._known.get(storage._cdata):
            kind, size, reference = known
            self._count(kind, storage.nbytes() - size)
            self._known[storage._cdata] = kind, storage.nbytes(), reference

    def _add(self, storage: Storage, kind: str) -> None:
        key, size = storage._cdata, storage.nbytes()

        def forget(reference: weakref.ref) -> None:
            if key in self._known and self._known[key][2] is reference:
                kind, size, _ = self._known.pop(key)
                self._count(kind, -size)

        self._known[key] = kind, size, weakref.ref(storage, forget)
        self._count(kind, size)

    def _count(self, kind: str, size: int) -> None:
        self.alive[kind] += size
        self.total += size
