"""What each engine would say to a folder: all layouts, and every trap that fails in silence."""

import copy
import dataclasses

import pytest
import torch
from transformers import Qwen3Config

from dspark_megatron.conversion.engines.table import ALL as EVERYONE
from dspark_megatron.conversion.engines.table import (
    DEEPSPEC,
    LLAMA,
    MLX,
    MLX_VLM,
    MODELOPT,
    ONNX,
    SGLANG,
    TRT,
    VLLM,
)
from dspark_megatron.conversion.engines.verdicts import engine_verdicts
from dspark_megatron.conversion.layouts.gemma4_config import gemma4_config
from dspark_megatron.conversion.layouts.hf_config import DraftDescription, hugging_face_config
from dspark_megatron.conversion.layouts.names import EMBEDDING, LM_HEAD, hugging_face_shapes
from support.shapes import VANILLA

ALL = set(EVERYONE)
TARGET = Qwen3Config(
    vocab_size=33,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=1,
    eos_token_id=2,
)
BACKBONE = {
    "vocab_size": 33,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "layer_types": ["full_attention"] * 3,
    "sliding_window": None,
}
RAW_MODELOPT = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    **BACKBONE,
    "block_size": 3,
    "num_target_layers": 6,
    "dflash_config": {
        "mask_token_id": 32,
        "target_layer_ids": [0, 2, 4],
        "projector_type": "dspark",
        "shift_label": True,
        "markov_rank": 5,
        "markov_head_type": "vanilla",
        "use_confidence_head": True,
    },
}
FLAT_NAMES = {
    "markov_head.markov_w1": "markov_w1",
    "markov_head.markov_w2": "markov_w2",
    "confidence_head.proj": "confidence_proj",
}
RAW_SPECFORGE = {
    "architectures": ["DSparkDraftModel"],
    "model_type": "qwen3",
    "auto_map": {"AutoModel": "dspark.DSparkDraftModel"},
    **BACKBONE,
    "block_size": 3,
    "num_target_layers": 6,
    "dflash_config": {
        "attention_mode": "gqa",
        "mask_token_id": 32,
        "target_layer_ids": [0, 2, 4],
        "projector_type": "dspark",
        "markov_rank": 5,
        "markov_head_type": "vanilla",
        "confidence_head_alpha": 1.0,
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    },
}
SPECULATORS = {
    "architectures": ["DSparkDraftModel"],
    "auto_map": {"": "config.DSparkSpeculatorConfig"},
    "speculators_model_type": "dspark",
    "speculators_version": "0.9.0",
    "aux_hidden_state_layer_ids": [1, 3, 5],
    "block_size": 3,
    "draft_vocab_size": 33,
    "mask_token_id": 32,
    "sample_from_anchor": True,
    "sliding_window_non_causal": False,
    "markov_rank": 5,
    "markov_head_type": "vanilla",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
    "target_hidden_size": 16,
    "tie_word_embeddings": False,
    "transformer_layer_config": {"model_type": "qwen3", **BACKBONE},
    "speculators_config": {
        "algorithm": "dspark",
        "default_proposal_method": "greedy",
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
        "verifier": {"name_or_path": "Qwen/Qwen3-4B", "architectures": ["Qwen3ForCausalLM"]},
    },
}


def superset(**changes):
    """Our own config.json and tensors; changes: fields of the shape."""
    shape = dataclasses.replace(VANILLA, **{"num_layers": 3, **changes})
    config = hugging_face_config(
        DraftDescription(shape=shape), target_config=TARGET, dtype=torch.bfloat16
    )
    return copy.deepcopy(config), hugging_face_shapes(shape)


def trained(renames=None, **changes):
    """Tensors without the target's two matrices."""
    shapes = hugging_face_shapes(
        dataclasses.replace(VANILLA, **{"num_layers": 3, **changes}), shared_weights=False
    )
    for old, new in (renames or {}).items():
        shapes = {name.replace(old, new): size for name, size in shapes.items()}
    return shapes


def verdicts(config, tensors, **options):
    return {v.engine: v for v in engine_verdicts(config, tensors, **options)}


def refusing(config, tensors, **options):
    return {name for name, v in verdicts(config, tensors, **options).items() if not v.loads}


# Whole folders.


def test_our_export_loads_everywhere_without_a_remark_but_for_its_lm_head_and_an_onnx_target():
    found = verdicts(*superset(), folder_name="dspark_qwen3", target_config=TARGET)
    assert set(found) == ALL
    assert found[MLX_VLM].problems == ("raises on lm_head.weight; export with --no-shared-weights",)
    assert found[ONNX].warnings == ("builds drafts for Qwen3.5 targets only, this is qwen3",)
    for verdict in found.values():
        assert verdict.loads or verdict.engine == MLX_VLM, verdict
        assert not verdict.warnings or verdict.engine == ONNX, verdict


