"""Folders to import: what they may say, what is refused, and where the run is written."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3Model

from dspark_megatron.conversion.draft_folder import DraftFolder
from dspark_megatron.conversion.export import convert_folder
from dspark_megatron.conversion.folder_writer import WriteOptions
from dspark_megatron.conversion.layouts.foreign_configs import TargetFacts
from dspark_megatron.conversion.layouts.table import LAYOUTS
from dspark_megatron.errors import ConfigError
from dspark_megatron.storage.target_folder import load_target_config
from dspark_megatron.storage.training_checkpoint import CheckpointReader
from support.draft_folders import (
    export_fp32,
    import_,
    reconfigure,
    rewrite,
    trained_tensors,
    write_checkpoint,
)
from support.full_disk import files_of_at_most
from support.shapes import VANILLA


@pytest.mark.parametrize("prefix", ["model.", "logit_head.", "model.logit_head."])
def test_older_beginnings_of_names(draft, prefix):
    heads = ("markov_head.", "confidence_head.")

    def rename(tensors):
        return {
            prefix + name if "model" in prefix or name.startswith(heads) else name: tensor
            for name, tensor in tensors.items()
        }

    before = load_file(draft / "model.safetensors")
    rewrite(draft, rename)
    folder = DraftFolder(draft)
    assert all(torch.equal(folder.tensor(name), tensor) for name, tensor in before.items())


def test_raw_specforge_with_all_keys_nested(draft):
    """Also without the keys whose defaults its readers know."""

    def nest(config):
        for key in (*config["dflash_config"], "num_anchors", "num_target_layers", "head_dim"):
            config.pop(key, None)
        config["dflash_config"]["num_target_layers"] = 6
        config["architectures"] = ["DSparkDraftModel"]
        config["head_dim"] = 6
        config.pop("rope_parameters")

    reconfigure(draft, nest)
    folder = DraftFolder(draft)
    assert folder.layout.name == "specforge" and folder.shape == VANILLA


def test_a_backbone_of_transformers_with_the_heads_beside_it(tmp_path, target):
    """A folder as `save_pretrained` writes it, with the extra tensors and keys put in."""
    config = Qwen3Config(
        vocab_size=33,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
    )
    folder = tmp_path / "saved"
    backbone = Qwen3Model(config)
    backbone.save_pretrained(folder)
    own = {n: t for n, t in backbone.state_dict().items() if not n.startswith("embed_tokens")}
    extra = {n: t for n, t in trained_tensors(VANILLA).items() if n not in own}
    rewrite(folder, lambda tensors: {**own, **extra})
    keys = (
        "block_size mask_token_id target_layer_ids num_target_layers num_anchors markov_rank "
        "markov_head_type enable_confidence_head confidence_head_with_markov"
    ).split()
    values = {**VANILLA.to_dict(), "num_anchors": 512}
    reconfigure(folder, lambda c: c.update({key: values[key] for key in keys}))
    reconfigure(folder, lambda c: c.update(architectures=["Qwen3DSparkModel"]))
    checkpoint = import_(folder, target, tmp_path / "run")
    back = export_fp32(tmp_path / "run", target, tmp_path / "back")
    found = load_file(back / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in {**own, **extra}.items())
    assert CheckpointReader(checkpoint).meta["weights_only"] is True


UNSUPPORTED = {
    "quantization_config": lambda c: c.update(quantization_config={"bits": 4}),
    "shift_label": lambda c: c["dflash_config"].update(shift_label=False),
    "(dflash_config.attention_value_scale 0.5)": lambda c: c["dflash_config"].update(
        attention_value_scale=0.5
    ),
    "(is_neox_style False)": lambda c: c.update(is_neox_style=False),
    "interleaved RoPE": lambda c: c.update(rope_is_neox_style=False),
    "draft_vocab_size": lambda c: c.update(draft_vocab_size=20),
    "'gelu'": lambda c: c.update(hidden_act="gelu"),
    "'gemma4'": lambda c: c.update(model_type="gemma4"),
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_what_our_draft_does_not_have_is_refused(draft, message):
    reconfigure(draft, UNSUPPORTED[message])
    with pytest.raises(ConfigError, match="not supported, and not to be left out") as error:
        DraftFolder(draft)
    assert message in str(error.value)


def test_the_same_settings_at_our_values_are_accepted(draft):
    same = {"logit_scale": 1.0, "is_neox_style": True, "attention_sink_bias": False}
    same["eagle_aux_hidden_state_layer_ids"] = [1, 3, 5]
    reconfigure(draft, lambda c: c.update(same) or c["dflash_config"].update(shift_label=True))
    assert DraftFolder(draft).shape == VANILLA


BAD = {
    "read as hf with a gated Markov head": lambda f: reconfigure(
        f,
        lambda c: [x.update(markov_head_type="gated") for x in (c, c["dflash_config"])],
    ),
    "missing markov_head.gate_proj.weight [5, 21]": lambda f: reconfigure(
        f,
        lambda c: [x.update(markov_head_type="gated") for x in (c, c["dflash_config"])],
    ),
    "unexpected confidence_head.proj.bias [1]": lambda f: reconfigure(
        f,
        lambda c: [x.update(enable_confidence_head=False) for x in (c, c["dflash_config"])],
    ),
    "vocab_size (34) must be the target's (33)": lambda f: (
        reconfigure(f, lambda c: c.update(vocab_size=34)),
        rewrite(
            f,
            lambda t: {n: torch.cat([x, x[:1]]) if x.shape[0] == 33 else x for n, x in t.items()},
        ),
    ),
    "must be strictly increasing": lambda f: reconfigure(
        f, lambda c: [x.update(target_layer_ids=[2, 0, 4]) for x in (c, c["dflash_config"])]
    ),
    "in [0, 4]": lambda f: reconfigure(
        f, lambda c: [x.update(target_layer_ids=[-1, 0, 4]) for x in (c, c["dflash_config"])]
    ),
    "norm.weight has type torch.int32": lambda f: rewrite(
        f, lambda t: t.update({"norm.weight": t["norm.weight"].int()})
    ),
    "norm.weight has 2 values that are not finite": lambda f: rewrite(
        f, lambda t: t["norm.weight"][:2].fill_(torch.nan)
    ),
    "embed_tokens.weight differs from its source": lambda f: rewrite(
        f, lambda t: t["embed_tokens.weight"][0].add_(1)
    ),
    "must be there as a whole, readable safetensors file": lambda f: (
        f / "model.safetensors"
    ).write_bytes((f / "model.safetensors").read_bytes()[:-40]),
    "is not valid JSON": lambda f: (f / "config.json").write_text("{"),
    "has no config.json": lambda f: (f / "config.json").unlink(),
    "lacks ['markov_rank']": lambda f: reconfigure(
        f, lambda c: [x.pop("markov_rank") for x in (c, c["dflash_config"])]
    ),
    "is no DSpark draft of a known layout": lambda f: reconfigure(
        f,
        lambda c: (
            [x.pop("markov_rank") for x in (c, c["dflash_config"])]
            and c.update(architectures=["LlamaForCausalLM"])
        ),
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_folder_is_refused_and_left_alone(tmp_path, target, draft, message):
    BAD[message](draft)
    before = {path: path.read_bytes() for path in draft.iterdir()}
    for use in (
        lambda: import_(draft, target, tmp_path / "imported"),
        lambda: convert_folder(draft, target, tmp_path / "converted", WriteOptions()),
    ):
        with pytest.raises(ConfigError) as error:
            use()
        assert message in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draft", "run", "target"]
    assert {path: path.read_bytes() for path in draft.iterdir()} == before


JUNK = [None, -1, 0, 1.5, "x", [], [None], {}, True]


UNREAD = set(
    "architectures dtype torch_dtype attention_dropout sliding_window max_window_layers use_cache "
    "tie_word_embeddings bos_token_id eos_token_id pad_token_id sample_from_anchor shift_label "
    "attention_mode speculators_model_type speculators_version target_hidden_size algorithm "
    "sliding_window_non_causal speculators_config default_proposal_method proposal_methods "
    "verifier".split()
)
"""No junk in these changes what the draft computes; `architectures` where other keys tell."""


MAY_BE_ABSENT = set(
    "rms_norm_eps max_position_embeddings rope_theta rope_parameters num_target_layers num_anchors "
    "initializer_range confidence_head_alpha draft_vocab_size attention_bias layer_types "
    "use_sliding_window dflash_config causal".split()
)


VALID = {
    "causal": [True],
    "mask_token_id": [-1, 0],  # whether the target has it is seen with the target
    **dict.fromkeys(("num_anchors", "initializer_range", "confidence_head_alpha"), [0, 1.5]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_config_with_any_junk_is_refused_in_words(tmp_path, target, layout):
    """Every key in turn, at the top and nested, with values of every kind."""
    run = write_checkpoint(tmp_path / "run", VANILLA)
    folder = export_fp32(run, target, tmp_path / "draft", layout)
    good = json.loads((folder / "config.json").read_text())
    facts = TargetFacts.of(load_target_config(target), "target")
    places = [(), ("dflash_config",), ("transformer_layer_config",), ("speculators_config",)]
    places += [("rope_parameters",), ("transformer_layer_config", "rope_parameters")]
    for place in places:
        for key in set(inner(good, place)) - UNREAD:
            for junk in JUNK:
                config = json.loads(json.dumps(good))
                same = junk is inner(config, place)[key]
                inner(config, place)[key] = junk
                (folder / "config.json").write_text(json.dumps(config))
                absent = not junk and key in MAY_BE_ABSENT
                try:
                    DraftFolder(folder, target=facts)
                except ConfigError:
                    assert not same
                else:
                    assert same or absent or junk in VALID.get(key, []), (place, key, junk)


def inner(config, place):
    for key in place:
        config = config.get(key, {})
    return config


def test_an_import_never_writes_over_anything(tmp_path, target, draft):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").touch()
    with pytest.raises(ConfigError, match="not empty; choose a new run folder"):
        import_(draft, target, taken)
    with pytest.raises(ConfigError, match="is the input itself"):
        convert_folder(draft, target, draft, WriteOptions(force=True))
    with pytest.raises(ConfigError, match=r"must be divisible by parallel.tensor_parallel \(8\)"):
        import_(draft, target, tmp_path / "eight", tensor_parallel=8)
    assert [path.name for path in taken.iterdir()] == ["mine"]


def test_an_import_into_the_folder_where_one_stands(tmp_path, target, draft, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "here.partial").mkdir()
    monkeypatch.chdir(here)
    import_(draft, target, ".")
    assert (here / "checkpoints/iter_0000000/.metadata").is_file()
    names = ["draft", "here", "here.partial", "run", "target"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_write_that_the_system_refuses_leaves_nothing(tmp_path, target, draft):
    out = tmp_path / "out"
    for use in (
        lambda: import_(draft, target, out),
        lambda: convert_folder(draft, target, out, WriteOptions()),
    ):
        with files_of_at_most(4096), pytest.raises(ConfigError, match="cannot write .*File too l"):
            use()
    assert not list(tmp_path.glob("*out*"))
