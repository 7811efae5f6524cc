"""Megatron-LM's own `pretrain()`: trains, saves, continues from a checkpoint, and is exported.

`examples/megatron_lm/pretrain_dspark.py` runs as a process of its own in bf16 at tensor-parallel 1,
beside our loop with the same settings. On a GPU nothing is patched; on a CPU
`tests/support/megatron_on_cpu.py` answers what Megatron asks a GPU for.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from benchmarking import TESTS  # before the modules of the tests, which it makes importable

from dspark_megatron.conversion.export import export_checkpoint
from dspark_megatron.conversion.verify import verify_folder
from gpu_checks.context import Skip
from support.tiny_pretrain import OPTIMIZER, TRAIN, command_line
from support.tiny_target import make_chats, make_target, tiny_settings

if TYPE_CHECKING:
    from gpu_checks.context import Context

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "megatron_lm" / "pretrain_dspark.py"
STEPS, TINY_STEPS = 20, 4
SAME_WEIGHTS = 1e-3
"""Relative difference of two losses in bf16 with equal weights: other sums, in another order."""
AFTER_UPDATES = 1e-2
"""After updates from gradients that were rounded differently; 0.1% was seen on a CPU at step 20."""
SECONDS = 240
"""Longest time of one process."""


def check(context: "Context") -> None:
    """Losses fall; the second half again from the checkpoint, and our loop, give the same; the
    export holds every trained tensor of the checkpoint."""
    _needs("megatron.training", "the wheels of megatron-core 0.17 to 0.19 have it")
    _needs("triton", "megatron.training imports it")
    settings = _settings(context)
    steps = TINY_STEPS if context.tiny else STEPS
    whole, again = context.folder / "whole", context.folder / "again"
    with ThreadPoolExecutor() as beside:
        our_loop = beside.submit(_our_loop, context, settings, steps)
        losses = _pretrain(context, settings, whole, steps)
        middle = ("--load", whole, "--ckpt-step", steps // 2)
        resumed = _pretrain(context, settings, again, steps, *middle)
    context.figures["losses"] = losses
    last = f"{losses[1]:.4f} at step 1, {losses[steps]:.4f} at step {steps}"
    assert losses[steps] < losses[1], f"the loss of pretrain() must fall and is {last}"
    _assert_close(context, "resumed", resumed, losses, first=steps // 2 + 1, last=steps)
    _assert_close(context, "our_loop", our_loop.result(), losses, first=1, last=steps)
    target = settings["target"]["path"]
    export = export_checkpoint(whole, target, context.folder / "export")
    context.figures["export"] = verify_folder(export, checkpoint=whole, target_dir=target)


def _needs(module: str, why: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise Skip(f"megatron-core {version('megatron-core')} is here without {module}; {why}")


def _settings(context: "Context") -> dict[str, Any]:
    """Of a random target and made-up chats in the check's folder."""
    sizes = {} if context.tiny else dict(hidden_size=256, heads=4, kv_heads=2, head_dim=64)
    target = make_target(context.folder / "target", **sizes)
    chats = make_chats(context.folder / "chats.jsonl")
    settings = tiny_settings(target, chats, context.folder / "ours")
    if not context.tiny:
        settings["optimizer"]["lr"] = 1e-3  # ten times that, and rounding alone moves a loss by 2%
    return settings


def _pretrain(
    context: "Context", settings: dict[str, Any], save: Path, steps: int, *more: object
) -> dict[int, float]:
    """The loss by step of a run of `pretrain()`."""
    on_cpu = context.device.type == "cpu"
    board = save.with_name(f"{save.name}_tensorboard")
    more = ("--bf16", "--tensorboard-dir", board, "--tensorboard-log-interval", 1, *more)
    if on_cpu:
        more = ("--distributed-backend", "gloo", *more)
    line = command_line(settings, save, *map(str, more), iterations=steps, save_interval=steps // 2)
    program = [Path(TESTS) / "support/megatron_on_cpu.py", EXAMPLE] if on_cpu else [EXAMPLE]
    _run(context, save.name, [*program, *line])
    return _scalars(board, "loss")


def _our_loop(context: "Context", settings: dict[str, Any], steps: int) -> dict[int, float]:
    """The loss by step of our training command."""
    train = {**settings["train"], **TRAIN, "dtype": "bfloat16", "iterations": steps}
    optimizer = {**settings["optimizer"], **OPTIMIZER}
    config = context.folder / "ours.yaml"
    config.write_text(yaml.safe_dump({**settings, "train": train, "optimizer": optimizer}))
    _run(context, "ours", ["-m", "dspark_megatron.train", "--config", config])
    lines = (Path(train["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    return {step["iteration"]: step["loss"] for step in map(json.loads, lines) if "loss" in step}


def _run(context: "Context", name: str, arguments: list[object]) -> None:
    """A Python process of one rank, its output in NAME.log. AssertionError if it fails or takes
    longer than SECONDS."""
    log, start = context.folder / f"{name}.log", time.perf_counter()
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port())}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, **place, "PYTHONPATH": path},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    context.figures[f"{name}_seconds"] = seconds = round(time.perf_counter() - start, 1)
    assert code == 0, f"{name} ended with code {code} after {seconds} s: {_failure(log)} ({log})"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _failure(log: Path) -> str:
    """The last line that names an error, or the last one."""
    lines = log.read_text(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()] or ["no output"]
    return next((line for line in reversed(said) if "error" in line.lower()), said[-1])


def _scalars(board: Path, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(board))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def _assert_close(
    context: "Context",
    name: str,
    got: dict[int, float],
    wanted: dict[int, float],
    *,
    first: int,
    last: int,
) -> None:
    """Of every step from first to last; at `first` both sides have the same weights."""
    steps = list(range(first, last + 1))
    assert sorted(got) == steps, f"{name} must have steps {first} to {last} and has {sorted(got)}"
    off = {step: abs(got[step] / wanted[step] - 1) for step in steps}
    difference = {"with_equal_weights": off[first], "largest": max(off.values())}
    context.figures[name] = {"losses": got, "relative_difference": difference}
    for step in steps:
        allowed = SAME_WEIGHTS if step == first else AFTER_UPDATES
        assert off[step] <= allowed, (
            f"{name}: the loss of step {step} is {got[step]:.6f}, that of pretrain() "
            f"{wanted[step]:.6f}, and they may differ by {allowed:.1%}"
        )
