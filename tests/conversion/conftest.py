"""A target, a checkpoint and an exported draft, in a test's own folder."""

from pathlib import Path

import pytest

from dspark_megatron.shape import DraftShape
from support.draft_folders import export_fp32, write_checkpoint, write_target
from support.shapes import FOLDER_SHAPES, VANILLA


@pytest.fixture(params=FOLDER_SHAPES)
def shape(request) -> DraftShape:
    return FOLDER_SHAPES[request.param]


@pytest.fixture
def target(tmp_path) -> Path:
    return write_target(tmp_path / "target")


@pytest.fixture
def run(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "run", VANILLA)


@pytest.fixture
def draft(tmp_path, target, run) -> Path:
    return export_fp32(run, target, tmp_path / "draft")
