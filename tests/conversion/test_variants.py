"""Every variant of a draft through every layout that can say it, and the refusals of the others."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dspark_megatron.conversion.draft_folder import DraftFolder
from dspark_megatron.conversion.layouts.foreign_configs import TargetFacts
from dspark_megatron.conversion.layouts.table import LAYOUTS
from dspark_megatron.conversion.layouts.variants import VARIANTS, layout_notes, unsayable
from dspark_megatron.errors import ConfigError
from dspark_megatron.shape.attention import DraftAttention
from dspark_megatron.storage.training_checkpoint import CheckpointReader
from support.draft_folders import export_fp32, import_, reconfigure, write_checkpoint
from support.shapes import VANILLA


def attending(**attention):
    return replace(VANILLA, attention=DraftAttention(**attention))


BOTH = {"window": 9, "sliding_layers": (0, 1)}
ONE = {"window": 9, "sliding_layers": (1,)}
ANCHOR = {"window_origin": "anchor"}
SHAPES = {
    "window": attending(**BOTH),
    "causal window": attending(**BOTH, causal_layers=(0, 1)),
    "window on a layer": attending(**ONE),
    "causal window on a layer": attending(**ONE, causal_layers=(1,)),
    "window on a layer, all causal": attending(**ONE, causal_layers=(0, 1)),
    "window from the anchor": attending(**BOTH, **ANCHOR),
    "causal window from the anchor": attending(**BOTH, **ANCHOR, causal_layers=(0, 1)),
    "causal window from the anchor on a layer": attending(**ONE, **ANCHOR, causal_layers=(1,)),
    "causal": attending(causal_layers=(0, 1)),
    "sink": attending(sink=True),
    "sink and window": attending(sink=True, **BOTH, causal_layers=(0, 1)),
    "biases": attending(biases=True),
    "behind the anchor": replace(VANILLA, block_size=4, sample_from_anchor=False),
    "scaled logits": replace(VANILLA, logit_scale=0.25),
    "all at once": replace(
        attending(**BOTH, causal_layers=(0, 1), sink=True, biases=True),
        block_size=4,
        sample_from_anchor=False,
        logit_scale=2.0,
    ),
}
SAYS = {
    "window": "hf modelopt",
    "causal window": "hf modelopt specforge",
    "window on a layer": "hf",
    "causal window on a layer": "hf specforge",
    "window on a layer, all causal": "hf",
    "window from the anchor": "speculators",
    "causal window from the anchor": "speculators",
    "causal window from the anchor on a layer": "speculators",
    "causal": "hf modelopt",
    "sink": "hf modelopt",
    "sink and window": "hf modelopt",
    "biases": "hf modelopt specforge speculators",
    "behind the anchor": "hf speculators",
    "scaled logits": "hf",
    "all at once": "hf",
}
CASES = [(name, layout) for name in SHAPES for layout in LAYOUTS]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_variant_comes_back_as_it_was_or_is_refused(tmp_path, target, name, layout):
    shape = SHAPES[name]
    run = write_checkpoint(tmp_path / "run", shape)
    if layout not in SAYS[name].split():
        with pytest.raises(ConfigError, match=f"layout {layout} cannot say it") as error:
            export_fp32(run, target, tmp_path / "draft", layout)
        assert all(line in str(error.value) for line in unsayable(layout, shape))
        assert not (tmp_path / "draft").exists()
        return
    folder = export_fp32(run, target, tmp_path / "draft", layout)
    checkpoint = import_(folder, target, tmp_path / "back")
    assert CheckpointReader(checkpoint).shape == shape
    again = export_fp32(tmp_path / "back", target, tmp_path / "again", layout)
    assert (again / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    there, back = (load_file(path / "model.safetensors") for path in (folder, again))
    assert there.keys() == back.keys()
    assert all(torch.equal(there[key], back[key]) for key in there)


def test_every_variant_of_the_table_is_one_of_these():
    tested = [v.name for v in VARIANTS if any(v.has(shape) for shape in SHAPES.values())]
    elsewhere = {"capped logits without Gemma-4 layers", "Gemma-4 layers", "no Markov head"}
    elsewhere |= {"a confidence head that does not see the Markov embedding"}
    assert {*tested, *elsewhere} == {variant.name for variant in VARIANTS}


def test_taps_and_layers_of_a_modelopt_draft_are_a_note():
    assert "3 taps and 2 layers" in layout_notes("modelopt", VANILLA)[0]
    assert not layout_notes("modelopt", replace(VANILLA, num_layers=3))
    assert not layout_notes("hf", VANILLA)


@pytest.fixture
def behind(tmp_path, target):
    """The folders of a draft whose slot 0 drafts nothing, of three tokens in four slots."""
    run = write_checkpoint(tmp_path / "run", SHAPES["behind the anchor"])
    return lambda layout: export_fp32(run, target, tmp_path / layout, layout)


FACTS = TargetFacts("t", (), VANILLA.num_target_layers, VANILLA.max_position_embeddings)


def read(folder, change):
    reconfigure(folder, change)
    shape = DraftFolder(folder).shape
    return shape.block_size, shape.sample_from_anchor


def test_each_layout_counts_a_block_in_its_own_way(behind):
    hf, speculators = (
        json.loads((behind(x) / "config.json").read_text()) for x in ("hf", "speculators")
    )
    assert (hf["block_size"], hf["num_speculative_tokens"]) == (3, 3)
    proposal = speculators["speculators_config"]["proposal_methods"][0]
    assert (speculators["block_size"], proposal["speculative_tokens"]) == (4, 3)


def test_what_counts_the_anchor_must_be_said(behind):
    folder = behind("hf")
    assert read(folder, lambda c: c.update(block_size=4)) == (4, False)
    with pytest.raises(ConfigError, match="add num_speculative_tokens: 4 or 3"):
        read(folder, lambda c: c.pop("num_speculative_tokens"))
    assert read(folder, lambda c: c.update(dspark_bonus_anchor=True)) == (4, False)
    assert read(folder, lambda c: c.pop("sample_from_anchor")) == (4, False)
    with pytest.raises(ConfigError, match="sample_from_anchor true, dspark_bonus_anchor true"):
        read(folder, lambda c: c.update(sample_from_anchor=True))


@pytest.mark.parametrize(
    ("tokens", "found"), [(4, (4, True)), (3, (4, False)), (2, None), (None, None), ("x", None)]
)
def test_a_speculators_draft_without_the_key_is_judged_by_its_tokens(behind, tokens, found):
    folder = behind("speculators")

    def change(config):
        del config["sample_from_anchor"]
        config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] = tokens

    reconfigure(folder, change)
    if found is None:
        with pytest.raises(ConfigError, match="add sample_from_anchor: true or false"):
            DraftFolder(folder, target=FACTS)
    else:
        shape = DraftFolder(folder, target=FACTS).shape
        assert (shape.block_size, shape.sample_from_anchor) == found


def test_unknown_keys_are_passed_over_where_the_user_says_so(draft):
    reconfigure(draft, lambda c: c.update(company="mine", use_gemma_norm=True))
    reconfigure(draft, lambda c: c["dflash_config"].update(team=1))
    allowed = ["company", "dflash_config.team"]
    with pytest.raises(
        ConfigError, match="2 problem.*\n.*company.*--allow-unknown company\n.*use_g"
    ):
        DraftFolder(draft, allow_unknown=["dflash_config.team"])
    with pytest.raises(ConfigError, match="1 problem.*\n.*norms multiply by 1"):
        DraftFolder(draft, allow_unknown=[*allowed, "use_gemma_norm"])
    reconfigure(draft, lambda c: c.pop("use_gemma_norm"))
    assert DraftFolder(draft, allow_unknown=allowed).shape == VANILLA
    with pytest.raises(ConfigError, match="--allow-unknown nothing: config.json has no such key"):
        DraftFolder(draft, allow_unknown=[*allowed, "nothing"])


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("eagle_aux_hidden_state_layer_ids", "x", "must be a list of integers"),
        ("aux_hidden_state_layer_ids", [None], "must be a list of integers"),
        ("architectures", 3, "must be a list of texts"),
        ("dspark_config", 7, r"dspark_config .* must be an object"),
        ("dflash_config", [1], r"dflash_config .* must be an object"),
        ("speculators_config", "x", r"speculators_config .* must be an object"),
        ("dflash_config.shift_label", 0, "labels shifted by one"),
        ("num_speculative_tokens", 0, "does not fit block_size"),
        ("num_speculative_tokens", [3], "does not fit block_size"),
        ("rope_dim", "x", "rope_dim"),
        ("confidence_head_alpha", float("inf"), "confidence_head_alpha must be a number >= 0"),
    ],
)
def test_values_of_another_kind_are_named(draft, place, value, said):
    def change(config):
        *outer, key = place.split(".")
        (config[outer[0]] if outer else config)[key] = value

    reconfigure(draft, change)
    with pytest.raises(ConfigError, match=said):
        DraftFolder(draft)


def test_fewer_tokens_than_slots_do_not_go_with_an_unsaid_anchor(draft):
    reconfigure(draft, lambda c: c.update(num_speculative_tokens=2))
    assert DraftFolder(draft).shape == VANILLA, "it serves fewer"
    reconfigure(draft, lambda c: c.pop("sample_from_anchor"))
    with pytest.raises(ConfigError, match="add sample_from_anchor: true or false"):
        DraftFolder(draft)


def test_keys_within_the_layers_of_speculators_are_known_too(behind):
    folder = behind("speculators")
    reconfigure(
        folder, lambda c: c["transformer_layer_config"].update(dflash_config={"selector_rank": 4})
    )
    with pytest.raises(ConfigError, match="transformer_layer_config.dflash_config.selector_rank 4"):
        DraftFolder(folder, target=FACTS)


def test_a_width_at_the_top_level_counts(draft):
    reconfigure(draft, lambda c: c.update(partial_rotary_factor=0.4, rope_dim=2))
    assert DraftFolder(draft).shape.rope_parameters["partial_rotary_factor"] == 0.4
