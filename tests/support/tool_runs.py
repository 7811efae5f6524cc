"""Tools in processes of their own, and the figures they write."""

import json
import os
import subprocess
import sys

from support.paths import ROOT


def run_python(*arguments, **environment):
    """Exit code and output of a Python in a process of its own."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    return done.returncode, done.stdout + done.stderr


def run_tool(*arguments):
    """The output of a tool that ends well."""
    code, text = run_python(*arguments)
    assert code == 0, text
    return text


def figures(file):
    """The rows of the only table of a --json file."""
    (rows,) = json.loads(file.read_text())["tables"].values()
    return rows
