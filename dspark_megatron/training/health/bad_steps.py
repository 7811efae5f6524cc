"""Steps that would harm the draft: seen before the optimizer, skipped, written down, counted.

A step is bad if a gradient or a loss of any rank is not finite, or if its gradient norm is above
the bound. All ranks decide alike, and what decides does not depend on the layout.
"""

from collections import deque
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from dspark_megatron.config import TrainConfig
from dspark_megatron.data.origins import Origins
from dspark_megatron.errors import require
from dspark_megatron.mcore.optimizer import gradient_norm, gradient_size
from dspark_megatron.run.checkpoints.state import RunState
from dspark_megatron.run.ranks.runtime import Runtime
from dspark_megatron.training.health.bad_samples import describe_samples, largest_gradients
from dspark_megatron.training.metrics import MetricSums
from dspark_megatron.training.step import GradientStep

WINDOW = 100
"""Steps among which skipped ones are counted: a few bad samples in each epoch are bearable, while a
draft that is broken, or a bound that is too low, shows within them."""


class BadSteps:
    """Judges the steps of a start, and knows which ones were skipped of late."""

    def __init__(
        self,
        settings: TrainConfig,
        step: GradientStep,
        optimizer: MegatronOptimizer,
        origins: Origins,
        runtime: Runtime,
    ) -> None:
        self._settings, self._step, self._optimizer = settings, step, optimizer
        self._origins, self._runtime = origins, runtime
        self._skipped: deque[int] = deque()

    def reason(self, metrics: MetricSums) -> str | None:
        """Why the step whose gradients are there is not to be taken; None where it is. metrics:
        with the step's own. One all-reduce of two numbers over the world, for which the host waits;
        with a bound also Megatron-Core's of the norm."""
        bound, norm = self._settings.skip_gradient_norm_above, 0.0
        if bound is not None:
            norm = gradient_norm(self._optimizer)
        finite = gradient_size(self._step.model).isfinite() & metrics.packed().isfinite().all()
        faults = torch.zeros(2, device=finite.device)
        faults[0] = ~finite
        faults[1] = float(bound is not None and norm > bound)
        dist.all_reduce(faults, op=dist.ReduceOp.MAX)
        not_finite, too_large = faults.tolist()
        if not_finite:
            return "its gradients or its loss are not finite"
        if too_large:
            return f"its gradient norm {norm:.4g} is above train.skip_gradient_norm_above ({bound})"
        return None

    def skip(self, state: RunState, reason: str, metrics: MetricSums) -> dict[str, Any]:
        """Count a step as skipped, and say what is known of it: a line of `skipped_samples.jsonl`,
        the same on all ranks. state: after the step. metrics: of the step alone. Two all-gathers of
        objects and the all-reduce of the metrics."""
        self._skipped.append(state.iteration)
        while self._skipped[0] <= state.iteration - WINDOW:
            self._skipped.popleft()
        total = metrics.reduced(dp_group=self._runtime.dp_group)
        samples = describe_samples(
            self._step.slot_terms, self._origins, is_first=self._runtime.tp_group.rank() == 0
        )
        return {
            "iteration": state.iteration,
            "consumed_samples": state.consumed_samples,
            "reason": reason,
            **total.means(self._step.forward_step.term_weights),
            "at_fault": [one["sample"] for one in samples if one["at_fault"]],
            "largest_gradients": largest_gradients(self._step.model.module),
            "samples": samples,
        }

    @property
    def are_too_many(self) -> bool:
        return len(self._skipped) > self._settings.max_skipped_steps

    def check(self, iteration: int) -> None:
        """ConfigError, once the run is saved, when more steps were skipped than may be."""
        count, limit = len(self._skipped), self._settings.max_skipped_steps
        require(
            not self.are_too_many,
            f"{count} of the last {min(iteration, WINDOW)} steps were skipped and "
            f"train.max_skipped_steps allows {limit}; skipped_samples.jsonl has their samples and "
            f"the reasons. The run is saved at iteration {iteration:,}, behind them: mend the data "
            "or lower optimizer.lr and start the same command again, raise "
            "train.max_skipped_steps, or go back with train.resume_from",
        )
