"""The name table between Megatron checkpoints and the Hugging Face layout, as data.

Megatron fuses what it splits together; the Hugging Face layout holds every matrix on its own and no
vocabulary padding. Layer names carry `{i}`, the draft layer. `table.py` has what other layouts call
the same.

Shapes: h hidden, g key/value heads, d head width, v vocabulary, r Markov rank.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from dspark_megatron.errors import ConfigError
from dspark_megatron.shape import DraftShape


class Rule(Enum):
    """How one Megatron tensor becomes its Hugging Face tensors."""

    COPY = "the same tensor"
    STACK = "matrices one after the other, on dimension 0"
    KV_HEADS = "for each key/value head its key rows, then its value rows"
    VOCAB = "the same rows, then padding up to a multiple of the tensor-parallel size"


@dataclass(frozen=True)
class NameMapping:
    """A Megatron tensor and the Hugging Face tensors that it holds."""

    megatron: str
    hugging_face: tuple[str, ...]
    split: int | None
    """Dimension that tensor-parallel ranks split; None: every rank holds it whole."""
    rule: Rule = Rule.COPY

    def of_layer(self, i: int) -> "NameMapping":
        names = tuple(name.format(i=i) for name in self.hugging_face)
        return dataclasses.replace(self, megatron=self.megatron.format(i=i), hugging_face=names)


BACKBONE = (
    NameMapping("fc.weight", ("fc.weight",), 0),
    NameMapping("hidden_norm.weight", ("hidden_norm.weight",), None),
    NameMapping("final_layernorm.weight", ("norm.weight",), None),
)
_LAYER = (
    ("input_layernorm", ("input_layernorm",), None),
    ("self_attention.linear_q", ("self_attn.q_proj",), 0),
    ("self_attention.linear_kv", ("self_attn.k_proj", "self_attn.v_proj"), 0, Rule.KV_HEADS),
    ("self_attention.linear_proj", ("self_attn.o_proj",), 1),
    ("self_attention.q_layernorm", ("self_attn.q_norm",), None),
    ("self_attention.k_layernorm", ("self_attn.k_norm",), None),
    ("pre_mlp_layernorm", ("post_attention_layernorm",), None),
    ("mlp.linear_fc1", ("mlp.gate_proj", "mlp.up_proj"), 0, Rule.STACK),
    ("mlp.linear_fc2", ("mlp.down_proj",), 1),
)
_SHARED_KEYS = ("self_attention.linear_kv", ("self_attn.k_proj",), 0)
"""In place of keys and values, where values are the keys."""
_GEMMA4 = (
    ("post_self_attn_layernorm", ("post_attention_layernorm",), None),
    ("pre_mlp_layernorm", ("pre_feedforward_layernorm",), None),
    ("post_mlp_layernorm", ("post_feedforward_layernorm",), None),
)
"""In place of the norm between attention and MLP."""
LAYER_SCALAR = NameMapping("layers.{i}.layer_scalar.value", ("layers.{i}.layer_scalar",), None)
SINK = NameMapping(
    "layers.{i}.self_attention.attention_sink_bias",
    ("layers.{i}.self_attn.attention_sink_bias",),
    0,
)


def _same(*names: str, split: int | None = None, rule: Rule = Rule.COPY) -> tuple[NameMapping, ...]:
    return tuple(NameMapping(name, (name,), split, rule) for name in names)


def _linear(name: str) -> tuple[NameMapping, ...]:
    return _same(f"{name}.weight", f"{name}.bias")


MARKOV = _same(
    "markov_head.markov_w1.weight", "markov_head.markov_w2.weight", split=0, rule=Rule.VOCAB
)
LATENT = {
    "vanilla": (),
    "gated": _linear("markov_head.gate_proj"),
    "rnn": _linear("markov_head.joint_proj"),
}
CONFIDENCE = _linear("confidence_head.proj")
EMBEDDING, LM_HEAD = "embed_tokens.weight", "lm_head.weight"
"""The target's own matrices: in exports, never in training checkpoints."""


