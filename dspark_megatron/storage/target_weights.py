"""What the draft shares of the target's weights, its embedding and LM head, and their identity:
from the Hugging Face folder, or from a Megatron-LM checkpoint that takes the place of its weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from dspark_megatron.storage.gpt_checkpoint import EMBEDDING, HEAD, GPTCheckpoint
from dspark_megatron.storage.safetensors_folder import SafetensorsFolder
from dspark_megatron.storage.target_folder import (
    load_target_config,
    shared_weights,
    target_fingerprint,
)


@dataclass(frozen=True)
class SharedMatrix:
    """One row for each entry of the vocabulary."""

    name: str
    """Where it was read."""
    shape: tuple[int, ...]
    """(v, h), without padding."""
    rows: Callable[[int, int], Tensor]
    """Rows [start, end), as they are saved; those past its end are zero."""

    def tensor(self) -> Tensor:
        return self.rows(0, self.shape[0])


def shared_matrices(
    target_dir: str | Path, checkpoint: str | Path = ""
) -> tuple[SharedMatrix, SharedMatrix]:
    """Embedding and LM head; the same twice when they are tied."""
    if checkpoint:
        return _of_checkpoint(GPTCheckpoint(checkpoint), load_target_config(target_dir).vocab_size)
    folder = SafetensorsFolder(target_dir)

    def matrix(name: str) -> SharedMatrix:
        return SharedMatrix(name, folder.shape(name), partial(folder.rows, name))

    embedding, head = shared_weights(target_dir)
    return matrix(embedding), matrix(head)


def weights_fingerprint(target_dir: str | Path, checkpoint: str | Path = "") -> str:
    """Identity of the target's weights; each of the two forms has its own."""
    return GPTCheckpoint(checkpoint).fingerprint() if checkpoint else target_fingerprint(target_dir)


def _of_checkpoint(checkpoint: GPTCheckpoint, vocab_size: int) -> tuple[SharedMatrix, SharedMatrix]:
    def matrix(name: str) -> SharedMatrix:
        def rows(start: int, end: int) -> Tensor:
            found = checkpoint.rows(name, start, end)
            found[max(vocab_size - start, 0) :] = 0  # the checkpoint's own padding
            return found

        return SharedMatrix(name, (vocab_size, checkpoint.shapes[name][1]), rows)

    return matrix(EMBEDDING), matrix(HEAD if HEAD in checkpoint.shapes else EMBEDDING)
