"""What a check is given, and how it leaves its figures: shared by the runner and all checks."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dspark_megatron.run.ranks.runtime import Launch, Runtime, start


class Skip(Exception):
    """A check cannot run here; the message says why."""


class Figures(dict):
    """What a check has measured. Written at every new figure, so that a killed check leaves what it
    had."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self._file.write_text(json.dumps(self))

    def update(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self[name] = value


@dataclass(frozen=True)
class Context:
    device: torch.device
    folder: Path
    """Empty, the check's own."""
    figures: Figures
    tiny: bool
    """Sizes of a rehearsal: every line runs, and no figure says anything of speed."""

    def runtime(self) -> Runtime:
        """This process as a job of one rank."""
        return start(Launch.alone(), 1)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference in units of the expected norm."""
    expected = expected.float()
    return float((got.float() - expected).norm() / expected.norm().clamp(min=1e-30))


def check_close(context: Context, name: str, got: Any, expected: Any, tolerance: float) -> None:
    """Record the relative error; AssertionError if it is above `tolerance`."""
    error = relative_error(got, expected)
    context.figures[f"error of {name}"] = error
    assert error <= tolerance, f"{name} differs from the plain twin by {error:.2g} of its norm"
