"""Collectives as PyTorch dispatches them: their kind, their group, and what a rank hands over."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

KINDS = {
    "allreduce": "all-reduce",
    "all_reduce": "all-reduce",
    "reduce": "all-reduce",
    "allgather": "all-gather",
    "all_gather": "all-gather",
    "gather": "all-gather",
    "reduce_scatter": "reduce-scatter",
    "broadcast": "broadcast",
    "scatter": "broadcast",
    "alltoall": "all-to-all",
    "all_to_all": "all-to-all",
    "send": "send",
    "isend": "send",
}
"""By how an operator's name begins; the longest that fits."""
SILENT = (
    "barrier",
    "monitored_barrier",
    "check_for_nan",
    "recv",
    "irecv",
    "wait_tensor",
    "wrap_tensor",
)
"""What sends nothing that counts: the sender counts what it sends."""
NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")


def collective(
    function: Any, args: tuple, kwargs: dict
) -> tuple[str, dist.ProcessGroup, int] | None:
    """Kind, group and bytes that this rank hands over; None for an operator that is none. Raises
    ValueError for one that is not known: it must not go uncounted."""
    if function.namespace not in NAMESPACES:
        return None
    name = function._schema.name.partition("::")[2].strip("_")
    if name.startswith(SILENT):
        return None
    prefixes = [prefix for prefix in KINDS if name.startswith(prefix)]
    if not prefixes:
        raise ValueError(f"the collective {function._schema.name} is not known to the plan")
    given = dict(zip((arg.name for arg in function._schema.arguments), args, strict=False)) | kwargs
    names = ("input_tensors", "input_tensor", "input_list", "inputs", "input", "tensors", "tensor")
    handed = next(given[name] for name in names if name in given)
    return KINDS[max(prefixes, key=len)], _group(given), sum(x.nbytes for x in _tensors(handed))


def span(group: dist.ProcessGroup) -> int:
    """Neighbouring ranks from the group's first to its last."""
    ranks = dist.get_process_group_ranks(group)
    return max(ranks) - min(ranks) + 1


def _group(given: dict[str, Any]) -> dist.ProcessGroup:
    group: Any = given.get("process_group", given.get("group_name"))
    if isinstance(group, str):
        resolve: Any = torch._C._distributed_c10d._resolve_process_group
        return resolve(group)
    return group if isinstance(group, dist.ProcessGroup) else dist.ProcessGroup.unbox(group)


def _tensors(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    else:
        for part in argument:
            yield from _tensors(part)
