"""What rank processes need, imported once before they are forked."""

import gc
import os

import torch

from dspark_megatron.mcore.prepare import prepare_megatron

# Only this process needed the tests' own path, to find this module.
del os.environ["PYTHONPATH"]
if (own := os.environ.pop("PYTHONPATH_OF_TESTS", None)) is not None:
    os.environ["PYTHONPATH"] = own
prepare_megatron()
torch.set_num_threads(1)

import dspark_megatron.evaluation.command  # noqa: E402
import dspark_megatron.training.loop  # noqa: E402, F401

gc.collect()
# Megatron-Core collects garbage at each save; ranks need not look through modules again.
gc.freeze()