def layer_table(shape: DraftShape) -> list[NameMapping]:
    """Of a layer, with `{i}` for its number."""
    attention, gemma = shape.attention, shape.architecture == "gemma4"
    table = []
    for row in _LAYER:
        if shape.shared_key_value and row[0] == _SHARED_KEYS[0]:
            row = _SHARED_KEYS
        replaced = _GEMMA4 if gemma and row[0] == "pre_mlp_layernorm" else (row,)
        table += [_layer_entry(*own) for own in replaced]
    if attention.biases:
        table += [_bias(entry) for entry in table if "self_attention.linear" in entry.megatron]
    return [*table, *((SINK,) if attention.sink else ()), *((LAYER_SCALAR,) if gemma else ())]


def _layer_entry(megatron: str, hugging_face: tuple[str, ...], *rest: Any) -> NameMapping:
    names = tuple(f"layers.{{i}}.{name}.weight" for name in hugging_face)
    return NameMapping(f"layers.{{i}}.{megatron}.weight", names, *rest)


def _bias(entry: NameMapping) -> NameMapping:
    """Of a linear of attention."""
    return dataclasses.replace(
        entry,
        megatron=entry.megatron.replace(".weight", ".bias"),
        hugging_face=tuple(name.replace(".weight", ".bias") for name in entry.hugging_face),
        split=None if "linear_proj" in entry.megatron else 0,
    )


def name_table(shape: DraftShape) -> list[NameMapping]:
    """Of one draft, in the order of its export."""
    table = list(BACKBONE)
    for i in range(shape.num_layers):
        table += [entry.of_layer(i) for entry in layer_table(shape)]
    if shape.markov_rank:
        table += [*MARKOV, *LATENT[shape.markov_head_type]]
    if shape.enable_confidence_head:
        table += CONFIDENCE
    return table


