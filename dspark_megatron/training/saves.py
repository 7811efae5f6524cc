"""The checkpoints of a run as the loop makes them: one at a time, in the background if asked."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dspark_megatron.config import TrainConfig
from dspark_megatron.mcore.averages.moving_average import MovingAverage
from dspark_megatron.mcore.optimizer import make_state
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.run.checkpoints.saving import RunningSave, start_save
from dspark_megatron.run.checkpoints.state import RunState
from dspark_megatron.training.health.weights import check_weights


class Saves:
    """Every rank makes the same calls, so all of them have a save that is running, or none has."""

    def __init__(
        self,
        settings: TrainConfig,
        checkpoints: Path,
        meta: dict[str, Any],
        draft: DSparkDraftModel,
        optimizer: Any,
        average: MovingAverage | None,
    ) -> None:
        self.settings, self.checkpoints, self.meta = settings, checkpoints, meta
        self.draft, self.optimizer, self.average = draft, optimizer, average
        self._running: RunningSave | None = None
        self._seconds = 0.0

    @property
    def is_writing(self) -> bool:
        """Whether this rank writes a checkpoint at this moment."""
        return self._running is not None and not self._running.is_written

    def save(self, state: RunState, *, waits: bool) -> None:
        """Save where the run stands, after the checkpoint before is finished. waits: until it is
        written, whatever `train.async_save` says. Collective over the world."""
        self.finish()
        with self._counted():
            check_weights(self.draft, state.iteration)
            make_state(self.optimizer)
            copies = self.settings.async_save and not waits
            place = self.checkpoints, state, self.meta
            what = self.draft, self.optimizer, self.average
            self._running = start_save(*place, *what, copies=copies)
        if not copies:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written and give it its name; nothing to do where
        there is none. Collective over the world. ConfigError where it could not be written."""
        if self._running is None:
            return
        running, self._running = self._running, None
        with self._counted():
            running.finish(keep_last=self.settings.keep_last)

    def seconds(self) -> float:
        """How long the run has stood still for saves since this was last asked."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started
