"""Drafts of every layout: to it, from it, between two, into Megatron; and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Qwen3Config, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from dspark_megatron.conversion.draft_folder import DraftFolder
from dspark_megatron.conversion.export import convert_folder, export_checkpoint
from dspark_megatron.conversion.folder_writer import WriteOptions
from dspark_megatron.conversion.import_draft import import_folder
from dspark_megatron.conversion.layouts.foreign_configs import TargetFacts
from dspark_megatron.conversion.layouts.names import hugging_face_shapes
from dspark_megatron.conversion.layouts.table import LAYOUTS
from dspark_megatron.errors import ConfigError
from dspark_megatron.ops.rope import RotaryTable
from dspark_megatron.storage.target_folder import load_target_config
from dspark_megatron.storage.training_checkpoint import CheckpointReader, find_checkpoint
from support.draft_folders import (
    FINGERPRINT,
    ROPES,
    trained_tensors,
    write_checkpoint,
    write_target,
)
from support.full_disk import files_of_at_most
from support.shapes import FOLDER_SHAPES, VANILLA

FP32 = torch.float32
NOT_MODELOPT = ("no Markov head", "confidence without Markov")
"""Drafts that ModelOpt's layout cannot express."""
CASES = [
    (name, layout)
    for name in FOLDER_SHAPES
    for layout in LAYOUTS
    if layout != "modelopt" or name not in NOT_MODELOPT
]


@pytest.fixture
def target(tmp_path):
    return write_target(tmp_path / "target")


def export(run, target, out, layout="hf", dtype=FP32, **options):
    return export_checkpoint(run, target, out, WriteOptions(layout=layout, dtype=dtype, **options))


def import_(folder, target, run, **options):
    return import_folder(folder, target, run, fingerprint=lambda path: FINGERPRINT, **options)


@pytest.mark.parametrize("name, layout", CASES)
def test_a_checkpoint_comes_back_as_it_was(tmp_path, target, name, layout):
    shape = FOLDER_SHAPES[name]
    run = write_checkpoint(tmp_path / "run", shape)
    folder = export(run, target, tmp_path / "draft", layout)
    facts = TargetFacts.of(load_target_config(target), "target")
    assert DraftFolder(folder, target=facts).layout.name == layout
    checkpoint = import_(folder, target, tmp_path / "back", tensor_parallel=2)
    before, after = CheckpointReader(find_checkpoint(run)), CheckpointReader(checkpoint)
    assert after.shape == before.shape
    assert after.names().keys() == before.names().keys()
    for tensor in after.names():
        a, b = before.tensor(tensor), after.tensor(tensor)
        if "markov_w" in tensor:
            assert b.shape[0] == 34 and not b[33:].any(), "padded for two ranks"
            a, b = a[:33], b[:33]
        assert torch.equal(a, b), tensor
    again = export(tmp_path / "back", target, tmp_path / "again", layout)
    for file in ("config.json", "model.safetensors"):
        assert (again / file).read_bytes() == (folder / file).read_bytes()
    keeps_facts = layout in ("hf", "specforge")
    assert after.meta["num_anchors"] == (before.meta["num_anchors"] if keeps_facts else 512)


def without_facts(path):
    """A config without what some layouts have no key for."""
    config = json.loads(path.read_text())
    config.pop("num_anchors", None)
    return config


@pytest.mark.parametrize("theirs", ["speculators", "modelopt", "specforge"])
@pytest.mark.parametrize("name", ["vanilla", "gated", "rnn", "no confidence head"])
def test_between_two_layouts_and_back(tmp_path, target, name, theirs):
    run = write_checkpoint(tmp_path / "run", FOLDER_SHAPES[name])
    ours = export(run, target, tmp_path / "ours")
    foreign = convert_folder(ours, target, tmp_path / "foreign", WriteOptions(layout=theirs))
    direct = export(run, target, tmp_path / "direct", theirs, dtype=torch.bfloat16)
    for file in ("config.json", "model.safetensors"):
        assert (foreign / file).read_bytes() == (direct / file).read_bytes()
    options = WriteOptions(dtype=None)
    exact = convert_folder(ours, target, tmp_path / "exact", WriteOptions(theirs, dtype=None))
    back = convert_folder(exact, target, tmp_path / "back", options)
    assert (back / "model.safetensors").read_bytes() == (ours / "model.safetensors").read_bytes()
    assert without_facts(back / "config.json") == without_facts(ours / "config.json")