def test_without_shared_weights_deepspec_alone_refuses():
    config, tensors = superset()
    bare = {n: s for n, s in tensors.items() if n not in (EMBEDDING, LM_HEAD)}
    found = verdicts(config, bare, target_config=TARGET)
    assert {name for name, v in found.items() if not v.loads} == {DEEPSPEC}
    assert len(found[DEEPSPEC].problems) == 1
    assert "fills embed_tokens.weight, lm_head.weight at random" in found[DEEPSPEC].problems[0]


@pytest.mark.parametrize("kind", ["gated", "rnn"])
def test_latent_heads_are_for_deepspec_modelopt_and_sglang(kind):
    config, tensors = superset(markov_head_type=kind)
    del tensors[LM_HEAD]
    found = verdicts(config, tensors)
    refused = {name for name, v in found.items() if not v.loads}
    assert refused == ALL - {MODELOPT, SGLANG}
    for name in refused - {DEEPSPEC}:
        assert kind in found[name].problems[0]
    assert "without an error" in found[ONNX].problems[0]


def test_a_latent_head_is_seen_by_its_tensors_alone():
    config, tensors = superset(markov_head_type="rnn")
    for place in (config, config["dflash_config"]):
        place["markov_head_type"] = "vanilla"
    assert {VLLM, MLX, MLX_VLM, LLAMA, TRT, ONNX} <= refusing(config, tensors)


def test_rank_zero_is_for_deepspec_vllm_tensorrt_and_mlx_dspark():
    found = verdicts(*superset(markov_rank=0, confidence_head_with_markov=False))
    assert {name for name, v in found.items() if v.loads} == {DEEPSPEC, VLLM, TRT, MLX}
    assert "then fails to load" in found[LLAMA].problems[0]
    assert "markov_rank" in found[VLLM].warnings[0]


@pytest.mark.parametrize(
    "changes, refused",
    [
        ({"confidence_head_with_markov": False}, {MODELOPT, LLAMA}),
        ({"enable_confidence_head": False, "confidence_head_with_markov": False}, set()),
        ({"num_key_value_heads": 4}, set()),
        ({"num_layers": 2}, {MODELOPT}),
    ],
)
def test_other_shapes(changes, refused):
    found = refusing(*superset(**changes), target_config=TARGET)
    assert found == refused | {MLX_VLM}  # for the LM head


def test_raw_modelopt_loads_in_modelopt_and_tensorrt_only():
    found = verdicts(RAW_MODELOPT, trained(FLAT_NAMES))
    assert {name for name, v in found.items() if v.loads} == {MODELOPT, TRT}
    assert any("markov_rank at the top level" in line for line in found[VLLM].problems)
    assert any("DeepSeek-V4" in line for line in found[VLLM].problems)
    assert any("without an error" in line for line in found[SGLANG].problems)
    assert any("markov_head.markov_w1.weight" in line for line in found[SGLANG].problems)


def test_modelopt_with_a_corrected_config_still_has_flat_names():
    config, _ = superset()
    found = verdicts(config, trained(FLAT_NAMES))
    assert {name for name, v in found.items() if v.loads} == {MODELOPT, TRT}
    # The worst case: no error, and a Markov head that was never filled.
    assert any("leaves markov_head.markov_w1.weight" in line for line in found[SGLANG].problems)


def test_raw_specforge_gives_its_heads_to_those_that_look_into_dflash_config():
    found = verdicts(RAW_SPECFORGE, trained())
    assert {name for name, v in found.items() if v.loads} == {MODELOPT, TRT, MLX_VLM, LLAMA}
    assert found[ONNX].problems == ("needs rope_parameters in config.json",)
    for name in (VLLM, SGLANG):
        assert "needs markov_rank at the top level" in found[name].problems[0]
    assert found[MLX].problems[0].endswith("[33, 256], found [33, 5]")


@pytest.mark.parametrize(
    "nested, shape, loads",
    [
        ({"markov_rank": 256}, {"markov_rank": 256}, True),
        ({"markov_rank": 256, "enable_confidence_head": False}, {"markov_rank": 256}, False),
        ({"markov_rank": 256, "confidence_head_with_markov": False}, {"markov_rank": 256}, False),
    ],
)
def test_mlx_dspark_takes_only_ids_and_mask_out_of_dflash_config(nested, shape, loads):
    changes = {k: v for k, v in nested.items() if k != "markov_rank"}
    config = copy.deepcopy(RAW_SPECFORGE)
    config["dflash_config"].update(nested)
    if changes.get("enable_confidence_head") is False:
        changes["confidence_head_with_markov"] = False
    assert (MLX not in refusing(config, trained(**shape, **changes))) == loads


def test_normalized_specforge_loads_in_all_that_share_weights():
    config = {
        **RAW_SPECFORGE,
        **RAW_SPECFORGE["dflash_config"],
        "architectures": ["Qwen3DSparkModel"],
    }
    config.pop("auto_map")
    assert refusing(config, trained()) == {DEEPSPEC, ONNX}  # ONNX for the older RoPE keys


