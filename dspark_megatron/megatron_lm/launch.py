"""Calling Megatron's `pretrain()`, whose signature differs between versions.

Not run on a GPU here, and it runs nowhere else: it asks for CUDA at its start. The choice of its
arguments is tested against the signatures of megatron-core 0.17 to 0.19, what it is given against
the parts of 0.19 that it is made of.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core import datasets

from dspark_megatron.config import require
from dspark_megatron.megatron_lm.arguments import ARGS_DEFAULTS
from dspark_megatron.training import loadable_adam


def launch_pretrain(
    *,
    datasets_provider: Callable,
    model_provider: Callable,
    forward_step: Callable,
    extra_args_provider: Callable,
) -> None:
    """Run `megatron.training.pretrain` of Megatron-LM 0.16 or of megatron-core 0.17 to 0.19."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain

    _check_makefile()
    loadable_adam.install()
    providers = dict(
        train_valid_test_dataset_provider=datasets_provider,
        model_provider=model_provider,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
    )
    parsing = dict(extra_args_provider=extra_args_provider, args_defaults=ARGS_DEFAULTS)
    pretrain(**pretrain_arguments(pretrain, providers, parsing, _parsed_config))


def pretrain_arguments(
    pretrain: Callable,
    providers: dict[str, Any],
    parsing: dict[str, Any],
    parse: Callable[..., Any],
) -> dict[str, Any]:
    """By keyword: up to 0.17 `pretrain` parses the command line itself, from 0.18 on it takes what
    `parse` has made of it."""
    if "cfg_container" in inspect.signature(pretrain).parameters:
        return {"cfg_container": parse(**parsing), **providers}
    return {**providers, **parsing}


def _parsed_config(**parsing: Any) -> Any:
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    return pretrain_cfg_container_from_args(parse_and_validate_args(**parsing))


def _check_makefile() -> None:
    folder = Path(datasets.__file__).parent
    require(
        (folder / "Makefile").is_file(),
        f"{folder} must have a Makefile: pretrain() runs it at its start, and wheels of "
        "megatron-core lack it; put a checkout of Megatron-LM on PYTHONPATH, or write the file "
        "with the one line 'all:', since wheels have what it makes",
    )
