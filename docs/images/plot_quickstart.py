"""The README's plot of a quickstart's run, into the folder of this file.

    python docs/images/plot_quickstart.py runs/quickstart_long

Reads the run's metrics.jsonl and evaluation.json.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

SMOOTHED = 10
"""Logged steps whose mean is a point of the curve."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the README's plot.")
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["iteration"] for row in rows]
    taus = [row["tau"] for row in rows]
    smooth = [
        sum(taus[max(0, i - SMOOTHED + 1) : i + 1]) / min(SMOOTHED, i + 1) for i in range(len(taus))
    ]
    [decoded] = json.loads((run / "evaluation.json").read_text())["files"].values()
    low, high = decoded["confidence_intervals"]["tau"]

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, taus, color="#9ecae1", linewidth=0.8, label="tau of training batches")
    axes.plot(steps, smooth, color="#2171b5", linewidth=2, label=f"mean of {SMOOTHED} logged steps")
    gain = decoded["tau"]
    bars = [[gain - low], [high - gain]]
    label = f"decoded, {decoded['prompts']} held-out prompts: {gain:.2f} (95%)"
    axes.errorbar(steps[-1:], [gain], yerr=bars, fmt="o", color="#d94801", capsize=4, label=label)
    axes.axhline(1, color="gray", linewidth=0.8, linestyle=":")
    axes.set(xlabel="step", ylabel="tokens a round of the target")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", fontsize=8)
    figure.savefig(Path(__file__).with_name("quickstart.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