def test_names_and_keys_of_modelopt(tmp_path, target):
    run = write_checkpoint(tmp_path / "run", FOLDER_SHAPES["gated"])
    folder = export(run, target, tmp_path / "draft", "modelopt")
    found = load_file(folder / "model.safetensors")
    ours = trained_tensors(FOLDER_SHAPES["gated"])
    assert found.keys() == {
        name.replace("markov_head.", "").replace("confidence_head.proj", "confidence_proj")
        for name in ours
    }
    assert torch.equal(found["markov_w2.weight"], ours["markov_head.markov_w2.weight"])
    assert torch.equal(found["gate_proj.bias"], ours["markov_head.gate_proj.bias"])
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["DFlashDraftModel"] and "markov_rank" not in config
    assert config["dflash_config"]["use_confidence_head"] is True
    assert "enable_confidence_head" not in config["dflash_config"]


def test_keys_of_speculators(tmp_path, target):
    run = write_checkpoint(tmp_path / "run", VANILLA)
    folder = export(run, target, tmp_path / "draft", "speculators", target_name="org/target")
    config = json.loads((folder / "config.json").read_text())
    assert "model_type" not in config, "with it vLLM would not take it for a speculators draft"
    assert config["aux_hidden_state_layer_ids"] == [1, 3, 5], "one more than [0, 2, 4]"
    assert config["sample_from_anchor"] is True
    assert config["transformer_layer_config"]["model_type"] == "qwen3"
    assert config["speculators_config"]["verifier"]["name_or_path"] == "org/target"
    assert (
        not {"embed_tokens.weight", "lm_head.weight"}
        & load_file(folder / "model.safetensors").keys()
    )


def test_a_layout_that_cannot_express_the_draft(tmp_path, target):
    run = write_checkpoint(tmp_path / "run", FOLDER_SHAPES["confidence without Markov"])
    with pytest.raises(ConfigError, match="ModelOpt's confidence head always sees"):
        export(run, target, tmp_path / "draft", "modelopt")
    assert not (tmp_path / "draft").exists()


