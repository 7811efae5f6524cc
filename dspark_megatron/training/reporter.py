"""What a run shows and keeps: metrics.jsonl, heldout.jsonl, TensorBoard, a progress bar. Main rank
only."""

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from dspark_megatron.storage.writing import write_text


class Reporter:
    """Writes each logged step once; lines past a resumed iteration are dropped first.

    Estimates on held-out answers have an interval of their own, and so a file of their own: a line
    of metrics.jsonl always has the means of the steps since the last one.
    """

    def __init__(self, output_dir: Path, *, iterations: int, start: int, tensorboard: bool) -> None:
        self._heldout = output_dir / "heldout.jsonl"
        metrics = output_dir / "metrics.jsonl"
        for path in (metrics, self._heldout):
            _forget_after(path, start)
        self._file = metrics.open("a", encoding="utf-8")
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
        self._to_board(row)

    def log_heldout(self, row: dict[str, Any], *, is_best: bool) -> None:
        """One estimate: a line of heldout.jsonl, its TensorBoard scalars, a line for the reader."""
        with self._heldout.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._to_board(row, prefix="heldout/")
        tqdm.write(
            f"held-out answers at iteration {row['iteration']}: tau {row['tau']:.4f}"
            + (", the best so far" if is_best else "")
        )

    def _to_board(self, row: dict[str, Any], prefix: str = "") -> None:
        if self._board is None:
            return
        for name, value in row.items():
            values = enumerate(value) if isinstance(value, list) else [(None, value)]
            for slot, number in values:
                if number is not None and name != "iteration":
                    tag = prefix + (name if slot is None else f"{name}/{slot}")
                    self._board.add_scalar(tag, number, row["iteration"])
        self._board.flush()

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        if self._board is not None:
            self._board.close()


def _forget_after(path: Path, iteration: int) -> None:
    """A killed run may have logged steps after its last checkpoint; they run again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # the line that the kill cut short
            continue
        if row["iteration"] <= iteration:
            kept.append(line)
    write_text(path, "".join(f"{line}\n" for line in kept))
