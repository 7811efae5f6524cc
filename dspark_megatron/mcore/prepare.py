"""Make Megatron-Core usable on this machine."""

import logging
import warnings

from dspark_megatron.mcore import cpu_support, loadable_adam


def prepare_megatron() -> None:
    """Make Megatron-Core usable on this machine; before anything else imports it."""
    silence_megatron()
    cpu_support.install()
    loadable_adam.install()


def silence_megatron() -> None:
    """Before it is imported.

    It tells every rank what is not installed, what it deprecates of its own and which deprecated
    collectives of PyTorch it calls; none of that is for the user to act on, so it is silenced.
    """
    for module in (r"megatron\.", r"torch\.distributed\.c10d_logger"):
        warnings.filterwarnings("ignore", module=module)
    logging.getLogger("megatron").setLevel(logging.ERROR)
