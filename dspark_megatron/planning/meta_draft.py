"""The draft of one tensor-parallel rank on the meta device: its real parameters, without memory."""

import contextlib
import functools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from dspark_megatron.shape import DraftShape


class DraftElements(NamedTuple):
    """Numbers that one rank holds, vocabulary padding included."""

    trained: int
    frozen: int
    """The target's embedding and LM head, and the buffer of `markov_w2` beside it."""


def draft_elements(shape: DraftShape, tp_size: int) -> DraftElements:
    """Counted on the real model. The process must not have joined a job's ranks, and Megatron-Core
    must be ready for this machine (`prepare_megatron`)."""
    return _counted(json.dumps(shape.to_dict()), tp_size)


@functools.cache
def _counted(shape: str, tp_size: int) -> DraftElements:
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from dspark_megatron.model.draft_model import DSparkDraftModel

    with one_of_ranks(tp_size) as group, torch.device("meta"), EverythingOnMeta():
        # Megatron-Core's layers ask for its random states, and draw nothing from them here.
        model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
        model = DSparkDraftModel(
            DraftShape.from_dict(json.loads(shape)),
            tp_group=group,
            params_dtype=torch.bfloat16,
            device=torch.device("meta"),
        )
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return DraftElements(trained, sum(p.numel() for p in parameters) - trained)


@contextlib.contextmanager
def one_of_ranks(size: int) -> Iterator[dist.ProcessGroup]:
    """The group of the first of `size` ranks that exist on paper only."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "a plan is made outside of a job's process groups"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


class EverythingOnMeta(TorchFunctionMode):
    """Megatron-Core names the current GPU when it allocates; `torch.device("meta")` alone only
    fills in what is not named."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        return function(*args, **kwargs)
