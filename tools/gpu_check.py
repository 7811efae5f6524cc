"""Prove the product on a GPU in minutes: `make gpu-check`.

    python tools/gpu_check.py [--wheels DIR] [--budget-minutes 10] [--only NAME ...] [--device cpu]

Needs a plain checkout and nothing from the network. Each check runs in a process of its own with a
time limit; one that fails or hangs does not stop the next. A line is printed as each ends, and
gpu_check.json (machine, versions, verdicts, figures, first errors) is written anew, so that a kill
loses nothing. `--device cpu` rehearses every check at tiny sizes. Exits with 1 if a check failed.
"""

import argparse
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a plain checkout

from gpu_checks.processes import FAILED, NOT_RUN, run_check, run_in_process
from gpu_checks.wheels import install_wheels

from dspark_megatron.errors import ConfigError, print_error, require
from dspark_megatron.storage.writing import write_json

ROOT = Path(__file__).resolve().parents[1]
MARK = ".gpu_check"
"""A file that stands in every folder of reports."""
SLOW = 10
"""How much longer than a GPU a busy CPU may take."""


@dataclass(frozen=True)
class Check:
    """A module of `gpu_checks/`."""

    name: str
    about: str
    seconds: int
    """About how long it takes on an H200; with less of the budget left it is not started."""
    limit: int = 180
    """Seconds after which it is ended."""


CHECKS = (  # what is most worth knowing comes first
    Check("head_loss", "head loss against its plain twin and bare matrix products", 65),
    Check("attention", "both backends of block attention against the dense mask", 110),
    Check("draft_step", "a whole step of the draft: parts, kernels, waits", 65),
    Check("training", "trained, killed, resumed, evaluated, exported, verified", 230, limit=360),
    Check("pretrain", "Megatron-LM's own pretrain()", 120, limit=300),
    Check("two_ranks", "two tensor-parallel ranks on one GPU over gloo", 50),
    Check("target", "a target of Transformers: taps, passes, packing", 30),
    Check("sharded", "a target sharded over data-parallel ranks", 15),
)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.run:
        return run_check(args.run, args.device, args.folder)
    try:
        output = claim_output(args.output.resolve())
        environment = child_environment(args.wheels, output)
    except ConfigError as error:
        return print_error(error)
    started = time.monotonic()
    report: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv)}
    report["checks"] = results = []
    for check in CHECKS:
        if args.only and check.name not in args.only:
            continue
        left = 60 * args.budget_minutes - (time.monotonic() - started)
        if left < check.seconds:
            result = {"verdict": NOT_RUN, "error": f"{left:.0f} s of the budget were left"}
        else:
            command = [sys.executable, __file__, "--run", check.name, "--device", args.device]
            patience = 1 if args.device == "cuda" else SLOW
            folder, limit = output / check.name, min(patience * check.limit, left)
            result = run_in_process(command, folder, limit, environment)
            report |= result.pop("where", {})
            if result.get("timed_out") and limit == left:
                result["verdict"] = NOT_RUN  # no fault of its own: the budget came to its end
        results.append({"name": check.name, "about": check.about, **result})
        report["seconds"] = round(time.monotonic() - started, 1)
        write_json(output / "gpu_check.json", report)
        print(line_of(results[-1]), flush=True)
    print(f"wrote {output / 'gpu_check.json'}", flush=True)
    return int(any(result["verdict"] == FAILED for result in results))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    names = [check.name for check in CHECKS]
    parser = argparse.ArgumentParser(description="Prove the product on a GPU in minutes.")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget-minutes", type=float, default=10.0)
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="made by tools/gpu_wheels.sh")
    parser.add_argument("--output", type=Path, default=Path("gpu_check"), help="a folder, emptied")
    parser.add_argument("--run", choices=names, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def claim_output(output: Path) -> Path:
    """The folder, empty. ConfigError for one that holds something else than an earlier report."""
    require(
        not output.exists() or not any(output.iterdir()) or (output / MARK).is_file(),
        f"--output {output} holds files that are not of this command, which empties its folder; "
        "name a new one",
    )
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    (output / MARK).touch()
    return output


def child_environment(wheels: Path | None, output: Path) -> dict[str, str]:
    """The checkout before what is installed, and the wheels before both."""
    path = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    if wheels is not None:
        site = output / "site"
        print(f"installed {', '.join(install_wheels(wheels, site))}", flush=True)
        path.insert(0, str(site))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def line_of(result: dict[str, Any]) -> str:
    seconds = f"{result['seconds']:6.1f} s" if "seconds" in result else " " * 8
    error = f": {result['error']}" if result.get("error") else ""
    return f"{result['verdict']:9} {seconds}  {result['name']} ({result['about']}){error}"


if __name__ == "__main__":
    sys.exit(main())
