"""Calling Megatron's `pretrain()`, whose signature differs between versions.

It asks for CUDA at its start and was not run on a GPU here. That of 0.19 was run to its end on a
CPU with such questions answered from outside (`tests/support/megatron_on_cpu.py`); the choice of
its arguments is tested against the signatures of megatron-core 0.17 to 0.19.
"""

import contextlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron.core.datasets import utils

from dspark_megatron.errors import require
from dspark_megatron.mcore import loadable_adam
from dspark_megatron.megatron_lm.arguments import ARGS_DEFAULTS


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

    loadable_adam.install()
    providers = dict(
        train_valid_test_dataset_provider=datasets_provider,
        model_provider=model_provider,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
    )
    parsing = dict(extra_args_provider=extra_args_provider, args_defaults=ARGS_DEFAULTS)
    with built_helper():
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


@contextlib.contextmanager
def built_helper() -> Iterator[None]:
    """Within it `pretrain()` starts from a wheel as well.

    At its start it runs `make` in the folder of Megatron's C++ helper for data sets. A wheel has
    the helper built and no Makefile: then its call of `make` does nothing. No file is written.
    """
    build, folder = utils.compile_helpers, Path(utils.__file__).parent
    if not (folder / "Makefile").is_file():
        require(
            importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None,
            f"{folder} must have helpers_cpp, or the Makefile with which pretrain() builds it at "
            "its start, and has neither; install a wheel of megatron-core, or put a checkout of "
            "Megatron-LM on PYTHONPATH",
        )
        utils.compile_helpers = lambda: None
    try:
        yield
    finally:
        utils.compile_helpers = build
