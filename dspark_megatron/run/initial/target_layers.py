"""Decoder layers of a target as draft layers: which tensors fit, and copying them by slice."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dspark_megatron.conversion.layouts.names import (
    NameMapping,
    Rule,
    hugging_face_shapes,
    layer_table,
    to_megatron,
)
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.shape import DraftShape
from dspark_megatron.storage.safetensors_folder import SafetensorsFolder
from dspark_megatron.storage.target_folder import shared_weights

FAMILIES = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen3_vl_text",
    "qwen3_vl_moe_text",
    "seed_oss",
)
"""Text models whose layers have the draft's mathematics under the draft's names. Others have such
names for something else: Gemma's norms add one to their weights, for example."""


class LayerSource(Protocol):
    """Weights of the target's decoder layers under Transformers' names for a bare decoder
    (`layers.3.self_attn.q_proj.weight`)."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None: there is no such tensor."""

    def part(self, name: str, dim: int | None, index: int, count: int) -> Tensor:
        """The index-th of `count` equal parts along dim; dim None: the whole tensor."""


class FolderLayers:
    """The layers of a folder in Hugging Face's layout, also of the text model inside another."""

    def __init__(self, target_dir: str | Path) -> None:
        self._folder = SafetensorsFolder(target_dir)
        embedding, _ = shared_weights(target_dir)
        self._prefix = embedding.removesuffix("embed_tokens.weight")

    def shape(self, name: str) -> tuple[int, ...] | None:
        name = self._prefix + name
        return self._folder.shape(name) if name in self._folder.files else None

    def part(self, name: str, dim: int | None, index: int, count: int) -> Tensor:
        return self._folder.part(self._prefix + name, dim, index, count)


@dataclass(frozen=True)
class LayerCopies:
    """What draft layers take over from a target's."""

    rows: list[NameMapping]
    """Megatron names of the draft, Hugging Face names of the target."""
    report: list[str]
    """Lines that say what is copied, and what is not and why."""


def layer_copies(
    source: LayerSource, ids: Sequence[int], shape: DraftShape, *, same_heads: Sequence[bool]
) -> LayerCopies:
    """For each draft layer the rows of its `ids` entry that fit. A row goes as a whole: keys with
    values, gate with up. same_heads: for each, whether both have the same numbers of heads and the
    same head width; else attention does not fit, though a shape may."""
    wanted = hugging_face_shapes(shape, shared_weights=False)
    rows: list[NameMapping] = []
    report: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, layer in enumerate(ids):
        known = {name for row in layer_table(shape) for name in row.of_layer(layer).hugging_face}
        for row in layer_table(shape):
            ours, theirs = row.of_layer(i).hugging_face, row.of_layer(layer).hugging_face
            shapes = [
                (source.shape(there), wanted[here])
                for there, here in zip(theirs, ours, strict=True)
            ]
            obstacle = _obstacle(shapes)
            if not obstacle and not same_heads[i] and "self_attn" in theirs[0]:
                obstacle = "not copied, other heads than the draft's"
            if not obstacle:
                rows.append(replace(row.of_layer(i), hugging_face=theirs))
            for name in theirs:
                report[obstacle or "copied"][_short(name)].append(i)
                bias = name.removesuffix("weight") + "bias"
                if bias not in known and source.shape(bias) is not None:
                    report["not copied, no place in the draft"][_short(bias)].append(i)
    lines = [_line(what, names, len(ids)) for what, names in report.items()]
    return LayerCopies(rows, lines)


@torch.no_grad()
def copy_layers(
    draft: DSparkDraftModel,
    rows: Iterable[NameMapping],
    source: LayerSource,
    *,
    tp_group: dist.ProcessGroup,
) -> None:
    """Fill the draft's parameters of these rows; each rank reads its own slices. No collective."""
    parameters = dict(draft.named_parameters())
    rank, size = tp_group.rank(), tp_group.size()
    for row in rows:
        get = partial(source.part, dim=row.split, index=rank, count=size)
        cut: dict[str, int] = {}
        if row.rule is Rule.KV_HEADS and draft.shape.num_key_value_heads < size:
            # A rank has a part of a head's keys and values together.
            get = partial(source.part, dim=None, index=0, count=1)
            cut = dict(tp_rank=rank, tp_size=size)
        for name, tensor in to_megatron(draft.shape, get, entries=[row], **cut):
            parameters[name].copy_(tensor)


def _obstacle(shapes: list[tuple[tuple[int, ...] | None, tuple[int, ...]]]) -> str:
    """Why tensors, by their shapes there and here, are not copied; empty: they are."""
    for there, here in shapes:
        if there is None:
            return "not copied, the target has none"
        if there != here:
            return f"not copied, {list(there)} there and {list(here)} here"
    return ""


def _short(name: str) -> str:
    return name.split(".", 2)[2].removesuffix(".weight")


def _line(what: str, names: dict[str, list[int]], num_layers: int) -> str:
    return f"  {what}: " + ", ".join(
        name if len(layers) == num_layers else f"{name} (draft layers {layers})"
        for name, layers in names.items()
    )
