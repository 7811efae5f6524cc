"""Commands of a user on random targets: train in bf16, kill, resume, evaluate, export, verify."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from gpu_checks.context import Context
from support.tiny_target import make_chats, make_target, tiny_settings

ROOT = Path(__file__).resolve().parents[2]
CONVERT = "tools/convert_checkpoint.py"
SAME_CURVE = 3e-2
"""Relative difference of losses in bf16: a GPU adds gradients of embeddings in any order."""
SECONDS = 120
"""Longest time of one command on a GPU."""
SMOLLM2 = dict(model_type="llama", hidden_size=576, heads=9, kv_heads=3, head_dim=64)
SMOLLM2 |= dict(num_layers=30, intermediate_size=1536, vocab_size=49152)


def check(context: Context) -> None:
    target = make_target(context.folder / "target")
    chats = make_chats(context.folder / "chats.jsonl", count=48)
    steps = 8 if context.tiny else 60
    settings = tiny_settings(target, chats, context.folder / "run")
    settings["train"] |= {"iterations": steps, "dtype": "bfloat16", "save_every": steps // 4}
    settings["evaluate"]["prompt_files"] = [str(chats)]
    if not context.tiny:  # at a high rate rounding alone moves the losses of 60 steps
        settings["optimizer"]["lr"] = 1e-3
    killed = _config(context, "killed", settings)
    whole = _config(context, "whole", settings)
    with ThreadPoolExecutor() as beside:
        unbroken = beside.submit(_train, context, "whole", whole)
        _kill_after(context, killed, steps // 2)
        _train(context, "resumed", killed)
        unbroken.result()
    curves = {name: _losses(context.folder / name) for name in ("whole", "killed")}
    for name, curve in curves.items():
        context.figures[f"losses, {name}"] = list(curve.values())
    _check_falls(curves["whole"])
    for iteration, loss in curves["whole"].items():
        other = curves["killed"][iteration]
        assert math.isclose(other, loss, rel_tol=SAME_CURVE), (
            f"after a kill the loss of step {iteration} is {other}, without one {loss}"
        )
    with ThreadPoolExecutor() as beside:
        evaluated = beside.submit(_evaluate, context, whole)
        _export(context, target)
        evaluated.result()
    if not context.tiny:
        _smollm2(context, settings, "SmolLM2's shapes", {})
        _smollm2(context, settings, "SmolLM2's shapes, Muon", {"name": "muon"})


def _config(context: Context, name: str, settings: dict[str, Any]) -> Path:
    output = {"output_dir": str(context.folder / name)}
    file = context.folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({**settings, "train": {**settings["train"], **output}}))
    return file


def _train(context: Context, name: str, config: Path) -> None:
    _run(context, name, "-m", "dspark_megatron.train", "--config", config)


def _evaluate(context: Context, config: Path) -> None:
    options = ["evaluate.max_prompts=4", "evaluate.max_new_tokens=16"]
    _run(context, "evaluate", "-m", "dspark_megatron.evaluate", "--config", config, *options)
    figures = json.loads((context.folder / "whole" / "evaluation.json").read_text())
    context.figures["evaluation"] = figures["files"]


def _export(context: Context, target: Path) -> None:
    run, export = context.folder / "whole", context.folder / "export"
    places = ["--checkpoint", run, "--target", target]
    _run(context, "export", CONVERT, "export", *places, "--output", export)
    verdict = _run(context, "verify", CONVERT, "verify", "--input", export, *places)
    context.figures["verify"] = verdict.splitlines()[-12:]


def _smollm2(
    context: Context, settings: dict[str, Any], name: str, optimizer: dict[str, Any]
) -> None:
    """Sixty steps at the shapes of SmolLM2-135M, with random weights."""
    target = context.folder / "smollm2"
    if not target.exists():
        make_target(target, **SMOLLM2)
    model = {"num_layers": 3, "block_size": 7, "num_anchors": 256, "markov_rank": 256}
    model["target_layer_ids"] = [1, 15, 28]
    settings = {**settings, "model": {**settings["model"], **model}, "loss": {}}
    settings["target"] = {"path": str(target)}
    settings["optimizer"] = {"lr": 1e-3, **optimizer}
    run = f"smollm2_{optimizer.get('name', 'adamw')}"
    _train(context, name, _config(context, run, settings))
    losses = _losses(context.folder / run)
    context.figures[f"losses, {name}"] = list(losses.values())
    _check_falls(losses)


def _check_falls(losses: dict[int, float]) -> None:
    values = list(losses.values())
    tail = max(1, len(values) // 6)
    first, last = sum(values[:tail]) / tail, sum(values[-tail:]) / tail
    assert last < first, f"the loss must fall: {first:.4f} at first, {last:.4f} at the end"


def _losses(run: Path) -> dict[int, float]:
    """By iteration; of one that was logged twice, the later."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {row["iteration"]: row["loss"] for row in map(json.loads, lines)}


def _limit(context: Context) -> float:
    return 10 * SECONDS if context.tiny else SECONDS


def _command(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def _run(context: Context, name: str, *arguments: object) -> str:
    """What a command prints. AssertionError if it fails."""
    start = time.perf_counter()
    done = subprocess.run(
        _command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=_limit(context)
    )
    context.figures[f"seconds, {name}"] = round(time.perf_counter() - start, 1)
    said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no output"]
    assert done.returncode == 0, f"{name} ended with code {done.returncode}: {said[-1]}"
    return done.stdout


def _kill_after(context: Context, config: Path, iteration: int) -> None:
    """Start training and kill it without warning once it has logged this iteration."""
    command = _command("-m", "dspark_megatron.train", "--config", config)
    metrics, end = context.folder / "killed" / "metrics.jsonl", time.monotonic() + _limit(context)
    with (context.folder / "killed.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None and time.monotonic() < end:
            if metrics.exists() and len(metrics.read_text().splitlines()) >= iteration:
                break
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    logged = metrics.read_text().splitlines() if metrics.exists() else []
    assert len(logged) >= iteration, f"training logged {len(logged)} steps: see {log.name}"
