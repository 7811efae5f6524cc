"""Whether Transformer Engine's layers can run here."""

import importlib.util

import torch


def is_usable() -> bool:
    return torch.cuda.is_available() and is_installed()


def is_installed() -> bool:
    try:
        return importlib.util.find_spec("transformer_engine") is not None
    except ValueError:  # hidden from Megatron-Core, as on a machine without a GPU
        return False
