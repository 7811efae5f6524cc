"""A GPTModel's weights from a Hugging Face folder: each rank reads its own slices, and only them.

The names of both sides stand in `_Table`. Query, key and value are one matrix in Megatron,
query group by query group: the group's queries, its key, its value. Its rows are cut evenly over
the tensor-parallel ranks, also through a group where there are more ranks than groups.
"""

import re
from typing import NamedTuple

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from dspark_megatron.errors import require
from dspark_megatron.storage.safetensors_folder import SafetensorsFolder
from dspark_megatron.targets.megatron.gpt_shape import GPTShape

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_COMPUTED = "rotary_emb.inv_freq"
"""Old folders of Llama have it beside the weights."""
_ALL = slice(None)


class Part(NamedTuple):
    """Rows, and columns of a matrix, of one tensor in the folder."""

    name: str
    rows: slice = _ALL
    columns: slice = _ALL


@torch.no_grad()
def load_hf_weights(model: GPTModel, shape: GPTShape, folder: SafetensorsFolder) -> None:
    """Fill this rank's part of the model. Raises ConfigError, before anything is read, for a folder
    that does not hold exactly the tensors of such a model. No collective."""
    _check_tensors(shape, folder)
    table = _Table(model, shape)
    for name, parameter in model.named_parameters():
        parts = [folder.block(*part) for part in table.parts(name)]
        whole = torch.cat(parts)
        missing = len(parameter) - len(whole)  # padding of the vocabulary
        if missing:
            whole = torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])])
        assert whole.shape == parameter.shape, f"{name}: {whole.shape}, wanted {parameter.shape}"
        parameter.copy_(whole)


