"""What every check of a setting is made of."""

import difflib

from dspark_megatron.errors import ConfigError, require


def positive(name: str, value: float) -> None:
    require(value > 0, f"{name} ({value}) must be > 0")


def one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        near = difflib.get_close_matches(value, valid, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name} ({value!r}) must be one of {', '.join(valid)}{hint}")
