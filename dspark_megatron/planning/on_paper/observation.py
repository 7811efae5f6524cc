"""A step of the draft on the meta device, observed: once for all plans that it is the same for."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state

from dspark_megatron.model.layer_specs import local_layer_spec
from dspark_megatron.ops.attention.block_attention import chosen_backend
from dspark_megatron.planning.observing.gpu_kernels import gpu_kernels
from dspark_megatron.planning.observing.observer import Observer
from dspark_megatron.planning.observing.work import Work
from dspark_megatron.planning.on_paper.draft_step import (
    AVERAGE,
    BACKWARD,
    FORWARD,
    FROZEN,
    GRADIENTS,
    LOSS,
    ONCE,
    OPTIMIZER,
    UPDATE,
    WEIGHTS,
    DraftStep,
)
from dspark_megatron.planning.on_paper.micro_batch import full_micro_batch
from dspark_megatron.planning.on_paper.plain_optimizer import plain_optimizer
from dspark_megatron.planning.on_paper.ranks import (
    META,
    EverythingOnMeta,
    HostAnswers,
    runtime_on_paper,
)
from dspark_megatron.run.build import empty_draft
from dspark_megatron.run.check import RunPlan
from dspark_megatron.run.ranks.runtime import Runtime

Parts = dict[str, int]
"""Bytes by what takes them."""


@dataclass(frozen=True)
class DraftObservation:
    trained: int
    """Parameters on a rank, without padding of their buffers."""
    held: Parts
    """From the start of a run to its end."""
    moments: dict[str, Parts]
    """All that is alive at the highest moment of each phase."""
    micro_batch: dict[str, Work]
    """`draft` and `loss`, of one micro-batch."""
    once: Work
    """Of what is done once a step."""
    notes: tuple[str, ...] = ()
    """What is not known."""


_known: dict[str, DraftObservation] = {}


def observed_draft(plan: RunPlan) -> DraftObservation:
    """What a GPU does and holds, whatever this machine has. ConfigError in a process that is a
    rank of a job."""
    key = _what_it_depends_on(plan)
    if key not in _known:
        _known[key] = _observed(plan)
    return _known[key]


def _what_it_depends_on(plan: RunPlan) -> str:
    config = plan.config
    sections = [asdict(section) for section in (config.model, config.loss, config.optimizer)]
    layout = config.parallel.tensor_parallel, config.parallel.sequence_parallel, plan.dp_size
    batch = config.train.micro_batch_size, config.data.max_length
    rest = config.train.dtype, str(plan.target_dtype), config.train.recompute_activations
    bound = config.train.skip_gradient_norm_above
    return json.dumps([plan.shape.to_dict(), sections, layout, batch, rest, bound])


def _observed(plan: RunPlan) -> DraftObservation:
    """The user's own layers are code, and a plan runs none of theirs."""
    found = observe_on_paper(_for_a_gpu(plan), gpu_kernels)
    words = plan.config.model.layer_spec
    if not words:
        return found
    note = (
        f"not known: what the layers of model.layer_spec {words} take and send, since a plan does "
        "not import them; counted are those of model.backend=local in their place"
    )
    return replace(found, notes=(note,))


def _for_a_gpu(plan: RunPlan) -> RunPlan:
    """What a GPU chooses, by name; and the plain way to add gradients, since Apex's needs one."""
    config = plan.config
    loss = replace(config.loss, compile=config.loss.is_compiled("cuda"))
    optimizer = replace(config.optimizer, gradient_accumulation_fusion=False)
    backend: Any = chosen_backend(config.model.attention_backend, "cuda", plan.shape.head_dim)
    model = replace(config.model, attention_backend=backend)
    return replace(plan, config=replace(config, loss=loss, optimizer=optimizer, model=model))


def observe_on_paper(
    plan: RunPlan, kernels: Callable[[Observer], AbstractContextManager[None]]
) -> DraftObservation:
    """One micro-batch of rank 0, and what surrounds all of them."""
    tp, world = plan.config.parallel.tensor_parallel, plan.dp_size
    with runtime_on_paper(tp, tp * world) as runtime, plain_optimizer():
        observer = Observer(META, group_words(runtime))
        with EverythingOnMeta(), HostAnswers(), kernels(observer), observer:
            with META, observer.phase("being built", kind=WEIGHTS):
                draft = empty_draft(plan, runtime, local_layer_spec(plan.shape.architecture))
                step = DraftStep(plan, runtime, draft, observer)
            return _observe(step, observer, plan)


def _observe(step: DraftStep, observer: Observer, plan: RunPlan) -> DraftObservation:
    held = {kind: observer.alive[kind] for kind in (FROZEN, WEIGHTS, GRADIENTS, OPTIMIZER)}
    if step.average is not None:
        held[AVERAGE] = observer.alive[AVERAGE]
    observer.peaks.clear()
    step.run([full_micro_batch(plan)])
    work = observer.work
    trained = sum(p.numel() for p in step.model.parameters() if p.requires_grad)
    return DraftObservation(
        trained,
        held,
        {name: observer.peaks[name].alive for name in (FORWARD, LOSS, BACKWARD, UPDATE)},
        {part: work[part] for part in ("draft", "loss")},
        work[ONCE],
    )


def group_words(runtime: Runtime) -> dict[str, str]:
    """What the draft's groups are for."""
    dp = "draft's gradients and weights, data-parallel"
    found = [
        (parallel_state.get_intra_distributed_optimizer_instance_group(), "gradients' norm"),
        (parallel_state.get_model_parallel_group(), "gradients' norm"),
        (torch.distributed.group.WORLD, "all ranks"),
        (parallel_state.get_data_parallel_group(), dp),
        (runtime.dp_group, dp),
        (runtime.tp_group, "draft, tensor-parallel"),
    ]
    return {group.group_name: words for group, words in found if group is not None}
