"""Forward passes of micro-batches through pipeline stages, by Megatron-Core's own schedule."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

RunStage = Callable[[int], Tensor]
"""Runs this stage for the micro-batch of a place; its output goes to the next stage."""


class _KnownShapes(P2PCommunicator):
    """Between stages, for micro-batches of several shapes that every rank knows beforehand.

    Megatron-Core either has one shape for all, and pads, or sends each shape ahead, for which it
    demands settings of a mixture of experts.
    """

    def __init__(self, shapes: Iterable[tuple[int, ...]], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._shapes = iter(shapes)

    def recv_forward(self, tensor_shapes: Any, is_first_stage: bool) -> list[Tensor | None]:
        received = super().recv_forward([next(self._shapes)], is_first_stage)
        # It asks for a gradient, and there is none of a frozen model.
        return [None if tensor is None else tensor.detach() for tensor in received]


@torch.no_grad()
def run_forward(
    model: torch.nn.Module,
    run_stage: RunStage,
    shapes: Sequence[tuple[int, ...]],
    *,
    pg_collection: ProcessGroupCollection,
) -> None:
    """Run every micro-batch through all stages; all pipeline ranks call it with the same shapes.

    model: this stage, to which Megatron-Core hands what the stage before has sent. shapes: of what
    is sent between stages, [s, b, h], by place in the run. Each rank but the last sends, and each
    but the first receives, one tensor for each of them.
    """

    def forward_step(places: Iterator[int], _model: torch.nn.Module) -> tuple[Tensor, Any]:
        return run_stage(next(places)).contiguous(), _keep_nothing

    pp_group: dist.ProcessGroup = pg_collection.pp
    forward = get_forward_backward_func(pp_size=pp_group.size(), vp_size=None)
    s, b, _ = shapes[0]
    forward(
        forward_step_func=forward_step,
        data_iterator=iter(range(len(shapes))),
        model=model,
        num_microbatches=len(shapes),
        seq_length=s,
        micro_batch_size=b,
        forward_only=True,
        collect_non_loss_data=True,
        p2p_communicator=_KnownShapes(shapes, pp_group=pp_group, config=model.config),
        pg_collection=pg_collection,
    )


def _keep_nothing(_output: Tensor, non_loss_data: bool) -> None:
    """What the schedule keeps of the last stage's output."""
