"""A draft whose RoPE is not the one that it started with: the second stage for long contexts, and
drafts of others that have YaRN."""

import json
import logging

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from dspark_megatron.conversion.draft_folder import DraftFolder
from dspark_megatron.conversion.export import export_checkpoint
from dspark_megatron.conversion.folder_writer import WriteOptions
from dspark_megatron.conversion.import_draft import import_folder
from dspark_megatron.errors import ConfigError
from dspark_megatron.ops.rope import RotaryTable
from dspark_megatron.planning.dry_run import describe_run
from dspark_megatron.storage.target_folder import target_fingerprint
from support.draft_folders import reconfigure
from support.tiny_target import tiny_config
from support.training_runs import assert_same_curve, curve, run_training

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0}
LONG = {"rope_parameters": YARN, "max_position_embeddings": 4096}
COMPLETE = {**YARN, "original_max_position_embeddings": 256}


def run(pool, tiny_run, output, tp=1, **sections):
    sections["train"] = {"output_dir": str(output), "iterations": 3, **sections.get("train", {})}
    config = tiny_config(tiny_run, parallel={"tensor_parallel": tp}, **sections)
    pool.run(run_training, world=tp, tp=tp, config=config)
    return curve(output)


def exported(tiny_run, run, folder, layout="hf"):
    options = WriteOptions(layout, dtype=torch.float32)
    return export_checkpoint(run, tiny_run["target"]["path"], folder, options)


@pytest.fixture(scope="module")
def plain(pool, tiny_run, tmp_path_factory):
    """Stage 1."""
    folder = tmp_path_factory.mktemp("plain")
    run(pool, tiny_run, folder)
    return folder


@pytest.fixture(scope="module")
def scaled(pool, tiny_run, plain, tmp_path_factory):
    """Stage 2."""
    folder = tmp_path_factory.mktemp("scaled")
    start = {"initial_checkpoint": str(plain), "initial_rope": "other"}
    run(pool, tiny_run, folder, tp=2, model=LONG, train=start)
    return folder


def test_another_rope_is_refused_unless_it_is_asked_for(tiny_run, plain):
    config = tiny_config(tiny_run, model=LONG, train={"initial_checkpoint": str(plain)})
    with pytest.raises(ConfigError, match="rope_parameters .* there, .*'yarn'.*initial_rope=other"):
        describe_run(config, world_size=1)
    config.train.initial_rope = "other"
    assert "yarn" in describe_run(config, world_size=1)


def test_the_second_stage_starts_where_a_draft_of_its_rope_does(
    pool, tiny_run, plain, scaled, tmp_path
):
    """That is: weights of the first stage in a folder whose config has YaRN."""
    folder = exported(tiny_run, plain, tmp_path / "folder")
    reconfigure(folder, lambda c: c.update(rope_parameters=COMPLETE, rope_scaling=COMPLETE))
    start = {"initial_checkpoint": str(folder)}
    assert_same_curve(run(pool, tiny_run, tmp_path / "run", model=LONG, train=start), curve(scaled))
    again = run(pool, tiny_run, tmp_path / "same", train={"initial_checkpoint": str(plain)})
    assert again[0]["loss"] != pytest.approx(curve(scaled)[0]["loss"], rel=1e-4)


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_the_export_has_yarn_in_both_spellings(tiny_run, scaled, tmp_path, spelling):
    config = json.loads(
        (exported(tiny_run, scaled, tmp_path / "draft") / "config.json").read_text()
    )
    assert config["max_position_embeddings"] == 4096
    both = ("rope_parameters", "rope_scaling")
    other = both[spelling == both[0]]
    del config[other]
    theirs = Qwen3RotaryEmbedding(Qwen3Config(**config))
    ours = RotaryTable(COMPLETE, 8, 4096)
    assert torch.equal(theirs.inv_freq, ours.inv_freq)
    assert theirs.attention_scaling == ours.attention_scaling > 1.2


@pytest.mark.parametrize("form", ["folder", "import"])
def test_a_yarn_draft_of_specforge_can_be_continued(pool, tiny_run, scaled, tmp_path, form):
    """Written as SpecForge does: one spelling, the older one, and the config that continues it is
    filled up from the draft."""
    target = tiny_run["target"]["path"]
    start = exported(tiny_run, scaled, tmp_path / "specforge", "specforge")

    def as_specforge(config):
        rope = config.pop("rope_parameters")
        config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
        del config["rope_scaling"]["rope_theta"]

    reconfigure(start, as_specforge)
    if form == "import":
        run_folder = tmp_path / "imported"
        import_folder(start, target, run_folder, fingerprint=target_fingerprint)
        start = run_folder
    train = {"initial_checkpoint": str(start)}
    rows = run(pool, tiny_run, tmp_path / "run", model=LONG, train=train)
    assert rows[0]["loss"] < curve(scaled)[0]["loss"]
    out = DraftFolder(exported(tiny_run, tmp_path / "run", tmp_path / "out", "specforge"))
    assert out.shape.rope_parameters == COMPLETE


def test_drafts_of_modelopt_may_have_another_theta(tiny_run, plain, tmp_path, caplog):
    target = tiny_run["target"]["path"]
    folder = exported(tiny_run, plain, tmp_path / "draft", "modelopt")

    def say(theta):
        places = ("rope_parameters",)
        reconfigure(
            folder,
            lambda c: [
                c.update(rope_theta=theta),
                *(c[p].update(rope_theta=theta) for p in places),
            ],
        )

    def imported(name, **rope):
        out = tmp_path / name
        import_folder(folder, target, out, fingerprint=target_fingerprint, rope=rope)
        return json.loads(next(out.glob("checkpoints/*/dspark.json")).read_text())["shape"]

    with caplog.at_level(logging.WARNING):
        assert imported("plain")["rope_parameters"]["rope_theta"] == 10000
        assert not caplog.text
        say(1e6)
        assert imported("said")["rope_parameters"]["rope_theta"] == 1e6
        assert "3.8 to 7.8 off" in caplog.text and "--rope-theta 10000" in caplog.text
        caplog.clear()
        assert imported("real", rope_theta=1e4)["rope_parameters"]["rope_theta"] == 1e4
        assert not caplog.text
        assert imported("part", partial_rotary_factor=0.5)["rope_parameters"] == {
            **{"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
        }
        with pytest.raises(ConfigError, match="must turn an even number of a head's 8 widths"):
            imported("odd", partial_rotary_factor=0.4)
