"""Memory of one rank by part: what is held all the time, and what comes on top, by moment. The
draft's is observed in its step on paper."""

import math
from dataclasses import dataclass, field

from dspark_megatron.planning.on_paper.draft_step import STATES
from dspark_megatron.planning.on_paper.observation import DraftObservation, Parts, observed_draft
from dspark_megatron.planning.pipeline import PipelineStates
from dspark_megatron.planning.target.plan import target_pass, target_weights
from dspark_megatron.planning.target.target_pass import LAYER
from dspark_megatron.run.check import RunPlan
from dspark_megatron.targets.huggingface.quantization import quantization_method


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
    weights, draft = target_weights(plan), observed_draft(plan)
    held = {} if weights is None else {"frozen target": weights}
    held |= {**draft.held, **_target_states(plan)}
    if kept := target_pass(plan).kept:
        held["target's buffers"] = kept
    forward = {} if plan.config.target.is_stored else _forward_parts(plan)
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


def _forward_parts(plan: RunPlan) -> Parts:
    """At the highest moment of a pass, beside the states that it ends with: those are held."""
    parts, states = dict(target_pass(plan).highest), plan.pass_size.waiting_bytes()
    parts[LAYER] = max(0, parts.get(LAYER, 0) - states)
    for_others = PipelineStates.of(plan).kept_for_others
    parts |= {"states kept for other pipeline ranks": for_others * pipeline_state_bytes(plan)}
    return {name: size for name, size in parts.items() if size}


def _batch(plan: RunPlan) -> tuple[int, int]:
    """Samples that go through the target together, and their length."""
    return plan.pass_size.samples, plan.config.data.max_length


def quantization_note(plan: RunPlan, *, counted: bool) -> list[str]:
    """What to know of a quantized target's size."""
    method = quantization_method(plan.target_config)
    if method is None or plan.config.target.is_stored:
        return []
    how = "counted as it is saved" if counted else "not counted"
    whole = target_weights(plan, dequantized=True)
    assert whole is not None, "its quantizer is known by now"
    return [
        f"the target is quantized ({method}), and {how}; where Transformers dequantizes it, for "
        f"want of a GPU or a kernel, it takes {whole / 2**30:.3f} GiB"
    ]


def _target_states(plan: RunPlan) -> Parts:
    """Taps and, where the loss compares with the target, the last hidden states: of a micro-batch
    and of those that wait for their turn."""
    states = PipelineStates.of(plan)
    parts = {"target states of a pass": plan.pass_size.waiting_bytes()}
    if states.received:
        parts["target states of a pipeline run"] = states.received * pipeline_state_bytes(plan)
    return parts


def state_bytes(plan: RunPlan) -> int:
    """Hidden states of one layer."""
    return math.prod(_batch(plan)) * plan.shape.hidden_size * plan.target_dtype.itemsize


def pipeline_state_bytes(plan: RunPlan) -> int:
    """The same as pipeline ranks keep and send them: with sequence parallelism each
    tensor-parallel rank has some of the rows."""
    parallel = plan.config.parallel
    parts = parallel.tensor_parallel if parallel.sequence_parallel else 1
    return state_bytes(plan) // parts
