"""What the comparisons on the quickstart's data share: the data, commands, figures over seeds."""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
CONFIG = QUICKSTART / "quickstart.yaml"
STUDENT_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}
"""Half width of the 95% interval of a mean in its standard errors, by degrees of freedom."""
MOST_SEEDS = len(STUDENT_95) + 1


def split_data(folder: Path, train_samples: int, heldout_samples: int | None = None) -> None:
    """`train.jsonl` with the first chats, and `heldout.jsonl` with the next ones; None: with all
    others."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (QUICKSTART / "chats.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    end = None if heldout_samples is None else train_samples + heldout_samples
    parts = {"train.jsonl": lines[:train_samples], "heldout.jsonl": lines[train_samples:end]}
    for name, part in parts.items():
        (folder / name).write_text("".join(part), encoding="utf-8")


def command(name: str, program: Sequence[str], log: Path) -> None:
    """Run a Python program from the repository's root with one thread, its output in `log`; the end
    of this process where it fails. name: what is said to run."""
    print(name, flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, *program], cwd=ROOT, env=environment, stdout=file, stderr=file
        )
    if done.returncode:
        sys.exit(f"python {' '.join(program)} failed with code {done.returncode}; see {log}")


def mean_and_range(values: Sequence[float], digits: int = 3) -> str:
    """The mean over seeds, the smallest and the largest."""
    mean, least, most = (f"{f(values):.{digits}f}" for f in (statistics.mean, min, max))
    return f"{mean} ({least}-{most})" if len(values) > 1 else mean


def paired_difference(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """The mean of `value - other`, seed by seed, and half the width of its 95% interval by
    Student's t; of one seed the interval is unbounded."""
    differences = [a - b for a, b in zip(values, others, strict=True)]
    mean, degrees = statistics.mean(differences), len(differences) - 1
    if not degrees:
        return mean, float("inf")
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return mean, STUDENT_95[degrees] * error


@dataclass(frozen=True)
class Column:
    """Of a comparison: a figure of every job."""

    title: str
    value: Callable[[dict[str, Any]], float | None]
    """Of a job's figures; None where there is nothing to count."""
    is_compared: bool = True
    """Whether a row is marked where it differs from the first."""
    shows_difference: bool = False
    """Whether the difference has a column of its own."""


def comparison_table(
    rows: Mapping[str, Mapping[int, dict[str, Any]]], columns: Sequence[Column], seeds: list[int]
) -> str:
    """Markdown: figures by row and seed, with the mean and range over the seeds that a row has.
    A star marks what differs from the first row by the rule of `paired_difference`."""
    titles = [""]
    for column in columns:
        titles += [column.title, "difference"] if column.shows_difference else [column.title]
    lines = [_line(titles), _line(["---"] * len(titles))]
    first = next(iter(rows.values()))
    for name, own in rows.items():
        lacking = f" ({len(own)} of {len(seeds)} seeds)" if len(own) < len(seeds) else ""
        cells = [cell for column in columns for cell in _cells(column, own, first)]
        lines.append(_line([name + lacking, *cells]))
    return "\n".join(lines)


def _cells(
    column: Column, own: Mapping[int, dict[str, Any]], first: Mapping[int, dict[str, Any]]
) -> list[str]:
    values, others = (
        {
            seed: value
            for seed, figures in row.items()
            if (value := column.value(figures)) is not None
        }
        for row in (own, first)
    )
    shown = mean_and_range(list(values.values())) if values else "-"
    both = [seed for seed in values if seed in others]
    if own is first or not both:
        return [shown, "-"] if column.shows_difference else [shown]
    mean, half = paired_difference([values[s] for s in both], [others[s] for s in both])
    star = " *" if column.is_compared and abs(mean) > half else ""
    interval = f" ± {half:.3f}" if len(both) > 1 else ""
    return [shown + star, f"{mean:+.3f}{interval}"][: 2 if column.shows_difference else 1]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
