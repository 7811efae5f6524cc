"""From the host to the device without a wait."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. A GPU gets it from page-locked memory, in its turn among the
    kernels that are queued, and the host goes on; from ordinary memory it would wait for both."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def all_to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of tensors of one type, in one transfer; they share its memory."""
    packed = to_device(torch.cat([tensor.flatten() for tensor in tensors]), device)
    parts = packed.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
