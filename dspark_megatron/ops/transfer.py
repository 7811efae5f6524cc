"""From the host to the device without a wait, and what both have of one thing."""

from typing import NamedTuple

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. A GPU gets it from page-locked memory, in its turn among the
    kernels that are queued, and the host goes on; from ordinary memory it would wait for both."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class PackedTensors(NamedTuple):
    """Tensors and a copy of them behind one another, which goes to a device in one transfer."""

    tensors: dict[str, Tensor]
    """Wide numbers first: each must begin at a multiple of its size."""
    memory: Tensor
    """[bytes] uint8 on the host, page-locked for a GPU."""

    @classmethod
    def of(cls, tensors: dict[str, Tensor], device: torch.device) -> "PackedTensors":
        ordered = dict(sorted(tensors.items(), key=lambda named: -named[1].itemsize))
        memory = torch.cat([tensor.flatten().view(torch.uint8) for tensor in ordered.values()])
        return cls(ordered, memory.pin_memory() if device.type == "cuda" else memory)

    def holds(self, tensors: dict[str, Tensor]) -> bool:
        """Whether these are the very tensors that were copied."""
        own = self.tensors
        return own.keys() == tensors.keys() and all(own[name] is tensors[name] for name in own)

    def to(self, device: torch.device) -> dict[str, Tensor]:
        """The copies on the device; they share one piece of memory there."""
        sizes = [tensor.nbytes for tensor in self.tensors.values()]
        parts = self.memory.to(device, non_blocking=True).split(sizes)
        return {
            name: part.view(tensor.dtype).view(tensor.shape)
            for (name, tensor), part in zip(self.tensors.items(), parts, strict=True)
        }


def all_to_device(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copies of tensors in one transfer, whose memory they share."""
    return PackedTensors.of(tensors, device).to(device)


class ContextRanges(NamedTuple):
    """The half-open range of the context that each of n blocks sees. Ranges that start alike are
    of one sample."""

    on_host: list[tuple[int, int]]
    """Groups of blocks are cut by these."""
    on_device: Tensor
    """[n, 2] the same numbers, for the masks."""

    @classmethod
    def of(cls, ranges: list[tuple[int, int]], device: torch.device) -> "ContextRanges":
        numbers = torch.tensor(ranges, dtype=torch.int64).view(-1, 2)
        return cls(ranges, to_device(numbers, device))
