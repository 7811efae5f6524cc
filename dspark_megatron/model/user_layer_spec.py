"""The draft layer that a user hands in, as Megatron's `--spec module name`: code of their own."""

import contextlib
import importlib
import traceback
from collections.abc import Iterator, Sequence

from megatron.core.transformer.spec_utils import ModuleSpec

from dspark_megatron.config import ConfigError, require


def user_layer_spec(words: Sequence[str]) -> ModuleSpec:
    """The ModuleSpec of `model.layer_spec`, [module, name]: what that name is in the module, or
    what it returns when called without arguments. Imports and runs the user's code. Raises
    ConfigError where that fails or gives something else."""
    module, name = words
    with user_code(words):
        found = getattr(importlib.import_module(module), name)
        if not isinstance(found, ModuleSpec | type) and callable(found):
            found = found()
    require(
        isinstance(found, ModuleSpec),
        f"model.layer_spec {list(words)} must be a ModuleSpec or a function that returns one, is "
        f"{found!r}; begin with dspark_megatron.model.layer_specs.layer_spec('local')",
    )
    return found


@contextlib.contextmanager
def user_code(words: Sequence[str]) -> Iterator[None]:
    """Turns what fails in the user's code into a ConfigError that says where."""
    try:
        yield
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"model.layer_spec {list(words)} must import and build: {type(error).__name__} in "
            f"{last.filename}:{last.lineno}: {error}"
        ) from error
