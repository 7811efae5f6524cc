"""Pickles of a checkpoint, read as data: a pickle could otherwise run any code."""

import argparse
import io
import os
import pathlib
import signal
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dspark_megatron.errors import require
from dspark_megatron.storage.checkpoints.damage import Damage

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_FORCE_NOT = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_PLAIN = [argparse.Namespace, types.SimpleNamespace, pathlib.PosixPath, signal.Signals, io.BytesIO]
_INERT = (
    "megatron.core.enums.ModelType",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphModule",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.transformer.enums.InferenceCudaGraphScope",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
    "numpy.ndarray",
)
"""What stands beside Megatron-LM's arguments, and is not looked at."""


class _Inert:
    """In place of a class that is not looked at: whatever is made of it does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


@contextmanager
def data_only() -> Iterator[None]:
    """Whatever is loaded inside, by Megatron-Core and by PyTorch's distributed checkpoints too, is
    read by PyTorch's `weights_only` unpickler, which takes data and classes that are allowed."""
    # PyTorch refuses to load where both are set.
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextmanager
def known_classes() -> Iterator[None]:
    """As `data_only`, and takes what stands among Megatron-LM's arguments."""
    known: list[Any] = [*_PLAIN, *((_Inert, name) for name in _INERT)]
    # What is allowed already, such as by Megatron-Core, must stay so afterwards.
    allowed = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([one for one in known if one not in allowed]):
        with data_only():
            yield


def load_data(path: Path, content: io.BytesIO) -> Any:
    """What `torch.save` wrote, of known classes alone. path: of whose content it is."""
    with known_classes():
        try:
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(content)
        except Exception as error:  # bytes that are no pickle lead to any of them
            raise Damage.of(path, error) from error
        require(
            not foreign,
            f"{path} names {', '.join(sorted(foreign))}, which has no place among a checkpoint's "
            "arguments and could run foreign code; nothing of it was run; get the checkpoint from "
            "someone you trust",
        )
        content.seek(0)
        try:
            return torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:
            raise Damage.of(path, error) from error
