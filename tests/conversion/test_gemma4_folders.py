"""Gemma-4 drafts as folders: a plain model of Transformers' own Gemma-4 classes computes the same
from an export, it comes back as it was, and what such a draft cannot be is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma4TextConfig

from dspark_megatron.conversion.draft_folder import DraftFolder
from dspark_megatron.conversion.export import convert_folder
from dspark_megatron.conversion.folder_writer import WriteOptions
from dspark_megatron.conversion.verify import verify_folder
from dspark_megatron.errors import ConfigError
from dspark_megatron.shape.attention import DraftAttention
from dspark_megatron.storage.training_checkpoint import CheckpointReader
from support import shapes
from support.draft_folders import (
    export_fp32,
    import_,
    reconfigure,
    rewrite,
    trained_tensors,
    write_checkpoint,
)
from support.gemma4_reference import Gemma4ClassesDraft, gemma4_text_config
from support.tiny_draft import make_samples, sample_logits

GEMMA4 = replace(shapes.GEMMA4, vocab_size=33, mask_token_id=32)
SHAPES = {
    "shared keys": GEMMA4,
    "own values, no cap, rnn": replace(
        GEMMA4,
        shared_key_value=False,
        num_key_value_heads=4,
        logit_softcapping=None,
        markov_head_type="rnn",
    ),
    "biases, no anchor": replace(
        GEMMA4, attention=DraftAttention(biases=True), sample_from_anchor=False
    ),
    "plain RoPE, no heads": replace(
        GEMMA4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        markov_rank=0,
        enable_confidence_head=False,
        confidence_head_with_markov=False,
    ),
}


def write_target(folder):
    """A Gemma-4 target's config and the two matrices that an export needs of it."""
    config = Gemma4TextConfig(
        vocab_size=GEMMA4.vocab_size,
        hidden_size=GEMMA4.hidden_size,
        num_hidden_layers=GEMMA4.num_target_layers,
        hidden_size_per_layer_input=0,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        final_logit_softcapping=3.0,
        tie_word_embeddings=False,
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    size = (GEMMA4.vocab_size, GEMMA4.hidden_size)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    tensors = {name: 0.3 * torch.randn(size, generator=generator) for name in names}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(params=SHAPES)
def exported(request, tmp_path, target):
    shape = SHAPES[request.param]
    run = write_checkpoint(tmp_path / "run", shape)
    return shape, run, export_fp32(run, target, tmp_path / "export")


def of_folder(runtime, path):
    """Hidden states and logits of a sample's blocks by our draft of a folder."""
    from dspark_megatron.conversion.draft_tensors import fill_draft
    from dspark_megatron.conversion.layouts.names import EMBEDDING, LM_HEAD
    from dspark_megatron.model.draft_model import DSparkDraftModel

    folder = DraftFolder(path)
    draft = DSparkDraftModel(
        folder.shape,
        tp_group=runtime.tp_group,
        params_dtype=torch.float32,
        device=runtime.device,
    )
    fill_draft(draft, folder.tensor, tp_group=runtime.tp_group)
    shard, rows = draft.vocab_shard, []
    for name in (EMBEDDING, LM_HEAD):
        whole = torch.cat([folder.tensor(name), torch.zeros(4, folder.shape.hidden_size)])
        rows.append(whole[shard.vocab_start_index : shard.vocab_end_index])
    draft.load_frozen_replicas(*rows)
    return sample_logits(draft, *sample())


def sample():
    samples = make_samples(GEMMA4, lengths=(20,))
    return samples.taps[0], samples.input_ids[0] % 33, torch.tensor([4, 9, 15])


@pytest.mark.parametrize("tp", [1, 4])
def test_transformers_classes_compute_the_same_from_an_export(pool, exported, tp):
    shape, _, out = exported
    twin = Gemma4ClassesDraft(shape)
    twin.load_state_dict(load_file(out / "model.safetensors"), strict=True)
    with torch.no_grad():
        expected = twin(*sample())
    drafting = slice(-shape.num_draft_tokens, None)
    ranks = pool.run(of_folder, world=tp, tp=tp, path=out)
    torch.testing.assert_close(ranks[0][0], expected.hidden[:, drafting], rtol=1e-4, atol=1e-5)
    logits = torch.cat([rank[1] for rank in ranks], dim=-1)[..., : shape.vocab_size]
    torch.testing.assert_close(logits, expected.logits[:, drafting], rtol=1e-4, atol=1e-4)


def test_a_draft_comes_back_as_it_was(exported, target, tmp_path):
    shape, run, out = exported
    found = load_file(out / "model.safetensors")
    assert ("layers.0.self_attn.v_proj.weight" in found) != shape.shared_key_value
    assert found["layers.1.layer_scalar"].shape == (1,)
    verify_folder(out, checkpoint=run, target_dir=target)
    back = import_(out, target, tmp_path / "back", tensor_parallel=4)
    reader = CheckpointReader(back)
    assert reader.shape == shape
    again = export_fp32(tmp_path / "back", target, tmp_path / "again")
    tensors = load_file(again / "model.safetensors")
    expected = trained_tensors(shape)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_transformers_reads_the_config_that_is_written(exported, target):
    shape, _, out = exported
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Gemma4DSparkModel"]
    text = Gemma4TextConfig.from_pretrained(out)
    layer, wanted = text.per_layer_config["full_attention"], gemma4_text_config(shape)
    assert (layer.num_key_value_heads, layer.head_dim) == (shape.num_key_value_heads, 16)
    assert text.rope_parameters == wanted.rope_parameters
    assert text.final_logit_softcapping == shape.logit_softcapping
    # As a newer Transformers writes it back, and as DeepSpec's own are.
    text.save_pretrained(out)
    assert DraftFolder(out).shape == shape


def test_a_published_draft_has_other_heads_in_the_layers_that_it_lacks(target, tmp_path):
    """DeepSpec copies the target's whole config."""
    run = write_checkpoint(tmp_path / "run", GEMMA4)
    out = export_fp32(run, target, tmp_path / "export")
    sliding = {"rope_type": "default", "rope_theta": 1e4}
    others = dict(head_dim=8, num_key_value_heads=4, sliding_window=512, target_model_type="gemma4")
    reconfigure(out, lambda c: c.update(others, model_type="gemma4_unified_text"))
    reconfigure(out, lambda c: c["rope_parameters"].update(sliding_attention=sliding))
    assert DraftFolder(out).shape == GEMMA4


REFUSED = {
    "experts (enable_moe_block)": dict(enable_moe_block=True),
    "hidden_size_per_layer_input": dict(hidden_size_per_layer_input=8),
    "hidden_activation must be": dict(hidden_activation="silu"),
    "layer_types must be": dict(layer_types=["full_attention", "sliding_attention"]),
    "must be null or a number > 0": dict(final_logit_softcapping=-1),
    "['altup_num_inputs']: not known": dict(altup_num_inputs=4),
    "dspark_target_layer_ids": dict(dspark_target_layer_ids=[0, 1]),
    "must be true or false": dict(attention_k_eq_v="yes"),
    "Transformers cannot read": dict(global_head_dim="wide"),
    "partial_rotary_factor in (0, 1]": dict(
        rope_parameters={
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1e6,
                "partial_rotary_factor": 2,
            }
        }
    ),
    "hidden_size": dict(hidden_size=None),
    "missing layers.0.self_attn.v_proj.weight": dict(attention_k_eq_v=False),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_ours_is_refused_by_name(target, tmp_path, message):
    run = write_checkpoint(tmp_path / "run", GEMMA4)
    out = export_fp32(run, target, tmp_path / "export")
    reconfigure(out, lambda c: c.update(REFUSED[message]))
    with pytest.raises(ConfigError) as error:
        DraftFolder(out)
    assert message in str(error.value)


def test_a_folder_without_its_scalars_is_refused(target, tmp_path):
    out = export_fp32(write_checkpoint(tmp_path / "run", GEMMA4), target, tmp_path / "export")
    rewrite(out, lambda tensors: tensors.pop("layers.0.layer_scalar"))
    with pytest.raises(ConfigError, match=r"missing layers.0.layer_scalar \[1\]"):
        DraftFolder(out)


@pytest.mark.parametrize("layout", ["speculators", "modelopt", "specforge"])
def test_layouts_without_such_layers_are_refused(target, tmp_path, layout):
    run = write_checkpoint(tmp_path / "run", GEMMA4)
    with pytest.raises(ConfigError, match=f"layout {layout}.*Qwen3-style layers only"):
        export_fp32(run, target, tmp_path / "out", layout=layout)
    out = export_fp32(run, target, tmp_path / "export")
    with pytest.raises(ConfigError, match=f"layout {layout}.*Qwen3-style layers only"):
        convert_folder(out, target, tmp_path / "converted", WriteOptions(layout=layout))
    with pytest.raises(ConfigError, match=f"layout {layout}.*Qwen3-style layers only"):
        DraftFolder(out, layout)
