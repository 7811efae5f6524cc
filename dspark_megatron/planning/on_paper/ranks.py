"""Rank 0 of a job that exists on paper: process groups of the planned sizes that send nothing, and
every tensor of the device without memory."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from dspark_megatron.errors import require
from dspark_megatron.run.ranks.runtime import Runtime

META = torch.device("meta")


@contextlib.contextmanager
def one_of_ranks(size: int) -> Iterator[dist.ProcessGroup]:
    """The group of the first of `size` ranks. ConfigError in a process that is a rank already."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    require(
        not dist.is_initialized(),
        "a plan needs a process that has not joined a job's ranks, and this one has; make it "
        "before they join, or with dspark plan",
    )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def runtime_on_paper(tp_size: int, world_size: int) -> Iterator[Runtime]:
    """Megatron-Core's groups of that job. What is allocated within must name its device."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    # A torch function mode does not reach into backward, where Megatron-Core asks for the device.
    on_meta = mock.patch.object(torch.cuda, "current_device", lambda: META)
    alike = mock.patch.object(dist, "all_gather_object", _all_alike)
    with one_of_ranks(world_size), on_meta, alike, _one_collective_at_a_time():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp_size, create_gloo_process_groups=False
        )
        try:
            model_parallel_cuda_manual_seed(1)
            yield Runtime.joined(META)
        finally:
            parallel_state.destroy_model_parallel()


def _all_alike(objects: list[Any], own: Any, group: Any = None) -> None:
    """Every rank has what this one has."""
    objects[:] = [own] * len(objects)


@contextlib.contextmanager
def _one_collective_at_a_time() -> Iterator[None]:
    """Megatron-Core reduces buckets in coalesced collectives, of which PyTorch has no form for meta
    tensors."""
    from megatron.core.distributed import param_and_grad_buffer

    def apart(*_: Any, **__: Any) -> Any:
        return contextlib.nullcontext(mock.Mock())

    with mock.patch.object(param_and_grad_buffer, "_coalescing_manager", apart):
        yield


class EverythingOnMeta(TorchFunctionMode):
    """Megatron-Core names the current GPU when it allocates; `torch.device("meta")` alone only
    fills in what is not named."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = META
        return function(*args, **kwargs)


class HostAnswers(TorchFunctionMode):
    """What the host would read from the device: all is finite, and norms are 1."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in (torch.Tensor.item, torch.Tensor.tolist) and args[0].device == META:
            if function is torch.Tensor.item:
                return 1.0
            return torch.zeros(args[0].shape).tolist()
        return function(*args, **(kwargs or {}))
