"""Packages that travel as wheels to a machine without network."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from dspark_megatron.errors import require


def install_wheels(folder: Path, target: Path) -> list[str]:
    """Install every wheel of `folder` into the new folder `target`, without what it depends on.
    Returns them as `name==version`. For processes that have `target` first on PYTHONPATH."""
    wheels = sorted(folder.glob("*.whl"))
    require(bool(wheels), f"{folder} must hold wheels and has none; fill it with gpu_wheels.sh")
    names = [_name(wheel) for wheel in wheels]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    require(
        not twice,
        f"{folder} must hold one version of a package and has more of {', '.join(twice)}; "
        "delete those that are not meant",
    )
    # pip leaves in place what it finds there, and says so only in a warning.
    require(
        not target.exists() or not any(target.iterdir()),
        f"{target} must be a new folder and holds something; delete it or name another",
    )
    options = "--quiet --disable-pip-version-check --no-index --no-deps --no-compile --target"
    pip = [sys.executable, "-m", "pip", "install", *options.split(), str(target)]
    done = subprocess.run([*pip, *map(str, wheels)], capture_output=True, text=True)
    reason = (done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"])[-1]
    require(done.returncode == 0, f"the wheels of {folder} cannot be installed here: {reason}")
    return [f"{name}=={_version(wheel)}" for name, wheel in zip(names, wheels, strict=True)]


def _name(wheel: Path) -> str:
    """As package indexes write it: a wheel's file has `_` where its package may have `-` or `.`."""
    return re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()


def _version(wheel: Path) -> str:
    return wheel.name.split("-")[1]
