"""The main job from end to end on a real target: prepare, evaluate, train, evaluate, export.

    python examples/quickstart/quickstart.py [--long]

Every step is a command that works by itself; this file only runs them in order and prints them. A
second start trains nothing, as the run is completed, and does the rest again. About 10 minutes on
two cores; with --long the same trains for more steps, about an hour, in a folder of its own, and
goes on where it was stopped.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "examples/quickstart/quickstart.yaml"
RUN = Path("runs/quickstart")
LONG_RUN = Path("runs/quickstart_long")
TARGET = RUN / "target"
LONG = [f"train.output_dir={LONG_RUN}", "train.iterations=1700", "train.save_every=200"]
# The model is small: two replicas use two cores better than one split model.
EVALUATE = ["2", "-m", "dspark_megatron.evaluate", "--config", CONFIG, "parallel.tensor_parallel=1"]


def run(*command: str) -> float:
    """Run a command from the repository's root, shown; returns its seconds."""
    print(f"\n$ {' '.join(command)}", flush=True)
    start = time.monotonic()
    program = (
        [sys.executable, "-m", "torch.distributed.run"]
        if command[0] == "torchrun"
        else [sys.executable]
    )
    # One thread a rank; torchrun would set the same, with a warning on each start.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([*program, *command[1:]], cwd=ROOT, env=environment)
    if done.returncode:
        sys.exit(f"quickstart stopped: the command above failed with code {done.returncode}")
    return time.monotonic() - start


def evaluate(output: Path, *overrides: str) -> dict:
    """Decode the held-out prompts; returns the figures of that file."""
    run("torchrun", "--nproc-per-node", *EVALUATE, f"evaluate.output={output}", *overrides)
    result = json.loads((ROOT / output).read_text(encoding="utf-8"))
    return {**result, **result.pop("files")["examples/quickstart/heldout.jsonl"]}


def calibrate_and_report(folder: Path) -> None:
    """Temperatures of the confidence head, which the export takes along, and a page of it all."""
    run("python", "-m", "dspark_megatron", "calibrate", str(folder))
    run("python", "-m", "dspark_megatron", "report", str(folder))


def closing_table(results: dict[str, dict], seconds: dict[str, float], folder: Path) -> str:
    """What came out, and where the time went."""
    lines = [f"{'draft':<12}{'tau':>8}{'accept@0':>10}{'verify rate':>13}"]
    for name, figures in results.items():
        accept = figures["accept_rate"][0]
        lines.append(
            f"{name:<12}{figures['tau']:>8.3f}{accept:>10.3f}{figures['verify_rate']:>13.3f}"
        )
    times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    trained = results["trained"]
    return "\n".join(
        [
            *lines,
            f"greedy output equal to the target's own: {trained['identical_to_plain']} of "
            f"{trained['prompts']} held-out prompts",
            f"time: {times}",
            "checkpoints, metrics, export, evaluation.json, report.html and these figures "
            f"(quickstart.json) are in {folder}",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--long", action="store_true", help="train for about an hour")
    folder, longer = (LONG_RUN, LONG) if parser.parse_args(argv).long else (RUN, [])
    seconds, results = {}, {}
    seconds["target"] = run(
        "python", "examples/quickstart/prepare_target.py", "--output", str(TARGET)
    )
    start = time.monotonic()
    results["untrained"] = evaluate(
        folder / "evaluation_untrained.json",
        "evaluate.untrained=true",
        "evaluate.compare_plain=false",
        *longer,
    )
    train = ["3", "-m", "dspark_megatron.train", "--config", CONFIG, *longer]
    seconds["training"] = run("torchrun", "--nproc-per-node", *train)
    # Where an evaluation of the run lies by default, and where an export looks for it.
    results["trained"] = evaluate(
        folder / "evaluation.json", f"evaluate.records={folder / 'drafts.safetensors'}", *longer
    )
    calibrate_and_report(folder)
    seconds["evaluation"] = time.monotonic() - start - seconds["training"]
    seconds["export"] = run(
        "python",
        "-m",
        "dspark_megatron",
        "export",
        str(folder),
        "--target",
        str(TARGET),
        "--output",
        str(folder / "export"),
        "--force",
    )
    text = json.dumps(results, indent=2) + "\n"
    (ROOT / folder / "quickstart.json").write_text(text, encoding="utf-8")
    print(f"\n{closing_table(results, seconds, folder)}")


if __name__ == "__main__":
    main()
