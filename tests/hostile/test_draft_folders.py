"""A draft's folder to import or convert, and the pages that are made of names and figures."""

import json
import shutil

import pytest
from markdown_it import MarkdownIt

from dspark_megatron.conversion.draft_folder import DraftFolder
from dspark_megatron.conversion.layouts.hf_config import DraftDescription
from dspark_megatron.conversion.model_card import model_card
from dspark_megatron.conversion.sidecar import check_sidecar
from dspark_megatron.evaluation.serving.sps_table import read_sps_table
from support.draft_folders import export, export_fp32, write_checkpoint, write_target
from support.hostile import DEEP, INF, MISSING, NAN, make_strange, refused, with_key
from support.shapes import VANILLA


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A target, a run and a draft."""
    folder = tmp_path_factory.mktemp("built")
    target, run = write_target(folder / "target"), write_checkpoint(folder / "run", VANILLA)
    return target, run, export_fp32(run, target, folder / "draft")


@pytest.fixture
def draft(built, tmp_path):
    """A draft's folder to be damaged."""
    return shutil.copytree(built[2], tmp_path / "draft")


FIELDS = [
    *(("hidden_size", value, "hidden_size") for value in (MISSING, None, -1, 0, "x", [1], 10**30)),
    *(("num_hidden_layers", value, "num_hidden_layers") for value in (-1, 0, "x", 10**6, 2.5)),
    *(("num_attention_heads", value, "num_attention_heads") for value in (MISSING, 0, "x", {})),
    *(("num_key_value_heads", value, "num_key_value_heads") for value in (-1, 0, "x")),
    *(("head_dim", value, "head_dim") for value in (-1, 0, "x", NAN)),
    *(("vocab_size", value, "vocab_size") for value in (MISSING, -1, "x", INF)),
    *(("rms_norm_eps", value, "rms_norm_eps") for value in (-1, 7, "x", NAN)),
    *(("block_size", value, "block_size") for value in (-1, 0, "x", [1])),
    *(("target_layer_ids", value, "target_layer_ids") for value in (7, ["x"], "x")),
    *(("markov_rank", value, "markov_rank") for value in (-1, "x")),
    ("markov_head_type", "spiral", "markov_head_type must be one of"),
    *(("rope_parameters", value, "rope_parameters") for value in (7, "x", [1])),
    *(("rope_theta", value, "rope_theta") for value in (-1, "x", INF, NAN)),
    ("dflash_config", 7, "dflash_config (7) must be an object"),
    ("dflash_config", [], "dflash_config ([]) must be an object"),
    ("initializer_range", INF, "initializer_range"),
    ("num_anchors", NAN, "num_anchors"),
    ("quantization_config", {"bits": 4}, "a quantized draft"),
    *(("layer_types", value, "layer_types") for value in (["sliding_attention"], 7, [7], "x")),
    ("layer_types", ["chunked_attention"] * 2, "attention layers ['chunked_attention']"),
    *(("use_sliding_window", value, "use_sliding_window") for value in (True, "x", 1, [])),
    *(("is_causal", value, "is_causal") for value in ("x", 1, [], NAN)),
    *(("dflash_query_causal", value, "dflash_query_causal") for value in ("x", 0)),
    *(("attention_bias", value, "attention_bias") for value in ("x", 1)),
    *(("attention_sink_bias", value, "attention_sink_bias") for value in ("x", 1, [0.0])),
    *(("sample_from_anchor", value, "sample_from_anchor") for value in ("x", 0, [], False)),
    *(("dspark_bonus_anchor", value, "dspark_bonus_anchor") for value in ("x", 1, True)),
    *(("logit_scale", value, "logit_scale") for value in (0, -1, "x", INF, NAN, True, [])),
    *(("final_logit_softcapping", value, "c tanh(x / c)") for value in (30.0, "x", NAN, True)),
    *(("output_multiplier", value, "output_multiplier") for value in (0.2, 0, "x", True)),
    ("output_multiplier", 1.0, ""),
    *(("input_embedding_scale", value, "input_embedding_scale") for value in (2, 0, NAN)),
    ("use_gemma_norm", True, "norms multiply by 1 + weight"),
    ("use_gemma_norm", False, ""),
    ("dspark_fixup_head_type", "mlp", "a head that corrects the logits"),
    ("dspark_fixup_head_type", None, ""),
    ("log_snr_conditioning", True, "log_snr_conditioning"),
    ("enable_qwen35_gated_q_proj", True, "enable_qwen35_gated_q_proj"),
    ("dspark_block_size", 9, "block_size 3 and dspark_block_size 9"),
    ("dspark_block_size", 3, ""),
    ("eagle_config", {"x": 1}, "eagle_config.x (1) is not known"),
    ("eagle_aux_hidden_state_layer_ids", [0, 2, 4], "counts the embedding"),
    ("eagle_aux_hidden_state_layer_ids", ["x"], "must be a list of integers"),
    ("transformer_layer_config", {}, "transformer_layer_config"),
    ("company_note", "mine", "company_note ('mine') is not known"),
    ("company_note", None, ""),
    ("auto_map", 7, "auto_map (7) must be an object"),
    ("auto_map", {"AutoModel": "payload.Own"}, ""),
]


