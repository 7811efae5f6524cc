"""What a run shows and keeps: metrics.jsonl, TensorBoard, a progress bar. Main rank only."""

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class Reporter:
    """Writes each logged step once; lines past a resumed iteration are dropped first."""

    def __init__(self, output_dir: Path, *, iterations: int, start: int, tensorboard: bool) -> None:
        self._path = output_dir / "metrics.jsonl"
        self._forget_after(start)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = None
        if tensorboard:
            self._board = SummaryWriter(str(output_dir / "tensorboard"), purge_step=start + 1)
        self._bar = tqdm(total=iterations, initial=start, desc="training", unit="step")

    def step(self) -> None:
        self._bar.update()

    def log(self, row: dict[str, Any]) -> None:
        """One logged step: a line of metrics.jsonl and its TensorBoard scalars."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        shown = {name: f"{row[name]:.4g}" for name in ("loss", "tau") if row.get(name) is not None}
        self._bar.set_postfix(shown)
        if self._board is None:
            return
        for name, value in row.items():
            values = enumerate(value) if isinstance(value, list) else [(None, value)]
            for slot, number in values:
                if number is not None and name != "iteration":
                    tag = name if slot is None else f"{name}/{slot}"
                    self._board.add_scalar(tag, number, row["iteration"])
        self._board.flush()

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _forget_after(self, iteration: int) -> None:
        """A killed run may have logged steps after its last checkpoint; they run again."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the line that the kill cut short
                continue
            if row["iteration"] <= iteration:
                kept.append(line)
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        partial.replace(self._path)
