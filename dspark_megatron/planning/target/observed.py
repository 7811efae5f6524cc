"""A target's forward pass as Transformers runs it, observed on the meta device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from dspark_megatron.config import TargetConfig
from dspark_megatron.data.batch import Batch
from dspark_megatron.planning.observing.observer import Observer
from dspark_megatron.planning.target.few_layers import from_few_layers, layer_kinds
from dspark_megatron.planning.target.on_meta import META, TargetOnMeta, gathers_named
from dspark_megatron.planning.target.rank_model import local_tensors, rank_model
from dspark_megatron.planning.target.target_pass import CACHE, GATHERED, LAYER, TargetPass
from dspark_megatron.targets.huggingface.split import TargetSplit, meta_target
from dspark_megatron.targets.huggingface.target import HuggingFaceTarget

WEIGHTS, PASS = "frozen target", "target"


@dataclass(frozen=True)
class PassWish:
    """Of which target what is to be observed."""

    config: TargetConfig
    target_config: PretrainedConfig
    dtype: torch.dtype
    split: TargetSplit
    layer_ids: tuple[int, ...]
    with_last_hidden: bool


def observed_pass(wish: PassWish, batch: tuple[int, int]) -> TargetPass:
    """batch: samples and their length. Raises whatever the family's classes raise where they do
    not run on the meta device."""
    kinds = layer_kinds(meta_target(wish.target_config, wish.dtype))
    if not wish.with_last_hidden:
        kinds = kinds[: max(wish.layer_ids) + 1]
    return from_few_layers(lambda few: _observed(wish, batch, few), kinds, wish.layer_ids)


def _observed(wish: PassWish, batch: tuple[int, int], layers: tuple[int, ...]) -> TargetPass:
    split, attention = wish.split, wish.config.attention
    rank = rank_model(wish.target_config, wish.dtype, split, layers=layers, attention=attention)
    routed_here = 1 / split.ep_size if split.ep_size == split.tp_size else 1.0
    observer = Observer(META)
    with rank as model:
        target = HuggingFaceTarget(
            wish.config,
            tuple(layers.index(layer_id) for layer_id in wish.layer_ids),
            split=split,
            dp_group=None,
            device=META,
            with_last_hidden=wish.with_last_hidden,
            model=model,
        )
        observer.name(WEIGHTS, local_tensors(model))
        _name_caches(observer, target)
        with (
            observer,
            gathers_named(observer, PASS, GATHERED),
            TargetOnMeta(observer, routed_here),
            observer.phase(PASS, kind=LAYER),
            META,
        ):
            states = target.states(Batch(torch.zeros(batch, dtype=torch.long, device=META)))
        del states
        kept, peak = observer.storages.alive[GATHERED], dict(observer.peaks[PASS].alive)
        weights = sum(x.nbytes for x in local_tensors(model)) + kept
    del peak[WEIGHTS]
    if GATHERED in peak:
        peak[GATHERED] -= kept
    return TargetPass(weights, peak, observer.work[PASS])


def _name_caches(observer: Observer, target: HuggingFaceTarget) -> None:
    """What a layer adds to the cache is part of it when the layer is through."""
    for number, layer in enumerate(target.layers):

        def name(
            _module: Any, _args: Any, kwargs: dict[str, Any], _output: Any, number: int = number
        ) -> None:
            if (cache := kwargs.get("past_key_values")) is not None:
                own = vars(cache.layers[number]).values()
                observer.name(CACHE, [x for x in own if isinstance(x, Tensor)])

        layer.register_forward_hook(name, with_kwargs=True)