@pytest.fixture
def draft(tmp_path, target):
    return export(write_checkpoint(tmp_path / "run", VANILLA), target, tmp_path / "draft")


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors)
    if isinstance(changed, dict):
        tensors = changed
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def reconfigure(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


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
    back = export(tmp_path / "run", target, tmp_path / "back")
    found = load_file(back / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in {**own, **extra}.items())
    assert CheckpointReader(checkpoint).meta["weights_only"] is True


def in_rope_parameters(config):
    del config["rope_theta"]
    config.pop("rope_scaling", None)


def in_the_older_keys(config):
    rope = config.pop("rope_parameters")
    config["rope_scaling"] = {k: v for k, v in rope.items() if not k.startswith("rope_")}
    config["rope_scaling"]["type"] = rope["rope_type"]


def theta_at_the_top(config):
    config.pop("rope_scaling", None)
    del config["rope_parameters"]["rope_theta"]


def with_what_targets_hand_on(config):
    config["rope_parameters"] |= {"mrope_section": [1, 1, 1], "mrope_interleaved": True}
    config["rope_parameters"]["partial_rotary_factor"] = 1.0


ROPE_SPELLINGS = [
    in_rope_parameters,
    in_the_older_keys,
    theta_at_the_top,
    with_what_targets_hand_on,
    lambda config: None,  # both, as an export has them
]


@pytest.mark.parametrize("layout", ["hf", "speculators"])
@pytest.mark.parametrize("spell", ROPE_SPELLINGS)
@pytest.mark.parametrize("kind", ROPES)
def test_every_spelling_of_the_rope_is_read_as_transformers_does(
    tmp_path, target, kind, spell, layout
):
    shape = dataclasses.replace(VANILLA, rope_parameters=ROPES[kind])
    draft = export(write_checkpoint(tmp_path / "run", shape), target, tmp_path / "draft", layout)
    reconfigure(draft, lambda c: spell(c.get("transformer_layer_config", c)))
    config = json.loads((draft / "config.json").read_text())
    facts = TargetFacts.of(load_target_config(target), "target")
    assert DraftFolder(draft, target=facts).shape.rope_parameters == ROPES[kind]
    rotary = Qwen3RotaryEmbedding(Qwen3Config(**config.get("transformer_layer_config", config)))
    ours = RotaryTable(ROPES[kind], 6, 256)
    assert torch.equal(rotary.inv_freq, ours.inv_freq)
    assert rotary.attention_scaling == ours.attention_scaling


def test_yarn_without_its_original_length_takes_the_configs(draft):
    """The way Qwen's model cards have it."""
    scaling = {"type": "yarn", "factor": 4.0}
    reconfigure(draft, lambda c: c.pop("rope_parameters") and c.update(rope_scaling=scaling))
    ours = DraftFolder(draft).shape
    assert ours.rope_parameters["original_max_position_embeddings"] == 256
    theirs = Qwen3RotaryEmbedding(AutoConfig.from_pretrained(draft))
    table = RotaryTable(ours.rope_parameters, 6, 4096)
    assert torch.equal(theirs.inv_freq, table.inv_freq)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
BAD_ROPE = {
    "rope_type': 'default'} and rope_scaling {'rope_type': 'yarn'": {"rope_scaling": YARN},
    "rope_theta is 5.0 at the top level and 10000.0 in rope_parameters": {"rope_theta": 5.0},
    "rope_type ('foo') must be one of default, linear, llama3, yarn": {
        "rope_parameters": {"rope_type": "foo", "rope_theta": 10000.0}
    },
    "rope_type ('mrope')": {
        "rope_parameters": None,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]},
    },
    "rope_type ('dynamic')": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    },
    "rope_theta must be a number > 0, is 'abc'": {
        "rope_parameters": {"rope_type": "default", "rope_theta": "abc"},
        "rope_theta": "abc",
    },
    "rope_theta must be a number > 0, is -1.0": {"rope_parameters": None, "rope_theta": -1.0},
    "rope_theta must be a number > 0, is None": {"rope_parameters": None, "rope_theta": None},
    "cannot be computed: {'rope_type': 'yarn'": {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0}
    },
    "'factor': 'x'": {"rope_parameters": {"rope_type": "linear", "factor": "x"}},
    "rope_parameters must be an object, is 'x'": {"rope_parameters": "x"},
    "rms_norm_eps (-1e-06) must be in (0, 1)": {"rms_norm_eps": -1e-6},
}


@pytest.mark.parametrize("message", BAD_ROPE)
def test_mathematics_that_is_not_ours_is_refused(draft, message):
    reconfigure(draft, lambda c: c.update(BAD_ROPE[message]))
    with pytest.raises(ConfigError) as error:
        DraftFolder(draft)
    assert message in str(error.value)


