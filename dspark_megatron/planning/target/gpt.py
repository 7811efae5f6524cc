"""A target's forward pass as Megatron-Core's GPTModel, observed on the meta device."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dspark_megatron.data.batch import Batch
from dspark_megatron.mcore import transformer_engine
from dspark_megatron.planning.observing.gpu_kernels import gpu_kernels
from dspark_megatron.planning.observing.observer import Observer
from dspark_megatron.planning.on_paper.ranks import META, EverythingOnMeta, runtime_on_paper
from dspark_megatron.planning.target.few_layers import from_few_layers
from dspark_megatron.planning.target.on_meta import even
from dspark_megatron.planning.target.target_pass import LAYER, OUTPUTS, TOKENS, TargetPass
from dspark_megatron.shape.layout import stage_layers
from dspark_megatron.targets.megatron.gpt_model import build_gpt_model
from dspark_megatron.targets.megatron.gpt_shape import GPTShape
from dspark_megatron.targets.megatron.groups import target_groups
from dspark_megatron.targets.megatron.target import MegatronTarget

WEIGHTS, FIRST, PASS = "frozen target", "first pass", "pass"


@dataclass(frozen=True)
class ObservedGPT:
    """The first pipeline stage of a GPTModel, which has the embedding and as many layers as any."""

    shape: GPTShape
    dtype: torch.dtype
    tp_size: int
    ep_size: int
    stages: int
    sequence_parallel: bool
    layer_ids: tuple[int, ...]
    with_last_hidden: bool
    max_tokens: int | None = None
    kernels: Callable[[Observer], contextlib.AbstractContextManager] = gpu_kernels

    def forward_pass(self, batch: tuple[int, int]) -> TargetPass:
        """batch: samples and their length. Of pipeline stages, with those of all ranks of the
        pipeline."""
        ids = tuple(i for i in self.layer_ids if i < self._layers) or (0,)
        found = from_few_layers(lambda few: self._observe(batch, few, ids), self._kinds, ids)
        return replace(found, work=found.work.times(self.stages))

    def weights(self) -> int:
        """Bytes of the weights, the output layer left out: a run frees it when it has compared
        it."""

        def held(layers: tuple[int, ...]) -> TargetPass:
            with self._target(layers, (0,)) as (target, _):
                size = sum(parameter.nbytes for parameter in target.model.parameters())
            return TargetPass({WEIGHTS: {WEIGHTS: size}})

        return from_few_layers(held, self._kinds, (0,)).highest[WEIGHTS]

    @property
    def _kinds(self) -> list[bool]:
        return [self.shape.has_experts(i) for i in range(self._layers)]

    @property
    def _layers(self) -> int:
        own = stage_layers(self.shape.num_layers, self.stages)[0]
        return own if self.with_last_hidden else min(own, max(self.layer_ids) + 1)

    @contextlib.contextmanager
    def _target(
        self, layers: tuple[int, ...], layer_ids: tuple[int, ...]
    ) -> Iterator[tuple[MegatronTarget, dict[str, str]]]:
        """A model of these layers, and what its groups are for."""
        pattern = tuple(int(self.shape.has_experts(i)) for i in layers)
        has_experts = self.shape.num_experts is not None
        shape = replace(
            self.shape,
            num_layers=len(layers),
            moe_layer_freq=pattern if has_experts else None,
        )
        ranks = max(self.tp_size, self.ep_size)
        with (
            mock.patch.object(transformer_engine, "is_usable", lambda: False),
            runtime_on_paper(self.tp_size, ranks) as runtime,
            EverythingOnMeta(),
            META,
        ):
            groups = target_groups(tp_group=runtime.tp_group, ep_size=self.ep_size)
            model = build_gpt_model(
                shape,
                groups,
                params_dtype=self.dtype,
                device=META,
                sequence_parallel=self.sequence_parallel or has_experts,
                post_process=self.stages == 1,
            )
            target = MegatronTarget(
                model,
                tuple(layers.index(i) for i in layer_ids),
                max_tokens_per_forward=self.max_tokens,
                with_last_hidden=self.with_last_hidden,
                with_output_layer=False,
            )
            target._shape_group = None  # batches of all ranks are of one size
            words = {groups.ep.group_name: TOKENS, groups.tp.group_name: OUTPUTS}
            yield target, words

    def _observe(
        self, batch: tuple[int, int], layers: tuple[int, ...], layer_ids: tuple[int, ...]
    ) -> TargetPass:
        with self._target(layers, layer_ids) as (target, words):
            observer, ids = Observer(META, words), torch.zeros(batch, dtype=torch.long)
            observer.name(WEIGHTS, (*target.model.parameters(), *target.model.buffers()))
            with observer, self.kernels(observer), EvenExperts(self.shape), torch.no_grad():
                for phase in (FIRST, PASS):
                    kept = observer.alive.get(LAYER, 0)
                    with observer.phase(phase, kind=LAYER):
                        if self.stages == 1:
                            target.states(Batch(ids))
                        else:
                            target._forward(ids)
            states = observer.peaks[PASS].alive[LAYER] - kept
            return TargetPass({PASS: {LAYER: states}}, observer.work[PASS], kept)


class EvenExperts(TorchFunctionMode):
    """Answers how many tokens Megatron-Core's router gives to each expert: equally many."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self._of_each = (shape.moe_router_topk or 0) / (shape.num_experts or 1)
        self._tokens = 0
        """That the router's last map has."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.sum and args[0].dtype == torch.bool:
            self._tokens = args[0].shape[0]
        if function is Tensor.cpu and args[0].is_meta:
            counts = even(self._routed(len(args[0]), self._tokens), len(args[0]))
            with torch._C.DisableTorchFunction():
                return torch.tensor(counts, device="cpu")
        if function is Tensor.masked_select:
            experts, tokens = args[1].shape
            return args[0].new_empty(self._routed(experts, tokens))
        return function(*args, **(kwargs or {}))

    def _routed(self, experts: int, tokens: int) -> int:
        return round(experts * tokens * self._of_each)
