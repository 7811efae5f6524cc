"""Megatron's tensors under Hugging Face's names: one for one, fused, padded, in every layout."""

from dataclasses import replace

import torch

from dspark_megatron.conversion.layouts import names
from dspark_megatron.conversion.layouts.names import hugging_face_shapes
from dspark_megatron.conversion.layouts.table import LAYOUTS
from dspark_megatron.shape.attention import DraftAttention
from support.draft_folders import PADDED_VOCAB, trained_tensors
from support.reference import PlainDraft
from support.shapes import FOLDER_SHAPES, VANILLA

BIASED = replace(VANILLA, attention=DraftAttention(sink=True, biases=True))


def test_sinks_and_biases_go_there_and_back():
    test_round_trip_is_bit_exact(BIASED)
    test_table_uses_every_plain_parameter_once(BIASED)
    ours = trained_tensors(BIASED)
    megatron = dict(names.to_megatron(BIASED, ours.__getitem__, tp_rank=1, tp_size=2))
    key, value = (ours[f"layers.1.self_attn.{x}_proj.bias"] for x in "kv")
    fused = megatron["layers.1.self_attention.linear_kv.bias"]
    assert torch.equal(fused, torch.cat([key[6:], value[6:]]))
    sink = ours["layers.0.self_attn.attention_sink_bias"]
    assert torch.equal(megatron["layers.0.self_attention.attention_sink_bias"], sink[2:])
    out = ours["layers.0.self_attn.o_proj.bias"]
    assert torch.equal(megatron["layers.0.self_attention.linear_proj.bias"], out)


def test_round_trip_is_bit_exact(shape):
    ours = trained_tensors(shape)
    megatron = dict(names.to_megatron(shape, ours.__getitem__, PADDED_VOCAB))
    names.check_megatron_tensors(shape, {n: tuple(t.shape) for n, t in megatron.items()}, "it")
    back = dict(names.to_hugging_face(shape, megatron.__getitem__))
    assert list(back) == list(ours)
    assert all(torch.equal(back[name], ours[name]) for name in ours)


def test_table_uses_every_plain_parameter_once(shape):
    plain = {name: tuple(p.shape) for name, p in PlainDraft(shape).named_parameters()}
    assert names.hugging_face_shapes(shape) == plain
    asked = []
    padded = names.megatron_shapes(shape, PADDED_VOCAB)
    for _ in names.to_hugging_face(shape, lambda n: asked.append(n) or torch.zeros(padded[n])):
        pass
    assert sorted(asked) == sorted(padded) and len(set(asked)) == len(asked)


def test_fused_tensors_by_hand():
    ours = trained_tensors(VANILLA)
    megatron = dict(names.to_megatron(VANILLA, ours.__getitem__, PADDED_VOCAB))
    kv = megatron["layers.1.self_attention.linear_kv.weight"]
    key, value = (ours[f"layers.1.self_attn.{x}_proj.weight"] for x in "kv")
    assert torch.equal(kv, torch.cat([key[:6], value[:6], key[6:], value[6:]]))
    gate, up = (ours[f"layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    assert torch.equal(megatron["layers.0.mlp.linear_fc1.weight"], torch.cat([gate, up]))


def test_vocabulary_padding_is_added_and_stripped():
    ours = trained_tensors(VANILLA)
    megatron = dict(names.to_megatron(VANILLA, ours.__getitem__, PADDED_VOCAB))
    for name in ("markov_head.markov_w1.weight", "markov_head.markov_w2.weight"):
        assert megatron[name].shape == (PADDED_VOCAB, 5) and not megatron[name][33:].any()
        megatron[name][33:] = torch.nan
    back = dict(names.to_hugging_face(VANILLA, megatron.__getitem__))
    assert all(tensor.isfinite().all() for tensor in back.values())


def test_every_layout_has_each_tensor_once():
    for shape in FOLDER_SHAPES.values():
        names = hugging_face_shapes(shape)
        for layout in LAYOUTS.values():
            theirs = [layout.to_name(name) for name in names]
            assert len(set(theirs)) == len(names)
            assert [layout.from_name(name) for name in theirs] == list(names)