def to_hugging_face(
    shape: DraftShape, get: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Every draft tensor under its Hugging Face name. `get` is asked for each Megatron tensor
    once, when it is needed, so one of them exists at a time."""
    for entry in name_table(shape):
        yield from zip(entry.hugging_face, _split(get(entry.megatron), entry, shape), strict=True)


def to_megatron(
    shape: DraftShape,
    get: Callable[[str], Tensor],
    padded_vocab_size: int | None = None,
    *,
    entries: Iterable[NameMapping] | None = None,
    tp_rank: int = 0,
    tp_size: int = 1,
) -> Iterator[tuple[str, Tensor]]:
    """The way back, cut to one tensor-parallel rank; the vocabulary is padded with zero rows up to
    `padded_vocab_size` (None: not at all). entries: those wanted; None: all."""
    padding = (padded_vocab_size or shape.vocab_size) - shape.vocab_size
    for entry in name_table(shape) if entries is None else entries:
        parts = []
        for name in entry.hugging_face:
            part = get(name)
            if entry.rule is Rule.VOCAB and padding:
                part = torch.cat([part, part.new_zeros(padding, part.shape[1])])
            # Where ranks share a key/value head, each has a part of its keys and values together.
            if entry.split is not None and entry.rule is not Rule.KV_HEADS:
                part = part.chunk(tp_size, dim=entry.split)[tp_rank]
            parts.append(part)
        joined = _join(parts, entry, shape)
        if entry.rule is Rule.KV_HEADS:
            joined = joined.chunk(tp_size)[tp_rank]
        yield entry.megatron, joined


def hugging_face_shapes(
    shape: DraftShape, shared_weights: bool = True
) -> dict[str, tuple[int, ...]]:
    """The exact tensors of an export and their shapes, in the order they are written."""
    trained = {
        name: _shape_of(name, shape) for entry in name_table(shape) for name in entry.hugging_face
    }
    if not shared_weights:
        return trained
    matrix = (shape.vocab_size, shape.hidden_size)
    return {EMBEDDING: matrix, **trained, LM_HEAD: matrix}


def megatron_shapes(
    shape: DraftShape, padded_vocab_size: int | None = None
) -> dict[str, tuple[int, ...]]:
    """The exact tensors of a training checkpoint and their global shapes."""
    shapes = {}
    for entry in name_table(shape):
        parts = [_shape_of(name, shape) for name in entry.hugging_face]
        rows = sum(part[0] for part in parts)
        if entry.rule is Rule.VOCAB:
            rows = padded_vocab_size or shape.vocab_size
        shapes[entry.megatron] = (rows, *parts[0][1:])
    return shapes


def check_megatron_tensors(
    shape: DraftShape, found: dict[str, tuple[int, ...]], where: str
) -> None:
    """Raise ConfigError that lists what a checkpoint lacks, has too much or has in another shape.
    The vocabulary may be padded, by the same number of rows everywhere."""
    padded = found.get(MARKOV[0].megatron, (0,))[0]
    expected = megatron_shapes(shape, max(padded, shape.vocab_size))
    raise_if_any(compare_tensors(expected, found), where)


def compare_tensors(
    expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]
) -> list[str]:
    """One line for every tensor that is missing, unexpected or of another shape."""
    missing = [f"missing {name} {list(expected[name])}" for name in expected if name not in found]
    extra = [f"unexpected {name} {list(found[name])}" for name in found if name not in expected]
    wrong = [
        f"{name} must have shape {list(expected[name])}, has {list(found[name])}"
        for name in expected
        if name in found and tuple(found[name]) != expected[name]
    ]
    return missing + extra + wrong


def raise_if_any(problems: list[str], where: str) -> None:
    """Raise ConfigError with every problem on a line of its own."""
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ConfigError(f"{where} has {len(problems)} problem(s):{lines}")


def _split(tensor: Tensor, entry: NameMapping, shape: DraftShape) -> list[Tensor]:
    if entry.rule is Rule.STACK:
        return list(tensor.chunk(len(entry.hugging_face)))
    if entry.rule is Rule.KV_HEADS:
        heads = tensor.unflatten(0, (-1, 2, shape.head_dim))  # [g, 2, d, h]
        return [heads[:, 0].flatten(0, 1), heads[:, 1].flatten(0, 1)]
    if entry.rule is Rule.VOCAB:
        return [tensor[: shape.vocab_size]]
    return [tensor]


def _join(parts: list[Tensor], entry: NameMapping, shape: DraftShape) -> Tensor:
    if entry.rule is Rule.STACK:
        return torch.cat(parts)
    if entry.rule is Rule.KV_HEADS:
        heads = [part.unflatten(0, (-1, shape.head_dim)) for part in parts]  # [g, d, h] each
        return torch.stack(heads, dim=1).flatten(0, 2)  # [g*2*d, h]
    return parts[0]


def _shape_of(name: str, shape: DraftShape) -> tuple[int, ...]:
    """Shape of a trained tensor by its Hugging Face name without the layer."""
    h, f, d = shape.hidden_size, shape.ffn_hidden_size, shape.head_dim
    q, kv = shape.num_attention_heads * d, shape.num_key_value_heads * d
    v, r = shape.vocab_size, shape.markov_rank
    confidence = h + (r if shape.confidence_head_with_markov else 0)
    return {
        "fc.weight": (h, len(shape.target_layer_ids) * h),
        "hidden_norm.weight": (h,),
        "norm.weight": (h,),
        "input_layernorm.weight": (h,),
        "post_attention_layernorm.weight": (h,),
        "pre_feedforward_layernorm.weight": (h,),
        "post_feedforward_layernorm.weight": (h,),
        "layer_scalar": (1,),
        "self_attn.q_proj.weight": (q, h),
        "self_attn.k_proj.weight": (kv, h),
        "self_attn.v_proj.weight": (kv, h),
        "self_attn.o_proj.weight": (h, q),
        "self_attn.q_proj.bias": (q,),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.bias": (h,),
        "self_attn.attention_sink_bias": (shape.num_attention_heads,),
        "self_attn.q_norm.weight": (d,),
        "self_attn.k_norm.weight": (d,),
        "mlp.gate_proj.weight": (f, h),
        "mlp.up_proj.weight": (f, h),
        "mlp.down_proj.weight": (h, f),
        "markov_head.markov_w1.weight": (v, r),
        "markov_head.markov_w2.weight": (v, r),
        "markov_head.gate_proj.weight": (r, h + r),
        "markov_head.gate_proj.bias": (r,),
        "markov_head.joint_proj.weight": (3 * r, h + 2 * r),
        "markov_head.joint_proj.bias": (3 * r,),
        "confidence_head.proj.weight": (1, confidence),
        "confidence_head.proj.bias": (1,),
    }[re.sub(r"^layers\.\d+\.", "", name)]
