"""Folders of safetensors: written a file at a time, read a tensor at a time; damage is named."""

import json
import os
import shutil
import weakref
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspark_megatron.errors import ConfigError
from dspark_megatron.storage.safetensors_folder import (
    SafetensorsFolder,
    parse_size,
    plan_files,
    write_tensor_files,
)
from dspark_megatron.storage.target_folder import shared_weights, target_fingerprint
from support.full_disk import files_of_at_most

LARGE = 10**9


def mixed_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 4, generator=generator)
    return {
        "long": torch.arange(9) - 4,
        "z.float": matrix,
        "transposed": matrix.t(),
        "every second row": matrix[::2],
        "repeated": matrix[:1].expand(5, 4),
        "a.bfloat16": matrix.bfloat16(),
        "half": matrix[0].half(),
        "no rows": torch.zeros(0, 4),
        "no columns": torch.zeros(3, 0, dtype=torch.bfloat16),
        "number": torch.tensor(2.5),
        'name with "quotes" and é': torch.tensor([-1.0, torch.inf, torch.nan]),
        "learnt": torch.ones(2, requires_grad=True),
        "bool": torch.tensor([True, False, True]),
        "after an odd number of bytes": torch.tensor([1.5, -2.0]),
    }


def write(folder: Path, tensors: dict[str, Tensor], max_shard_size: int = LARGE) -> Path:
    folder.mkdir(exist_ok=True)
    write_tensor_files(folder, iter(tensors.items()), plan_files(tensors, max_shard_size))
    return folder


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        torch.testing.assert_close(found[name], tensor.detach(), rtol=0, atol=0, equal_nan=True)


def test_the_library_reads_what_went_in(tmp_path):
    tensors = mixed_tensors()
    file = write(tmp_path, tensors) / "model.safetensors"
    assert os.listdir(tmp_path) == [file.name]
    assert_same(load_file(file), tensors)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    folder = SafetensorsFolder(tmp_path)
    assert folder.dtypes == {name: tensor.dtype for name, tensor in tensors.items()}
    assert folder.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_shards_and_their_index(tmp_path):
    tensors = {f"{i}": torch.full((i, 10), i, dtype=torch.bfloat16) for i in (3, 2, 1, 9, 4, 1000)}
    tensors |= {"empty": torch.zeros(0), "last": torch.ones(5)}
    one, two = (write(tmp_path / name, tensors, max_shard_size=120) for name in ("one", "two"))
    index = json.loads((one / "model.safetensors.index.json").read_text())
    shards = [["9"], ["1000"], ["3", "2", "1"], ["4", "empty", "last"]]
    shards = sorted(shards, key=lambda shard: index["weight_map"][shard[0]])
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in tensors.values())}
    assert index["weight_map"].keys() == tensors.keys()
    assert sorted(os.listdir(one)) == [*names, "model.safetensors.index.json"]
    for name, shard in zip(names, shards, strict=True):
        assert [t for t in tensors if index["weight_map"][t] == name] == shard
        assert_same(load_file(one / name), {t: tensors[t] for t in shard})
    for name in os.listdir(one):
        assert (one / name).read_bytes() == (two / name).read_bytes()


A, B = torch.zeros(2, 3), torch.ones(4)


def test_tensors_that_do_not_come(tmp_path):
    with pytest.raises(ValueError, match="ended before model.safetensors had all") as error:
        write_tensor_files(tmp_path, iter([("a", A)]), plan_files({"a": A, "b": B}, LARGE))
    assert not isinstance(error.value, ConfigError) and not os.listdir(tmp_path)


def test_one_file_is_in_memory_at_a_time(tmp_path):
    """When the first tensor of the next is asked for, those of the one before are gone."""
    alive: list[weakref.ref] = []

    class Tensors:
        """A generator's own variables would keep the tensor while it waits."""

        def __init__(self):
            self.made = 0

        def __iter__(self):
            return self

        def __next__(self):
            if self.made == 12:
                raise StopIteration
            assert sum(reference() is not None for reference in alive) == self.made % 3
            tensor = torch.full((8,), float(self.made))
            alive.append(weakref.ref(tensor))
            self.made += 1
            return str(self.made - 1), tensor

    specs = {str(i): torch.empty(8, device="meta") for i in range(12)}
    write_tensor_files(tmp_path, Tensors(), plan_files(specs, 100))
    assert len(alive) == 12
    found = SafetensorsFolder(tmp_path)
    assert all(torch.equal(found.tensor(name), torch.full((8,), float(name))) for name in specs)


def test_too_little_free_space(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(5000, 3977, 1023))
    tensors = {"a": torch.zeros(128), "b": torch.zeros(128)}
    with pytest.raises(ConfigError, match=r"takes 1,024 bytes.* has 1,023 free; free some or"):
        write(tmp_path, tensors)
    assert not os.listdir(tmp_path)


