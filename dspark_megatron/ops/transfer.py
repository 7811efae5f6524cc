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


def all_to_device(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copies of tensors in one transfer, whose memory they share."""
    # Wide numbers first: each must begin at a multiple of its size.
    ordered = sorted(tensors.items(), key=lambda named: -named[1].itemsize)
    flat = [tensor.flatten().view(torch.uint8) for _, tensor in ordered]
    parts = to_device(torch.cat(flat), device).split([len(part) for part in flat])
    return {
        name: part.view(tensor.dtype).view(tensor.shape)
        for (name, tensor), part in zip(ordered, parts, strict=True)
    }


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
