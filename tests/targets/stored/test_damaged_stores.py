"""Damage to stored states is found and named: when they are opened, in the background of a run, and
where an older version left no checksums."""

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_megatron.errors import ConfigError
from dspark_megatron.storage import checksums
from dspark_megatron.targets.stored.deepspec_layout import DeepSpecStates
from dspark_megatron.targets.stored.layout import read_manifest
from dspark_megatron.targets.stored.safetensors_layout import SafetensorsStates
from dspark_megatron.targets.stored.verification import ShardChecks, check_files, known_checksums
from support.damage import KINDS, flip
from support.stored_states import prepare, prepare_options
from support.tiny_target import tiny_config
from support.training_runs import run_training

READERS = {"rows": SafetensorsStates, "deepspec": DeepSpecStates}
FIRST = {"rows": "shard_00000.safetensors", "deepspec": "shard-00000.bin"}
INDEX = {"rows": "index.safetensors", "deepspec": "samples.idx"}


@pytest.fixture(scope="module")
def stores(pool, tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    config = tiny_config(tiny_run, train={"output_dir": str(folder / "run")})
    for name in READERS:
        pool.run(prepare_options, world=1, tp=1, config=config, output=folder / name, format=name)
    return folder


@pytest.fixture(params=READERS)
def store(request, stores, tmp_path):
    shutil.copytree(stores / request.param, tmp_path / request.param)
    return tmp_path / request.param


def reader_of(store: Path):
    return READERS[store.name](store, read_manifest(store))


def check_shards(store: Path) -> None:
    ShardChecks(reader_of(store), known_checksums(store), rank=0, ranks=1).check()


def test_every_file_has_a_checksum_and_a_whole_store_is_sound(store):
    names = {path.name for path in store.iterdir()}
    assert known_checksums(store).keys() == names - {"checksums.json"}
    check_files(store)
    check_shards(store)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "of another iteration"])
def test_a_damaged_file_is_named_when_the_store_is_opened(store, kind):
    for name in (FIRST[store.name], INDEX[store.name], "manifest.json", "checksums.json"):
        kept = (store / name).read_bytes()
        KINDS[kind](store / name)
        if (name, kind) != ("checksums.json", "missing"):
            with pytest.raises(ConfigError, match=f"{name} is damaged .*; copy it again, or dele"):
                check_files(store)
        shutil.rmtree(store / name) if (store / name).is_dir() else (store / name).unlink(True)
        (store / name).write_bytes(kept)
    check_files(store)


def exchange(store: Path) -> None:
    """Two shards of one size, as far as their bytes go."""
    one, other = sorted(store.glob("shard*"))[:2]
    size = min(one.stat().st_size, other.stat().st_size)
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1][:size] + contents[0][size:])
    other.write_bytes(contents[0][:size] + contents[1][size:])


def zero_taps(store: Path) -> None:
    file = store / FIRST[store.name]
    content = bytearray(file.read_bytes())
    content[-2000:] = bytes(2000)
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [exchange, zero_taps, lambda store: flip(store / FIRST[store.name])]
)
def test_a_large_shard_is_compared_with_its_checksum(store, damage, monkeypatch):
    monkeypatch.setattr(checksums, "_READ_ANYWAY", 0)
    damage(store)
    check_files(store)  # by size
    with pytest.raises(ConfigError, match=f"{FIRST[store.name]} is damaged .its CRC-32 is "):
        check_shards(store)


@pytest.mark.parametrize("value, said", [(float("nan"), "not finite"), (0.0, "all zero")])
def test_values_are_looked_at_where_there_are_no_checksums(stores, tmp_path, value, said):
    store = shutil.copytree(stores / "rows", tmp_path / "rows")
    (store / "checksums.json").unlink()
    check_shards(store)
    file = store / "shard_00001.safetensors"
    tensors = load_file(file)
    width = int(load_file(store / INDEX["rows"])["context"][-1])
    tensors["taps"][:width] = value
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=f"shard_00001.safetensors is damaged .*taps are {said}"):
        check_shards(store)


def test_an_index_of_something_else_is_refused(stores, tmp_path):
    store = shutil.copytree(stores / "rows", tmp_path / "rows")
    shutil.copy(store / FIRST["rows"], store / INDEX["rows"])
    with pytest.raises(ConfigError, match="index.safetensors lacks .*: it is no index"):
        reader_of(store)


@pytest.mark.parametrize(
    "change",
    [
        {"shards": 3},
        {"shards": [3]},
        {"shards": [{"shard_id": 0, "file_name": "../shard-00000.bin"}]},
        {"hidden_size": "32"},
        {"target_layer_ids": 3},
        {"num_samples": -1},
    ],
)
def test_a_manifest_of_deepspecs_that_lies_is_refused(stores, tmp_path, change):
    store = shutil.copytree(stores / "deepspec", tmp_path / "deepspec")
    file = store / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match="manifest of DeepSpec's cache .*copy it again"):
        reader_of(store)


def run_without_data(runtime, config):
    from dspark_megatron.training import loop

    with mock.patch.object(loop, "load_train_data", side_effect=AssertionError("read too early")):
        run_unread(runtime, config)


def run_unread(runtime, config):
    """As with files that are too large to be read whenever they are opened."""
    with mock.patch.object(checksums, "_READ_ANYWAY", 0):
        run_training(runtime, config)


def test_a_damaged_shard_ends_the_run(pool, tiny_run, stores, tmp_path):
    """In the background before its end, and with `full` before the data are read."""
    store = shutil.copytree(stores / "rows", tmp_path / "rows")
    flip(store / "shard_00002.safetensors")
    target = {"provider": "cache", "cache": str(store)}
    train = {"output_dir": str(tmp_path / "run"), "iterations": 2}
    said = "shard_00002.safetensors is damaged .its CRC-32 is "
    for verify, run in (("size", run_unread), ("full", run_without_data)):
        sections = dict(target=target, train=train, storage={"verify": verify})
        with pytest.raises(AssertionError, match=said):
            pool.run(run, world=1, tp=1, config=tiny_config(tiny_run, **sections))
        assert not list(tmp_path.glob("run/checkpoints/iter_*"))


def prepare_nonsense(runtime, config, output):
    """A target whose states overflow in one sample."""
    from dspark_megatron.training import store_states

    checked = store_states.checked_target

    def overflowing(*args):
        target = checked(*args)
        states = target.states

        def some(batch):
            found = states(batch)
            if batch.input_ids.shape[1] % 2:
                found.taps[0, -1, 3] = torch.inf
            return found

        target.states = some
        return target

    with mock.patch.object(store_states, "checked_target", overflowing):
        prepare(runtime, config, output)


def test_states_that_are_no_numbers_are_not_stored(pool, tiny_run, tmp_path):
    config = tiny_config(tiny_run)
    with pytest.raises(AssertionError, match="the target's taps of sample .* are not finite"):
        pool.run(prepare_nonsense, world=1, tp=1, config=config, output=tmp_path / "store")
    assert not (tmp_path / "store" / "manifest.json").exists()
