"""A target's folder that is damaged or hostile: file, field, value and rule in one sentence."""

import json

import pytest
from transformers import CONFIG_MAPPING

from dspark_megatron.config.target import TargetConfig
from dspark_megatron.data.prompts.local_target import LocalTarget
from dspark_megatron.run.check import check
from dspark_megatron.storage.target_folder import load_target_config, load_tokenizer
from dspark_megatron.targets.huggingface.split import TargetSplit
from dspark_megatron.targets.huggingface.target import load_base_model
from support.hostile import DEEP, INF, MISSING, NAN, make_strange, refused, with_key
from support.tiny_target import tiny_config

WIDTH = "must be an integer from 1 to 1,000,000"
HEADS = "must be an integer from 1 to 100,000, or a list of them"
BOOL = "must be true or false"
ROPE = "must be an object of finite numbers and texts, its rope_theta and factor > 0"
DESCRIBED = "are not those that its config.json describes"
FIELDS = [
    *(("hidden_size", value, WIDTH) for value in (-1, 0, "text", "7", 1.5, 10**30, [1], {}, True)),
    *(("hidden_size", value, WIDTH) for value in (INF, NAN, 10**6 + 1)),
    *(("hidden_size", value, DESCRIBED) for value in (MISSING, 64)),
    ("hidden_size", None, "hidden_size"),
    *(("num_hidden_layers", value, "an integer from 1 to 1,000") for value in (-1, 0, 10**6, "x")),
    ("num_hidden_layers", 7, "num_hidden_layers"),
    ("num_hidden_layers", MISSING, "num_hidden_layers"),
    *(("num_attention_heads", value, HEADS) for value in (-1, 0, "x", 10**30, [0], [])),
    ("num_attention_heads", 6, "must be divisible by num_key_value_heads (4)"),
    ("num_attention_heads", MISSING, DESCRIBED),
    *(("num_key_value_heads", value, HEADS) for value in (-1, 0, {}, 2.0)),
    ("num_key_value_heads", 3, "num_attention_heads (8) must be divisible"),
    ("num_key_value_heads", None, DESCRIBED),
    *(("head_dim", value, "must be an even integer") for value in (-1, 0, 7, "8", 10**6)),
    *(("head_dim", value, DESCRIBED) for value in (MISSING, 16)),
    *(("vocab_size", value, "an integer from 1 to 10,000,000") for value in (-1, 0, "x", 10**9)),
    *(("vocab_size", value, DESCRIBED) for value in (MISSING, 302, 10**6)),
    *(("intermediate_size", value, WIDTH) for value in (-1, 0, "x", NAN)),
    *(("intermediate_size", value, DESCRIBED) for value in (MISSING, 7)),
    *(("max_position_embeddings", value, "an integer from 1 to") for value in (0, -1, "x", INF)),
    *(("rms_norm_eps", value, "must be a number in [0, 1)") for value in (-1, 1.5, "x", INF, NAN)),
    *(("tie_word_embeddings", value, BOOL) for value in (0, "yes", [1])),
    *(("torch_dtype", value, "floating-point type") for value in (7, "int8", "text", {}, True)),
    *(("dtype", value, "floating-point type") for value in ("float31", "Tensor", [1])),
    *(("model_type", value, "must be a text") for value in (7, [1], {}, "", True)),
    ("model_type", "nobody", "Transformers"),
    ("model_type", MISSING, "is of model_type None"),
    *(("architectures", value, "must be a list of texts") for value in ("x", 7, [1], {})),
    ("auto_map", "payload.Own", "must be an object"),
    *(("rope_parameters", value, ROPE) for value in ("x", 7, [], {"rope_theta": INF})),
    *(("rope_parameters", value, ROPE) for value in ({"a": {"b": {"c": 1}}}, {"a": 10**400})),
    *(("rope_parameters.rope_theta", value, ROPE) for value in ("1e4", None, True, [], 0, -1)),
    *(("rope_parameters.factor", value, ROPE) for value in ("2", 0, -1, True, [2], INF)),
    *(
        ("rope_parameters.partial_rotary_factor", value, ROPE)
        for value in ("1", 0, -0.5, 1.5, None, True)
    ),
    ("rope_scaling", {"full_attention": {"factor": 0}}, ROPE),
    ("rope_parameters.rope_theta", 10**30, "a RoPE that cannot be computed"),
    ("rope_parameters.rope_type", "spiral", "is none of those that a draft can have"),
    ("rope_parameters.rope_type", "yarn", "Missing required keys"),
    ("rope_scaling", 7, ROPE),
    ("hidden_act", "text", "must be an activation of Transformers"),
    *(("layer_types", value, "must be a list of texts") for value in ("full", [], [1])),
    ("layer_types", ["full_attention"], "must be equal to the number"),
    ("eos_token_id", "x", "must be an integer from -1 to"),
    ("pad_token_id", -7, "must be an integer from -1 to"),
    ("quantization_config", "fp8", "must be an object"),
    ("use_sliding_window", 1, BOOL),
    ("sliding_window", "x", "must be an integer from -1 to"),
    ("attention_dropout", 7.5, "must be a number in [0, 1]"),
    ("initializer_range", INF, "must be a finite number >= 0"),
    ("num_labels", 10**9, "must be an integer from 0 to 100,000"),
    *((key, 10**6, "from 1 to 1,000") for key in ("n_layer", "n_layers", "num_layers", "depth")),
    ("vision_config.depth", 0, "vision_config.depth (0) must be an integer from 1"),
    ("audio_config.encoder_config.hidden_size", -1, "audio_config.encoder_config.hidden_size"),
    ("text_config", 7, "must be an object"),
    ("text_config.hidden_size", -4, "text_config.hidden_size (-4) must be"),
    ("thinker_config.text_config.hidden_size", 0, "thinker_config.text_config.hidden_size (0)"),
]


