"""Files of a draft's folder that may hold weights and that nobody reads."""

from collections.abc import Iterable
from pathlib import Path

WEIGHTS = set(".bin .pt .pth .ckpt .gguf .npz .npy .h5 .msgpack .onnx .pkl .safetensors".split())
HARMLESS = set(
    "training_args.bin optimizer.pt optimizer.bin scheduler.pt scheduler.bin rng_state.pth".split()
)
"""What trainers leave beside a model: states of the run."""
_MASK = "mask_embedding"


def unread_weights(folder: Path, read: Iterable[Path]) -> list[str]:
    """A line for each such file. read: the safetensors files that belong to the draft."""
    known = set(read)
    found = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in WEIGHTS and path not in known and path.name not in HARMLESS
    ]
    return [f"{path.name} {_why(path)}" for path in found]


def _why(path: Path) -> str:
    if path.stem == _MASK:
        return (
            "holds an embedding of its own for the mask token: not supported, and not to be left "
            "out"
        )
    if path.suffix == ".safetensors":
        return "is not in the index, but engines may load it; move it away if it is no part of it"
    return "may hold weights and is not read; move it away if it is no part of the draft"
