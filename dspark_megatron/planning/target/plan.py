"""The frozen target of a plan: its weights on a rank, and what a pass of it takes."""

import functools
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from dspark_megatron.config import TargetConfig
from dspark_megatron.errors import ConfigError
from dspark_megatron.planning.target.formula import formula_bytes, formula_pass
from dspark_megatron.planning.target.gpt import ObservedGPT
from dspark_megatron.planning.target.observed import ObservedTarget
from dspark_megatron.planning.target.rank_model import target_bytes
from dspark_megatron.planning.target.target_pass import TargetPass
from dspark_megatron.run.check import RunPlan
from dspark_megatron.storage.target_folder import load_target_config
from dspark_megatron.targets.huggingface.quantization import quantization_method
from dspark_megatron.targets.huggingface.split import TargetSplit
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
    max_tokens: int | None
    gpt: ObservedGPT | None
    """None: Transformers runs it."""

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
            target.max_tokens_per_forward,
            _gpt(plan) if target.provider == "megatron" else None,
        )

    @property
    def config(self) -> PretrainedConfig:
        return load_target_config(self.path)

    @property
    def last_layer(self) -> int:
        """The highest that is kept."""
        if not self.with_last_hidden:
            return max(self.layer_ids)
        return self.config.get_text_config().num_hidden_layers - 1


def _gpt(plan: RunPlan) -> ObservedGPT:
    parallel = plan.config.parallel
    return ObservedGPT(
        gpt_shape_of(plan.target_config),
        plan.target_dtype,
        tp_size=parallel.tensor_parallel,
        ep_size=parallel.expert_parallel,
        stages=parallel.pipeline_parallel,
        sequence_parallel=parallel.sequence_parallel,
        layer_ids=plan.shape.target_layer_ids,
        with_last_hidden=plan.config.needs_target_logits,
        max_tokens=plan.config.target.max_tokens_per_forward,
    )


def target_pass(plan: RunPlan, micro_batches: int | None = None) -> TargetPass:
    """Of so many that go through the target together, None for the most that do; nothing where no
    target is run."""
    config, count = plan.config, micro_batches or plan.pass_size.micro_batches
    if config.target.is_stored:
        return TargetPass()
    batch = count * config.train.micro_batch_size, config.data.max_length
    return _pass(_Target.of(plan), batch, count)


def target_weights(plan: RunPlan, *, dequantized: bool = False) -> int | None:
    """Bytes on the rank that holds most. None: not known, or no target is loaded. dequantized:
    count a quantized target as if it were not."""
    return None if plan.config.target.is_stored else _weights(_Target.of(plan), dequantized)


@functools.cache
def _weights(target: _Target, dequantized: bool) -> int | None:
    given = target.config, target.dtype, target.split
    try:
        if target.gpt is not None:
            return target.gpt.weights()
        return target_bytes(*given, last_layer=target.last_layer, dequantized=dequantized)
    except ConfigError:
        raise
    except Exception:  # `_pass` says it
        return formula_bytes(*given, target.last_layer)


@functools.cache
def _pass(target: _Target, batch: tuple[int, int], micro_batches: int) -> TargetPass:
    try:
        found, notes = _observed(target, batch, micro_batches)
    except ConfigError:
        raise
    except Exception as error:  # whatever a family's classes meet on the meta device
        owner = "Transformers'" if target.gpt is None else "Megatron-Core's"
        words = " ".join(str(error).split())
        found = formula_pass(
            target.config,
            target.dtype,
            target.split,
            batch,
            kept_states=len(target.layer_ids) + target.with_last_hidden,
            last_layer=target.last_layer,
            max_tokens=target.max_tokens,
        )
        notes = [
            f"by formula: what a forward pass of the target takes and sends, since {owner} classes "
            f"of {target.config.model_type!r} do not run on the meta device ({words[:120]})"
        ]
    return replace(found, by_formula=tuple(notes))


def _observed(
    target: _Target, batch: tuple[int, int], micro_batches: int
) -> tuple[TargetPass, list[str]]:
    """And what of it is not as it will run."""
    if target.gpt is not None:
        return target.gpt.forward_pass(batch), []
    attention, notes = target.attention, []
    if attention not in ("sdpa", "eager"):
        attention = "sdpa"
        notes.append(
            f"by formula: attention as target.attention=sdpa has it, for {target.attention!r}"
        )
    if quantization_method(target.config) is not None:
        notes.append(
            f"by formula: the target's pass as if its weights were {target.dtype}; quantized ones "
            "are gathered and read in fewer bytes"
        )
    settings = TargetConfig(
        path=target.path, attention=attention, max_tokens_per_forward=target.max_tokens
    )
    observed = ObservedTarget(
        settings,
        target.config,
        target.dtype,
        target.split,
        target.layer_ids,
        target.with_last_hidden,
    )
    return observed.forward_pass(batch, micro_batches), notes