GPT2_FIELDS = [
    ("n_head", 0, "num_attention_heads (0) must be an integer from 1"),
    ("n_embd", -1, "hidden_size (-1) must be"),
    ("n_layer", 0, "n_layer (0) must be"),
    ("n_positions", "x", "max_position_embeddings ('x') must be"),
]


@pytest.mark.parametrize(("key", "value", "fragment"), GPT2_FIELDS)
def test_a_field_under_a_familys_own_name(tmp_path, key, value, fragment):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", key: value}))
    refused(lambda: load_target_config(tmp_path), fragment)


@pytest.mark.parametrize("family", ["mpt", "dbrx", "gpt2", "qwen3_omni_moe", "gemma3"])
def test_what_a_family_writes_itself_passes(tmp_path, family):
    CONFIG_MAPPING[family]().save_pretrained(tmp_path)
    assert load_target_config(tmp_path).model_type == family


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("name", ["flash_attention_2", "evil/kernel"])
def test_a_target_does_not_choose_the_code_of_attention(target, key, name):
    with_key(target / "config.json", key, name)
    assert load_target_config(target)._attn_implementation is None
    tokenizer = load_tokenizer(target)
    answering = LocalTarget(target, tokenizer, temperature=0, max_new_tokens=1)
    assert answering._model.config._attn_implementation == "sdpa"
    loaded = load_base_model(TargetConfig(path=str(target), attention="eager"), TargetSplit())
    assert loaded.config._attn_implementation == "eager"


def plan(tiny_run, target, **model):
    return check(tiny_config(tiny_run, target={"path": str(target)}, model=model), 1, use="train")


@pytest.mark.parametrize(("key", "value", "fragment"), FIELDS)
def test_a_field_of_a_targets_config_is_refused(tiny_run, target, key, value, fragment):
    with_key(target / "config.json", key, value)
    refused(lambda: plan(tiny_run, target), fragment)


@pytest.mark.parametrize("layers", [3, 5])
def test_a_model_of_more_or_fewer_layers_than_its_config_says(tiny_run, target, layers):
    with_key(target / "config.json", "num_hidden_layers", layers)
    with_key(target / "config.json", "layer_types", ["full_attention"] * layers)
    said = f"there are 4 layers, and num_hidden_layers is {layers}"
    refused(lambda: plan(tiny_run, target, target_layer_ids=[0, 1]), said)