@pytest.mark.parametrize(("key", "value", "fragment"), FIELDS)
def test_a_field_of_a_drafts_config_is_refused(draft, key, value, fragment):
    path = draft / "config.json"
    with_key(path, key, value)
    if (
        isinstance((nested := json.loads(path.read_text())["dflash_config"]), dict)
        and key in nested
    ):
        with_key(path, f"dflash_config.{key}", value)
    if fragment:
        refused(lambda: DraftFolder(draft), fragment, lines=9)
    else:
        DraftFolder(draft)  # it names code, which is not run


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "is not valid JSON"),
        (b"[]", "must hold a JSON object"),
        (b"\xff", "must be text in UTF-8"),
        (b'{"a":' + DEEP.encode(), "is nested too deeply"),
        (b"{}", ""),
    ],
)
def test_a_config_that_is_no_drafts(draft, content, fragment):
    (draft / "config.json").write_bytes(content)
    refused(lambda: DraftFolder(draft), fragment, lines=9)


@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling", "loop"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_is_no_file_of_a_draft(draft, name, kind):
    make_strange(draft / name, kind)
    refused(lambda: DraftFolder(draft), "")


@pytest.mark.parametrize(
    "content", [b"", b"7", b"[]", b"{}", b'{"temperatures": [1, NaN, 1]}', DEEP.encode()]
)
def test_a_sidecar_that_is_none(tmp_path, content):
    (tmp_path / "dspark_sts.json").write_bytes(content)
    refused(lambda: check_sidecar(tmp_path, 3), "dspark_sts.json must")


@pytest.mark.parametrize("content", [b"", b"7", b"[]", b"{}", DEEP.encode(), b"\xff"])
def test_a_table_of_steps_that_is_none(tmp_path, content):
    (tmp_path / "sps.json").write_bytes(content)
    refused(lambda: read_sps_table(tmp_path / "sps.json"), "sps.json")


NO_LINE = [
    "a\nb",
    "a\n---\nlicense: mit\n---\n",
    "a\r\nb",
    "a\u2028b",
    "a\x1b[31mb",
    "a\x00b",
    "a\u202eb",
    " ",
    "a\tb",
]


@pytest.mark.parametrize("name", NO_LINE)
def test_a_name_that_writes_lines_of_its_own_is_refused(built, tmp_path, name):
    target, run, _ = built
    out = tmp_path / "out"
    refused(
        lambda: export(run, target, out, target_name=name), "must be one line of printable text"
    )
    assert not out.exists()


STRANGE = [
    "<script>alert(1)</script>",
    "[click](https://evil.example)",
    "![x](https://evil.example/x.png)",
    "**bold** _it_ `code` ~~gone~~",
    "a | b | c",
    "$x$ & &lt;",
    "`; rm -rf /; echo `",
    'it\'s "quoted"',
]


def card(name, files=("a.jsonl",)):
    history = {
        "iterations": 10,
        "samples": 80,
        "weights": "trained",
        "evaluation": {
            "temperature": 0.0,
            "files": {file: {"prompts": 3, "tau": 1.5} for file in files},
        },
    }
    return model_card(
        DraftDescription(shape=VANILLA),
        layout="hf",
        target=name,
        folder=name.replace("/", "-"),
        engines={"vLLM", "SGLang"},
        history=history,
        with_temperatures=True,
    )


@pytest.mark.parametrize("name", STRANGE)
def test_a_name_is_text_in_a_model_card(name):
    """Told by a Markdown parser: the heading is the name, and there is no more markup than for a
    plain one."""
    parser = MarkdownIt().enable(["table", "strikethrough"])

    def shapes(text):
        kinds = [token.type for token in parser.parse(text)]
        return kinds, [
            child.type
            for token in parser.parse(text)
            for child in token.children or []
            if child.type not in ("text", "text_special")
        ]

    heading = next(t for t in parser.parse(card(name)) if t.type == "inline")
    assert "".join(child.content for child in heading.children) == f"DSpark drafter for {name}"
    assert shapes(card(name, files=[name])) == shapes(card("plain", files=["plain"]))
