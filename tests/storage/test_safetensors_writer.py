"""Safetensors: written from a stream with one tensor in memory; damaged folders are refused."""

import json
import os
import shutil
import subprocess
import sys
import weakref
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspark_megatron.conversion.safetensors_writer import TensorSpec, write_safetensors
from dspark_megatron.errors import ConfigError
from dspark_megatron.storage.safetensors_folder import SafetensorsFolder
from dspark_megatron.storage.target_folder import (
    read_rows,
    read_tensor,
    shared_weights,
    target_fingerprint,
    tensor_files,
    tensor_shapes,
)

ROOT = Path(__file__).parents[2]
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


def specs_of(tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def write(folder: Path, tensors: dict[str, Tensor], max_shard_size: int = LARGE) -> Path:
    folder.mkdir(exist_ok=True)
    write_safetensors(folder, iter(tensors.items()), specs_of(tensors), max_shard_size)
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
        assert set(opened.keys()) == set(tensors)
        assert_same({name: opened.get_tensor(name) for name in tensors}, tensors)
    folder = SafetensorsFolder(tmp_path)
    assert folder.dtypes == {name: tensor.dtype for name, tensor in tensors.items()}
    assert folder.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_the_layout_of_the_file(tmp_path):
    raw = (write(tmp_path, mixed_tensors()) / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    assert list(header) == ["__metadata__", *mixed_tensors()]
    offsets = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    assert [start for start, _ in offsets] == [0, *(end for _, end in offsets[:-1])]
    assert offsets[-1][1] == len(raw) - 8 - length


def test_bytes_are_the_librarys_and_repeat(tmp_path):
    """The library sorts by type and name; given that order, not one byte differs."""
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7), "c": torch.zeros(0, 2)}
    save_file(tensors, tmp_path / "library.safetensors", metadata={"format": "pt"})
    library = (tmp_path / "library.safetensors").read_bytes()
    for name in ("once", "again"):
        assert (write(tmp_path / name, tensors) / "model.safetensors").read_bytes() == library


def test_shards_and_their_index(tmp_path):
    tensors = {f"{i}": torch.full((i, 10), i, dtype=torch.bfloat16) for i in (3, 2, 1, 9, 4, 1000)}
    tensors |= {"empty": torch.zeros(0), "last": torch.ones(5)}
    one, two = (write(tmp_path / name, tensors, max_shard_size=120) for name in ("one", "two"))
    index = json.loads((one / "model.safetensors.index.json").read_text())
    shards = [["3", "2", "1"], ["9"], ["4"], ["1000"], ["empty", "last"]]
    names = [f"model-{i:05}-of-00005.safetensors" for i in range(1, 6)]
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in tensors.values())}
    assert list(index["weight_map"]) == sorted(tensors)
    assert sorted(os.listdir(one)) == [*names, "model.safetensors.index.json"]
    for name, shard in zip(names, shards, strict=True):
        assert [t for t in tensors if index["weight_map"][t] == name] == shard
        assert_same(load_file(one / name), {t: tensors[t] for t in shard})
    for name in os.listdir(one):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_no_tensors_at_all(tmp_path):
    assert load_file(write(tmp_path, {}) / "model.safetensors") == {}


A, B = torch.zeros(2, 3), torch.ones(4)
WRONG = {
    "tensor b came where a was to come": [("b", B), ("a", A)],
    "a must be torch.float32 of shape [2, 3], is torch.float32 of shape [3, 2]": [("a", A.t())],
    "is torch.float16 of shape [2, 3]": [("a", A.half())],
    "the tensors ended before b came": [("a", A)],
    "tensor c came after the last": [("a", A), ("b", B), ("c", B)],
    "tensor a came where b was to come": [("a", A), ("a", A)],
}


@pytest.mark.parametrize("max_shard_size", [LARGE, 1])
@pytest.mark.parametrize("message", WRONG)
def test_what_comes_otherwise_than_planned(tmp_path, message, max_shard_size):
    with pytest.raises(ValueError) as error:
        specs = specs_of({"a": A, "b": B})
        write_safetensors(tmp_path, iter(WRONG[message]), specs, max_shard_size)
    assert message in str(error.value) and not isinstance(error.value, ConfigError)


def test_a_type_that_the_format_lacks(tmp_path):
    with pytest.raises(ValueError, match="x: torch.complex128 must be one of"):
        write(tmp_path, {"x": torch.zeros(1, dtype=torch.complex128)})


def test_one_tensor_is_alive_at_a_time(tmp_path):
    """Also across shards: when the next tensor is asked for, the one before is gone."""
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
            assert all(reference() is None for reference in alive)
            tensor = torch.full((8,), float(self.made))
            alive.append(weakref.ref(tensor))
            self.made += 1
            return str(self.made - 1), tensor

    specs = {str(i): TensorSpec((8,), torch.float32) for i in range(12)}
    write_safetensors(tmp_path, Tensors(), specs, max_shard_size=100)
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
        write_safetensors(tmp_path, broken(), specs_of({"a": A, "b": B}), LARGE)


REFUSED = """
import resource, signal, sys
from pathlib import Path
import torch
from dspark_megatron.errors import ConfigError
from dspark_megatron.conversion.safetensors_writer import TensorSpec, write_safetensors

count, length = int(sys.argv[2]), int(sys.argv[3])
specs = {str(i): TensorSpec((length,), torch.float32) for i in range(count)}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    tensors = ((name, torch.zeros(length)) for name in specs)
    write_safetensors(Path(sys.argv[1]), tensors, specs, 10**9)
except ConfigError as error:
    sys.exit(f"error: {error}")
"""


@pytest.mark.parametrize("count, length", [(4, 2_000), (1, 100_000), (19, 250)])
def test_a_write_that_the_system_refuses(tmp_path, count, length):
    """At a tensor, within one, and when what is buffered goes out at the end."""
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, str(tmp_path), str(count), str(length)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    file = tmp_path / "model.safetensors"
    assert done.stderr == (
        f"error: cannot write {file}: File too large; make room there or choose another folder\n"
    )


def test_a_file_that_cannot_be_made(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ConfigError, match="model.safetensors: Is a directory"):
        write(tmp_path, {"a": A})


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
    "read_tensor": lambda folder: read_tensor(folder, "lm_head.weight"),
    "read_rows": lambda folder: read_rows(folder, "lm_head.weight", 0, 2),
    "tensor_shapes": tensor_shapes,
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


@pytest.mark.parametrize("reader", [*READERS.values(), shared_weights, tensor_files])
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
        (b"{", "must be readable JSON"),
        (b"", "must be readable JSON"),
        (b"\xff\xfe\x00", "must be readable JSON"),
        (b"[]", "must have a weight_map"),
        (b"{}", "must have a weight_map"),
        (b'{"weight_map": {"a": 3}}', "must have a weight_map"),
    ],
)
def test_a_broken_index_is_named(tmp_path, content, message):
    index = two_shards(tmp_path) / "model.safetensors.index.json"
    index.write_bytes(content)
    for reader in (*READERS.values(), shared_weights, tensor_files):
        with pytest.raises(ConfigError) as error:
            reader(tmp_path)
        assert str(error.value).startswith(f"{index} {message}")
        assert str(error.value).endswith("; copy it again")


def test_an_index_that_disagrees_with_its_files(tmp_path):
    index = two_shards(tmp_path) / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    entries["weight_map"]["other"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match="model-00001-of-00002.safetensors must be"):
        read_tensor(tmp_path, "other")


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
