"""What a target's forward pass needs to run on the meta device: kernels that PyTorch has for devices
with memory only, and answers to questions that only data could answer.

Transformers' and PyTorch's own code runs otherwise, sharding and exchange of tokens included.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed.fsdp._fully_shard._fsdp_param_group as param_group
import torch.distributed.fsdp._fully_shard._fully_shard as fully_shard
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import masking_utils

from dspark_megatron.planning.observing.observer import Observer

META = torch.device("meta")
aten = torch.ops.aten


@contextlib.contextmanager
def sharding_on_meta() -> Iterator[None]:
    """FSDP2 takes the device of its buffers from the mesh, asks that device for streams and refuses
    weights without memory."""
    group = param_group.FSDPParamGroup
    with (
        mock.patch.object(torch._C, "_get_accelerator", lambda *_: torch.device("cpu")),
        mock.patch.object(fully_shard, "_get_device_from_mesh", lambda _mesh: META),
        mock.patch.object(torch, "meta", torch.cpu, create=True),
        mock.patch.object(group, "_validate_no_meta_params", lambda _self: None),
    ):
        yield


@contextlib.contextmanager
def gathers_named(observer: Observer, phase: str, kind: str) -> Iterator[None]:
    """What FSDP2 allocates for weights of other ranks is of that kind."""
    group = param_group.FSDPParamGroup
    with contextlib.ExitStack() as stack:
        for name in ("unshard", "wait_for_unshard"):
            plain = getattr(group, name)

            def named(self: Any, *args: Any, plain: Any = plain, **kwargs: Any) -> Any:
                with observer.phase(phase, kind=kind):
                    return plain(self, *args, **kwargs)

            stack.enter_context(mock.patch.object(group, name, named))
        yield


class TargetOnMeta(TorchFunctionMode):
    """Every position belongs to one sequence of its row, and tokens spread evenly over experts."""

    def __init__(self, observer: Observer, routed_here: float = 1.0) -> None:
        """routed_here: share of the rows handed to a rank's experts that are for them; the kernel
        skips the others."""
        super().__init__()
        self._observer = observer
        self._routed_here = routed_here
        self._pairs = 0
        self._unpacked = mock.patch.object(
            masking_utils, "find_packed_sequence_indices", lambda *_, **__: None
        )

    def __enter__(self) -> "TargetOnMeta":
        self._unpacked.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._unpacked.stop()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return fused_attention(*args, **kwargs)
        if function in _GROUPED:
            return self._grouped_mm(*args, **kwargs)
        if function is Tensor.scatter_add_:  # counts tokens by expert
            self._pairs = args[2].numel()
        if function is Tensor.tolist and args[0].is_meta and args[0].dim() == 2:
            return [_even(self._pairs, size) for size in [args[0].shape[1]] * len(args[0])]
        return function(*args, **kwargs)

    def _grouped_mm(self, rows: Tensor, weights: Tensor, **_: Any) -> Tensor:
        """Rows [n, k] sorted by expert, weights [experts, k, m] -> [n, m]."""
        out = rows.new_empty(len(rows), weights.shape[-1])
        products = 2 * len(rows) * weights.shape[-2] * weights.shape[-1]
        moved = rows.nbytes + weights.nbytes + out.nbytes
        self._observer.add(math.ceil(products * self._routed_here), moved)
        return out


_GROUPED = [
    function
    for function in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None))
    if function is not None
]


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As a GPU does it: flash attention without a mask; with one, or where values are of another
    width than keys, the memory-efficient kernel, to which a mask of booleans is handed as numbers.
    """
    if attn_mask is None and query.shape[-1] == value.shape[-1]:
        return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, 0.0, is_causal
    )[0]


def _even(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]
