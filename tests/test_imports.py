"""Data flows one way, and so do imports: a room knows only the rooms it may know."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dspark_megatron"
LEAVES = {
    "config",
    "config_file",
    "draft_rope",
    "loss_presets",
    "rms_norm",
    "megatron_names",
    "shape",
    "seeds",
    "storage",
    "transformer_engine",
}
"""Modules that every room may use; among themselves in this order of knowledge."""
LEAF_MAY_IMPORT = {
    "config": set(),
    "config_file": {"config", "loss_presets"},
    "draft_rope": {"config"},
    "loss_presets": {"config"},
    "rms_norm": set(),
    "megatron_names": {"config"},
    "seeds": set(),
    "shape": {"config", "draft_rope"},
    "storage": {"config"},
    "transformer_engine": set(),
}
ROOM_MAY_IMPORT = {
    "ops": set(),
    "model": {"ops"},
    "targets": {"ops"},
    "data": set(),
    "conversion": {"ops", "model"},
    "evaluation": {"ops", "model", "targets", "data"},
    "training": {"ops", "model", "targets", "data", "conversion", "evaluation"},
    # A plan adds up what all rooms would take; only entry points and tools ask for one.
    "planning": {"ops", "model", "targets", "conversion", "training"},
}
ENTRY_POINTS = {"train", "evaluate", "megatron_lm", "__init__"}


def imported_parts(path):
    """The parts of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide their direction"
            inside = node.module == PACKAGE.name
            names = [f"{node.module}.{a.name}" for a in node.names] if inside else [node.module]
        for name in names:
            if name.startswith("dspark_megatron."):
                yield name.split(".")[1]


@pytest.mark.parametrize("room", ROOM_MAY_IMPORT)
def test_rooms_import_only_what_is_upstream(room):
    allowed = ROOM_MAY_IMPORT[room] | LEAVES | {room}
    for path in (PACKAGE / room).rglob("*.py"):
        wrong = set(imported_parts(path)) - allowed
        assert not wrong, f"{path.name} in {room} imports {wrong}"


@pytest.mark.parametrize("leaf", LEAF_MAY_IMPORT)
def test_leaves_import_almost_nothing(leaf):
    files = [*(PACKAGE / leaf).glob("*.py")] or [PACKAGE / f"{leaf}.py"]
    for path in files:
        wrong = set(imported_parts(path)) - LEAF_MAY_IMPORT[leaf] - {leaf}
        assert not wrong, f"{path.name} of {leaf} imports {wrong}"


def test_every_part_of_the_package_has_a_rule():
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    modules = {p.stem for p in PACKAGE.glob("*.py")}
    assert rooms | modules == set(ROOM_MAY_IMPORT) | LEAVES | ENTRY_POINTS


@pytest.mark.parametrize("room", ["ops", "data", "targets"])
def test_rooms_without_megatron(room):
    """But for the provider that is Megatron-Core's, which only training may ask for."""
    provider = PACKAGE / "targets" / "megatron"
    for path in set((PACKAGE / room).rglob("*.py")) - set(provider.glob("*.py")):
        content = path.read_text(encoding="utf-8")
        assert "megatron.core" not in content and "targets.megatron" not in content, path
