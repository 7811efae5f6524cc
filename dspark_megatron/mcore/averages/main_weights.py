"""The fp32 main weights of a draft, where its optimizers have them, and the way from there to this
rank's part of every parameter and back.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from dspark_megatron.mcore.owned_weights import Owners


class MainWeights(Protocol):
    """Of the parameters of one optimizer."""

    tensors: list[Tensor]
    """What this rank owns of them: fp32, and changed in place by the optimizer."""

    def parts(self, values: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Values in the places of `tensors` as this rank's part of each parameter, by name: fp32,
        one at a time. Every rank takes all of them."""

    def take(self, values: list[Tensor], parts: Mapping[str, Tensor]) -> None:
        """Fill values in the places of `tensors` from what `parts` gives, on any device."""


def main_weights(optimizer: Any, draft: torch.nn.Module) -> list[MainWeights]:
    """Of all trained parameters. optimizer: of `build_optimizer`."""
    plain, *muons = optimizer.chained_optimizers
    owned = [OwnedMatrices(one.owners) for one in muons]
    apart = {name for one in owned for name in one.names}
    trained = {n: p for n, p in draft.named_parameters() if p.requires_grad and n not in apart}
    return [ParameterRanges(trained, plain), *owned]


class ParameterRanges:
    """Of Megatron-Core's own optimizers: whole parameters, or with the distributed one the range of
    each that this data-parallel rank owns, if any."""

    def __init__(self, parameters: dict[str, Any], optimizer: MegatronOptimizer) -> None:
        self._parameters = parameters
        self._group: dist.ProcessGroup | None = None
        self._ranges = {name: slice(0, p.numel()) for name, p in parameters.items()}
        if isinstance(optimizer, DistributedOptimizer):
            self._group = optimizer.data_parallel_group
            own = {n: p for n, p in parameters.items() if p in optimizer.model_param_gbuf_map}
            ranges = {n: optimizer._get_model_param_range_map(p)["param"] for n, p in own.items()}
            self._ranges = {name: slice(r.start, r.end) for name, r in ranges.items()}
        self.tensors = [_flat(parameters[name], place) for name, place in self._ranges.items()]

    def parts(self, values: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """With the distributed optimizer an all-reduce of each parameter over its ranks."""
        own = dict(zip(self._ranges, values, strict=True))
        for name, parameter in self._parameters.items():
            part = torch.zeros(parameter.numel(), device=parameter.device)
            if name in own:
                part[self._ranges[name]] = own[name]
            if self._group is not None and self._group.size() > 1:
                dist.all_reduce(part, group=self._group)
            yield name, part.view(parameter.shape)

    def take(self, values: list[Tensor], parts: Mapping[str, Tensor]) -> None:
        """No collective."""
        for (name, place), value in zip(self._ranges.items(), values, strict=True):
            value.copy_(parts[name].reshape(-1)[place])


def _flat(parameter: Any, place: slice) -> Tensor:
    """A parameter of 16 bits has its main weight beside it, one of fp32 is its own."""
    main = getattr(parameter, "main_param", None)
    return parameter.detach().view(-1)[place] if main is None else main.detach().view(-1)


class OwnedMatrices:
    """Of Muon: whole matrices on the ranks that own them."""

    def __init__(self, owners: Owners) -> None:
        self._owners = owners
        own = [one for one in map(owners.own, owners.rounds) if one is not None]
        self.tensors = [matrix.detach() for weight in own for matrix in weight.matrices]
        self.names = {w.name for one in owners.rounds for weights in one for w in weights}

    def parts(self, values: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """`Owners.spread` a round, in fp32."""
        left = iter(values)
        for one in self._owners.rounds:
            own = self._owners.own(one)
            matrices = [next(left) for _ in own.matrices] if own else []
            parameters = {w.name: w.parameter for weights in one for w in weights}
            parts = {n: torch.empty_like(p, dtype=torch.float32) for n, p in parameters.items()}
            self._owners.spread(one, matrices, parts)
            yield from parts.items()

    def take(self, values: list[Tensor], parts: Mapping[str, Tensor]) -> None:
        """`Owners.gathered` a round, in fp32."""
        left = iter(values)
        for one in self._owners.rounds:
            whole = self._owners.gathered(one, lambda w: parts[w.name].to(w.parameter.device))
            for matrix in whole:
                next(left).copy_(matrix)
