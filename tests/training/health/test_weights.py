"""Weights that are no numbers, or absurd, are never saved."""

import contextlib
import shutil
from pathlib import Path
from unittest import mock

import pytest

from support.tiny_target import tiny_config
from support.training_runs import latest, run_training


def spoiled_run(runtime, config, after, value, rank, checks=True):
    """Train; after so many steps one weight of one rank has this value. checks: as an older version
    it saves it if not."""
    import torch

    from dspark_megatron.training import loop, saves

    save = loop.Trainer._save

    def spoiling(self, metrics, **how):
        if self.state.iteration > after and runtime.rank == rank:
            weight = self.draft.get_parameter("layers.1.mlp.linear_fc2.weight")
            with torch.no_grad():
                weight.view(-1)[0] = value
        save(self, metrics, **how)

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(loop.Trainer, "_save", spoiling))
        if not checks:
            patches.enter_context(mock.patch.object(saves, "check_weights"))
        run_training(runtime, config)


@pytest.mark.parametrize(
    ("value", "text"), [(float("nan"), "is not finite"), (-2e4, "is as large as 2e[+]04")]
)
def test_bad_weights_of_one_rank_end_the_run_and_the_older_checkpoint_stays(
    pool, tiny_run, tmp_path, value, text
):
    settings = {"output_dir": str(tmp_path), "iterations": 9, "save_every": 3, "keep_last": 1}
    config = tiny_config(tiny_run, train=settings, parallel={"tensor_parallel": 2})
    message = f"iteration 6 1 tensors are not: .*linear_fc2.weight {text}. Nothing was saved"
    with pytest.raises(AssertionError, match=message) as failure:
        pool.run(spoiled_run, world=2, tp=2, config=config, after=3, value=value, rank=1)
    assert "rank 0:" in str(failure.value) and "rank 1:" in str(failure.value)
    assert latest(tmp_path) == 3
    assert sorted(p.name for p in Path(tmp_path, "checkpoints").glob("iter_*")) == ["iter_0000003"]
    pool.run(run_training, world=1, tp=1, config=tiny_config(tiny_run, train=settings))
    assert latest(tmp_path) == 9


def evaluated(runtime, config):
    """What an evaluation says of a checkpoint, before it has loaded the target."""
    from dspark_megatron.errors import ConfigError
    from dspark_megatron.evaluation.command import build_decoder
    from dspark_megatron.run.check import check
    from dspark_megatron.storage.training_checkpoint import find_checkpoint

    plan, checkpoint = check(config, runtime.world_size), find_checkpoint(config.train.output_dir)
    try:
        build_decoder(plan, runtime, checkpoint, None, None)
    except ConfigError as error:
        return str(error)


def test_a_checkpoint_with_weights_that_are_not_finite_is_refused_by_all_readers(
    pool, tiny_run, tmp_path
):
    from dspark_megatron.conversion.export import export_checkpoint
    from dspark_megatron.errors import ConfigError

    settings = {"output_dir": str(tmp_path / "run"), "iterations": 2}
    config = tiny_config(tiny_run, train=settings)
    spoil = {"after": 0, "value": float("nan"), "rank": 0, "checks": False}
    pool.run(spoiled_run, world=1, tp=1, config=config, **spoil)
    found = "layers.1.mlp.linear_fc2.weight has 1 values that are not finite"
    (message,) = pool.run(evaluated, world=1, tp=1, config=config)
    assert found in message and "iter_0000002" in message
    with pytest.raises(ConfigError, match="down_proj.weight has 1 values that are not finite"):
        export_checkpoint(tmp_path / "run", config.target.path, tmp_path / "export")
    config.train.iterations = 4
    with pytest.raises(AssertionError, match=found):
        pool.run(run_training, world=1, tp=1, config=config)
    config.train.output_dir, config.train.initial_checkpoint = (
        str(tmp_path / "b"),
        str(tmp_path / "run"),
    )
    with pytest.raises(AssertionError, match="down_proj.weight has 1 values|" + found):
        pool.run(run_training, world=1, tp=1, config=config)


def test_a_target_whose_embedding_is_not_finite_is_refused(pool, tiny_run, tmp_path):
    from safetensors.torch import load_file, save_file

    target = shutil.copytree(tiny_run["target"]["path"], tmp_path / "target")
    tensors = load_file(target / "model.safetensors")
    tensors["model.embed_tokens.weight"][7, 3] = float("inf")
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    settings = {"output_dir": str(tmp_path / "run")}
    config = tiny_config(tiny_run, target={"path": str(target)}, train=settings)
    with pytest.raises(
        AssertionError, match="embed_tokens.weight has 1 values that are not finite"
    ):
        pool.run(run_training, world=1, tp=1, config=config)
