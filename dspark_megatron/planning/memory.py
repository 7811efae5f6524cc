"""Memory of one rank by part: what is held all the time, and what comes on top, by moment. The
draft's is observed in its step on paper."""

import functools
import math
from dataclasses import dataclass, field

import torch

from dspark_megatron.planning.on_paper.draft_step import STATES
from dspark_megatron.planning.on_paper.observation import DraftObservation, Parts, observed_draft
from dspark_megatron.planning.pipeline import PipelineStates
from dspark_megatron.planning.target_work import NO_WORK, TargetWork, target_work
from dspark_megatron.run.check import RunPlan
from dspark_megatron.storage.target_folder import load_target_config
from dspark_megatron.targets.footprint import target_bytes
from dspark_megatron.targets.huggingface.quantization import quantization_method
from dspark_megatron.targets.huggingface.split import TargetSplit
from dspark_megatron.targets.megatron.footprint import gpt_bytes
from dspark_megatron.targets.megatron.gpt_shape import gpt_shape_of
from dspark_megatron.targets.passes import Passes


@dataclass(frozen=True)
class RankMemory:
    held: Parts
    """Throughout a micro-batch."""
    moments: dict[str, Parts] = field(default_factory=dict)
    """On top of it, one moment after the other."""

    @property
    def highest(self) -> str:
        """The moment that takes most."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def total(self) -> int:
        """Bytes at the highest moment."""
        return sum(self.held.values()) + sum(self.moments[self.highest].values())


def rank_memory(plan: RunPlan) -> RankMemory:
    """Of the rank that holds most. Sizes are upper bounds where data decides: samples of
    `data.max_length` tokens, `model.num_anchors` anchors in each and every slot supervised. Without
    the target where its quantized size is not known, or its states are stored."""
    weights, work = _target_figures(plan)
    draft = observed_draft(plan)
    held = {} if weights is None else {"frozen target": weights}
    held |= {**draft.held, **_target_states(plan)}
    forward = {} if plan.config.target.is_stored else _forward_parts(plan, work)
    target = {"the target's forward pass": forward} if forward else {}
    return RankMemory(held, target | _draft_moments(draft))


def _draft_moments(draft: DraftObservation) -> dict[str, Parts]:
    """What comes on top of what is held. States of the target are: all of a pass."""
    return {
        moment: {
            kind: size - draft.held.get(kind, 0)
            for kind, size in alive.items()
            if kind != STATES and size > draft.held.get(kind, 0)
        }
        for moment, alive in draft.moments.items()
    }


def _forward_parts(plan: RunPlan, work: TargetWork) -> Parts:
    """A layer at work, when the last states of its pass are still to come, or states being put
    together: each tap by itself and beside the others, or those of several passes and all of them,
    or those of a pass and of each of its micro-batches.
    """
    with_hidden = plan.config.needs_target_logits
    again = max(target_passes(plan), plan.pass_size.micro_batches) > 1
    joined = _taps(plan) + again * with_hidden * state_bytes(plan)
    for_others = PipelineStates.of(plan).kept_for_others
    parts = {
        "states kept for other pipeline ranks": for_others * pipeline_state_bytes(plan),
        "states of a target layer": max(work.layer - with_hidden * work.last_states, joined),
        "target's keys and values": work.cache,
        "gathered target layer": work.gathered_layers,
    }
    return {name: size for name, size in parts.items() if size}


def plan_target_work(plan: RunPlan) -> TargetWork:
    return _target_figures(plan)[1]


def _batch(plan: RunPlan) -> tuple[int, int]:
    """Samples that go through the target together, and their length."""
    return plan.pass_size.samples, plan.config.data.max_length


def target_passes(plan: RunPlan) -> int:
    """Forward passes of the target for them."""
    return Passes.of(*_batch(plan), plan.config.target.max_tokens_per_forward).count


def quantization_note(plan: RunPlan, *, counted: bool) -> list[str]:
    """What to know of a quantized target's size."""
    method = quantization_method(plan.target_config)
    if method is None or plan.config.target.is_stored:
        return []
    how = "counted as it is saved" if counted else "not counted"
    arguments = load_target_config(plan.config.target.path), plan.target_dtype, plan.target_split
    whole = target_bytes(*arguments, last_layer=_last_layer(plan), dequantized=True)
    assert whole is not None, "its quantizer is known by now"
    return [
        f"the target is quantized ({method}), and {how}; where Transformers dequantizes it, for "
        f"want of a GPU or a kernel, it takes {whole / 2**30:.3f} GiB"
    ]


