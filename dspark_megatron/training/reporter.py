"""What a run shows and keeps: metrics.jsonl, heldout.jsonl, skipped_samples.jsonl, TensorBoard,
progress. Main rank only."""

import json
import math
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from dspark_megatron.progress import Progress, say
from dspark_megatron.storage.writing import disk_named, json_text, write_text
from dspark_megatron.training.health.spikes import Spikes
from dspark_megatron.training.watching.lines import short, step_line


class Reporter:
    """Writes each logged step once; lines past a resumed iteration are dropped first.

    Estimates on held-out answers have an interval of their own, and so a file of their own: a line
    of metrics.jsonl always has the means of the steps since the last one.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        iterations: int,
        start: int,
        tensorboard: bool,
        rank: str = "rank",
    ) -> None:
        """rank: what one is called in the lines, GPU or rank."""
        self.last: dict[str, Any] | None = None
        """The row that was logged last."""
        self._iterations, self._rank = iterations, rank
        self._heldout = output_dir / "heldout.jsonl"
        self._skipped = output_dir / "skipped_samples.jsonl"
        self._metrics = output_dir / "metrics.jsonl"
        for path in (self._heldout, self._skipped):
            _forget_after(path, start)
        self._spikes = Spikes(_forget_after(self._metrics, start))
        with disk_named(self._metrics):
            self._file = self._metrics.open("a", encoding="utf-8")
        self._board = None
        if tensorboard:
            self._board = SummaryWriter(str(output_dir / "tensorboard"), purge_step=start + 1)
        self._progress = Progress(iterations, "training", "step", done=start, own_lines=True)

    def step(self) -> None:
        self._progress.update()

    def log(self, row: dict[str, Any]) -> None:
        """One logged step: a line of metrics.jsonl and its TensorBoard scalars."""
        if spikes := self._spikes.found(row):
            row = {**row, "spike": spikes}
        with disk_named(self._metrics):
            self._file.write(json_text(row) + "\n")
            self._file.flush()
        names = [name for name in ("loss", "tau") if row.get(name) is not None]
        shown = [f"{name} {short(row[name])}" for name in names]
        self._progress.note(", ".join(shown))
        self._progress.line(step_line(row, self._iterations, rank=self._rank))
        self.last = row
        self._to_board(row)

    def log_heldout(self, row: dict[str, Any], *, is_best: bool) -> None:
        """One estimate: a line of heldout.jsonl, its TensorBoard scalars, a line for the reader."""
        _append(self._heldout, row)
        self._to_board(row, prefix="heldout/")
        tau = row["tau"]
        shown = "no number" if tau is None or not math.isfinite(tau) else f"{tau:.4f}"
        say(
            f"held-out answers at iteration {row['iteration']}: tau {shown}"
            + (", the best so far" if is_best else "")
        )

    def log_skipped(self, row: dict[str, Any]) -> None:
        """One step that was not taken: a line of skipped_samples.jsonl, a line for the reader."""
        _append(self._skipped, row)
        named = [f"{s['file']}:{s['line']}" for s in row["samples"] if s["at_fault"]]
        fault = f", and so is the loss of {', '.join(named[:3])}" if named else ""
        say(f"step {row['iteration']} was skipped: {row['reason']}{fault}; see {self._skipped}")

    def _to_board(self, row: dict[str, Any], prefix: str = "") -> None:
        if self._board is None:
            return
        with disk_named(Path(self._board.log_dir)):
            for name, value in row.items():
                values = enumerate(value) if isinstance(value, list) else [(None, value)]
                for slot, number in values:
                    if isinstance(number, int | float) and name != "iteration":
                        tag = prefix + (name if slot is None else f"{name}/{slot}")
                        self._board.add_scalar(tag, number, row["iteration"])
            self._board.flush()

    def close(self) -> None:
        self._progress.close()
        self._file.close()
        if self._board is not None:
            self._board.close()


def _append(path: Path, row: dict[str, Any]) -> None:
    with disk_named(path), path.open("a", encoding="utf-8") as file:
        file.write(json_text(row) + "\n")


def _forget_after(path: Path, iteration: int) -> list[dict[str, Any]]:
    """The rows that are left. A killed run may have logged steps after its last checkpoint; they
    run again."""
    if not path.exists():
        return []
    kept, rows = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the line that the kill cut short
            continue
        if row["iteration"] <= iteration:
            kept.append(line)
            rows.append(row)
    write_text(path, "".join(f"{line}\n" for line in kept))
    return rows