def test_superset_under_specforges_class():
    config, tensors = superset()
    config["architectures"] = ["DSparkDraftModel"]
    found = verdicts(config, tensors)
    assert {name for name, v in found.items() if not v.loads} == {DEEPSPEC, MLX_VLM}
    assert "#52197" in found[VLLM].warnings[0] and not found[SGLANG].warnings


def test_speculators_loads_in_vllm_and_gives_modelopt_its_weights():
    found = verdicts(SPECULATORS, trained(), target_config=TARGET)
    assert {name for name, v in found.items() if v.loads} == {VLLM, MODELOPT}
    assert not found[VLLM].warnings
    assert len(found[MLX].problems) == 1 and "one layer late" in found[MLX].problems[0]
    for name in (DEEPSPEC, SGLANG, TRT):
        assert "speculators" in found[name].problems[0] and "--layout hf" in found[name].problems[0]


def test_speculators_with_a_model_type_is_no_longer_read():
    found = verdicts({**SPECULATORS, "model_type": "qwen3"}, trained())
    assert all(not v.loads for v in found.values())
    for name in (VLLM, MLX):
        assert any("model_type exclude each other" in line for line in found[name].problems)


def test_reduced_vocabulary_of_speculators():
    config = {**SPECULATORS, "draft_vocab_size": 20}
    tensors = trained() | {"markov_head.markov_w2.weight": (20, 5), "d2t": (20,), "t2d": (33,)}
    tensors["lm_head.weight"] = (20, 16)
    assert VLLM not in refusing(config, tensors, target_config=TARGET)
    for lost in ("d2t", "lm_head.weight"):
        rest = {name: size for name, size in tensors.items() if name != lost}
        assert "lm_head and d2t" in verdicts(config, rest)[VLLM].problems[0]


def test_reduced_vocabulary_in_our_layout():
    config, tensors = superset()
    config["draft_vocab_size"] = 20
    tensors |= {"markov_head.markov_w2.weight": (20, 5), "lm_head.weight": (20, 16)}
    tensors |= {"d2t": (20,), "t2d": (33,)}
    assert refusing(config, tensors) == ALL - {VLLM, MLX, LLAMA}


# Traps: one change to our own export, and the engines that it turns, each with words of its line.


def set_keys(**keys):
    return lambda config, tensors: config.update(keys)


def set_both(**keys):
    """Keys that stand twice."""

    def change(config, tensors):
        config.update(keys)
        config["dflash_config"].update(keys)

    return change


def set_nested(**keys):
    return lambda config, tensors: config["dflash_config"].update(keys)


def set_rope(**keys):
    return lambda config, tensors: config["rope_parameters"].update(keys)


def drop_keys(*keys):
    return lambda config, tensors: [config.pop(key) for key in keys]


def drop_both(*keys):
    return lambda config, tensors: [place.pop(x) for x in keys for place in places(config)]


def places(config):
    return config, config["dflash_config"]


def set_tensors(**sizes):
    return lambda config, tensors: tensors.update(
        {k.replace("__", "."): v for k, v in sizes.items()}
    )


def drop_tensors(*names):
    return lambda config, tensors: [tensors.pop(name) for name in names]


def rename(old, new):
    def change(config, tensors):
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[new + name.removeprefix(old)] = tensors.pop(name)

    return change


def all_of(*changes):
    return lambda config, tensors: [change(config, tensors) for change in changes]


