"""Break real runs in every way that is known, continue them, and compare: `make faults`.

    python tools/inject_faults.py [--only WORDS ...] [--list] [--output runs/faults]
    python tools/inject_faults.py --soak-minutes 10 [--seed 0]

Each fault starts a command on a tiny random target under torchrun, breaks it at an exact place and
continues it at another layout. The result must be that of an unbroken command: the curve within
1e-4, stored states and exports byte for byte; and no process, temporary file or partial folder may
be left. A line is printed as each ends, and faults.json is written anew. The soak kills runs at
random places instead, again and again, until the time is over. Exits with 1 if something failed.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from faults.scenario import prepare, run_fault
from faults.soak import soak
from faults.table import FAULTS, Fault
from faults.works import Bench

from dspark_megatron.storage.writing import write_json


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    chosen = [fault for fault in FAULTS if all(word in fault.name for word in args.only)]
    if args.list:
        print("\n".join(fault.name for fault in chosen))
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="faults_")).resolve()
    try:
        if args.soak_minutes:
            return run_soak(args, Bench(folder))
        return run_all(args, Bench(folder), chosen)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)


def run_all(args: argparse.Namespace, bench: Bench, chosen: list[Fault]) -> int:
    started, report = time.monotonic(), about(args)
    prepare(bench, chosen)
    print(f"{len(chosen)} faults", flush=True)
    verdicts = []
    for fault in chosen:
        verdicts.append(run_fault(fault, bench))
        print(verdicts[-1].line, flush=True)
        report["seconds"] = round(time.monotonic() - started)
        report["faults"] = [verdict.row() for verdict in verdicts]
        write_json(args.output / "faults.json", report)
    failed = sum(bool(verdict.problems) for verdict in verdicts)
    print(f"{len(chosen) - failed} of {len(chosen)} as promised, {failed} not; ", end="")
    print(f"{report['seconds'] / 60:.0f} minutes; wrote {args.output / 'faults.json'}")
    return int(failed > 0)


def run_soak(args: argparse.Namespace, bench: Bench) -> int:
    report = about(args) | soak(bench, args.soak_minutes, args.seed)
    write_json(args.output / "soak.json", report)
    print(f"wrote {args.output / 'soak.json'}")
    return int(bool(report["problems"]))


def about(args: argparse.Namespace) -> dict[str, Any]:
    return {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), "only": args.only}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Break runs in every known way.")
    add = parser.add_argument
    add("--only", nargs="+", default=[], metavar="WORD", help="faults with all of these words")
    add("--list", action="store_true", help="print the names of the faults and end")
    add("--output", type=Path, default=Path("runs/faults"), help="for faults.json")
    add("--keep", action="store_true", help="keep the runs, in the folder for temporary files")
    add("--soak-minutes", type=float, default=0.0, help="kill at random for so long instead")
    add("--seed", type=int, default=0, help="of the places of the soak")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
