"""A Megatron-LM checkpoint of a tiny target."""

import shutil

import pytest

from support.megatron_checkpoint import write_checkpoint
from support.megatron_targets import config_of
from support.megatron_targets import target as target  # noqa: F401

WRITERS = {
    "qwen3": dict(world=4, tp=2, pp=2),
    "qwen2": dict(world=2, tp=2, pp=1),
    "llama": dict(world=1, tp=1, pp=1, name="release"),
    "experts": dict(world=4, tp=2, pp=2, ep=2),
    "mixed": dict(world=2, tp=2, pp=1, ep=1),
}


def without_weights(path, folder):
    """The Hugging Face folder as it needs to be beside a checkpoint."""
    return shutil.copytree(path, folder, ignore=shutil.ignore_patterns("*.safetensors"))


@pytest.fixture(scope="module")
def checkpoint(pool, tiny_run, target, tmp_path_factory):  # noqa: F811
    """Writes the checkpoint of a target once; returns it and the folder without weights."""
    made = {}

    def make(name):
        if name not in made:
            writer = dict(WRITERS[name])
            world, tp, ep = writer.pop("world"), writer.pop("tp"), writer.pop("ep", 1)
            folder = tmp_path_factory.mktemp(f"{name}_checkpoint")
            config = config_of(tiny_run, target(name), tp, ep)
            pool.run(
                write_checkpoint,
                world=world,
                tp=tp,
                config=config,
                output=str(folder / "run"),
                **writer,
            )
            made[name] = folder / "run", without_weights(target(name), folder / "target")
        return made[name]

    return make
