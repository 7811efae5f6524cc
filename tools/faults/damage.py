"""What may happen to a folder between two starts."""

from collections.abc import Callable
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
NEWEST = "iter_0000004"
PRECIOUS = "precious"
"""A folder beside the run that nobody may touch."""


def shard(checkpoints: Path) -> Path:
    return max((checkpoints / NEWEST).glob("*.distcp"), key=lambda file: file.stat().st_size)


def cut(checkpoints: Path) -> None:
    file = shard(checkpoints)
    file.write_bytes(file.read_bytes()[:-100])


def flip(checkpoints: Path) -> None:
    file = shard(checkpoints)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def link(checkpoints: Path) -> None:
    precious = checkpoints.parents[1] / PRECIOUS
    precious.mkdir()
    (precious / "file").write_text("kept")
    for name in ("iter_0000006", "iter_0000002"):
        (checkpoints / f".partial_{name}").symlink_to(precious)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no tracker": lambda folder: (folder / TRACKER).unlink(),
    "odd tracker": lambda folder: (folder / TRACKER).write_bytes(b"\xff\x00four"),
    "old tracker": lambda folder: (folder / TRACKER).write_text("3\n"),
    "cut shard": cut,
    "flipped bit": flip,
    "lost shard": lambda folder: shard(folder).unlink(),
    "link": link,
}
