"""Estimates of tau on held-out answers while a run trains."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist

from dspark_megatron.data.dataset import ConversationDataset
from dspark_megatron.data.files.sources import check_apart
from dspark_megatron.errors import printable
from dspark_megatron.evaluation.estimate import EstimateSettings, estimate_acceptance
from dspark_megatron.mcore.averages.moving_average import MovingAverage
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.ops.logit_transform import TargetHead
from dspark_megatron.run.check import RunPlan
from dspark_megatron.run.checkpoints.state import BestEstimate, RunState
from dspark_megatron.run.data import load_run_data
from dspark_megatron.run.ranks.runtime import Runtime
from dspark_megatron.targets.base import Target
from dspark_megatron.training.reporter import Reporter


class HeldOut:
    """The answers to estimate on, read and checked before any long work."""

    def __init__(self, plan: RunPlan, runtime: Runtime, dataset: ConversationDataset) -> None:
        settings = plan.config.evaluate
        assert settings.every is not None
        self.config, self.runtime, self.every = plan.config, runtime, settings.every
        self.target_transform = plan.target_transform
        count = min(len(dataset), settings.heldout_samples or len(dataset))
        self.samples = [dataset[i] for i in range(count)]
        share = max(plan.config.train.micro_batch_size, math.ceil(count / plan.dp_size))
        self.samples_per_pass = min(plan.samples_outside_training, share)
        self.conditions = {
            "data_fingerprint": dataset.fingerprint,
            "samples": count,
            "temperature": settings.temperature,
        }
        if settings.weights != "trained":
            self.conditions["weights"] = settings.weights
        """Estimates compare when these are equal."""

    @classmethod
    def load(cls, plan: RunPlan, runtime: Runtime) -> "HeldOut | None":
        """None where the run makes no estimates."""
        config = plan.config
        if config.evaluate.every is None:
            return None
        files = config.evaluate.heldout_files
        check_apart(config.data.train_files, files)
        name, show_progress = "evaluate.heldout_files", runtime.is_main
        dataset = load_run_data(
            plan, files, name=name, runtime=runtime, show_progress=show_progress
        )
        if runtime.is_main:
            print(printable(f"held-out {dataset.report.describe()}"), flush=True)
        return cls(plan, runtime, dataset)

    def is_due(self, iteration: int) -> bool:
        return iteration % self.every == 0

    def estimate(
        self,
        state: RunState,
        draft: DSparkDraftModel,
        average: MovingAverage | None,
        target: Target,
        reporter: Reporter | None,
    ) -> RunState:
        """Estimate, report, and return the state with what is then the best. The draft is left in
        training mode, and nothing that training reads is changed. average: of the draft's weights,
        for `evaluate.weights: ema`."""
        draft.eval()
        with self._chosen_weights(draft, average):
            figures = estimate_acceptance(
                draft,
                target,
                TargetHead(draft.lm_head, self.target_transform),
                self.samples,
                EstimateSettings.of(self.config, draft, samples_per_pass=self.samples_per_pass),
                dp_group=self.runtime.dp_group,
            )
        draft.train()
        if self._is_best(figures["tau"], state.best):
            state = replace(
                state, best=BestEstimate(state.iteration, figures["tau"], self.conditions)
            )
        if reporter is not None:
            row = {"iteration": state.iteration, "consumed_samples": state.consumed_samples}
            reporter.log_heldout({**row, **figures}, is_best=state.is_best)
        return state

    def _chosen_weights(
        self, draft: DSparkDraftModel, average: MovingAverage | None
    ) -> AbstractContextManager[None]:
        if self.config.evaluate.weights == "trained":
            return nullcontext()
        assert average is not None, "the config asks for one"
        return average.in_place_of_weights(draft)

    def _is_best(self, tau: float | None, best: BestEstimate | None) -> bool:
        """Whether a tau beats the best one, or there is none to compare with; one that is no number
        never does. The main rank decides for all: one broadcast of one number."""
        compares = best is not None and best.conditions == self.conditions
        known = best.tau if best is not None and compares and math.isfinite(best.tau) else -math.inf
        better = tau is not None and math.isfinite(tau) and tau > known
        decision = torch.tensor(float(better), device=self.runtime.device)
        dist.broadcast(decision, 0)
        return bool(decision.item())
