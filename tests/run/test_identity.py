"""What must be as it was for a run to continue, and what older checkpoints lack."""

import json
import shutil
from pathlib import Path

import pytest

from dspark_megatron.errors import ConfigError
from support.tiny_target import make_target, tiny_config
from support.training_runs import curve, run_training


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"model": {"block_size": 4}}, "shape.block_size: 3 there, 4 here"),
        ({"model": {"sample_from_anchor": False}}, "shape.sample_from_anchor: True there, False"),
        ({"train": {"seed": 9}}, "seed: 1234 there, 9 here"),
        ({"optimizer": {"name": "muon"}}, "optimizer.name: 'adamw' there, 'muon' here"),
        ({"data": {"max_length": 40}}, "data_fingerprint"),
        ({"data": {"weights": [2.0]}}, "data_fingerprint"),
    ],
)
def test_a_run_with_other_settings_is_not_continued(pool, tiny_run, unbroken, sections, message):
    settings = {**sections, "train": {**sections.get("train", {}), "output_dir": str(unbroken)}}
    with pytest.raises(AssertionError, match=message):
        pool.run(run_training, world=1, tp=1, config=tiny_config(tiny_run, **settings))


def test_other_loss_weights_are_not_continued(pool, tiny_run, unbroken):
    config = tiny_config(tiny_run, train={"output_dir": str(unbroken)}, loss={"ce_loss_alpha": 0.5})
    with pytest.raises(AssertionError, match="loss.terms.ce: 0.1 there, 0.5 here"):
        pool.run(run_training, world=1, tp=1, config=config)


YOUNGER_KEYS = (
    "terms",
    "weighting",
    "confidence_weights",
    "confidence_stop_gradient",
    "ce_labels",
    "anchor_rule",
    "supervised_slots",
    "slot_mask",
)
"""Of the loss section; the first checkpoints lack them."""


@pytest.fixture
def old_run(unbroken, tmp_path):
    """The run as an older version would have left it: fewer keys and fewer kept sums."""
    output = tmp_path / "old"
    shutil.copytree(unbroken, output)
    file = output / "checkpoints" / "iter_0000020" / "dspark.json"
    meta = json.loads(file.read_text())
    for key in YOUNGER_KEYS:
        del meta["loss"][key]
    meta["loss"] |= {"ce_loss_alpha": 0.1, "l1_loss_alpha": 0.9, "tvd_loss_alpha": 0.0}
    del meta["target_logits"], meta["optimizer"]
    meta["open_metrics"] = meta["open_metrics"][1:]
    file.write_text(json.dumps(meta))
    file.with_name("checksums.json").unlink()
    return output


def test_a_checkpoint_without_younger_keys_is_continued_at_their_defaults(pool, tiny_run, old_run):
    config = tiny_config(tiny_run, train={"output_dir": str(old_run), "iterations": 21})
    pool.run(run_training, world=1, tp=1, config=config)
    assert curve(old_run)[-1]["iteration"] == 21


def test_a_checkpoint_without_younger_keys_has_no_other_values(pool, tiny_run, old_run):
    settings = {"output_dir": str(old_run), "iterations": 21}
    config = tiny_config(tiny_run, train=settings, loss={"anchor_rule": "token"})
    with pytest.raises(AssertionError, match="loss.anchor_rule: 'label' there, 'token' here"):
        pool.run(run_training, world=1, tp=1, config=config)


def test_the_same_loss_in_other_words_is_continued(pool, tiny_run, unbroken, tmp_path):
    """A preset whose every difference is taken back, and other sizes of chunks."""
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    config = tiny_config(
        tiny_run,
        train={"output_dir": str(tmp_path), "iterations": 21},
        loss={
            "preset": "modelopt",
            "anchor_rule": "label",
            "supervised_slots": "prefix",
            "normalization": "global_step",
            "chunk_rows": None,
            "memory_budget_mb": 64,
        },
    )
    pool.run(run_training, world=1, tp=1, config=config)
    assert curve(tmp_path)[-1]["iteration"] == 21


def test_another_target_is_not_continued(pool, tiny_run, unbroken, tmp_path):
    other = make_target(tmp_path / "other", seed=1)
    config = tiny_config(tiny_run, target={"path": str(other)}, train={"output_dir": str(unbroken)})
    with pytest.raises(AssertionError, match="target_fingerprint"):
        pool.run(run_training, world=1, tp=1, config=config)


def test_an_output_directory_that_cannot_be_made(tiny_run, tmp_path):
    from dspark_megatron.run.output import claim_output

    (tmp_path / "file").write_text("in the way")
    config = tiny_config(tiny_run, train={"output_dir": str(tmp_path / "file" / "run")})
    with pytest.raises(ConfigError, match="must be writable"):
        claim_output(Path(config.train.output_dir), config)


def test_checkpoints_are_not_overwritten_when_resuming_is_off(tiny_run, unbroken):
    from dspark_megatron.run.output import claim_output

    config = tiny_config(tiny_run, train={"output_dir": str(unbroken), "resume": False})
    with pytest.raises(ConfigError, match="train.resume"):
        claim_output(unbroken, config)
