"""A target and a draft whose logits are scaled are those of a head that is scaled itself."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from support.stored_states import prepare_options
from support.target_families import make_family
from support.tiny_target import make_chats, tiny_config
from support.training_runs import assert_same_curve, curve, run_training

SCALE = 0.25
HEADS = dict(num_attention_heads=8, num_key_value_heads=4, head_dim=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Targets `scaled`, by its config, and `folded`, by the weights of its head, and answers to
    estimate on."""
    folder = tmp_path_factory.mktemp("scaled")
    make_family(folder / "scaled", "cohere", logit_scale=SCALE, tie_word_embeddings=False)
    shutil.copytree(folder / "scaled", folder / "folded")
    config = json.loads((folder / "folded" / "config.json").read_text())
    (folder / "folded" / "config.json").write_text(json.dumps(config | {"logit_scale": 1.0}))
    weights = folder / "folded" / "model.safetensors"
    tensors = load_file(weights)
    tensors["lm_head.weight"] *= SCALE
    save_file(tensors, weights, metadata={"format": "pt"})
    make_chats(folder / "heldout.jsonl")
    return folder


def run_of(tiny_run, folder, name, kind, logit_scale, **sections):
    at = {"path": str(folder / kind), **sections.pop("target", {})}
    evaluate = {"heldout_files": [str(folder / "heldout.jsonl")], "every": 2, "temperature": 0.7}
    if at.get("provider") == "cache":
        evaluate = {}  # estimates need the target itself
    train = {"output_dir": str(folder / name), "iterations": 2, "save_every": 2}
    return tiny_config(
        tiny_run,
        target=at,
        model={**HEADS, "logit_scale": logit_scale},
        train=train,
        evaluate=evaluate,
        **sections,
    )


def test_a_scale_is_that_of_the_head_in_training_and_in_estimates(pool, tiny_run, folder):
    folded = run_of(tiny_run, folder, "a", "folded", 1.0)
    pool.run(run_training, world=1, tp=1, config=folded)
    expected = curve(folder / "a")
    scaled = run_of(tiny_run, folder, "b", "scaled", SCALE)
    cache = str(folder / "cache")
    pool.run(prepare_options, world=1, tp=1, config=scaled, output=cache, dtype="float32")
    stored = dict(provider="cache", cache=cache)
    stored = run_of(tiny_run, folder, "c", "scaled", SCALE, target=stored)
    pool.run(run_training, world=1, tp=1, config=stored)
    assert_same_curve(curve(folder / "c"), expected)
    split = run_of(tiny_run, folder, "b", "scaled", SCALE, parallel={"tensor_parallel": 2})
    pool.run(run_training, world=2, tp=2, config=split)
    assert_same_curve(curve(folder / "b"), expected)
    taus = [json.loads((folder / x / "heldout.jsonl").read_text())["tau"] for x in "ab"]
    assert taus[0] == pytest.approx(taus[1], rel=1e-4) and taus[0] > 1
    unscaled = run_of(tiny_run, folder, "d", "scaled", 1.0)
    pool.run(run_training, world=1, tp=1, config=unscaled)
    assert abs(curve(folder / "d")[0]["l1_loss"] - expected[0]["l1_loss"]) > 1e-3
    # The weights of the target are the same, so its fingerprint is.
    changed = json.loads((folder / "scaled" / "config.json").read_text()) | {"logit_scale": 0.5}
    (folder / "scaled" / "config.json").write_text(json.dumps(changed))
    with pytest.raises(AssertionError, match="target_logits.scale: 0.25 there, 0.5 here"):
        pool.run(run_training, world=2, tp=2, config=split)
