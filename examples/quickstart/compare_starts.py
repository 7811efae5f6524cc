"""A draft that starts as layers of its target beside one that starts from random weights.

    python examples/quickstart/compare_starts.py [--layers 28 29] [--seeds 1 2] [--jobs 2]

Trains both for each seed on the data of `compare_heads.py`, equal steps, and prints the estimates
of tau on the held-out answers on the way, as means over seeds. A run that is complete is not made
again; `runs/starts` has them.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor

from compare_heads import RUNS as DATA
from compare_heads import SETTINGS, TRAIN_SAMPLES, run_module
from comparing import ROOT, mean_and_range, split_data

RUNS = ROOT / "runs" / "starts"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare starts on the quickstart's data.")
    parser.add_argument("--layers", type=int, nargs="+", default=[28, 29])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=2, help="runs at one time, one core each")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args(argv)
    split_data(DATA, TRAIN_SAMPLES)
    RUNS.mkdir(parents=True, exist_ok=True)
    starts: list[list[int]] = [[], arguments.layers]
    runs = [(layers, seed) for seed in arguments.seeds for layers in starts]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        found = list(pool.map(lambda run: train(*run, arguments), runs))
    for layers in starts:
        rows = [row for run, row in zip(runs, found, strict=True) if run[0] == layers]
        print(f"layers {layers}" if layers else "random", table(rows), sep="\n")


def train(layers: list[int], seed: int, arguments: argparse.Namespace) -> dict[int, float]:
    """Held-out tau by iteration."""
    name = "_".join(["start", *map(str, layers or ["random"]), f"seed{seed}"])
    run = RUNS / f"{name}_{arguments.iterations}"
    if not (run / "checkpoints" / f"iter_{arguments.iterations:07d}").is_dir():
        overrides = [
            *SETTINGS,
            f"train.output_dir={run}",
            f"train.seed={seed}",
            f"train.iterations={arguments.iterations}",
            f"model.initialize_from_target_layers={layers}",
            f"evaluate.heldout_files=[{DATA}/heldout.jsonl]",
            "evaluate.heldout_samples=32",
            "evaluate.every=20",
            *arguments.overrides,
        ]
        run_module("train", overrides, run.with_suffix(".log"))
    lines = (run / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["iteration"]: row["tau"] for row in map(json.loads, lines)}


def table(rows: list[dict[int, float]]) -> str:
    """Iterations, and under them the mean and the smallest and largest tau of the seeds."""
    lines = ["".join(f"{iteration:>22}" for iteration in rows[0])]
    cells = [mean_and_range([row[iteration] for row in rows]) for iteration in rows[0]]
    return "\n".join([*lines, "".join(f"{cell:>22}" for cell in cells)])


if __name__ == "__main__":
    main()
