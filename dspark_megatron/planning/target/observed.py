"""A target's forward pass as Transformers runs it, observed on the meta device."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed.fsdp._fully_shard._fsdp_param_group as param_group
from torch import Tensor
from transformers import PretrainedConfig

from dspark_megatron.config import TargetConfig
from dspark_megatron.data.batch import Batch
from dspark_megatron.planning.observing.gpu_kernels import gpu_kernels
from dspark_megatron.planning.observing.observer import Observer
from dspark_megatron.planning.observing.work import Sent, Work, summed
from dspark_megatron.planning.on_paper.ranks import META
from dspark_megatron.planning.target.few_layers import from_few_layers, layer_kinds
from dspark_megatron.planning.target.on_meta import (
    EvenRouting,
    TokenByToken,
    one_sequence_in_each_row,
)
from dspark_megatron.planning.target.rank_model import local, rank_model
from dspark_megatron.planning.target.target_pass import (
    CACHE,
    GATHERED,
    LAYER,
    OUTPUTS,
    SHARDS,
    TOKENS,
    TargetPass,
)
from dspark_megatron.targets.base import TargetStates
from dspark_megatron.targets.huggingface.split import TargetSplit, meta_target
from dspark_megatron.targets.huggingface.target import HuggingFaceTarget
from dspark_megatron.targets.passes import Passes
from dspark_megatron.targets.shared_pass import SharedPasses

WEIGHTS, GATHERS, COMPUTES = "frozen target", "gathers", "computes"
MOST_CALLS = 2000
"""Of a layer, in functions of PyTorch: those of the public families make 30 to 300."""


@dataclass(frozen=True)
class ObservedTarget:
    """A target that Transformers runs, and what is wanted of it."""

    config: TargetConfig
    target_config: PretrainedConfig
    dtype: torch.dtype
    split: TargetSplit
    layer_ids: tuple[int, ...]
    with_last_hidden: bool
    kernels: Callable[[Observer], contextlib.AbstractContextManager] = gpu_kernels

    def forward_pass(self, batch: tuple[int, int], micro_batches: int = 1) -> TargetPass:
        """batch: samples, of so many micro-batches, and their length. Raises whatever the family's
        classes raise where they do not run on the meta device."""
        kinds = layer_kinds(meta_target(self.target_config, self.dtype))
        if not self.with_last_hidden:
            kinds = kinds[: max(self.layer_ids) + 1]
        try:
            return from_few_layers(
                lambda few: self.observe(batch, micro_batches, few), kinds, self.layer_ids
            )
        except TokenByToken:
            raise
        except Exception:  # a class that needs all its layers
            return self.observe(batch, micro_batches, tuple(range(len(kinds))))

    def observe(
        self, batch: tuple[int, int], micro_batches: int, layers: tuple[int, ...]
    ) -> TargetPass:
        """With these layers, among them those that are tapped."""
        rank = rank_model(
            self.target_config,
            self.dtype,
            self.split,
            layers=layers,
            attention=self.config.attention,
        )
        with rank as model:
            target = HuggingFaceTarget(
                self.config,
                tuple(layers.index(layer_id) for layer_id in self.layer_ids),
                split=self.split,
                dp_group=None,
                device=META,
                with_last_hidden=self.with_last_hidden,
                model=model,
            )
            size = batch[0] // micro_batches, batch[1]
            return _observed(target, [size] * micro_batches, self.split, self.kernels)


def _observed(
    target: HuggingFaceTarget, sizes: list[tuple[int, int]], split: TargetSplit, kernels: Callable
) -> TargetPass:
    """sizes: of micro-batches that go through it together."""
    shared_batch = split.ep_size == split.tp_size
    routed_here = 1 / split.ep_size if shared_batch else 1.0
    passes = sum(Passes.of(*size, target._max_tokens).count for size in sizes)
    most_calls = MOST_CALLS * len(target.layers) * passes

    def run(observer: Observer, moments: _Moments, sizes: list[tuple[int, int]]) -> None:
        with (
            observer,
            kernels(observer),
            moments.gathers(observer),
            one_sequence_in_each_row(),
            EvenRouting(observer, routed_here, most_calls=most_calls),
            observer.phase(moments.current, part=COMPUTES, kind=LAYER),
            META,
        ):
            batches = [Batch(torch.zeros(size, dtype=torch.long)) for size in sizes]
            source = target if len(batches) == 1 else SharedPasses(target, len(batches))
            source.expect(batches)
            source.states(batches[0])

    if split.shards > 1:  # the first pass gathers what then stays
        run(Observer(META), _Moments(), [(1, 1)])
    observer, moments = Observer(META), _Moments()
    observer.name(WEIGHTS, map(local, (*target.model.parameters(), *target.model.buffers())))
    moments.watch(target, observer)
    run(observer, moments, sizes)
    peaks = {
        name: {kind: size for kind, size in peak.alive.items() if kind != WEIGHTS}
        for name, peak in observer.peaks.items()
    }
    return TargetPass(peaks, _with_purposes(observer.work))


def _with_purposes(work: dict[str, Work]) -> Work:
    def named(one: Sent, part: str) -> Sent:
        purpose = TOKENS if one.kind == "all-to-all" else SHARDS if part == GATHERS else OUTPUTS
        return replace(one, group=purpose)

    sent = [named(one, part) for part in work for one in work[part].sent]
    total = sum(work.values(), Work())
    return Work(total.flops, total.moved, summed(tuple(sent)))


class _Moments:
    """Each forward pass is one, and what is between them another."""

    def __init__(self) -> None:
        self.current, self._passes = "states put together", 0

    def watch(self, target: HuggingFaceTarget, observer: Observer) -> None:
        plain = target._run

        def run(*args: Any, **kwargs: Any) -> TargetStates:
            between, self._passes = self.current, self._passes + 1
            self.current = f"pass {self._passes}"
            with observer.phase(self.current, part=COMPUTES, kind=LAYER):
                states = plain(*args, **kwargs)
            self.current = between
            return states

        target._run = run  # type: ignore[method-assign]
        for number, layer in enumerate(target.layers):
            layer.register_forward_hook(_cache_namer(number, observer), with_kwargs=True)

    @contextlib.contextmanager
    def gathers(self, observer: Observer) -> Iterator[None]:
        """FSDP2's buffers and collectives are told from the layer's."""
        group = param_group.FSDPParamGroup
        with contextlib.ExitStack() as stack:
            for name in ("unshard", "wait_for_unshard"):
                ours = self._gathering(getattr(group, name), observer)
                stack.enter_context(mock.patch.object(group, name, ours))
            yield

    def _gathering(self, plain: Callable, observer: Observer) -> Callable:
        def gather(*args: Any, **kwargs: Any) -> Any:
            with observer.phase(self.current, part=GATHERS, kind=GATHERED):
                return plain(*args, **kwargs)

        return gather


def _cache_namer(number: int, observer: Observer) -> Callable:
    """A hook of a layer: what it has added to the cache is part of that."""

    def name(_module: Any, _args: Any, kwargs: dict[str, Any], _output: Any) -> None:
        if (cache := kwargs.get("past_key_values")) is not None:
            own = vars(cache.layers[number]).values()
            observer.name(CACHE, [x for x in own if isinstance(x, Tensor)])

    return name