def provider_note(plan: RunPlan) -> list[str]:
    """What is not known of a GPTModel."""
    if plan.config.target.provider != "megatron":
        return []
    return [
        "not counted: what a forward pass of the target takes and sends with "
        "target.provider=megatron; its weights are"
    ]


def _gpt_bytes(plan: RunPlan, dtype: torch.dtype) -> int:
    parallel = plan.config.parallel
    return gpt_bytes(
        gpt_shape_of(plan.target_config),
        dtype,
        tp_size=parallel.tensor_parallel,
        ep_size=parallel.expert_parallel,
        stages=parallel.pipeline_parallel,
        last_layer=_last_layer(plan),
    )


def _target_figures(plan: RunPlan) -> tuple[int | None, TargetWork]:
    """Bytes of the frozen weights, None where they are not known, and what a forward pass takes."""
    if plan.config.target.is_stored:
        return None, NO_WORK
    target, dtype = plan.config.target, plan.target_dtype
    if target.provider == "megatron":
        return _gpt_bytes(plan, dtype), TargetWork(0, 0, 0, 0, 0, 0, 0)
    wanted = (dtype, plan.target_split, _batch(plan), target.max_tokens_per_forward)
    text = load_target_config(target.path).to_json_string()
    return _figures_of_split(target.path, text, *wanted, _last_layer(plan))


@functools.cache
def _figures_of_split(
    path: str,
    text: str,
    dtype: torch.dtype,
    split: TargetSplit,
    batch: tuple[int, int],
    max_tokens: int | None,
    last: int | None,
) -> tuple[int | None, TargetWork]:
    """Once for all layouts that split the target alike. text: its config, which a path may lose."""
    config = load_target_config(path)
    weights = target_bytes(config, dtype, split, last_layer=last)
    if last is None:
        last = config.get_text_config().num_hidden_layers - 1
    work = target_work(config, dtype, split, batch, last_layer=last, max_tokens=max_tokens)
    return weights, work


def _last_layer(plan: RunPlan) -> int | None:
    """The highest target layer that is kept; None for all."""
    return None if plan.config.needs_target_logits else max(plan.shape.target_layer_ids)


def _target_states(plan: RunPlan) -> Parts:
    """Taps and, where the loss compares with the target, the last hidden states: of a micro-batch
    and of those that wait for their turn."""
    states = PipelineStates.of(plan)
    parts = {"target states of a pass": plan.pass_size.waiting_bytes()}
    if states.received:
        parts["target states of a pipeline run"] = states.received * pipeline_state_bytes(plan)
    return parts


def _taps(plan: RunPlan) -> int:
    """For a moment each tap exists by itself and beside the others."""
    return len(plan.shape.target_layer_ids) * state_bytes(plan)


def state_bytes(plan: RunPlan) -> int:
    """Hidden states of one layer."""
    return math.prod(_batch(plan)) * plan.shape.hidden_size * plan.target_dtype.itemsize


def pipeline_state_bytes(plan: RunPlan) -> int:
    """The same as pipeline ranks keep and send them: with sequence parallelism each
    tensor-parallel rank has some of the rows."""
    parallel = plan.config.parallel
    parts = parallel.tensor_parallel if parallel.sequence_parallel else 1
    return state_bytes(plan) // parts
