#!/usr/bin/env bash
# gpu_wheels.sh DIR: puts into DIR the wheels that `tools/gpu_check.py --wheels DIR` needs on a bare
# GPU machine without network: Python 3.12 on x86-64 with PyTorch and an older Transformers, whose
# own needs are enough for the newer one. Versions are those of constraints.txt.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: $0 DIR" >&2; exit 2; }
constraints="$(dirname "$0")/../constraints.txt"
limit_mb=40
packages="megatron-core transformers"
python=${PYTHON:-python3}

# pip would read the conditions in constraints.txt for the Python that it runs on.
wanted=$("$python" - "$constraints" $packages <<'END'
import sys

from pip._vendor.packaging.requirements import Requirement

lines = [line.partition("#")[0].strip() for line in open(sys.argv[1], encoding="utf-8")]
pins = [Requirement(line) for line in lines if line]
for name in sys.argv[2:]:
    there = {"python_version": "3.12"}
    pin = [p for p in pins if p.name == name and (not p.marker or p.marker.evaluate(there))]
    if len(pin) != 1:
        sys.exit(f"constraints.txt must hold one version of {name} for Python 3.12, not {len(pin)}")
    print(f"{name}{pin[0].specifier}")
END
)
platforms=(--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64)
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --python-version 3.12 --implementation cp "${platforms[@]}" --dest "$1" $wanted

bytes=$(cat "$1"/*.whl | wc -c)
ls -1 "$1"
echo "$1 holds $(((bytes + 999999) / 1000000)) MB of wheels; at most $limit_mb MB are meant to travel"
[ "$bytes" -le $((limit_mb * 1000000)) ]
