"""Data flows one way, and so do imports: a room knows only the rooms it may know."""

import ast

import pytest

from support.paths import ROOT

PACKAGE = ROOT / "dspark_megatron"
BELOW = {
    "errors": set(),
    "bounded_text": {"errors"},
    "progress": {"errors"},
    "config": {"errors", "bounded_text"},
    "shape": {"errors", "config"},
    "ops": {"errors", "config"},
    "mcore": {"errors", "config"},
    "data": {"errors", "progress", "config", "ops", "storage"},
    "storage": {"errors", "bounded_text", "config", "shape"},
    # The draft reads the blocks of a batch by their names.
    "model": {"errors", "config", "shape", "ops", "mcore", "data"},
    "targets": {"errors", "progress", "config", "shape", "ops", "mcore", "data", "storage"},
    "conversion": {"errors", "bounded_text", "config", "shape", "ops", "data", "storage", "model"},
}
"""What a room may import. Those that follow may import all of these, and what is named for each."""
ABOVE = {
    "run": set(),
    "evaluation": {"run"},
    "training": {"run", "evaluation"},
    # It runs the step of training, on no device.
    "planning": {"run", "evaluation", "training"},
    "megatron_lm": {"run", "evaluation", "training"},
    "api": {"run", "evaluation", "training"},
    "cli": {"run", "evaluation", "training", "planning"},
    # Other names of its commands.
    "train": {"cli"},
    "evaluate": {"cli"},
    "__main__": {"cli"},
}
MAY_IMPORT = BELOW | {room: set(BELOW) | more for room, more in ABOVE.items()}


def imports(path):
    """What a file imports, wherever in it, by full names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide their direction"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_is_upstream(room):
    for path in [*(PACKAGE / room).rglob("*.py")] or [PACKAGE / f"{room}.py"]:
        parts = {n.split(".")[1] for n in imports(path) if n.startswith("dspark_megatron.")}
        wrong = parts - MAY_IMPORT[room] - {room}
        assert not wrong, f"{path.relative_to(PACKAGE)} imports {wrong}"


def test_every_part_of_the_package_has_a_rule():
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    modules = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__"}
    assert rooms | modules == MAY_IMPORT.keys()


def test_a_flat_folder_holds_at_most_twelve_files():
    for folder in [PACKAGE, *(p for p in PACKAGE.rglob("*") if p.is_dir())]:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= 12, f"{folder.relative_to(PACKAGE)} holds {len(files)} files"


@pytest.mark.parametrize("room", ["ops", "data", "targets"])
def test_rooms_without_megatron(room):
    """But for the provider that is Megatron-Core's, which only training may ask for."""
    provider = PACKAGE / "targets" / "megatron"
    for path in set((PACKAGE / room).rglob("*.py")) - set(provider.glob("*.py")):
        content = path.read_text(encoding="utf-8")
        assert "megatron.core" not in content and "targets.megatron" not in content, path


def test_no_test_imports_a_test():
    """What tests share lies in tests/support, or is a fixture of a conftest.py."""
    for path in (ROOT / "tests").rglob("*.py"):
        wrong = [name for name in imports(path) if name.startswith(("test", "conftest"))]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"
