"""What a target's forward pass needs to run on the meta device: kernels that PyTorch has only for
devices with memory, and answers to questions that only data could answer.

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
from dspark_megatron.planning.on_paper.ranks import META


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
def one_sequence_in_each_row() -> Iterator[None]:
    """Transformers looks for packed sequences among the positions."""
    with mock.patch.object(masking_utils, "find_packed_sequence_indices", lambda *_, **__: None):
        yield


class TokenByToken(Exception):
    """A pass that takes minutes even where nothing is computed; a GPU has kernels for it."""


class EvenRouting(TorchFunctionMode):
    """Tokens spread evenly over experts, whose matrices are multiplied in one kernel."""

    def __init__(self, observer: Observer, routed_here: float, *, most_calls: int) -> None:
        """routed_here: share of the rows handed to a rank's experts that are for them; the kernel
        skips the others. most_calls: of functions in a pass; TokenByToken for more."""
        super().__init__()
        self._observer, self._routed_here = observer, routed_here
        self._most_calls = most_calls
        self._calls = 0
        self._pairs = 0
        """Of a token and an expert, in the layer that was routed last."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self._calls += 1
        if self._calls == self._most_calls:  # once: what follows restores modes
            raise TokenByToken("they go through tokens one by one")
        if function in _GROUPED:
            return self._grouped_mm(*args, **(kwargs or {}))
        if function is Tensor.scatter_add_:  # counts a rank's pairs by expert
            self._pairs = args[2].numel()
        if function is Tensor.tolist and args[0].is_meta and args[0].dim() == 2:
            sent_and_received, ranks = args[0].shape
            return [even(self._pairs, ranks)] * sent_and_received
        return function(*args, **(kwargs or {}))

    def _grouped_mm(self, rows: Tensor, weights: Tensor, **_: Any) -> Tensor:
        """rows [n, k] sorted by expert, weights [experts, k, m] -> [n, m]"""
        out = rows.new_empty(len(rows), weights.shape[-1])
        products = 2 * len(rows) * math.prod(weights.shape[1:])
        moved = rows.nbytes + weights.nbytes + out.nbytes
        self._observer.add(math.ceil(products * self._routed_here), moved)
        return out


_GROUPED = [getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)]


def even(total: int, parts: int) -> list[int]:
    """A number in as many whole parts."""
    return [total // parts + (i < total % parts) for i in range(parts)]
