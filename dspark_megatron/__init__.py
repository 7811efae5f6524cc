"""DSpark speculative-decoding drafters, trained tensor-parallel with Megatron-Core."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspark_megatron.api.draft import Draft, Drafted, Generated, Loss
    from dspark_megatron.api.target import Target
    from dspark_megatron.config.loading import load_config
    from dspark_megatron.errors import ConfigError

__version__ = "0.1.0"

__all__ = ["ConfigError", "Draft", "Drafted", "Generated", "Loss", "Target", "load_config"]

_PLACES = {
    "ConfigError": "errors",
    "load_config": "config.loading",
    "Target": "api.target",
    **dict.fromkeys(("Draft", "Drafted", "Generated", "Loss"), "api.draft"),
}
"""The module of each name. It is imported when the name is asked for, since it may need PyTorch."""


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    place = _PLACES[name]
    if place.startswith("api."):
        from dspark_megatron.mcore.prepare import prepare_megatron

        prepare_megatron()  # before anything else imports Megatron-Core
    return getattr(importlib.import_module(f"{__name__}.{place}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
