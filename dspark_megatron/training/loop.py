"""The training run: start, steps, checkpoints, end."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dspark_megatron.conversion.draft_tensors import check_finite
from dspark_megatron.data.ahead import StepsAhead
from dspark_megatron.data.batch import MicroBatches
from dspark_megatron.data.dataset import ConversationDataset
from dspark_megatron.errors import printable
from dspark_megatron.mcore.averages.moving_average import MovingAverage
from dspark_megatron.mcore.optimizer import (
    build_optimizer,
    build_scheduler,
    wrap_data_parallel,
)
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.run.build import build_draft
from dspark_megatron.run.check import RunPlan
from dspark_megatron.run.checkpoints.commit import track_best
from dspark_megatron.run.checkpoints.loading import load_checkpoint
from dspark_megatron.run.checkpoints.state import RunState, check_same_run, read_state
from dspark_megatron.run.data import load_train_data
from dspark_megatron.run.identity import export_settings, run_identity
from dspark_megatron.run.initial.initial_weights import InitialWeights
from dspark_megatron.run.initial.warm_start import WarmStart
from dspark_megatron.run.output import claimed_output, set_aside, write_config, write_status
from dspark_megatron.run.ranks.agreement import agree
from dspark_megatron.run.ranks.facts import draft_facts, start_facts, target_facts
from dspark_megatron.run.ranks.places import at
from dspark_megatron.run.ranks.runtime import Runtime
from dspark_megatron.run.states import check_stored_states, states_source
from dspark_megatron.storage.checkpoints.meta import FORMAT
from dspark_megatron.storage.checkpoints.whole import iteration_folder
from dspark_megatron.targets.stored.target import StoredStates
from dspark_megatron.training.ending.run_end import RunEnd, check_length, finished_text
from dspark_megatron.training.ending.stop_requests import StopReason, StopRequests
from dspark_megatron.training.health.bad_steps import BadSteps
from dspark_megatron.training.heldout import HeldOut
from dspark_megatron.training.metrics import MetricSums
from dspark_megatron.training.padding import describe_padding
from dspark_megatron.training.reporter import Reporter
from dspark_megatron.training.resuming import average_text, checkpoint_to_resume, finished_state
from dspark_megatron.training.saves import Saves
from dspark_megatron.training.step import GradientStep
from dspark_megatron.training.watching.flops import StepFlops
from dspark_megatron.training.watching.lines import end_lines, start_lines, stopped_lines
from dspark_megatron.training.watching.speed import Speed


def train(plan: RunPlan, runtime: Runtime, stop: StopRequests) -> RunState | None:
    """Train until the run's end or until a rank is to stop; every rank calls it. The state it ended
    in; None where nothing was left to do."""
    agree(target_facts(plan))
    with claimed_output(plan.config, runtime) as output_dir:
        return _train(plan, runtime, stop, output_dir)


def _train(
    plan: RunPlan, runtime: Runtime, stop: StopRequests, output_dir: Path
) -> RunState | None:
    at("looking for a checkpoint", longer=True)
    resume_from = checkpoint_to_resume(plan, output_dir / "checkpoints", runtime)
    if finished := finished_state(plan, resume_from, output_dir, runtime):
        finish_again(plan, runtime, output_dir, finished)
        return None
    agree(start_facts(plan, resume_from))
    if plan.config.target.is_stored:
        at("checking target.cache", longer=True)
        check_stored_states(plan, runtime)  # refused before the data are read
    at("building the draft", longer=True)
    draft = build_run_draft(plan, runtime, is_new=resume_from is None)
    at("reading the held-out answers", longer=True)
    heldout = HeldOut.load(plan, runtime)
    dataset = load_train_data(plan, runtime)
    check_length(plan.config.train, len(dataset))
    if resume_from is not None:
        check_same_run(resume_from, {"data_fingerprint": dataset.fingerprint})
        end, state = RunEnd.of(plan.config.train, len(dataset)), read_state(resume_from)
        if end.is_reached(state):
            finish_again(plan, runtime, output_dir, end.describe(state))
            return None
    trainer = Trainer(plan, runtime, dataset, output_dir, resume_from, draft, heldout)
    with trainer.steps:
        return trainer.run(stop)


def finish_again(plan: RunPlan, runtime: Runtime, output_dir: Path, state: str) -> None:
    """Say that the run had reached its end before this start."""
    if runtime.is_main:
        write_status(output_dir, "completed")
        print(printable(finished_text(state, plan.config.train)), flush=True)


class Trainer:
    def __init__(
        self,
        plan: RunPlan,
        runtime: Runtime,
        dataset: ConversationDataset,
        output_dir: Path,
        resume_from: Path | None,
        draft: DSparkDraftModel,
        heldout: HeldOut | None,
    ) -> None:
        config = plan.config
        self.plan, self.runtime, self.dataset = plan, runtime, dataset
        self.draft, self.heldout = draft, heldout
        self.settings = config.train
        self.checkpoints = output_dir / "checkpoints"
        self.output_dir = output_dir
        self.reporter: Reporter | None = None
        identity = {**run_identity(plan), "data_fingerprint": dataset.fingerprint}
        self.state = RunState(0, 0) if resume_from is None else read_state(resume_from)
        self.end = RunEnd.of(config.train, len(dataset))
        self.iterations = self.end.last_iteration(self.state)
        self.meta = {"format": FORMAT, **identity, **export_settings(plan)}
        if config.optimizer.ema_decay is not None:
            self.meta["ema_decay"] = config.optimizer.ema_decay
        self.meta |= {"num_samples": len(dataset), "resumed_from": self.settings.resume_from}
        if runtime.is_main:
            write_config(output_dir, config)
            write_status(output_dir, "running")
        batches = MicroBatches(config, dataset, dp_group=runtime.dp_group)
        self.steps = StepsAhead(
            batches, step_samples=config.train.global_batch_size, device=runtime.device
        )
        samples = dataset.lengths, batches.blend
        self._say(describe_padding(plan, *samples, self.iterations) or "")
        self.target = states_source(plan, runtime, dataset, self.draft)
        self.model = wrap_data_parallel(self.draft, config.optimizer)
        self.optimizer = build_optimizer(config.optimizer, self.model, plan.dtype)
        self.average = MovingAverage.of(config.optimizer, self.optimizer, self.draft)
        unit = self.end.progress_of_a_step
        self.scheduler = build_scheduler(
            config.optimizer, self.optimizer, self.end.steps, unit=unit
        )
        if resume_from is not None:
            self.state = self._resumed(resume_from)
            self.scheduler.step(self.end.progress(self.state))
            self._say(f"continuing from {resume_from}: {self.end.describe(self.state)}")
            self._say(average_text(resume_from, config.optimizer.ema_decay))
        agree(draft_facts(self.draft, runtime.tp_group.rank()))
        parts = self.draft, self.optimizer, self.average
        self.saves = Saves(self.settings, self.checkpoints, self.meta, *parts)
        self.step = GradientStep(
            config.loss,
            self.model,
            self.target,
            plan.target_transform,
            tp_group=runtime.tp_group,
            dp_group=runtime.dp_group,
            device=runtime.device,
        )
        self.bad_steps = BadSteps(config.train, self.step, self.optimizer, dataset.origins, runtime)
        self.flops = StepFlops.of(plan)
        self.speed = Speed(self.step.forward_step.parts, runtime.device, runtime.world_size)
        trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
        where = dict(trained=trained, iterations=self.iterations, resume_from=resume_from)
        self._say("\n".join(start_lines(plan, runtime, dataset, output_dir, **where)))

    def run(self, stop: StopRequests) -> RunState:
        """Steps until the run's end, saving on the way, at the end and on a stop. Returns the last
        state."""
        if self.runtime.is_main and not self.settings.resume:
            self._say(set_aside(self.checkpoints))
        reporter = self.reporter = self._reporter()
        start, began = self.state.iteration, time.perf_counter()
        metrics = self._open_metrics()
        self.speed.begin()
        limit = self.settings.exit_duration_minutes
        # Signals only: with a limit shorter than its start, a requeued run would never get on.
        reason = self._agreed(stop.reason(None))
        while not reason and not self.end.is_reached(self.state):
            is_first = self.state.iteration == start  # which compiles
            at(f"step {self.state.iteration + 1}", longer=is_first)
            grad_norm = self._train_step(metrics)
            iteration = self.state.iteration
            last = self.end.is_reached(self.state)
            self.speed.step()
            if reporter is not None:
                reporter.step()
            if last and isinstance(self.target, StoredStates):
                self._wait_for_checks(self.target)
            if last or iteration % self.settings.log_every == 0:
                self._log(reporter, metrics, grad_norm)
                metrics = self._new_metrics()
            if self.heldout is not None and (last or self.heldout.is_due(iteration)):
                started = time.perf_counter()
                assert not isinstance(self.target, StoredStates), "the config refuses it"
                parts = self.draft, self.average, self.target
                self.state = self.heldout.estimate(self.state, *parts, reporter)
                self.speed.leave_out(time.perf_counter() - started)
            reason = self._agreed(stop.reason(limit))
            is_over = bool(reason) or last or self.bad_steps.are_too_many
            is_due = self.state.is_best or iteration % self.settings.save_every == 0
            if is_over or is_due:
                self._save(metrics, waits=is_over)
            self.bad_steps.check(iteration)
        if reporter is not None:
            reporter.close()
            self._report_end(reason, reporter.last, time.perf_counter() - began)
        return self.state

    def _wait_for_checks(self, states: StoredStates) -> None:
        """Until every rank has compared its shards: no run completes on states unchecked. Every ten
        seconds an all-reduce of one number over the world, so that ranks are seen to get on."""
        while any(self._largest(float(not states.is_checked(10.0)))):
            at("comparing the stored states with their checksums", longer=True)

    def _report_end(self, reason: StopReason, row: dict[str, Any] | None, seconds: float) -> None:
        """On the main rank, after the last save."""
        state = self.end.describe(self.state)
        if self.end.is_reached(self.state):
            write_status(self.output_dir, "completed")
            self._say(f"completed: {state}")
            self._say("\n".join(end_lines(self.output_dir, self.state, row, seconds)))
            return
        write_status(self.output_dir, "stopped")
        limit = f"its time limit of {self.settings.exit_duration_minutes} minutes"
        cause = "a signal" if reason == StopReason.SIGNAL else limit
        world = self.runtime.world_size
        lines = stopped_lines(cause, self.output_dir, self.state, state, self.settings, world)
        self._say("\n".join(lines))

    def _train_step(self, metrics: MetricSums) -> float | None:
        """One step; returns the gradient norm before clipping, None where it was skipped. A
        skipped one leaves weights, moments, average and metrics as they were; data and learning
        rate go on.
        """
        micro_batches = self.steps.of_step(self.state.consumed_samples)
        before = metrics.packed()
        self.optimizer.zero_grad()
        parts = self.step.forward_step.parts
        with parts.part("draft"):
            self.step.run(micro_batches, metrics)
        if self.flops is not None:
            metrics.add(flops=self.flops.of_step(micro_batches, self.step.forward_step))
        self.scheduler.step(self.end.progress_of_a_step)
        reason = self.bad_steps.reason(metrics)
        self.state = replace(
            self.state,
            iteration=self.state.iteration + 1,
            consumed_samples=self.state.consumed_samples + self.settings.global_batch_size,
            skipped_steps=self.state.skipped_steps + bool(reason),
        )
        if reason is None:
            with parts.part("optimizer"):
                norm = float(self.optimizer.step()[1])
            if self.average is not None:
                self.average.move()
            return norm
        own = MetricSums.unpacked(metrics.packed() - before)
        skipped = self.bad_steps.skip(self.state, reason, own)
        metrics.restore(before)
        if self.reporter is not None:
            self.reporter.log_skipped(skipped)
        return None

    def _log(
        self,
        reporter: Reporter | None,
        metrics: MetricSums,
        grad_norm: float | None,
    ) -> None:
        total = metrics.reduced(dp_group=self.runtime.dp_group)
        if reporter is None:
            return
        row = {
            "iteration": self.state.iteration,
            "consumed_samples": self.state.consumed_samples,
            **total.means(self.step.forward_step.term_weights),
            "grad_norm": grad_norm,
            "learning_rate": self.scheduler.get_lr({}),  # of parts with a scale of 1
            "skipped_steps": self.state.skipped_steps,
        }
        row |= self.speed.figures(
            tokens=total.scalars["tokens"].item(),
            flops=None if self.flops is None else total.scalars["flops"].item(),
            waited=self.steps.seconds_waited(),
            saved=self.saves.seconds(),
        )
        reporter.log(row)

    def _save(self, metrics: MetricSums, *, waits: bool) -> None:
        open_metrics = metrics.reduced(dp_group=self.runtime.dp_group).packed().tolist()
        self.saves.save(replace(self.state, open_metrics=tuple(open_metrics)), waits=waits)

    def _resumed(self, folder: Path) -> RunState:
        """The state of a checkpoint, once draft, optimizer and average are filled from it. A best
        checkpoint that somebody has deleted is let go."""
        state = load_checkpoint(folder, self.draft, self.optimizer, self.average)
        if state.best and not iteration_folder(self.checkpoints, state.best.iteration).is_dir():
            state = replace(state, best=None)
        if self.runtime.is_main:
            track_best(self.checkpoints, state.best)
        return state

    def _agreed(self, reason: StopReason) -> StopReason:
        """The largest of all ranks' reasons: a signal may reach one node only; clocks differ. The
        same all-reduce, of two numbers over the world, tells whether a rank still writes a
        checkpoint; one that all have written is finished."""
        reason_of_all, is_writing = self._largest(float(reason), float(self.saves.is_writing))
        if not is_writing:
            self.saves.finish()
        return StopReason(int(reason_of_all))

    def _largest(self, *values: float) -> list[float]:
        """Of all ranks' values, one by one. One all-reduce of them over the world."""
        tensor = torch.tensor(values, device=self.runtime.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def _open_metrics(self) -> MetricSums:
        """The sums of the log interval that the run stands in. What a checkpoint kept of them is
        of all ranks together, so one data-parallel rank takes it."""
        is_first = self.runtime.dp_group.rank() == 0
        return self._new_metrics().continued(self.state.open_metrics if is_first else ())

    def _new_metrics(self) -> MetricSums:
        return MetricSums.zeros(self.plan.shape.num_draft_tokens, self.runtime.device)

    def _reporter(self) -> Reporter | None:
        if not self.runtime.is_main:
            return None
        return Reporter(
            self.output_dir,
            iterations=self.iterations,
            start=self.state.iteration,
            tensorboard=self.settings.tensorboard,
            rank="GPU" if self.runtime.device.type == "cuda" else "rank",
        )

    def _say(self, text: str) -> None:
        if text and self.runtime.is_main:
            print(printable(text), flush=True)


def build_run_draft(plan: RunPlan, runtime: Runtime, *, is_new: bool) -> DSparkDraftModel:
    """The draft, before anything slow: its layers may be the user's own. A new run's has the
    weights that it is to start from."""
    initial = None
    if is_new:
        initial = InitialWeights.open(plan) or WarmStart.open(plan)
    draft = build_draft(plan, runtime)
    if initial is not None:
        initial.load(draft, tp_group=runtime.tp_group)
        check_finite(draft, "the draft as it starts")
        if runtime.is_main:
            print(printable(initial.describe()), flush=True)
    return draft
