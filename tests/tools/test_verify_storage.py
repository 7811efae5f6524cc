"""tools/verify_storage.py names what is damaged, one line a file."""

import shutil
import sys

import pytest
import torch

from support.damage import flip, zero
from support.draft_folders import write_checkpoint
from support.paths import ROOT
from support.shapes import VANILLA
from support.stored_states import prepare_options
from support.tiny_target import tiny_config

sys.path.append(str(ROOT / "tools"))


@pytest.fixture
def verify(capsys):
    """The exit code of the tool, and what it says."""
    import verify_storage

    def run(*paths):
        code = verify_storage.main([str(path) for path in paths])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


@pytest.fixture(scope="module")
def store(pool, tiny_run, tmp_path_factory):
    output = tmp_path_factory.mktemp("verified") / "store"
    config = tiny_config(tiny_run)
    pool.run(prepare_options, world=1, tp=1, config=config, output=output)
    return output


def test_what_is_as_it_was_written(verify, unbroken, store):
    code, text = verify(unbroken, store)
    assert code == 0 and text.splitlines()[-1] == "all is as it was written"
    for name in ("iter_0000010/.metadata", "iter_0000020/dspark.json", "shard_00002.safetensors"):
        assert f"{name}: as it was written" in text
    assert text.count("complete, and its weights are finite") == 3
    one = unbroken / "checkpoints" / "iter_0000015"
    assert verify(one)[1].count("complete, and its weights are finite") == 1


def test_damage_to_a_checkpoint_and_to_a_store_is_named(verify, unbroken, store, tmp_path):
    run = shutil.copytree(unbroken, tmp_path / "run")
    states = shutil.copytree(store, tmp_path / "store")
    flip(run / "checkpoints" / "iter_0000015" / "__0_0.distcp")
    (run / "checkpoints" / "iter_0000020" / "metadata.json").unlink()
    zero(states / "shard_00001.safetensors")
    code, text = verify(run, states)
    assert code == 1
    damaged = [line for line in text.splitlines() if "DAMAGED" in line]
    assert f"{run}/checkpoints/iter_0000015/__0_0.distcp: DAMAGED: its CRC-32 is" in text
    assert f"{run}/checkpoints/iter_0000020/metadata.json: DAMAGED: it is not there" in text
    assert f"{states}/shard_00001.safetensors: DAMAGED: its CRC-32 is" in text
    assert text.splitlines()[-1] == f"{len(damaged)} damaged"


def test_weights_that_are_no_numbers_are_damage(verify, tmp_path):
    """Also without checksums."""
    bad = torch.full((VANILLA.hidden_size,), torch.nan)
    run = write_checkpoint(tmp_path / "run", VANILLA, **{"hidden_norm.weight": bad})
    code, text = verify(run)
    assert code == 1 and "checksums.json: not there: an older version wrote" in text
    assert "iter_0000100: DAMAGED: " in text and "hidden_norm.weight" in text


def test_what_is_neither_is_said(verify, tmp_path):
    code, text = verify(tmp_path)
    assert (
        code == 2
        and f"error: {tmp_path} holds neither a draft nor checkpoints nor stored states" in text
    )
