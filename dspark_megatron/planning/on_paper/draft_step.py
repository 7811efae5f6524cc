"""The draft's part of a step as training runs it, with each of its phases observed."""

import functools
from collections.abc import Callable
from typing import Any

import numpy

from dspark_megatron.data.origins import Origins
from dspark_megatron.mcore.averages.moving_average import MovingAverage
from dspark_megatron.mcore.optimizer import build_optimizer, make_state, wrap_data_parallel
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.planning.observing.observer import Observer
from dspark_megatron.planning.on_paper.micro_batch import FullStates
from dspark_megatron.run.check import RunPlan
from dspark_megatron.run.ranks.runtime import Runtime
from dspark_megatron.targets.base import StatesSource
from dspark_megatron.training.health.bad_steps import BadSteps
from dspark_megatron.training.metrics import MetricSums
from dspark_megatron.training.step import GradientStep

WEIGHTS, FROZEN = "draft weights", "frozen embedding and head"
GRADIENTS, OPTIMIZER = "draft gradients (fp32)", "optimizer state (fp32)"
AVERAGE = "moving average (fp32)"
STATES = "target states of a micro-batch"
FORWARD, LOSS = "the draft's forward pass", "the draft's loss"
BACKWARD, UPDATE = "the draft's backward pass", "the optimizer's step"
ONCE = "optimizer"
"""The part of what is done once a step; `draft` and `loss` are done for each micro-batch."""


class DraftStep:
    """Draft, gradient buffers, optimizer and the step over them, on the runtime's device."""

    def __init__(
        self, plan: RunPlan, runtime: Runtime, draft: DSparkDraftModel, observer: Observer
    ) -> None:
        self.plan, self.device = plan, runtime.device
        with observer.phase("being built", kind=GRADIENTS):
            self.model = wrap_data_parallel(draft, plan.config.optimizer)
        trained = [p for p in draft.parameters() if p.requires_grad]
        observer.name(WEIGHTS, trained)
        observer.name(FROZEN, [p for p in draft.parameters() if not p.requires_grad])
        with observer.phase("being built", kind=OPTIMIZER):
            self.optimizer = build_optimizer(plan.config.optimizer, self.model, plan.dtype)
            make_state(self.optimizer)
        with observer.phase("being built", kind=AVERAGE):
            self.average = MovingAverage.of(plan.config.optimizer, self.optimizer, draft)
        groups = dict(tp_group=runtime.tp_group, dp_group=runtime.dp_group)
        self.step: Any = GradientStep(
            plan.config.loss,
            self.model,
            _ObservedStates(FullStates(plan, runtime.device), observer),
            plan.target_transform,
            **groups,
            device=runtime.device,
        )
        nowhere = Origins([], [], numpy.empty(0, dtype=numpy.int64))
        self.judge = BadSteps(plan.config.train, self.step, self.optimizer, nowhere, runtime)
        self._observe(observer)

    def _observe(self, observer: Observer) -> None:
        """Let each piece of work begin a phase of its own."""

        def phased(owner: Any, name: str, phase: str, part: str) -> None:
            setattr(owner, name, _in_phase(observer, getattr(owner, name), phase, part))

        phased(self.step, "_divisors", BACKWARD, "draft")
        phased(self.step, "_forward_backward", BACKWARD, "draft")
        phased(self.model.module, "forward", FORWARD, "draft")
        phased(self.step.forward_step, "head_loss", LOSS, "loss")
        self.step.forward_step = _ObservedForward(self.step.forward_step, observer)
        for group in self.model.bucket_groups:
            phased(group, "start_grad_sync", UPDATE, ONCE)
        self.run = _in_phase(observer, self._run, UPDATE, ONCE)

    def _run(self, batches: list[Any]) -> None:
        metrics = MetricSums.zeros(self.plan.shape.num_draft_tokens, self.device)
        self.optimizer.zero_grad()
        self.step.run(batches, metrics)
        self.judge.reason(metrics)
        self.optimizer.step()
        if self.average is not None:
            self.average.move()


class _ObservedForward:
    """Around the forward step, which `_forward_backward` calls."""

    def __init__(self, forward_step: Any, observer: Observer) -> None:
        self._forward_step, self._observer = forward_step, observer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._forward_step, name)

    def __call__(self, *args: Any) -> Any:
        with self._observer.phase(FORWARD, "draft"):
            return self._forward_step(*args)


class _ObservedStates(StatesSource):
    lockstep = False

    def __init__(self, source: StatesSource, observer: Observer) -> None:
        self.source, self.observer = source, observer

    def states(self, batch: Any) -> Any:
        with self.observer.phase(FORWARD, "target", kind=STATES):
            return self.source.states(batch)


def _in_phase(observer: Observer, function: Callable, phase: str, part: str) -> Callable:
    @functools.wraps(function, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        with observer.phase(phase, part):
            return function(*args, **kwargs)

    return run