WHOLE_FILES = [
    ("config.json", b"", "is not valid JSON"),
    ("config.json", b"{", "is not valid JSON"),
    ("config.json", b"[]", "must hold a JSON object"),
    ("config.json", b"7", "must hold a JSON object"),
    ("config.json", b"\xff\xfe{}", "must be text in UTF-8"),
    ("config.json", b'{"a":' + DEEP.encode(), "is nested too deeply"),
    ("config.json", b'{"a": "' + b"x" * 2**26 + b'"}', "at most 67,108,864 are read"),
    ("generation_config.json", b"{", "is not valid JSON"),
    ("generation_config.json", b"[]", "must hold a JSON object"),
    ("generation_config.json", b'{"eos_token_id": "x"}', "eos_token_id ('x') must be an integer"),
    ("generation_config.json", b'{"eos_token_id": [1, -9]}', "must be an integer from -1"),
    ("generation_config.json", b'{"eos_token_id": 1e999}', "eos_token_id (inf) must be"),
    ("generation_config.json", b'{"eos_token_id": 99999}', "must be in the target's vocabulary"),
    ("tokenizer.json", b"", "must hold the target's tokenizer"),
    ("tokenizer.json", b"[]", "must hold the target's tokenizer"),
    ("tokenizer.json", b"\xff" * 9, "must hold the target's tokenizer"),
    ("tokenizer.json", b'{"a":' + DEEP.encode(), "must hold the target's tokenizer"),
    ("tokenizer_config.json", b"{", "is not valid JSON"),
    ("tokenizer_config.json", b"[]", "must hold a JSON object"),
    ("tokenizer_config.json", b'{"tokenizer_class": 7}', "must hold the target's tokenizer"),
    ("tokenizer_config.json", b'{"eos_token": 7}', "must hold the target's tokenizer"),
    ("tokenizer_config.json", b'{"extra_special_tokens": 7}', "must hold the target's tokenizer"),
    ("added_tokens.json", b"[", "must hold the target's tokenizer"),
    ("special_tokens_map.json", b'{"eos_token": []}', "must hold the target's tokenizer"),
    ("chat_template.jinja", b"\xff\xfe", "must hold the target's tokenizer"),
    ("model.safetensors", b"", "whole, readable safetensors file"),
    ("model.safetensors", b"x" * 100, "whole, readable safetensors file"),
    ("model.safetensors", (1 << 60).to_bytes(8, "little") + b"{}", "whole, readable safetensors"),
    (
        "model.safetensors",
        (2).to_bytes(8, "little") + b"{}",
        "must hold exactly one token embedding",
    ),
    ("model.safetensors.index.json", b"{", "is not valid JSON"),
    ("model.safetensors.index.json", b"{}", "must have a weight_map"),
    ("model.safetensors.index.json", b'{"weight_map": []}', "must have a weight_map"),
    ("model.safetensors.index.json", b'{"weight_map": {}}', "must have a weight_map"),
    ("model.safetensors.index.json", b'{"weight_map": {"a": 7}}', "must have a weight_map"),
    (
        "model.safetensors.index.json",
        b'{"weight_map": {"model.embed_tokens.weight": "../../secret"}}',
        "from tensors to files beside it",
    ),
    (
        "model.safetensors.index.json",
        b'{"weight_map": {"model.embed_tokens.weight": "none.safetensors"}}',
        "whole, readable safetensors file",
    ),
]


@pytest.mark.parametrize(("name", "content", "fragment"), WHOLE_FILES)
def test_a_file_of_a_target_is_refused(tiny_run, target, name, content, fragment):
    (target / name).write_bytes(content)
    refused(lambda: plan(tiny_run, target), fragment)


def lying_header(entries):
    header = json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + b"\0" * 64


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [301, 32], "data_offsets": [0, 64]},
        {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 10**12]},
        {"dtype": "F32", "shape": [4, 4], "data_offsets": [64, 0]},
        {"dtype": "F32", "shape": [-4, 4], "data_offsets": [0, 64]},
        {"dtype": "F33", "shape": [4, 4], "data_offsets": [0, 64]},
        {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 64]},
    ],
)
def test_a_safetensors_header_that_lies(tiny_run, target, entry):
    (target / "model.safetensors").write_bytes(lying_header({"model.embed_tokens.weight": entry}))
    refused(lambda: plan(tiny_run, target), "model.safetensors must be there as a whole")


def test_an_embedding_that_is_no_matrix(tiny_run, target):
    entry = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
    (target / "model.safetensors").write_bytes(lying_header({"model.embed_tokens.weight": entry}))
    refused(lambda: plan(tiny_run, target), "model.embed_tokens.weight is [16], and vocab_size x")


@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling", "loop"])
@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors"],
)
def test_what_is_no_file_is_not_waited_for(tiny_run, target, name, kind):
    make_strange(target / name, kind)
    refused(
        lambda: plan(tiny_run, target), f"'{name}' in the target's folder {target} must be a file"
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [("absent", "No such file"), ("config.json", "Not a directory"), ("x" * 256, "too long")],
)
def test_a_folder_that_cannot_be_listed(target, name, said):
    refused(lambda: load_tokenizer(target / name), f"cannot read the target's folder {target}")
    refused(lambda: load_tokenizer(target / name), said)


def test_the_good_target_passes(tiny_run, target):
    """Else the table would prove nothing."""
    assert plan(tiny_run, target).shape.hidden_size == 32
