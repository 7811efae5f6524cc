"""Ways in which a checkpoint is damaged, by name."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

FILES = (".metadata", "__0_0.distcp", "common.pt", "metadata.json", "dspark.json", "checksums.json")


class Payload:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, made: str) -> None:
        self.made = made

    def __reduce__(self):
        return os.mkdir, (self.made,)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def of_another_iteration(file: Path) -> None:
    shutil.copy(file.parent.with_name("iter_0000002") / file.name, file)


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        file.unlink()
        make(file)

    return damage


KINDS: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "cut": cut,
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "flipped": flip,
    "zeroed": zero,
    "noise": lambda file: file.write_bytes(os.urandom(file.stat().st_size)),
    "of another iteration": of_another_iteration,
    "a folder": replaced(Path.mkdir),
    "a dangling link": replaced(lambda file: file.symlink_to("nowhere")),
    "a pipe": replaced(os.mkfifo),
}
"""Of any file."""


def meta(**changes: object) -> Callable[[Path], object]:
    """Keys of dspark.json; `...` takes one out, `shape.x` is one of the shape."""

    def damage(folder: Path) -> None:
        file = folder / "dspark.json"
        found = json.loads(file.read_text())
        for name, value in changes.items():
            place, key = (found["shape"], name[6:]) if name.startswith("shape_") else (found, name)
            if value is ...:
                del place[key]
            else:
                place[key] = value
        file.write_text(json.dumps(found))

    return damage


def written(name: str, content: bytes | str) -> Callable[[Path], object]:
    content = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(content)


def saved(content: object) -> Callable[[Path], object]:
    return lambda folder: torch.save(content, folder / "common.pt")


CONTENTS: dict[str, Callable[[Path], object]] = {
    ".metadata: a dictionary": written(".metadata", pickle.dumps({})),
    ".metadata: a text": written(".metadata", "hello"),
    "common.pt: a list": saved([1]),
    "common.pt: nothing": saved({}),
    "common.pt: no groups": saved({"optimizer": {}}),
    "common.pt: odd groups": saved({"optimizer": {"param_groups": 3}}),
    "metadata.json: a list": written("metadata.json", "[]"),
    "metadata.json: no backend": written("metadata.json", "{}"),
    "metadata.json: another backend": written("metadata.json", '{"sharded_backend": "zarr"}'),
    "metadata.json: deep": written("metadata.json", "[" * 10**5),
    "dspark.json: a list": written("dspark.json", "[]"),
    "dspark.json: null": written("dspark.json", "null"),
    "dspark.json: deep": written("dspark.json", "[" * 10**5),
    "dspark.json: no shape": meta(shape=...),
    "dspark.json: shape is a list": meta(shape=[]),
    "dspark.json: no head_dim": meta(shape_head_dim=...),
    "dspark.json: head_dim is a text": meta(shape_head_dim="8"),
    "dspark.json: head_dim is huge": meta(shape_head_dim=10**30),
    "dspark.json: head_dim is negative": meta(shape_head_dim=-8),
    "dspark.json: head_dim is true": meta(shape_head_dim=True),
    "dspark.json: rms_norm_eps is NaN": meta(shape_rms_norm_eps=float("nan")),
    "dspark.json: layers are texts": meta(shape_target_layer_ids=["a"]),
    "dspark.json: layers are a number": meta(shape_target_layer_ids=3),
    "dspark.json: an unknown key": meta(shape_colour=3),
    "dspark.json: no fingerprint": meta(target_fingerprint=...),
    "dspark.json: no num_anchors": meta(num_anchors=...),
    "dspark.json: num_anchors is null": meta(num_anchors=None),
    "dspark.json: another iteration": meta(iteration=2),
    "dspark.json: iteration is a text": meta(iteration="3"),
    "dspark.json: no consumed_samples": meta(consumed_samples=...),
    "dspark.json: open_metrics is a number": meta(open_metrics=3),
    "dspark.json: best is a number": meta(best=3),
    "dspark.json: best lacks tau": meta(best={"iteration": 3, "conditions": {}}),
    "dspark.json: best has an unknown key": meta(
        best={"iteration": 3, "tau": 1.5, "conditions": {}, "colour": 3}
    ),
    "dspark.json: skipped_steps is a text": meta(skipped_steps="3"),
    "dspark.json: loss is a list": meta(loss=[1]),
    "dspark.json: num_samples is a text": meta(num_samples="24"),
    "checksums.json: a list": written("checksums.json", "[]"),
    "checksums.json: a number": written("checksums.json", '{"files": {"common.pt": 3}}'),
    "checksums.json: no digest": written(
        "checksums.json", '{"files": {"common.pt": {"size": 1, "crc32": "x"}}}'
    ),
}
"""Of a file whose other kinds of damage need its format; by the file's name."""
