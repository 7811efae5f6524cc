"""Targets of the provider `megatron`: Hugging Face folders, and Megatron-LM checkpoints of them."""

import functools
import shutil

import pytest

from support.megatron_checkpoint import write_checkpoint
from support.megatron_targets import config_of, make_target

WRITERS = {
    "qwen3": dict(world=4, tp=2, pp=2),
    "qwen2": dict(world=2, tp=2, pp=1),
    "llama": dict(world=1, tp=1, pp=1, name="release"),
    "experts": dict(world=4, tp=2, pp=2, ep=2),
    "mixed": dict(world=2, tp=2, pp=1, ep=1),
}


@pytest.fixture(scope="session")
def target(tmp_path_factory):
    """Makes a folder of TARGETS once."""
    return functools.cache(lambda name: make_target(name, tmp_path_factory.mktemp(name) / "target"))


@pytest.fixture(scope="session")
def checkpoint(pool, tiny_run, target, tmp_path_factory):
    """Writes the checkpoint of a target once; returns it and the folder without weights."""

    @functools.cache
    def make(name):
        writer = dict(WRITERS[name])
        world, tp, ep = writer.pop("world"), writer.pop("tp"), writer.pop("ep", 1)
        folder = tmp_path_factory.mktemp(f"{name}_checkpoint")
        config, output = config_of(tiny_run, target(name), tp, ep), str(folder / "run")
        pool.run(write_checkpoint, world=world, tp=tp, config=config, output=output, **writer)
        ignored = shutil.ignore_patterns("*.safetensors")
        return folder / "run", shutil.copytree(target(name), folder / "target", ignore=ignored)

    return make
