"""How fast a run is, and what its time and memory go into: figures of a line of metrics.jsonl."""

import resource
import time
from datetime import datetime, timezone

import torch

from dspark_megatron.training.watching.step_parts import StepParts

PARTS = ("target", "draft", "optimizer")


class Speed:
    """Of the steps since the last line, on the main rank."""

    def __init__(self, parts: StepParts, device: torch.device, world_size: int) -> None:
        self._parts, self._device, self._world_size = parts, device, world_size
        self.begin()

    def begin(self) -> None:
        """The next step is the first that counts."""
        self._steps, self._start = 0, time.perf_counter()

    def step(self) -> None:
        """One more is done."""
        self._steps += 1

    def leave_out(self, seconds: float) -> None:
        """Time that is none of the steps'."""
        self._start += seconds

    def figures(
        self, *, tokens: float, flops: float | None, waited: float, saved: float
    ) -> dict[str, float | str | None]:
        """And begin anew. tokens, flops: of all ranks; flops None where they are not known. waited,
        saved: seconds for micro-batches and for checkpoints."""
        seconds, steps = time.perf_counter() - self._start, max(self._steps, 1)
        parts, rate = self._parts.seconds(), tokens / seconds
        ranks_seconds = seconds * self._world_size
        self.begin()
        return {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z"),
            "step_seconds": seconds / steps,
            **{f"{name}_seconds": parts.get(name, 0.0) / steps for name in PARTS},
            "data_wait_seconds": waited / steps,
            "save_seconds": saved,
            "data_wait_share": waited / seconds,
            "tokens_per_second": rate,
            "tokens_per_second_per_rank": rate / self._world_size,
            "tflops_per_rank": None if flops is None else flops / ranks_seconds / 1e12,
            "peak_memory_gib": peak_memory(self._device) / 2**30,
        }


def peak_memory(device: torch.device) -> int:
    """Bytes, the most so far: of tensors on a GPU, else what the process had in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
