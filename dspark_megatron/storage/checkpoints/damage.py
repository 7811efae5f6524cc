"""The error for what is not as it was saved. Who knows the folder's neighbours adds the way out."""

from pathlib import Path

from dspark_megatron.errors import ConfigError

_ADVICE = ("Weights only load failed", "Please file an issue", "compatible with your use case")
"""How lines of PyTorch's begin that advise to load a pickle without limits."""


class Damage(ConfigError):
    """A file of a checkpoint, or the folder, is damaged or incomplete."""

    def __init__(self, what: str) -> None:
        """what: names the file and what is wrong with it."""
        super().__init__(f"{what}; copy it again or use another iteration")
        self.what = what

    @classmethod
    def of(cls, path: Path, cause: BaseException | str) -> "Damage":
        return cls(f"{path} is damaged or incomplete ({reason_of(cause)})")


def reason_of(cause: BaseException | str) -> str:
    """In one line."""
    if isinstance(cause, str):
        return cause
    lines = [line.strip() for line in str(cause).partition("Please use")[0].splitlines()]
    lines = [line for line in lines if line and not line.startswith(_ADVICE)]
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__
