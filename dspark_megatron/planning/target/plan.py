"""The frozen target of a plan: its weights on a rank, and what a pass of it takes."""

import functools
from dataclasses import dataclass, replace

import torch

from dspark_megatron.config import TargetConfig
from dspark_megatron.errors import ConfigError
from dspark_megatron.planning.target.formula import formula_bytes, formula_pass
from dspark_megatron.planning.target.observed import ObservedTarget
from dspark_megatron.planning.target.rank_model import target_bytes
from dspark_megatron.planning.target.target_pass import TargetPass
from dspark_megatron.run.check import RunPlan
from dspark_megatron.storage.target_folder import load_target_config
from dspark_megatron.targets.huggingface.quantization import quantization_method
from dspark_megatron.targets.huggingface.split import TargetSplit
from dspark_megatron.targets.megatron.footprint import gpt_bytes
from dspark_megatron.targets.megatron.gpt_shape import gpt_shape_of


@dataclass(frozen=True)
class _Target:
    """All that its figures depend on, so that they are found once for all layouts alike."""

    path: str
    text: str
    """Its config, which the path may lose."""
    attention: str
    dtype: torch.dtype
    split: TargetSplit
    layer_ids: tuple[int, ...]
    with_last_hidden: bool

    @classmethod
    def of(cls, plan: RunPlan) -> "_Target":
        target = plan.config.target
        return cls(
            target.path,
            load_target_config(target.path).to_json_string(),
            target.attention,
            plan.target_dtype,
            plan.target_split,
            plan.shape.target_layer_ids,
            plan.config.needs_target_logits,
        )

    @property
    def last_layer(self) -> int:
        """The highest that is kept."""
        if not self.with_last_hidden:
            return max(self.layer_ids)
        return load_target_config(self.path).get_text_config().num_hidden_layers - 1


def target_pass(plan: RunPlan) -> TargetPass:
    """Of the samples that go through the target together; nothing where none is run."""
    if plan.config.target.is_stored:
        return TargetPass()
    if plan.config.target.provider == "megatron":
        return TargetPass(by_formula=(_NOT_COUNTED,))
    size, most = plan.pass_size, plan.config.target.max_tokens_per_forward
    batch = size.samples, plan.config.data.max_length
    return _pass(_Target.of(plan), batch, size.micro_batches, most)


def target_weights(plan: RunPlan, *, dequantized: bool = False) -> int | None:
    """Bytes on the rank that holds most. None: not known, or no target is loaded. dequantized:
    count a quantized target as if it were not."""
    if plan.config.target.is_stored:
        return None
    if plan.config.target.provider == "megatron":
        return _gpt_weights(plan)
    return _weights(_Target.of(plan), dequantized)


_NOT_COUNTED = (
    "not counted: what a forward pass of the target takes and sends with target.provider=megatron; "
    "its weights are"
)


def _gpt_weights(plan: RunPlan) -> int:
    parallel, dtype = plan.config.parallel, plan.target_dtype
    return gpt_bytes(
        gpt_shape_of(plan.target_config),
        dtype,
        tp_size=parallel.tensor_parallel,
        ep_size=parallel.expert_parallel,
        stages=parallel.pipeline_parallel,
        last_layer=None if plan.config.needs_target_logits else max(plan.shape.target_layer_ids),
    )


@functools.cache
def _weights(target: _Target, dequantized: bool) -> int | None:
    given = load_target_config(target.path), target.dtype, target.split
    last = target.last_layer
    try:
        return target_bytes(*given, last_layer=last, dequantized=dequantized)
    except ConfigError:
        raise
    except Exception:  # `_pass` says it
        return formula_bytes(*given, last)


@functools.cache
def _pass(
    target: _Target, batch: tuple[int, int], micro_batches: int, max_tokens: int | None
) -> TargetPass:
    config = load_target_config(target.path)
    notes, attention = [], target.attention
    if attention not in ("sdpa", "eager"):
        notes.append(
            f"target.attention={attention} is planned as sdpa, whose kernel takes about as much"
        )
        attention = "sdpa"
    if quantization_method(config) is not None:
        notes.append(
            f"by formula: the target's pass is planned as if its weights were {target.dtype}; "
            "quantized ones are gathered and read in fewer bytes"
        )
    settings = TargetConfig(
        path=target.path, attention=attention, max_tokens_per_forward=max_tokens
    )
    given = config, target.dtype, target.split
    observed = ObservedTarget(settings, *given, target.layer_ids, target.with_last_hidden)
    try:
        found = observed.forward_pass(batch, micro_batches)
    except ConfigError:
        raise
    except Exception as error:  # whatever a family's classes meet on the meta device
        found = formula_pass(
            *given,
            batch,
            kept_states=len(target.layer_ids) + target.with_last_hidden,
            last_layer=target.last_layer,
            max_tokens=max_tokens,
        )
        notes.append(
            "by formula: what a forward pass of the target takes and sends, since Transformers' "
            f"classes of {config.model_type!r} do not run on the meta device "
            f"({' '.join(str(error).split())[:120]})"
        )
    return replace(found, by_formula=tuple(notes))
