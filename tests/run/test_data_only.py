"""Nothing that a checkpoint holds is run: not when it is checked, and not when Megatron-Core and
PyTorch load it."""

import os
import shutil

import pytest
import torch

from support.damage import Payload
from support.tiny_target import tiny_config


@pytest.fixture
def run(unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")
    for file in (tmp_path / "run").rglob("checksums.json"):
        file.unlink()  # whoever plants something writes these, too
    return tmp_path / "run"


def resume(runtime, config, made, is_checked):
    """Continue from a checkpoint whose common.pt has a payload; the error."""
    from dspark_megatron.mcore.optimizer import build_optimizer, wrap_data_parallel
    from dspark_megatron.run.build import build_draft
    from dspark_megatron.run.check import check
    from dspark_megatron.run.checkpoints import loading
    from dspark_megatron.storage.training_checkpoint import find_checkpoint

    folder = find_checkpoint(config.train.output_dir)
    common = folder / "common.pt"
    content = torch.load(common, weights_only=True) if common.is_file() else {}
    torch.save({**content, "payload": Payload(str(made))}, common)
    plan = check(config, 1)
    draft = build_draft(plan, runtime)
    wrapped = wrap_data_parallel(draft, config.optimizer)
    optimizer = build_optimizer(config.optimizer, wrapped, plan.dtype)
    kept = loading.check_whole
    if not is_checked:
        loading.check_whole = lambda folder: None
    try:
        loading.load_checkpoint(folder, draft, optimizer)
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        loading.check_whole = kept


@pytest.mark.parametrize("is_checked", [True, False], ids=["checked", "loaded"])
def test_a_payload_beside_the_optimizers_state_does_not_run(
    pool, tiny_run, run, tmp_path, is_checked
):
    """Also where it were not seen before Megatron-Core loads it."""
    made = tmp_path / "made"
    config = tiny_config(tiny_run, train={"output_dir": str(run)})
    (found,) = pool.run(resume, world=1, tp=1, config=config, made=made, is_checked=is_checked)
    assert not made.exists()
    kind, text = found
    assert kind == "ConfigError" and "mkdir" in text and "\n" not in text


def load_object(runtime, folder, made):
    """A payload as one of the objects among the tensors."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from dspark_megatron.storage.checkpoints.data_only import data_only

    def state(data):
        return {"state": ShardedObject("state", data, (1,), (0,))}

    folder.mkdir()
    dist_checkpointing.save(state(Payload(str(made))), str(folder))
    os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)
    texts = []
    for load in (data_only, None):
        made.rmdir() if made.exists() else None
        try:
            if load is None:
                dist_checkpointing.load(state(None), str(folder))
            else:
                with load():
                    dist_checkpointing.load(state(None), str(folder))
        except BaseException as error:
            texts.append(str(error))
        texts.append(made.exists())
    return texts


def test_a_payload_among_the_tensors_does_not_run(pool, tmp_path):
    """Without the limit it does, so the payload is one."""
    folder, made = tmp_path / "checkpoint", tmp_path / "made"
    refused, ran, *rest = pool.run(load_object, world=1, tp=1, folder=folder, made=made)[0]
    assert "Weights only load failed" in refused and not ran
    assert rest[-1], "the payload of this test does nothing"


def test_the_limit_ends_with_what_it_is_for(monkeypatch):
    from dspark_megatron.storage.checkpoints.data_only import data_only

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    for before in (None, "0"):
        monkeypatch.delenv(name, raising=False)
        if before is not None:
            monkeypatch.setenv(name, before)
        with pytest.raises(RuntimeError), data_only():
            assert os.environ[name] == "1"
            raise RuntimeError
        assert os.environ.get(name) == before
