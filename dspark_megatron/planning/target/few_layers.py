"""A target of many layers observed on few: what layers of one kind take grows with their number."""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dspark_megatron.planning.observing.work import Sent, Work
from dspark_megatron.planning.target.target_pass import TargetPass
from dspark_megatron.targets.huggingface.target import decoder_layers

NUMBERS = ("layer_idx", "layer_id", "layer_number", "training")
"""Attributes of a module that say which layer it is, not how it works."""


def from_few_layers(
    observe: Callable[[tuple[int, ...]], TargetPass],
    kinds: list[Any],
    layer_ids: tuple[int, ...],
) -> TargetPass:
    """What all layers take. observe: a pass with these layers only. kinds: of each layer.

    The few are those that are tapped and, of each kind, the last that stand side by side; then of
    each kind one more, for what it adds."""
    few = sorted({*layer_ids, *_last_neighbours(kinds), len(kinds) - 1})
    base = total = observe(tuple(few))
    here = Counter(kinds[i] for i in few)
    for kind, count in Counter(kinds).items():
        if missing := count - here[kind]:
            another = next(i for i, one in enumerate(kinds) if one == kind and i not in few)
            more = observe(tuple(sorted({*few, another})))
            total = _plus(total, missing, more, base)
    return total


def layer_kinds(model: PreTrainedModel) -> list[Any]:
    """Equal ones for layers of the same modules, sizes and settings."""
    layers = decoder_layers(model)
    settings = _settings_by_layer(model).values()
    return [
        (*_kind(layer), *(str(values[i]) for values in settings)) for i, layer in enumerate(layers)
    ]


def keep_layers(model: PreTrainedModel, kept: tuple[int, ...]) -> None:
    """Make it a model of these layers, its config included."""
    layers, settings = decoder_layers(model), _settings_by_layer(model)
    text = model.config.get_text_config()
    chosen = [layers[i] for i in kept]
    del layers[:]
    layers.extend(chosen)
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = number  # type: ignore[assignment]  # its place in a cache
    for name, values in settings.items():
        setattr(text, name, [values[i] for i in kept])
    text.num_hidden_layers = len(kept)


def _last_neighbours(kinds: list[Any]) -> set[int]:
    """Of each kind the last two that follow each other: weights are gathered while those of the
    layer before are still there. One where there are no two."""
    found = {kind: {i} for i, kind in enumerate(kinds)}
    found |= {kinds[i]: {i - 1, i} for i in range(1, len(kinds)) if kinds[i - 1] == kinds[i]}
    return set().union(*found.values())


def _settings_by_layer(model: PreTrainedModel) -> dict[str, list[Any]]:
    """Lists of the config with an entry for each layer."""
    text = model.config.get_text_config()
    return {
        name: list(values)
        for name, values in copy.copy(vars(text)).items()
        if isinstance(values, (list, tuple)) and len(values) == text.num_hidden_layers
    }


def _kind(layer: nn.Module) -> tuple:
    def settings(module: nn.Module) -> str:
        plain = (int, float, str, bool, type(None))
        own = {n: v for n, v in vars(module).items() if isinstance(v, plain) and n not in NUMBERS}
        return f"{type(module).__name__} {sorted(own.items())}"

    modules = tuple((name, settings(module)) for name, module in layer.named_modules())
    return modules, tuple((n, tuple(p.shape), p.dtype) for n, p in layer.named_parameters())


def _plus(total: TargetPass, count: int, more: TargetPass, base: TargetPass) -> TargetPass:
    """total + count * (more - base)"""

    def grown(of: Callable[[TargetPass], int]) -> int:
        return of(total) + count * (of(more) - of(base))

    def grown_sent(i: int, one: Sent) -> Sent:
        handed = grown(lambda a: a.work.sent[i].handed)
        return replace(one, handed=handed, calls=grown(lambda a: a.work.sent[i].calls))

    groups = [[(one.kind, one.group) for one in a.work.sent] for a in (total, more, base)]
    assert groups[0] == groups[1] == groups[2], "one more layer sends to the same groups"
    moments = {
        name: {kind: grown(_size_of(name, kind)) for kind in parts}
        for name, parts in total.moments.items()
    }
    sent = tuple(grown_sent(i, one) for i, one in enumerate(total.work.sent))
    flops, moved = grown(lambda a: a.work.flops), grown(lambda a: a.work.moved)
    kept = grown(lambda a: a.kept)
    return replace(total, moments=moments, kept=kept, work=Work(flops, moved, sent))


def _size_of(moment: str, kind: str) -> Callable[[TargetPass], int]:
    return lambda target_pass: target_pass.moments[moment].get(kind, 0)
