"""Markov heads side by side: the quickstart's target, general chats, equal steps, several seeds.

    python examples/quickstart/compare_heads.py [--seeds 1 2 3] [--jobs 2]

Trains a drafter for each head and seed on the first 512 samples of `chats.jsonl`, decodes
the prompts of the rest with each, and prints tau and acceptance by slot with their spread over
seeds; `runs/heads/comparison.json` has the numbers. A run that is complete is not made again. On
two cores of a CPU with bf16 instructions a run takes some 10 minutes.
"""

import argparse
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from comparing import QUICKSTART, ROOT, command, split_data

RUNS = ROOT / "runs" / "heads"
TRAIN_SAMPLES = 512
HEADS = {
    "dflash": ["model.markov_rank=0", "model.confidence_head_with_markov=false"],
    "vanilla": [],
    "rnn": ["model.markov_head_type=rnn"],
}
"""Overrides of `chats.yaml`; without a Markov head a DSpark draft is DFlash."""
SETTINGS = [
    "parallel.tensor_parallel=1",
    "target.dtype=bfloat16",
    "train.dtype=bfloat16",
    "train.iterations=256",
    "train.save_every=256",
    "data.show_sample=false",
    f"data.train_files=[{RUNS}/train.jsonl]",
    f"evaluate.prompt_files=[{RUNS}/heldout.jsonl]",
    "evaluate.temperature=1.0",
    "evaluate.max_prompts=64",
    "evaluate.max_new_tokens=64",
    "evaluate.compare_plain=false",
]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare Markov heads on general chats.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="runs at one time, one core each")
    arguments = parser.parse_args(argv)
    split_data(RUNS, TRAIN_SAMPLES)
    runs = [(head, seed) for seed in arguments.seeds for head in HEADS]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = dict(zip(runs, pool.map(lambda run: train_and_evaluate(*run), runs), strict=True))
    comparison = {head: [results[head, seed] for seed in arguments.seeds] for head in HEADS}
    text = json.dumps({"seeds": arguments.seeds, "heads": comparison}, indent=2) + "\n"
    (RUNS / "comparison.json").write_text(text, encoding="utf-8")
    print(table(comparison))


def train_and_evaluate(head: str, seed: int) -> dict:
    """Figures of a run's held-out prompts."""
    run = RUNS / f"{head}_{seed}"
    output = run / "evaluation.json"
    overrides = [*SETTINGS, *HEADS[head], f"train.output_dir={run}", f"train.seed={seed}"]
    overrides += [f"evaluate.records={run / 'drafts.safetensors'}"]
    if not output.is_file():
        for module in ("train", "evaluate"):
            run_module(module, overrides, run.with_suffix(f".{module}.log"))
    files = json.loads(output.read_text(encoding="utf-8"))["files"]
    return files[str(RUNS / "heldout.jsonl")]


def run_module(module: str, overrides: list[str], log: Path) -> None:
    program = ["-m", f"dspark_megatron.{module}", "--config", str(QUICKSTART / "chats.yaml")]
    program += overrides
    command(f"{module} {log.stem}", program, log)


def table(comparison: dict[str, list[dict]]) -> str:
    """Of decoding, and of the estimate on the same answers, which leaves out the luck of the draw:
    means over seeds, with the standard deviation between them."""
    slots = len(comparison["vanilla"][0]["accept_rate"])
    header = ["head", "", "tau", *(f"accept@{slot}" for slot in range(slots))]
    lines = ["".join(f"{cell:>15}" for cell in header)]
    for head, figures in comparison.items():
        for kind, rows in (("decoded", figures), ("estimate", [f["estimate"] for f in figures])):
            columns = [[f["tau"] for f in rows]]
            columns += [[f["accept_rate"][slot] for f in rows] for slot in range(slots)]
            cells = [head, kind, *map(_mean_and_spread, columns)]
            lines.append("".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def _mean_and_spread(values: list[float]) -> str:
    spread = f" ±{statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