UNSUPPORTED = {
    "quantization_config": lambda c: c.update(quantization_config={"bits": 4}),
    "sliding_attention": lambda c: c.update(layer_types=["sliding_attention"] * 2),
    "use_sliding_window": lambda c: c.update(use_sliding_window=True),
    "use_swa": lambda c: c["dflash_config"].update(use_swa=True),
    "causal attention": lambda c: c["dflash_config"].update(causal=True),
    "attention_bias": lambda c: c.update(attention_bias=True),
    "sample_from_anchor": lambda c: c.update(sample_from_anchor=False),
    "blocks whose anchor": lambda c: (
        c.pop("sample_from_anchor") and c["dflash_config"].update(sample_from_anchor=False)
    ),
    "shift_label": lambda c: c["dflash_config"].update(shift_label=False),
    "logit_scale 0.5 instead of 1": lambda c: c.update(logit_scale=0.5),
    "attention_value_scale 0.5": lambda c: c["dflash_config"].update(attention_value_scale=0.5),
    "(is_neox_style false)": lambda c: c.update(is_neox_style=False),
    "interleaved RoPE": lambda c: c.update(rope_is_neox_style=False),
    "attention_sink_bias": lambda c: c["dflash_config"].update(attention_sink_bias=True),
    "eagle_aux_hidden_state_layer_ids [0, 2, 4] counts the embedding": lambda c: c.update(
        eagle_aux_hidden_state_layer_ids=[0, 2, 4]
    ),
    "draft_vocab_size": lambda c: c.update(draft_vocab_size=20),
    "'gelu'": lambda c: c.update(hidden_act="gelu"),
    "'gemma4'": lambda c: c.update(model_type="gemma4"),
    "dspark_bonus_anchor": lambda c: c.update(dspark_bonus_anchor=True),
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
    "use_sliding_window dflash_config".split()
)
VALID = {
    "mask_token_id": [-1, 0],  # whether the target has it is seen with the target
    **dict.fromkeys(("num_anchors", "initializer_range", "confidence_head_alpha"), [0, 1.5]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_config_with_any_junk_is_refused_in_words(tmp_path, target, layout):
    """Every key in turn, at the top and nested, with values of every kind."""
    run = write_checkpoint(tmp_path / "run", VANILLA)
    folder = export(run, target, tmp_path / "draft", layout)
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
    with pytest.raises(ConfigError, match=r"must be divisible by parallel.tensor_parallel \(4\)"):
        import_(draft, target, tmp_path / "four", tensor_parallel=4)
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


def test_temperatures_are_carried_along(tmp_path, target, draft):
    good = {"temperatures": [1.0, 0.5, 2.0], "dataset": "", "num_samples": 3}
    (draft / "dspark_sts.json").write_text(json.dumps(good))
    other = convert_folder(draft, target, tmp_path / "other", WriteOptions("specforge"))
    assert json.loads((other / "dspark_sts.json").read_text()) == good
    assert "dspark_sts.json" in (other / "README.md").read_text()
    import_(draft, target, tmp_path / "imported")
    back = export(tmp_path / "imported", target, tmp_path / "back")
    assert json.loads((back / "dspark_sts.json").read_text()) == good
    (draft / "dspark_sts.json").write_text(json.dumps({"temperatures": [1.0, 0.0, 1.0]}))
    for bad in ([1.0, 0.0, 1.0], [1.0, float("inf"), 1.0], [1.0, True, 1.0], [1.0, 1.0]):
        (draft / "dspark_sts.json").write_text(json.dumps({"temperatures": bad}))
        with pytest.raises(ConfigError, match="one positive temperature for each of the 3 slots"):
            convert_folder(draft, target, tmp_path / "third", WriteOptions())


def test_temperatures_of_another_iteration_are_refused(tmp_path, target):
    run = write_checkpoint(tmp_path / "run", VANILLA)
    temperatures = {"temperatures": [1.0, 0.5, 2.0], "iteration": 100}
    (run / "dspark_sts.json").write_text(json.dumps(temperatures))
    out = export(run, target, tmp_path / "out")
    import_(out, target, tmp_path / "back")
    export(tmp_path / "back", target, tmp_path / "again")
    write_checkpoint(run, VANILLA, iteration=200)
    with pytest.raises(ConfigError, match="was calibrated for iteration 100, this draft is of 200"):
        export(run, target, tmp_path / "third")


def test_what_was_made_in_an_export_is_not_replaced(tmp_path, target):
    run = write_checkpoint(tmp_path / "run", VANILLA)
    (run / "dspark_sts.json").write_text(json.dumps({"temperatures": [1.0, 0.5, 2.0]}))
    out = export(run, target, tmp_path / "out")
    export(run, target, out, force=True)
    card = (out / "README.md").read_text()
    (out / "README.md").write_text(card.replace("## License", "## Licence\n\nMIT"))
    (out / "dspark_sts.json").write_text(json.dumps({"temperatures": [3.0, 3.0, 3.0]}))
    with pytest.raises(ConfigError, match="dspark_sts.json, which is not .* README.md, which was"):
        export(run, target, out, force=True)
    (out / "README.md").write_text(card)
    (out / "dspark_sts.json").unlink()
    export(run, target, out, force=True)


def test_the_same_export_and_import_may_be_written_again(tmp_path, target):
    run, out = write_checkpoint(tmp_path / "run", VANILLA), tmp_path / "out"
    export(run, target, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    export(run, target, out)
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    for other in ({"dtype": torch.bfloat16}, {"shared_weights": False}):
        with pytest.raises(ConfigError, match="of other weights or settings; give --force"):
            export(run, target, out, **other)
    imported = import_(out, target, tmp_path / "imported")
    assert import_(out, target, tmp_path / "imported") == imported

    tensors = load_file(out / "model.safetensors")
    tensors["fc.weight"][0, 0] += 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="of other weights or settings; give --force"):
        export(run, target, out)
    with pytest.raises(ConfigError, match="is there already and not empty"):
        import_(out, target, tmp_path / "imported")


def test_a_newer_calibration_of_the_same_checkpoint_takes_the_place_of_an_older(tmp_path, target):
    run, out = write_checkpoint(tmp_path / "run", VANILLA), tmp_path / "out"
    of = {"iteration": 100, "checkpoint": "run/checkpoints/iter_0000100"}
    for temperature in (2.0, 3.0):
        sidecar = {"temperatures": [temperature] * VANILLA.block_size, **of}
        (run / "dspark_sts.json").write_text(json.dumps(sidecar))
        export(run, target, out)
        assert json.loads((out / "dspark_sts.json").read_text()) == sidecar
    (out / "dspark_sts.json").write_text(json.dumps({**sidecar, "iteration": 50}))
    with pytest.raises(ConfigError, match="would delete its dspark_sts.json"):
        export(run, target, out, force=True)


def test_the_card_has_what_is_known(tmp_path, target):
    run = write_checkpoint(tmp_path / "run", FOLDER_SHAPES["gated"])
    figures = {"heldout.jsonl": {"prompts": 5, "tau": 3.25}}
    evaluation = {"iteration": 100, "temperature": 0.0, "files": figures}
    evaluation["checkpoint"] = "/elsewhere/run/checkpoints/iter_0000100"
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    card = (export(run, target, tmp_path / "dspark", target_name="org/t") / "README.md").read_text()
    assert "# DSpark drafter for org/t" in card and "gated Markov head of rank 5" in card
    assert "100 iterations over 800 samples" in card
    assert "| heldout.jsonl | 5 | 3.250 |" in card
    assert "--speculative-algorithm DSPARK" in card and "vllm serve" not in card, "gated"
    vanilla = write_checkpoint(tmp_path / "vanilla", VANILLA)
    card = (export(vanilla, target, tmp_path / "v", target_name="org/t") / "README.md").read_text()
    assert "vllm serve org/t --speculative-config" in card and '"num_speculative_tokens": 3' in card
    card = (export(vanilla, target, tmp_path / "m", "modelopt") / "README.md").read_text()
    assert "Neither vLLM nor SGLang loads this folder" in card
    for other in ("run/checkpoints/iter_0000050", "other/checkpoints/iter_0000100", None):
        (run / "evaluation.json").write_text(json.dumps({**evaluation, "checkpoint": other}))
        shutil.rmtree(tmp_path / "dspark")
        card = (export(run, target, tmp_path / "dspark") / "README.md").read_text()
        assert "tau" not in card, "the evaluation is of another checkpoint"
    for malformed in ({**evaluation, "files": {"a": {}}}, {**evaluation, "files": []}, [], {}):
        (run / "evaluation.json").write_text(json.dumps(malformed))
        with pytest.raises(ConfigError, match="evaluation.json is not as evaluation writes it"):
            export(run, target, tmp_path / "third")


def write_at(runtime, shape, folder, run):
    """A draft filled from a folder at this size, and saved as training saves it."""
    from dspark_megatron.conversion.draft_tensors import fill_draft
    from dspark_megatron.run import checkpoints as c
    from support.tiny_draft import build_tiny_draft

    draft = build_tiny_draft(runtime, shape)
    fill_draft(draft, DraftFolder(folder).tensor, tp_group=runtime.tp_group)
    meta = {"format": 1, "shape": shape.to_dict(), "target_fingerprint": FINGERPRINT}
    meta |= {"num_anchors": 16, "initializer_range": 0.02, "confidence_head_alpha": 1.0}
    state = c.RunState(100, 800)
    c.save_checkpoint(Path(run, "checkpoints"), state, meta, draft, None, keep_last=1)


def read_at(runtime, shape, checkpoint):
    """The trained parameters of this rank from a checkpoint, and those filled from a folder."""
    from dspark_megatron.run.checkpoints import load_checkpoint
    from support.tiny_draft import build_tiny_draft

    draft = build_tiny_draft(runtime, shape)
    load_checkpoint(checkpoint, draft, None)
    return {n: p.detach().clone() for n, p in draft.named_parameters() if p.requires_grad}


FOUR = dataclasses.replace(VANILLA, num_key_value_heads=4)
"""Splits over four ranks."""


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_megatron_reads_and_writes_the_same_at_every_size(pool, tmp_path, target, head):
    """Folder -> model at TP -> checkpoint -> folder gives the same bytes, and an import loads."""
    shape = dataclasses.replace(FOUR, markov_head_type=head)
    run = write_checkpoint(tmp_path / "run", shape)
    first = {layout: export(run, target, tmp_path / layout, layout) for layout in LAYOUTS}
    imported = {x: import_(first[x], target, tmp_path / f"import {x}") for x in LAYOUTS}
    for tp in (1, 2, 4):
        trained = tmp_path / f"trained {tp}"
        options = dict(shape=shape, folder=first["hf"], run=trained)
        pool.run(write_at, world=tp, tp=tp, **options)
        for layout, folder in first.items():
            again = export(trained, target, tmp_path / f"{layout} {tp}", layout)
            for file in ("config.json", "model.safetensors"):
                assert (again / file).read_bytes() == (folder / file).read_bytes(), (layout, tp)
        wanted = pool.run(
            read_at, world=tp, tp=tp, shape=shape, checkpoint=find_checkpoint(trained)
        )
        for layout, checkpoint in imported.items():
            got = pool.run(read_at, world=tp, tp=tp, shape=shape, checkpoint=checkpoint)
            for mine, theirs in zip(got, wanted, strict=True):
                assert mine.keys() == theirs.keys()
                assert all(torch.equal(mine[n], theirs[n]) for n in mine), (layout, tp)


def test_a_checkpoint_of_the_same_iteration_is_replaced(pool, tmp_path, target):
    folder = export(write_checkpoint(tmp_path / "run", VANILLA), target, tmp_path / "draft")
    trained = tmp_path / "trained"
    for _ in range(2):
        pool.run(write_at, world=1, tp=1, shape=VANILLA, folder=folder, run=trained)
    names = sorted(path.name for path in (trained / "checkpoints").iterdir())
    assert names == ["iter_0000100", "latest_checkpointed_iteration.txt"]
    again = export(trained, target, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_every_layout_has_each_tensor_once():
    for shape in FOLDER_SHAPES.values():
        names = hugging_face_shapes(shape)
        for layout in LAYOUTS.values():
            theirs = [layout.to_name(name) for name in names]
            assert len(set(theirs)) == len(names)
            assert [layout.from_name(name) for name in theirs] == list(names)
