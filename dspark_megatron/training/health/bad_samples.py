"""What is known of a step that went wrong: its samples and its largest gradients, of all ranks."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dspark_megatron.data.origins import Origins
from dspark_megatron.training.forward_step import SlotTerms

_GRADIENTS = 5
"""The largest ones that are named."""


def describe_samples(
    batches: Sequence[SlotTerms], origins: Origins, *, is_first: bool
) -> list[dict[str, Any]]:
    """The samples of all ranks that had something to learn, those with the largest loss first, with
    file and line and the mean of each term. `at_fault`: one of these is not finite. is_first: this
    is the first of the tensor-parallel ranks, which have the same samples. One all-gather of
    objects over the world."""
    own = []
    for batch in batches if is_first else ():
        for sample, terms in zip(batch.sample_indices, batch.by_sample(), strict=True):
            file, line = origins[sample]
            at_fault = not all(map(math.isfinite, terms.values()))
            place = {"sample": sample, "file": str(file), "line": line}
            own.append({**place, "at_fault": at_fault, "terms": terms})
    gathered = [one for part in _of_all_ranks(own) for one in part]
    return sorted(gathered, key=lambda one: (-_loss(one), one["sample"]))


def _loss(sample: dict[str, Any]) -> float:
    return math.inf if sample["at_fault"] else sum(sample["terms"].values())


@torch.no_grad()
def largest_gradients(draft: nn.Module) -> list[dict[str, Any]]:
    """Names and largest absolute values of the gradients, those that are not finite first. One
    all-gather of objects over the world."""
    trained: Any = [(name, p) for name, p in draft.named_parameters() if p.requires_grad]
    own = {name: largest(p.main_grad) for name, p in trained}
    values = torch.stack([*own.values()]).tolist()
    of_ranks = _of_all_ranks(dict(zip(own, values, strict=True)))
    of_all = {name: max(one[name] for one in of_ranks) for name in own}
    first = sorted(of_all, key=lambda name: (-of_all[name], name))[:_GRADIENTS]
    return [{"name": name, "largest": of_all[name]} for name in first]


def largest(tensor: Tensor) -> Tensor:
    """[] largest absolute value; infinite where one is no number."""
    return tensor.abs().max().float().nan_to_num(nan=math.inf, posinf=math.inf)


def _of_all_ranks(value: Any) -> list[Any]:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
