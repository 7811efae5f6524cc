"""Decoder layers of a Megatron-LM checkpoint under the names of a Hugging Face folder."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dspark_megatron.storage.gpt_checkpoint import GPTCheckpoint

_STORED = {
    "input_layernorm.weight": (
        "self_attention.linear_qkv.layer_norm_weight",  # fused, as Megatron-Core saves both forms
        "input_layernorm.weight",
    ),
    "post_attention_layernorm.weight": (
        "mlp.linear_fc1.layer_norm_weight",
        "pre_mlp_layernorm.weight",
    ),
    "self_attn.o_proj.weight": ("self_attention.linear_proj.weight",),
    "self_attn.o_proj.bias": ("self_attention.linear_proj.bias",),
    "self_attn.q_norm.weight": ("self_attention.q_layernorm.weight",),
    "self_attn.k_norm.weight": ("self_attention.k_layernorm.weight",),
    "mlp.down_proj.weight": ("mlp.linear_fc2.weight",),
    "mlp.gate_proj.weight": ("mlp.linear_fc1.weight", "mlp.linear_fc1.weight_w"),
    "mlp.up_proj.weight": ("mlp.linear_fc1.weight", "mlp.linear_fc1.weight_v"),
}
"""What the tensors are called there, or lie in: gate above up, unless each has its own."""


class _Place(NamedTuple):
    """Where a layer's tensor is stored."""

    key: str
    stack: list[int]
    """Its number among stacked layers; empty where it has a name of its own."""
    shape: tuple[int, ...]


class CheckpointLayers:
    """Query, key and value are rows of one matrix there, query group by query group."""

    def __init__(self, checkpoint: GPTCheckpoint, text_config: Any) -> None:
        """text_config: the target's, whose heads are those of the checkpoint."""
        self._checkpoint, self._shapes = checkpoint, checkpoint.shapes
        heads = text_config.num_attention_heads
        self._groups = getattr(text_config, "num_key_value_heads", None) or heads
        self._queries = heads // self._groups

    def shape(self, name: str) -> tuple[int, ...] | None:
        layer, rest = _split(name)
        if runs := self._runs(rest):
            place = self._place(layer, _fused(rest))
            if place is None:
                return None
            return (len(runs) * self._groups * self._head_rows(place), *place.shape[1:])
        place = self._place(layer, *_STORED.get(rest, ()))
        if place is None or not place.key.endswith("linear_fc1.weight"):
            return place and place.shape
        return (place.shape[0] // 2, *place.shape[1:])

    def part(self, name: str, dim: int | None, index: int, count: int) -> Tensor:
        """Reads the rows that it returns; of query, key or value those of all three."""
        if dim is None:
            dim, index, count = 0, 0, 1
        layer, rest = _split(name)
        if runs := self._runs(rest):
            assert dim == 0, "heads are rows"
            return self._query_key_value(self._found(layer, _fused(rest)), runs, index, count)
        place, shape = self._found(layer, *_STORED[rest]), self.shape(name)
        assert shape is not None
        offsets, sizes = [0] * len(place.shape), list(shape)
        if rest == "mlp.up_proj.weight":
            offsets[0] = place.shape[0] - sizes[0]
        sizes[dim] //= count
        offsets[dim] += index * sizes[dim]
        return self._read(place, offsets, sizes)

    def _runs(self, rest: str) -> range:
        """Which heads of a query group a tensor has; none of other tensors."""
        n = self._queries
        runs = {"q_proj": range(n), "k_proj": range(n, n + 1), "v_proj": range(n + 1, n + 2)}
        return runs.get(rest.split(".")[1], range(0))

    def _head_rows(self, place: _Place) -> int:
        return place.shape[0] // (self._groups * (self._queries + 2))

    def _query_key_value(self, place: _Place, runs: range, index: int, count: int) -> Tensor:
        groups, width = self._groups // count, self._queries + 2
        rows = groups * width * self._head_rows(place)
        tail = place.shape[1:]
        block = self._read(place, [index * rows, *[0] * len(tail)], [rows, *tail])
        heads = block.view(groups, width, -1, *tail)
        return heads[:, runs.start : runs.stop].reshape(-1, *tail)

    def _found(self, layer: int, *names: str) -> _Place:
        place = self._place(layer, *names)
        assert place is not None, f"{names} of layer {layer} was not asked for by its shape"
        return place

    def _place(self, layer: int, *names: str) -> _Place | None:
        for name in names:
            own, stacked = f"decoder.layers.{layer}.{name}", f"decoder.layers.{name}"
            if own in self._shapes:
                return _Place(own, [], self._shapes[own])
            if stacked in self._shapes:
                return _Place(stacked, [layer], self._shapes[stacked][1:])
        return None

    def _read(self, place: _Place, offsets: list[int], sizes: list[int]) -> Tensor:
        stack = [1] * len(place.stack)
        found = self._checkpoint.part(place.key, [*place.stack, *offsets], [*stack, *sizes])
        return found.view(torch.Size(sizes))


def _split(name: str) -> tuple[int, str]:
    _, layer, rest = name.split(".", 2)
    return int(layer), rest


def _fused(rest: str) -> str:
    return f"self_attention.linear_qkv.{rest.rpartition('.')[2]}"