def test_errors_of_the_source_pass_through(tmp_path):
    def broken():
        yield "a", A
        raise OSError("the source")

    with pytest.raises(OSError, match="the source"):
        write_tensor_files(tmp_path, broken(), plan_files({"a": A, "b": B}, LARGE))


def test_a_write_that_the_system_refuses(tmp_path):
    with files_of_at_most(20_000), pytest.raises(ConfigError) as error:
        write(tmp_path, {str(i): torch.zeros(2000) for i in range(4)})
    assert str(error.value).startswith(f"cannot write {tmp_path / 'model.safetensors'}: ")
    assert "File too large" in str(error.value) and not os.listdir(tmp_path)


def test_a_file_that_cannot_be_made(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ConfigError, match="model.safetensors: Is a directory"):
        write(tmp_path, {"a": A})


@pytest.mark.parametrize(
    "text, size", [("5GB", 5 * 10**9), ("1.5MB", 1_500_000), ("2KiB", 2048), (77, 77)]
)
def test_parse_size(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 apples"])
def test_parse_size_refuses(text):
    with pytest.raises(ConfigError, match="such as 5GB"):
        parse_size(text)


def two_shards(folder: Path) -> Path:
    embedding, head = torch.randn(40, 8), torch.randn(40, 8)
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    return write(folder, tensors, max_shard_size=embedding.nbytes)


def one_file(folder: Path) -> Path:
    write(folder, load_two(two_shards(folder)))
    for path in folder.glob("model-*"):
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    return folder


def load_two(folder: Path) -> dict[str, Tensor]:
    source = SafetensorsFolder(folder)
    return {name: source.tensor(name).clone() for name in source.files}


READERS = {
    "tensor": lambda folder: SafetensorsFolder(folder).tensor("lm_head.weight"),
    "rows": lambda folder: SafetensorsFolder(folder).rows("lm_head.weight", 0, 2),
    "target_fingerprint": target_fingerprint,
    "dtypes": lambda folder: SafetensorsFolder(folder).dtypes,
}
DAMAGE = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size - 1),
    "cut in the header": lambda file: os.truncate(file, 50),
    "empty": lambda file: os.truncate(file, 0),
    "random": lambda file: file.write_bytes(bytes(range(256)) * 8),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_named(tmp_path, damage, reader):
    file = two_shards(tmp_path) / "model-00002-of-00002.safetensors"
    READERS[reader](tmp_path)
    DAMAGE[damage](file)
    with pytest.raises(ConfigError) as error:
        READERS[reader](tmp_path)
    assert str(error.value).startswith(f"{file} must be there as a whole")
    assert str(error.value).endswith("; copy it again")


@pytest.mark.parametrize("reader", [*READERS.values(), shared_weights, SafetensorsFolder])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_single_file_is_named(tmp_path, damage, reader):
    file = one_file(tmp_path) / "model.safetensors"
    reader(tmp_path)
    DAMAGE[damage](file)
    with pytest.raises(ConfigError) as error:
        reader(tmp_path)
    assert str(file) in str(error.value) or damage == "missing"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe\x00", "must be text in UTF-8"),
        (b"[]", "must hold a JSON object"),
        (b"{}", "must have a weight_map"),
        (b'{"weight_map": {"a": 3}}', "must have a weight_map"),
    ],
)
def test_a_broken_index_is_named(tmp_path, content, message):
    index = two_shards(tmp_path) / "model.safetensors.index.json"
    index.write_bytes(content)
    for reader in (*READERS.values(), shared_weights, SafetensorsFolder):
        with pytest.raises(ConfigError) as error:
            reader(tmp_path)
        assert str(error.value).startswith(f"{index} {message}")
        assert "; " in str(error.value)  # the way out


def test_an_index_that_disagrees_with_its_files(tmp_path):
    index = two_shards(tmp_path) / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    entries["weight_map"]["other"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match="model-00001-of-00002.safetensors must be"):
        SafetensorsFolder(tmp_path).tensor("other")


def test_a_folder_reads_its_index_once(tmp_path):
    folder = SafetensorsFolder(two_shards(tmp_path))
    (tmp_path / "model.safetensors.index.json").unlink()
    assert folder.shapes == {"model.embed_tokens.weight": (40, 8), "lm_head.weight": (40, 8)}
    head = folder.tensor("lm_head.weight")
    assert torch.equal(folder.rows("lm_head.weight", 38, 42)[:2], head[38:])
    assert not folder.rows("lm_head.weight", 38, 42)[2:].any()
    with pytest.raises(ConfigError, match="has no tensor fc.weight"):
        folder.tensor("fc.weight")


def test_a_type_that_is_not_known(tmp_path):
    save_file({"x": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "model.safetensors")
    folder = SafetensorsFolder(tmp_path)
    assert folder.shapes == {"x": (2,)}
    with pytest.raises(ConfigError, match="'x': 'C64'"):
        _ = folder.dtypes
