"""Tools run in this process, and the figures they print."""

import json
import os
import subprocess
import sys

from support.paths import ROOT


def run_tool(*command):
    """The output of a tool in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def figures(file):
    """The rows of the only table of a --json file."""
    (rows,) = json.loads(file.read_text())["tables"].values()
    return rows
