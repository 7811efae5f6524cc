"""Megatron-Core's optimizer for tensors on the meta device, with Apex and Transformer Engine
installed or not."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from dspark_megatron.mcore.loadable_adam import AdamW


@contextlib.contextmanager
def plain_optimizer() -> Iterator[None]:
    """Within it, Megatron-Core takes PyTorch's operations in place of kernels that need a GPU, and
    a tensor on meta for one on a GPU. State and results have the same sizes."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads
    from megatron.core.optimizer import optimizer as mixed_precision

    plain = {
        (optimizer, "Adam"): AdamW,
        (distributed, "Adam"): AdamW,
        (clip_grads, "multi_tensor_applier"): utils.local_multi_tensor_applier,
        (clip_grads, "l2_norm_impl"): _norm,
        (clip_grads, "multi_tensor_scale_impl"): utils.local_multi_tensor_scale,
        (mixed_precision, "multi_tensor_applier"): utils.local_multi_tensor_applier,
        (mixed_precision, "multi_tensor_scale_impl"): utils.local_multi_tensor_scale,
        (torch.Tensor, "type"): _type_on_a_gpu(torch.Tensor.type),
    }
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")  # as in a run
        for (owner, name), ours in plain.items():
            stack.enter_context(mock.patch.object(owner, name, ours, create=True))
        yield


def _norm(_: int, flag: Any, tensors: list[list[torch.Tensor]], *__: Any) -> tuple[Any, None]:
    """Of all together, [1]; Megatron-Core's own form of it reads each norm on the host."""
    return torch.stack([x.norm() for x in tensors[0]]).norm().view(1), None


def _type_on_a_gpu(plain_type: Any) -> Any:
    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = plain_type(self, *args, **kwargs)
        return found.replace("torch.meta.", "torch.cuda.") if isinstance(found, str) else found

    return tensor_type
