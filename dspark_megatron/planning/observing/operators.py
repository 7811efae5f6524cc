"""What an operator computes and moves, from its arguments and results."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
PICKING = {
    "embedding",
    "index",
    "index_select",
    "gather",
    "slice_scatter",
    "index_put",
    "index_put_",
    "_index_put_impl_",
    "index_copy",
    "index_copy_",
    "index_add",
    "index_add_",
    "scatter",
    "scatter_",
    "scatter_add",
    "scatter_add_",
}
"""Operators that read or write some rows of a tensor: what they pick is moved twice, and not what
they pick from."""
WRITING = {"copy_", "zero_", "fill_", "normal_", "uniform_", "zeros_like", "full_like", "ones_like"}
"""Operators that do not read the tensor they fill, or whose shape they take."""
ALLOCATING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def flops(function: Any, args: tuple, kwargs: dict, out: Any) -> int:
    """By PyTorch's formulas; 0 for what has none."""
    packet = function._overloadpacket
    formula = flop_registry.get(packet)
    if formula is None and packet.__name__.endswith("_"):  # in place
        formula = flop_registry.get(getattr(aten, packet.__name__[:-1], None))
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def moved(function: Any, given: list[Tensor], results: list[Tensor]) -> int:
    """Bytes that are read and written; none by views, which share their argument's storage and
    write nothing."""
    schema = function._schema
    name = schema.name.partition("::")[2]
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
    own = {x.untyped_storage()._cdata for x in given}
    fresh = [x for x in results if x.untyped_storage()._cdata not in own]
    if name in ALLOCATING or not (writes or fresh):
        return 0
    if name in PICKING:
        places, picked = (given[1:-1], given[-1:]) if writes else (given[1:], results)
        return _size(places) + 2 * _size(picked)
    read = given
    if name in WRITING or any(a.is_out for a in schema.arguments):
        read = [x for x in given if all(x is not y for y in results)]
        read = [] if name.endswith("_like") else read
    return _size(read) + _size(results)


def _size(tensors: Iterable[Tensor]) -> int:
    """Bytes of their elements, those that `expand` repeats once."""
    return sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors)
