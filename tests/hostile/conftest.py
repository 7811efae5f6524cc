import shutil
from pathlib import Path

import pytest


@pytest.fixture
def target(tiny_run, tmp_path) -> Path:
    """A target's folder to be damaged."""
    return Path(shutil.copytree(tiny_run["target"]["path"], tmp_path / "target"))
