"""The micro-batches of coming steps, made by a thread while the device works."""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType

import torch

from dspark_megatron.data.batch import MicroBatch, MicroBatches


class StepsAhead:
    """What `MicroBatches` gives for one step after the other, made before it is asked for. The
    thread ends with the `with` around it."""

    def __init__(
        self, batches: MicroBatches, *, step_samples: int, device: torch.device, ahead: int = 1
    ) -> None:
        """step_samples: of all ranks together. device: for which micro-batches are made ready; a
        GPU takes them from page-locked memory. ahead: steps that are made and not asked for yet,
        at most; 0 makes each when it is asked for."""
        self._batches, self._step_samples, self._device = batches, step_samples, device
        self._ahead = ahead
        on_gpu = device.type == "cuda"  # else a thread is on the first GPU, and takes memory there
        start = partial(torch.cuda.set_device, device) if on_gpu else None
        self._thread = ThreadPoolExecutor(1, "micro-batches", initializer=start)
        self._coming: deque[tuple[int, Future[list[MicroBatch]]]] = deque()
        self._waited = 0.0

    def __enter__(self) -> "StepsAhead":
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def of_step(self, consumed_samples: int) -> list[MicroBatch]:
        """Those of the step that starts after so many samples. Raises what went wrong in the
        thread."""
        started = time.perf_counter()
        if self._coming and self._coming[0][0] != consumed_samples:
            self._coming.clear()
        for place in range(len(self._coming), self._ahead + 1):
            after = consumed_samples + place * self._step_samples
            self._coming.append((after, self._thread.submit(self._made, after)))
        step = self._coming.popleft()[1].result()
        self._waited += time.perf_counter() - started
        return step

    def seconds_waited(self) -> float:
        """For micro-batches, since this was last asked for."""
        waited, self._waited = self._waited, 0.0
        return waited

    def _made(self, consumed_samples: int) -> list[MicroBatch]:
        step = self._batches.of_step(consumed_samples)
        return [batch.ready_for(self._device) for batch in step]
