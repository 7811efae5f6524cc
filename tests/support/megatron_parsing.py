"""Megatron-LM's own parser."""

import argparse

from dspark_megatron.megatron_lm.names import ARGUMENTS

PARALLEL = [("tensor_model", 4), ("context", 1), ("expert_model", 1), ("expert_tensor", None)]


def parsed(**given):
    """Megatron's arguments as its parser leaves them, by hand: it needs a newer Python."""
    names = {entry.name.removeprefix("--").replace("-", "_") for entry in ARGUMENTS}
    names |= {"fp16", "lr_warmup_iters", "gradient_accumulation_fusion"}
    defaults = {
        **dict.fromkeys(names),
        **{entry.name.removeprefix("--").replace("-", "_"): entry.default for entry in ARGUMENTS},
        **{f"{name}_parallel_size": size for name, size in PARALLEL},
        "fp16": False,
        "gradient_accumulation_fusion": True,
    }
    return argparse.Namespace(**{**defaults, **given})
