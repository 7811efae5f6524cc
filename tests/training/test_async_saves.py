"""Checkpoints that are written while the run goes on are those of a run that waits for them."""

import contextlib
import json
import shutil
import threading
import time
from pathlib import Path

import pytest

from support.tiny_target import tiny_config
from support.training_runs import (
    assert_same_curve,
    curve,
    latest,
    run_training,
    run_until_stopped,
    status,
)


@contextlib.contextmanager
def writing_begins(when):
    """Every file of a background save waits for it."""
    from dspark_megatron.mcore.checkpoint_writer import PlannedSave

    write = PlannedSave.write

    def late(self):
        deadline = time.monotonic() + 600
        while not when() and time.monotonic() < deadline:
            time.sleep(0.001)
        write(self)

    PlannedSave.write = late
    try:
        yield
    finally:
        PlannedSave.write = write


@contextlib.contextmanager
def at_each_step(call):
    from dspark_megatron.training import loop

    train_step = loop.Trainer._train_step

    def called(self, metrics):
        call(self.state.iteration + 1)
        return train_step(self, metrics)

    loop.Trainer._train_step = called
    try:
        yield
    finally:
        loop.Trainer._train_step = train_step


def run_far_ahead(runtime, config, steps):
    """A run whose background saves are written once so many more steps are taken. Which checkpoints
    had a name as each step began."""
    checkpoints = Path(config.train.output_dir, "checkpoints")
    named, taken = {}, [0]

    def note(iteration):
        named[iteration] = sorted(path.name for path in checkpoints.glob("iter_*"))
        taken[0] = iteration

    def when():
        return is_waited_for() or taken[0] % config.train.save_every > steps

    with writing_begins(when), at_each_step(note):
        run_training(runtime, config)
    return named


def is_waited_for():
    from dspark_megatron.run.ranks import places

    return places._here.text.startswith("waiting for the checkpoint")


def content(run):
    """Of every checkpoint: all tensors by name, and what is beside them."""
    from dspark_megatron.storage.torch_dist_folder import TorchDistFolder

    found = {}
    for folder in sorted(Path(run, "checkpoints").glob("iter_*")):
        inside = TorchDistFolder(folder)
        tensors = {name: inside.tensor(name) for name in inside.shapes}
        found[folder.name] = tensors, inside.common(), (folder / "dspark.json").read_text()
    return found


LAYOUTS = {
    "distributed optimizer": dict(tp=1, distributed=True),
    "plain optimizer": dict(tp=2, distributed=False),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_is_saved_is_what_was_there_when_the_save_began(pool, tiny_run, tmp_path, layout):
    """Weights, main weights and moments, bit for bit, though the next step was taken meanwhile."""
    import torch

    runs = {}
    for name in ("waits", "goes on"):
        config = tiny_config(
            tiny_run,
            train={
                "output_dir": str(tmp_path / name),
                "iterations": 8,
                "save_every": 3,
                "dtype": "bfloat16",
                "async_save": name == "goes on",
                "tensorboard": False,
            },
            optimizer={"use_distributed_optimizer": layout["distributed"]},
            parallel={"tensor_parallel": layout["tp"]},
        )
        place = dict(world=2, tp=layout["tp"], config=config)
        named = pool.run(run_far_ahead, **place, steps=1)[0]
        runs[name] = content(tmp_path / name), named
    (waits, named), (goes_on, named_late) = runs["waits"], runs["goes on"]
    assert list(waits) == list(goes_on) == ["iter_0000003", "iter_0000006", "iter_0000008"]
    for folder, (tensors, common, meta) in waits.items():
        mine, mine_common, mine_meta = goes_on[folder]
        assert list(mine) == list(tensors) and any("exp_avg_sq" in name for name in tensors)
        for name, tensor in tensors.items():
            assert torch.equal(tensor, mine[name]), f"{name} of {folder}"
        assert str(common) == str(mine_common) and json.loads(meta) == json.loads(mine_meta)
    assert_same_curve(curve(tmp_path / "goes on"), curve(tmp_path / "waits"), rel=0)
    assert named[4] == ["iter_0000003"], "a run that waits has it at once"
    assert named_late[5] == [] and "iter_0000003" in named_late[7], "none has a name too early"


def test_a_stop_waits_for_the_checkpoint_that_is_being_written(pool, tiny_run, unbroken, tmp_path):
    config = tiny_config(tiny_run, train={"output_dir": str(tmp_path), "async_save": True})
    pool.run(stopped_while_it_writes, world=2, tp=2, config=config, steps=7)
    assert (latest(tmp_path), status(tmp_path)) == (7, "stopped\n")
    assert names(tmp_path) == ["iter_0000005", "iter_0000007"]
    pool.run(run_training, world=1, tp=1, config=config)
    assert_same_curve(curve(tmp_path), curve(unbroken))
    assert names(tmp_path) == ["iter_0000010", "iter_0000015", "iter_0000020"]
    rows = curve(tmp_path)
    assert sum(row["save_seconds"] > 0 for row in rows) >= 3


def stopped_while_it_writes(runtime, config, steps):
    with writing_begins(is_waited_for):
        run_until_stopped(runtime, config, steps)


def names(run):
    return sorted(path.name for path in Path(run, "checkpoints").iterdir() if path.is_dir())


def test_a_run_that_fails_meanwhile_continues_from_the_checkpoint_before(
    pool, tiny_run, unbroken, tmp_path
):
    """What was written of the newer one is no checkpoint, and goes."""
    run = shutil.copytree(unbroken, tmp_path / "run")
    train = {"output_dir": str(run), "iterations": 24, "save_every": 2, "async_save": True}
    config = tiny_config(tiny_run, train={**train, "tensorboard": False})
    with pytest.raises(AssertionError, match="the step failed"):
        pool.run(failing_while_it_writes, world=1, tp=1, config=config, iteration=24)
    assert latest(run) == 20
    assert [name for name in names(run) if "22" in name][0].startswith(".partial_iter_0000022_")
    pool.run(run_training, world=1, tp=1, config=config)
    assert names(run) == ["iter_0000020", "iter_0000022", "iter_0000024"]


def failing_while_it_writes(runtime, config, iteration):
    over = threading.Event()

    def fail(step):
        if step == iteration:
            over.set()
            raise AssertionError("the step failed")

    with writing_begins(over.is_set), at_each_step(fail):
        run_training(runtime, config)
