"""Make Megatron-Core usable on this machine."""

import logging
import warnings

from dspark_megatron.mcore import cpu_support, loadable_adam

_COLLECTIVE = r"`torch\.distributed\.\w+` is (deprecated|a private function)"
_KNOWN: tuple[tuple[type[Warning], str, str], ...] = (
    (UserWarning, r"megatron\.", "Transformer Engine and Apex are not installed"),
    (UserWarning, r"megatron\.", "Apex is not installed"),
    (UserWarning, r"megatron\.", "full scope is deprecated"),
    (FutureWarning, r"megatron\.", r"`(load|save)_state_dict` is deprecated"),
    (UserWarning, r"megatron\.core\.optimizer", r"The \.grad attribute of a Tensor"),
    (FutureWarning, r"torch\.distributed\.c10d_logger", _COLLECTIVE),
)
"""Category, module and beginning of each warning that Megatron-Core gives on every rank and that
no user can act on: what is not installed, and what it calls that is deprecated."""


def prepare_megatron() -> None:
    """Make Megatron-Core usable on this machine; before anything else imports it."""
    silence_megatron()
    cpu_support.install()
    loadable_adam.install()


def silence_megatron() -> None:
    """Before it is imported. Any warning of Megatron-Core that is not known is shown."""
    for category, module, message in _KNOWN:
        warnings.filterwarnings("ignore", message, category, module)
    logging.getLogger("megatron").setLevel(logging.ERROR)
