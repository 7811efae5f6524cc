"""A check in a process of its own: started and ended by the runner, which imports nothing heavy.

The check's process leaves `result.json` (verdict and error) and `figures.json` in its folder.
"""

import json
import os
import platform
import signal
import subprocess
import threading
import time
import traceback
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PASSED, FAILED, SKIPPED, NOT_RUN = "passed", "failed", "skipped", "not run"
PACKAGES = ("torch", "triton", "megatron-core", "transformers", "tokenizers", "safetensors")


def run_in_process(
    command: list[str], folder: Path, limit: float, environment: dict[str, str]
) -> dict[str, Any]:
    """Verdict, seconds, error and figures of a check; all its processes are gone afterwards."""
    folder.mkdir(parents=True)
    log, started, timed_out = folder / "log.txt", time.monotonic(), False
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--folder", str(folder)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            error = f"ended with code {process.wait(limit)}: {_last_line(log)}"
        except subprocess.TimeoutExpired:
            error, timed_out = f"ended by its limit of {limit:.0f} s: {_last_line(log)}", True
        finally:
            _end_session(process)
    # A verdict comes with the check's own word on errors; without one the process died before it.
    result = {"verdict": FAILED, "error": error} | _read(folder / "result.json")
    if timed_out:
        result["timed_out"] = True
    result["seconds"] = round(time.monotonic() - started, 1)
    result["figures"] = _read(folder / "figures.json")
    return result


def _end_session(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):  # the process was killed before or while it wrote
        return {}


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def run_check(name: str, device_type: str, folder: Path) -> int:
    """In the check's process."""
    threading.Thread(target=_end_with_the_runner, args=(os.getppid(),), daemon=True).start()
    result: dict[str, Any] = {"verdict": PASSED, "error": None}
    try:
        result |= _run(name, device_type, folder)
    except BaseException as error:
        traceback.print_exc()
        result |= {"verdict": FAILED, "error": f"{type(error).__name__}: {error}"[:600]}
    _write(folder, result)
    return 0


def _run(name: str, device_type: str, folder: Path) -> dict[str, Any]:
    from dspark_megatron.mcore.prepare import prepare_megatron

    prepare_megatron()  # before anything imports Megatron-Core
    import torch

    from gpu_checks.context import Context, Figures, Skip

    device = torch.device(device_type)
    if device_type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU here; rehearse with --device cpu")
    where = {"where": {"machine": _machine(device), "versions": _versions()}}
    _write(folder, {"verdict": FAILED, **where})
    scratch = folder / "scratch"
    scratch.mkdir()
    figures = Figures(folder / "figures.json")
    context = Context(device, scratch, figures, tiny=device_type == "cpu")
    try:
        import_module(f"gpu_checks.{name}").check(context)
    except Skip as reason:
        return {**where, "verdict": SKIPPED, "error": str(reason)}
    return where


def _write(folder: Path, result: dict[str, Any]) -> None:
    (folder / "result.json").write_text(json.dumps(result))


def _end_with_the_runner(runner: int) -> None:
    """A runner that is killed cannot end its checks."""
    while os.getppid() == runner:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def _machine(device: Any) -> dict[str, Any]:
    import torch

    about = {"processor": platform.machine(), "cores": os.cpu_count()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {"gpu": properties.name, "memory_gib": properties.total_memory / 2**30}
    return about


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