class _Table:
    """Which slices of the folder each parameter of this rank is made of."""

    def __init__(self, model: GPTModel, shape: GPTShape) -> None:
        groups, self.shape = model.pg_collection, shape
        self.tp = groups.tp.rank(), groups.tp.size()
        self.first_layer = model.decoder.layers[0].layer_number - 1
        if shape.num_experts is not None:
            self.expert_tp = groups.expt_tp.rank(), groups.expt_tp.size()
            self.first_expert = groups.ep.rank() * shape.num_experts // groups.ep.size()

    def parts(self, name: str) -> list[Part]:
        """In the order of their rows."""
        if name == "embedding.word_embeddings.weight":
            return [self._vocabulary(EMBEDDING)]
        if name == "output_layer.weight":
            tied = self.shape.share_embeddings_and_output_weights
            return [self._vocabulary(EMBEDDING if tied else HEAD)]
        if name == "decoder.final_layernorm.weight":
            return [Part(NORM)]
        _, _, number, rest = name.split(".", 3)
        return self._layer(f"model.layers.{self.first_layer + int(number)}.", rest)

    def _layer(self, layer: str, name: str) -> list[Part]:
        attention, kind = f"{layer}self_attn.", name.rpartition(".")[2]
        if name in ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"):
            return [Part(f"{layer}input_layernorm.weight")]
        if name in ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"):
            return [Part(f"{layer}post_attention_layernorm.weight")]
        if name.startswith("self_attention.linear_qkv."):
            return self._query_key_value(attention, kind)
        if name == "self_attention.linear_proj.weight":
            width = self.shape.num_attention_heads * self.shape.kv_channels
            return [Part(f"{attention}o_proj.weight", columns=_share(width, self.tp))]
        if name in ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"):
            return [Part(f"{attention}{name[15]}_norm.weight")]
        if name == "mlp.router.weight":
            return [Part(f"{layer}mlp.gate.weight")]
        if expert := _expert_number(name):
            number = self.first_expert + int(expert)
            prefix, width = f"{layer}mlp.experts.{number}.", self.shape.moe_ffn_hidden_size
            return _mlp(prefix, name, _share(width, self.expert_tp))
        return _mlp(f"{layer}mlp.", name, _share(self.shape.ffn_hidden_size, self.tp))

    def _vocabulary(self, name: str) -> Part:
        rank, size = self.tp
        rows = -(-self.shape.vocab_size // size)
        return Part(name, slice(rank * rows, min((rank + 1) * rows, self.shape.vocab_size)))

    def _query_key_value(self, attention: str, kind: str) -> list[Part]:
        """The rows of this rank's share, as runs of query, key and value rows."""
        shape, parts = self.shape, []
        queries = shape.num_attention_heads // shape.num_query_groups * shape.kv_channels
        runs = {"q": queries, "k": shape.kv_channels, "v": shape.kv_channels}
        own = _share(sum(runs.values()) * shape.num_query_groups, self.tp)
        start = 0  # of the run, in the whole matrix
        for group in range(shape.num_query_groups):
            for letter, length in runs.items():
                first, last = max(own.start, start), min(own.stop, start + length)
                if first < last:
                    offset = group * length - start
                    rows = slice(first + offset, last + offset)
                    parts.append(Part(f"{attention}{letter}_proj.{kind}", rows))
                start += length
        return parts


def _mlp(prefix: str, name: str, share: slice) -> list[Part]:
    if "linear_fc1" in name:
        return [Part(f"{prefix}{half}_proj.weight", share) for half in ("gate", "up")]
    assert "linear_fc2" in name, f"no tensor is known for {name}"
    return [Part(f"{prefix}down_proj.weight", columns=share)]


def _expert_number(name: str) -> str | None:
    """Of Megatron's own experts, and of Transformer Engine's, which are one module."""
    found = re.fullmatch(r"mlp\.experts\.(?:local_experts\.(\d+)\.)?linear_fc\d\.weight(\d*)", name)
    return found and (found[1] or found[2])


def _share(total: int, place: tuple[int, int]) -> slice:
    rank, size = place
    return slice(rank * total // size, (rank + 1) * total // size)


def hf_tensors(shape: GPTShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model's Hugging Face folder and its shape."""
    h, d = shape.hidden_size, shape.kv_channels
    vocabulary = (shape.vocab_size, h)
    tensors: dict[str, tuple[int, ...]] = {EMBEDDING: vocabulary, NORM: (h,)}
    if not shape.share_embeddings_and_output_weights:
        tensors[HEAD] = vocabulary
    rows = {"q": shape.num_attention_heads * d, "k": shape.num_query_groups * d}
    rows["v"] = rows["k"]
    for number in range(shape.num_layers):
        layer = f"model.layers.{number}."
        attention = f"{layer}self_attn."
        tensors[f"{layer}input_layernorm.weight"] = (h,)
        tensors[f"{layer}post_attention_layernorm.weight"] = (h,)
        for letter, size in rows.items():
            tensors[f"{attention}{letter}_proj.weight"] = (size, h)
            if shape.add_qkv_bias:
                tensors[f"{attention}{letter}_proj.bias"] = (size,)
        tensors[f"{attention}o_proj.weight"] = (h, rows["q"])
        if shape.qk_layernorm:
            tensors |= {f"{attention}{letter}_norm.weight": (d,) for letter in "qk"}
        if shape.num_experts is not None and shape.has_experts(number):
            tensors[f"{layer}mlp.gate.weight"] = (shape.num_experts, h)
            for expert in range(shape.num_experts):
                prefix = f"{layer}mlp.experts.{expert}."
                tensors |= _mlp_shapes(prefix, h, shape.moe_ffn_hidden_size)
        else:
            tensors |= _mlp_shapes(f"{layer}mlp.", h, shape.ffn_hidden_size)
    return tensors


def _mlp_shapes(prefix: str, h: int, width: int) -> dict[str, tuple[int, ...]]:
    wide = {f"{prefix}{half}_proj.weight": (width, h) for half in ("gate", "up")}
    return {**wide, f"{prefix}down_proj.weight": (h, width)}


def _check_tensors(shape: GPTShape, folder: SafetensorsFolder) -> None:
    wanted = hf_tensors(shape)
    found = {n: size for n, size in folder.shapes.items() if not n.endswith(_COMPUTED)}
    problems = [f"lacks {name}" for name in wanted.keys() - found.keys()]
    problems += [f"has an unknown {name}" for name in found.keys() - wanted.keys()]
    problems += [
        f"has {name} as {found[name]} instead of {wanted[name]}"
        for name in wanted.keys() & found.keys()
        if found[name] != wanted[name]
    ]
    problems += [
        f"has {name} in the quantized type {dtype}"
        for name, dtype in folder.dtypes.items()
        if not dtype.is_floating_point or dtype.itemsize < 2
    ]
    shown = "; ".join(sorted(problems)[:4]) + ("; ..." if len(problems) > 4 else "")
    require(
        not problems,
        f"{folder.path} is not what target.provider megatron reads: it {shown}; set "
        "target.provider=huggingface, or save the target with Transformers' save_pretrained",
    )
