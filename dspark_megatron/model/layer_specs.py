"""Which classes a draft layer is built from: Megatron-Core's, Transformer Engine's, or a user's."""

import contextlib
import importlib
import importlib.util
import traceback
from collections.abc import Iterator, Sequence

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from dspark_megatron.config import ModelConfig
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.mcore import transformer_engine
from dspark_megatron.mcore.rms_norm import RMSNorm
from dspark_megatron.model.layers.gemma4 import (
    Gemma4Attention,
    Gemma4DraftLayer,
    Gemma4DraftLayerSubmodules,
)
from dspark_megatron.model.layers.qwen3 import (
    ContextInjectionAttention,
    ContextInjectionAttentionSubmodules,
    DraftLayer,
    DraftLayerSubmodules,
)


def layer_spec(backend: str, architecture: str = "qwen3") -> ModuleSpec:
    """The draft layer of `model.backend` and `model.architecture`. Raises ConfigError where
    Transformer Engine is asked for by name and cannot run."""
    require(
        architecture == "qwen3" or backend != "transformer_engine",
        f"model.backend 'transformer_engine' has no layers of model.architecture={architecture}; "
        "set model.backend=local",
    )
    if backend == "local" or architecture != "qwen3":
        return local_layer_spec(architecture)
    usable = transformer_engine.is_usable()
    found = f"{torch.cuda.is_available()} and {transformer_engine.is_installed()}"
    require(
        usable or backend == "auto",
        "model.backend 'transformer_engine' needs a GPU and the package transformer-engine (found: "
        f"{found}); install both or set "
        "model.backend=local: a checkpoint moves between the two",
    )
    if not usable:
        return local_layer_spec()
    from dspark_megatron.model.layers.transformer_engine import transformer_engine_layer_spec

    return transformer_engine_layer_spec()


def local_layer_spec(architecture: str = "qwen3") -> ModuleSpec:
    """Megatron-Core's own parallel linears and PyTorch's RMSNorm: runs on any device."""
    gemma = architecture == "gemma4"
    attention = ContextInjectionAttentionSubmodules(
        linear_q=ColumnParallelLinear,
        linear_kv=ColumnParallelLinear,
        linear_proj=RowParallelLinear,
        q_layernorm=RMSNorm,
        k_layernorm=RMSNorm,
    )
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    attention_class = Gemma4Attention if gemma else ContextInjectionAttention
    parts = dict(
        input_layernorm=RMSNorm,
        self_attention=ModuleSpec(module=attention_class, submodules=attention),
        pre_mlp_layernorm=RMSNorm,
        mlp=ModuleSpec(module=MLP, submodules=mlp),
    )
    if not gemma:
        return ModuleSpec(module=DraftLayer, submodules=DraftLayerSubmodules(**parts))
    more = dict(post_self_attn_layernorm=RMSNorm, post_mlp_layernorm=RMSNorm)
    layer = Gemma4DraftLayerSubmodules(**parts, **more)
    return ModuleSpec(module=Gemma4DraftLayer, submodules=layer)


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


def chosen_layer_spec(model: ModelConfig) -> ModuleSpec:
    """The user's own layer where the config names one, else that of `model.backend`."""
    if model.layer_spec:
        return user_layer_spec(model.layer_spec)
    return layer_spec(model.backend, model.architecture)