SLIDING = set_keys(
    layer_types=["sliding_attention"] * 3, sliding_window=64, use_sliding_window=True
)
STRICT = {MODELOPT, VLLM, MLX, MLX_VLM, LLAMA}
"""Raise on a tensor that they do not know."""
LOOSE = ALL - STRICT - {SGLANG}
NO_WINDOW = "reads no window; trained with all layers of 64 positions"
TRAPS = {
    # Names and tensors.
    "unknown name": (
        set_tensors(extra__weight=(1,)),
        dict.fromkeys(STRICT, "raises on extra") | dict.fromkeys(LOOSE | {SGLANG}, "in silence"),
    ),
    "logit_head": (
        all_of(
            rename("markov_head.", "logit_head.markov_head."),
            rename("confidence_head.", "logit_head.confidence_head."),
        ),
        dict.fromkeys(STRICT | {ONNX}, "raises on the names logit_head.")
        | {DEEPSPEC: "at random", SGLANG: "leaves markov_head.markov_w1.weight"}
        | {TRT: "passes over the names logit_head."},
    ),
    "confidence bias": (
        drop_tensors("confidence_head.proj.bias"),
        {VLLM: "leaves confidence_head.proj.bias uninitialised", DEEPSPEC: "at random"}
        | dict.fromkeys({MLX, MLX_VLM, LLAMA}, "needs confidence_head.proj.bias")
        | {MODELOPT: "lacks confidence_head.proj.bias"},
    ),
    "padded heads": (
        set_tensors(markov_head__markov_w1__weight=(36, 5), markov_head__markov_w2__weight=(36, 5)),
        dict.fromkeys(ALL, "strip the padding"),
    ),
    "padded lm_head": (
        set_tensors(lm_head__weight=(36, 16)),
        dict.fromkeys({DEEPSPEC, VLLM, MLX}, "strip the padding"),
    ),
    "padded config": (
        all_of(
            set_keys(vocab_size=36),
            set_tensors(
                embed_tokens__weight=(36, 16),
                lm_head__weight=(36, 16),
                markov_head__markov_w1__weight=(36, 5),
                markov_head__markov_w2__weight=(36, 5),
            ),
        ),
        {VLLM: "d2t"} | dict.fromkeys({SGLANG, MLX_VLM, ONNX}, "36, the target has 33"),
    ),
    "model. prefix": (
        rename("", "model."),
        dict.fromkeys({VLLM, MLX, MODELOPT, ONNX}, "raises on the names model.")
        | dict.fromkeys({SGLANG, DEEPSPEC}, "passes over the names model."),
    ),
    "flat heads": (
        all_of(
            rename("markov_head.markov_w", "markov_w"),
            rename("confidence_head.proj", "confidence_proj"),
        ),
        dict.fromkeys({VLLM, MLX, MLX_VLM, LLAMA, ONNX}, "raises on the names markov_w1")
        | dict.fromkeys({SGLANG, DEEPSPEC}, "passes over the names markov_w1"),
    ),
    "unknown markov name": (
        set_tensors(markov_head__other__weight=(1,)),
        dict.fromkeys(STRICT | {SGLANG}, "raises") | dict.fromkeys(LOOSE, "in silence"),
    ),
    "unknown bias": (
        set_tensors(layers__0__self_attn__q_proj__bias=(24,)),
        dict.fromkeys(STRICT - {VLLM}, "raises")
        | dict.fromkeys(LOOSE | {VLLM, SGLANG}, "in silence"),
    ),
    "d2t": (set_tensors(d2t=(33,)), dict.fromkeys(ALL - {LLAMA}, "d2t")),
    # Layer ids.
    "off by one": (
        set_both(target_layer_ids=[1, 3, 5]),
        dict.fromkeys({DEEPSPEC, SGLANG, ONNX}, "[5]"),
    ),
    "embedding": (
        set_both(target_layer_ids=[-1, 2, 4]),
        dict.fromkeys({SGLANG, MLX, MLX_VLM, ONNX, MODELOPT}, "[-1]"),
    ),
    "unsorted": (
        set_both(target_layer_ids=[4, 0, 2]),
        dict.fromkeys({MLX, MLX_VLM, SGLANG, DEEPSPEC}, "increasing") | {VLLM: "permutes"},
    ),
    "twice": (
        set_both(target_layer_ids=[0, 2, 2]),
        dict.fromkeys({MLX, MLX_VLM, SGLANG, DEEPSPEC}, "increasing") | {VLLM: "permutes"},
    ),
    "no such layer": (
        all_of(set_both(target_layer_ids=[0, 2, 6])),
        dict.fromkeys(ALL, "[6]"),
    ),
    "eagle ids first in vLLM": (
        set_keys(eagle_aux_hidden_state_layer_ids=[5, 3, 1]),
        {VLLM: "[4, 2, 0]"},
    ),
    "depth": (set_keys(num_target_layers=7), {MLX_VLM: "7, the target has 6"}),
    # Keys of the config.
    "quantization_config": (
        set_keys(quantization_config={"quant_method": "fp8"}),
        dict.fromkeys(ALL, "delete quantization_config"),
    ),
    "dspark keys": (set_keys(dspark_markov_rank=5), {SGLANG: "dspark_markov_rank"}),
    "rank 0 as DFlash": (
        set_keys(architectures=["DFlashDraftModel"]),
        {VLLM: "DeepSeek-V4"} | dict.fromkeys({DEEPSPEC, SGLANG, LLAMA}, "DFlashDraftModel"),
    ),
    "architectures absent": (
        drop_keys("architectures"),
        dict.fromkeys({DEEPSPEC, VLLM, SGLANG, LLAMA}, "None"),
    ),
    "model_type": (
        set_keys(model_type="llama"),
        dict.fromkeys({DEEPSPEC, VLLM, SGLANG, MLX}, "model_type"),
    ),
    "no model_type": (
        drop_keys("model_type"),
        dict.fromkeys({DEEPSPEC, VLLM, SGLANG, MLX, MLX_VLM, TRT}, "model_type"),
    ),
    "no dflash_config": (
        drop_keys("dflash_config"),
        dict.fromkeys({MLX_VLM, ONNX}, "needs dflash_config"),
    ),
    "nested markov keys": (
        drop_keys("markov_rank", "markov_head_type"),
        dict.fromkeys({DEEPSPEC, VLLM, SGLANG}, "reads no dflash_config.markov_rank")
        | {MLX: "[33, 256], found [33, 5]"},
    ),
    "nested layer ids": (
        drop_keys("target_layer_ids", "mask_token_id"),
        {DEEPSPEC: "reads no dflash_config.target_layer_ids"},
    ),
    "block_size": (
        drop_keys("block_size"),
        dict.fromkeys({DEEPSPEC, MLX, ONNX}, "needs block_size"),
    ),
    "enable_confidence_head": (
        drop_both("enable_confidence_head"),
        {DEEPSPEC: "needs enable_confidence_head", MLX_VLM: "raises on confidence_head"},
    ),
    "num_anchors": (drop_keys("num_anchors"), {DEEPSPEC: "num_anchors"}),
    "confidence_head_with_markov absent": (
        drop_keys("confidence_head_with_markov"),
        {DEEPSPEC: "needs confidence_head_with_markov", VLLM: "found [1, 21]"},
    ),
    "disabled confidence head": (
        set_both(enable_confidence_head=False),
        {DEEPSPEC: "confidence_head", MLX: "raises", MLX_VLM: "raises"},
    ),
    "unknown head type": (
        set_both(markov_head_type="other"),
        dict.fromkeys({DEEPSPEC, SGLANG, TRT, MLX_VLM}, "valid markov_head_type"),
    ),
    "defaults": (
        drop_both("markov_head_type", "enable_confidence_head", "confidence_head_with_markov"),
        {DEEPSPEC: "enable_confidence_head", SGLANG: "markov_head_type", MLX_VLM: "raises"},
    ),
    "mlx's rank": (
        drop_both("markov_rank"),
        dict.fromkeys({DEEPSPEC, VLLM, SGLANG, ONNX}, "needs markov_rank")
        | dict.fromkeys({MLX, MLX_VLM}, "[33, 256]")
        | {TRT: "refuses a Markov head"},
    ),
    "mlx's attention": (
        drop_keys("head_dim", "num_key_value_heads"),
        dict.fromkeys(ALL - {MLX, MLX_VLM, TRT}, "needs head_dim")
        | {TRT: "needs num_key_value_heads", MLX: "[32, 16]", MLX_VLM: "[256, 16]"},
    ),
    "width": (
        set_keys(hidden_size=18),
        dict.fromkeys(ALL, "needs the target's hidden_size, found 18"),
    ),
    "mask token": (set_both(mask_token_id=33), dict.fromkeys(ALL, "33 of 33")),
    # Windows and causal blocks.
    "sliding_window beside dflash_config": (
        set_keys(sliding_window=64),
        {MLX: "reads all layers of 64 positions; trained with no window"},
    ),
    "use_swa": (
        all_of(
            set_keys(sliding_window=64),
            set_nested(use_swa=True, swa_window_size=64, causal=False),
        ),
        dict.fromkeys({SGLANG, MLX_VLM, LLAMA, ONNX, TRT}, NO_WINDOW),
    ),
    "causality of sliding layers": (
        SLIDING,
        dict.fromkeys({DEEPSPEC, MLX, MLX_VLM, ONNX}, "reads no causal layer"),
    ),
    "non-causal in dflash_config only": (
        all_of(SLIDING, set_nested(causal=False)),
        {SGLANG: "reads all layers causal", TRT: "reads all layers causal"},
    ),
    "a window for TensorRT-LLM": (
        all_of(
            SLIDING,
            set_keys(use_sliding_window=False, is_causal=False),
            set_nested(use_swa=True, swa_window_size=64, causal=False),
        ),
        {ONNX: NO_WINDOW},
    ),
    "a causal window": (
        all_of(
            SLIDING,
            set_keys(use_sliding_window=True, is_causal=True, dflash_query_causal=True),
            set_nested(use_swa=True, swa_window_size=64, causal=True),
        ),
        {TRT: "refuses dflash_config.causal", DEEPSPEC: "reads no causal layer"},
    ),
    "windows of one layer": (
        all_of(
            set_keys(layer_types=["sliding_attention", "full_attention", "full_attention"]),
            set_keys(sliding_window=64, use_sliding_window=True, is_causal=False),
            set_nested(causal=False),
        ),
        {MLX: "reads all layers of 64", ONNX: "the same window", TRT: "reads layers 0 causal"},
    ),
    "two widths": (
        all_of(SLIDING, set_keys(is_causal=False), set_nested(use_swa=True, swa_window_size=32)),
        dict.fromkeys(ALL - {DEEPSPEC, MODELOPT}, "two widths of the window, 32 and 64"),
    ),
    "no width": (
        all_of(SLIDING, set_keys(sliding_window=None, is_causal=False)),
        dict.fromkeys(ALL - {DEEPSPEC, MODELOPT}, "needs sliding_window"),
    ),
    "sliding_window_non_causal": (
        all_of(SLIDING, set_keys(sliding_window_non_causal=True)),
        dict.fromkeys({VLLM, SGLANG, LLAMA, TRT}, "reads all layers causal"),
    ),
    "value scale": (
        set_nested(attention_value_scale=0.6),
        dict.fromkeys(ALL - {VLLM, SGLANG, MODELOPT}, "attention_value_scale 0.6"),
    ),
    # RoPE.
    "leftover rotary": (set_rope(partial_rotary_factor=0.5), {VLLM: "partial_rotary_factor 0.5"}),
    "leftover rotary at the top": (set_keys(partial_rotary_factor=0.5), {VLLM: "without a rope_d"}),
    "a part of each head": (
        set_rope(partial_rotary_factor=0.5, rope_dim=2),
        dict.fromkeys((DEEPSPEC, MODELOPT, MLX, MLX_VLM), "turns whole heads"),
    ),
    "mrope": (set_rope(mrope_section=[1, 1, 1]), {VLLM: "mrope_section"}),
    "linear": (
        set_rope(rope_type="linear", factor=4.0),
        {MLX: "leaves linear out", ONNX: "refuses linear"},
    ),
    "yarn with mscale": (
        set_rope(rope_type="yarn", factor=48.0, mscale=1.0, mscale_all_dim=1.0),
        {MLX: "without mscale 1.0", ONNX: "without mscale 1.0"},
    ),
    "yarn with its own factor": (
        set_rope(rope_type="yarn", factor=4.0, attention_factor=1.0),
        {MLX: "instead of 1.0"},
    ),
    "yarn in mlx": (
        all_of(set_rope(rope_type="yarn", factor=4.0), set_nested(projector_type=None)),
        {MLX: "projector_type"},
    ),
    "older rope alone": (drop_keys("rope_parameters"), {ONNX: "needs rope_parameters"}),
    "other rope in the older keys": (
        set_keys(rope_scaling={"type": "yarn", "factor": 4.0}),
        dict.fromkeys(ALL, "rope_scaling {'factor': 4.0, 'rope_type': 'yarn'"),
    ),
    "other rope_theta": (
        set_keys(rope_theta=5.0),
        dict.fromkeys(ALL, "5.0 at the top level and 10000.0 in rope_parameters"),
    ),
    # Anchors and logits.
    "anchor": (
        set_keys(sample_from_anchor=False),
        dict.fromkeys({DEEPSPEC, TRT, ONNX, MODELOPT}, "from the anchor"),
    ),
    "contradicting anchors": (
        set_keys(dspark_bonus_anchor=True),
        dict.fromkeys(ALL, "contradict each other"),
    ),
    "scaled logits": (
        set_keys(logit_scale=0.5),
        dict.fromkeys(ALL - {VLLM, LLAMA, MODELOPT}, "logit_scale is 0.5"),
    ),
    "capped logits": (
        set_keys(final_logit_softcapping=30.0),
        dict.fromkeys({DEEPSPEC, VLLM, SGLANG, TRT, ONNX}, "final_logit_softcapping is 30.0"),
    ),
    # Quantized.
    "quantized lm_head": (
        all_of(
            set_keys(quantization_config={"quant_algo": "NVFP4"}),
            set_tensors(lm_head__weight_scale=(33, 1)),
        ),
        {VLLM: "needs lm_head unquantized", SGLANG: "lm_head unq", DEEPSPEC: "lm_head"},
    ),
    "quantized fc": (
        all_of(
            set_keys(quantization_config={"quant_algo": "NVFP4"}),
            set_tensors(fc__weight=(16, 24), fc__weight_scale=(16, 3)),
        ),
        {SGLANG: "needs fc unquantized"} | dict.fromkeys(LOOSE | STRICT - {VLLM, MLX}, "fc"),
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_traps_turn_the_verdict_of_the_right_engines(trap):
    change, wanted = TRAPS[trap]
    config, tensors = superset()
    before = verdicts(config, tensors, target_config=TARGET)
    change(config, tensors)
    found = verdicts(config, tensors, target_config=TARGET)
    lines = {name: set(found[name].problems) - set(before[name].problems) for name in found}
    lines = {name: new for name, new in lines.items() if new}
    assert set(lines) == set(wanted), lines
    for name, words in wanted.items():
        assert any(words in line for line in lines[name]), lines[name]


def test_attention_biases_are_known_to_all_but_three():
    config, tensors = superset()
    config["attention_bias"] = True
    names = [n for n in tensors if n.endswith(tuple(f".{x}_proj.weight" for x in "qkvo"))]
    del tensors[LM_HEAD]
    knowing = {VLLM, SGLANG, TRT, MLX, MODELOPT}
    assert not knowing - refusing(config, tensors)
    tensors |= {n.replace(".weight", ".bias"): tensors[n][:1] for n in names}
    assert refusing(config, tensors) == ALL - knowing  # DeepSpec for the LM head
    assert verdicts(config, tensors)[TRT].warnings


@pytest.mark.parametrize("place, readers", [("dflash_config", {VLLM, SGLANG}), ("top", {MLX})])
def test_attention_sinks_are_read_where_an_engine_looks_for_them(place, readers):
    config, tensors = superset()
    del tensors[LM_HEAD]
    where = config if place == "top" else config["dflash_config"]
    where["attention_sink_bias"] = True
    tensors |= {f"layers.{i}.self_attn.attention_sink_bias": (4,) for i in range(3)}
    loading = ALL - refusing(config, tensors)
    assert loading == readers | {MLX_VLM, LLAMA, MODELOPT}


def test_speculators_windows_move_with_the_slot_in_vllm():
    config = copy.deepcopy(SPECULATORS)
    config["transformer_layer_config"] |= {
        "layer_types": ["sliding_attention"] * 3,
        "sliding_window": 64,
    }
    found = verdicts(config, trained(), target_config=TARGET)[VLLM]
    assert found.loads and "slot j sees j + 1 positions less" in found.warnings[0]
    config["sliding_window_non_causal"] = True
    found = verdicts(config, trained(), target_config=TARGET)[VLLM]
    assert "reads all layers causal" in found.problems[0]


def test_speculators_without_sample_from_anchor_runs_wrongly_in_vllm():
    config = {key: value for key, value in SPECULATORS.items() if key != "sample_from_anchor"}
    assert "sample_from_anchor" in verdicts(config, trained())[VLLM].problems[0]


# Gemma-4 drafts.


def gemma(**changes):
    shape = dataclasses.replace(
        VANILLA,
        architecture="gemma4",
        shared_key_value=True,
        num_key_value_heads=1,
        logit_softcapping=30.0,
        rope_parameters={
            "rope_type": "proportional",
            "rope_theta": 1e6,
            "partial_rotary_factor": 0.25,
        },
    )
    description = DraftDescription(shape=shape)
    config = gemma4_config(description, target_config=TARGET, dtype=torch.bfloat16)
    return {**copy.deepcopy(config), **changes}, hugging_face_shapes(shape)


def test_gemma_drafts_are_for_deepspec_vllm_and_mlx_dspark():
    config, tensors = gemma()
    found = verdicts(config, tensors, target_config=TARGET)
    assert {name for name, v in found.items() if v.loads} == {DEEPSPEC, VLLM, MLX}
    assert "caps the Markov bias" in found[VLLM].warnings[0]
    assert found[MLX_VLM].problems == ("leaves out the norm of values, without an error",)
    assert found[SGLANG].problems == ("has no Gemma-4 drafts",)


@pytest.mark.parametrize(
    "change, engine, words",
    [
        (drop_tensors(LM_HEAD), VLLM, "takes no matrices from the target, the file lacks lm_head"),
        (drop_tensors(EMBEDDING), MLX_VLM, "the file lacks embed_tokens.weight"),
        (set_keys(attention_k_eq_v=False), VLLM, "needs attention_k_eq_v"),
        (set_keys(sample_from_anchor=False), MLX, "reads no sample_from_anchor"),
        (set_keys(draft_vocab_size=20), VLLM, "needs the whole vocabulary"),
        (set_tensors(extra__weight=(1,)), VLLM, "passes over extra.weight in silence"),
    ],
)
def test_traps_of_gemma_drafts(change, engine, words):
    config, tensors = gemma()
    before = verdicts(config, tensors)[engine].problems
    change(config, tensors)
    found = verdicts(config, tensors)[engine].problems
    assert any(words in line for line in found) and not any(words in line for line in before)


# What loads, but deserves a word.

REMARKS = {
    "anchor": (set_keys(sample_from_anchor=False), {VLLM, SGLANG, MLX_VLM}, "block_size"),
    "unused confidence": (drop_keys("enable_confidence_head"), {VLLM}, "confidence head out"),
    "no confidence bias": (drop_tensors("confidence_head.proj.bias"), {SGLANG}, "static mode"),
    "last layer": (set_both(target_layer_ids=[0, 2, 5]), {VLLM, MLX, MLX_VLM}, "final norm"),
    "unsorted": (set_both(target_layer_ids=[4, 0, 2]), {TRT, LLAMA, ONNX}, "may not capture"),
    "auto_map": (set_keys(auto_map={"AutoModel": "x"}), ALL - {MODELOPT}, "auto_map"),
    "copies": (set_nested(mask_token_id=3), ALL - {MODELOPT}, "mask_token_id"),
    "block_size in dflash_config": (
        all_of(drop_keys("block_size"), set_nested(block_size=3)),
        {VLLM},
        "num_speculative_tokens",
    ),
    "vocabulary": (set_keys(vocab_size=34), {MLX, TRT}, "34, the target has 33"),
    "last layer unread": (set_both(target_layer_ids=[0, 2, 5]), {TRT, LLAMA}, "[5]: its source"),
    "embedding unread": (set_both(target_layer_ids=[-1, 2, 4]), {TRT, LLAMA}, "[-1]: its source"),
    "block_size": (drop_keys("block_size"), {VLLM}, "num_speculative_tokens"),
    "block_size in SGLang": (drop_keys("block_size"), {SGLANG}, "takes 7"),
    "window": (SLIDING, {DEEPSPEC}, "no window in its training mask"),
    "rope": (set_rope(partial_rotary_factor=0.5), {SGLANG, TRT, LLAMA}, "partial_rotary_factor"),
    "a part of each head": (
        set_rope(partial_rotary_factor=0.5, rope_dim=2),
        {TRT, LLAMA, ONNX},
        "not read for partial_rotary_factor 0.5",
    ),
    "block_size of drafts": (
        set_keys(sample_from_anchor=False, num_speculative_tokens=3),
        {MLX},
        "one token less",
    ),
    "block_size of drafts in llama.cpp": (
        set_keys(sample_from_anchor=False, num_speculative_tokens=3),
        {LLAMA},
        "leaves the Markov bias out",
    ),
    "window that stands": (
        all_of(SLIDING, set_keys(is_causal=False)),
        {MLX_VLM},
        "slot j sees j positions more",
    ),
    "causal block": (all_of(SLIDING, set_keys(is_causal=True)), {LLAMA}, "for causal blocks"),
    "scaled bias": (set_keys(logit_scale=0.5), {VLLM}, "scales the Markov bias"),
    "sinks": (set_nested(attention_sink_bias=True), {SGLANG}, "backend with sinks"),
    "biases": (set_keys(attention_bias=True), {TRT}, "bias of o_proj"),
    "no dspark_bonus_anchor": (
        set_keys(sample_from_anchor=False, dspark_bonus_anchor=True),
        set(),
        "dspark_bonus_anchor",
    ),
    "depth": (set_keys(num_target_layers=7), {SGLANG}, "7, the target has 6"),
}


@pytest.mark.parametrize("remark", REMARKS)
def test_warnings(remark):
    change, engines, words = REMARKS[remark]
    config, tensors = superset()
    change(config, tensors)
    found = verdicts(config, tensors, target_config=TARGET)
    said = {name for name, v in found.items() if any(words in line for line in v.warnings)}
    assert said == engines, found


@pytest.mark.parametrize("name", ["Qwen3-DFlash-b3", "eagle3_draft", "my-eagle-draft"])
def test_vllm_takes_its_method_from_the_path(name):
    found = verdicts(*superset(), folder_name=name)
    assert [n for n, v in found.items() if v.warnings] == [VLLM]
    assert found[VLLM].loads


def test_what_engines_find_without_the_usual_key():
    config, tensors = superset(head_dim=4)
    config.pop("head_dim")  # hidden_size / heads
    assert MLX not in refusing(config, tensors)
    config["dflash_config"]["block_size"] = config.pop("block_size")
    found = verdicts(config, tensors)[SGLANG].warnings
    assert not any("takes 7" in line for line in found)


def test_quantized_layers_stay_loadable_where_they_are_read():
    config, tensors = superset()
    config["quantization_config"] = {"quant_algo": "NVFP4", "exclude_modules": ["fc"]}
    tensors["layers.0.mlp.up_proj.weight"] = (24, 8)
    tensors["layers.0.mlp.up_proj.weight_scale"] = (24, 1)
    tensors["layers.0.mlp.up_proj.weight_scale_2"] = ()
    assert ALL - refusing(config, tensors) == {VLLM, SGLANG, MLX}


# Nothing crashes it.


@pytest.mark.parametrize("tensors", [{}, trained(), {"fc.weight": ()}])
def test_an_empty_config_is_only_full_of_problems(tensors):
    found = verdicts({}, tensors, target_config=TARGET)
    assert set(found) == ALL and not any(v.loads for v in found.values())
    for verdict in found.values():
        keys = {"hidden_size", "target_layer_ids", "mask_token_id"}
        keys -= {
            LLAMA: {"mask_token_id"},
            MODELOPT: {"mask_token_id"},
            MLX_VLM: {"hidden_size"},
        }.get(verdict.engine, set())
        for key in keys:
            assert any(f"needs {key}" in line for line in verdict.problems), verdict


@pytest.mark.parametrize("junk", [None, "x", "", [], {}, [None], ["x"], {"a": 1}, -1, 0, 2.5, True])
def test_junk_never_raises(junk):
    for config in (superset()[0], RAW_MODELOPT, RAW_SPECFORGE, SPECULATORS):
        nested = [key for key in ("dflash_config", "transformer_layer_config") if key in config]
        for key in config:
            engine_verdicts({**config, key: junk}, trained(), target_config=TARGET)
        for place in nested:
            for key in config[place]:
                engine_verdicts({**config, place: {**config[place], key: junk}}, trained())


def test_sglang_scales_the_drafts_of_a_target_that_divides_its_logits():
    inkling = Qwen3Config(**{**TARGET.to_dict(), "logits_mup_width_multiplier": 4.0})
    for scale, loads in ((0.25, True), (None, False), (0.5, False)):
        config, tensors = superset()
        if scale:
            config["logit_scale"] = scale
        sglang = verdicts(config, tensors, target_config=inkling)[SGLANG]
        assert sglang.loads is loads, sglang
    assert "multiplies logits by 0.25 (the target's logits_mup_width_mult" in sglang.problems[0]
