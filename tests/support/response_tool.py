"""The tool that writes answers, and the lines it reads and writes."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

TOOL = Path(__file__).parents[2] / "tools" / "generate_responses.py"


def load_tool() -> ModuleType:
    """The tool as a module; tools/ is a folder of scripts, not a package."""
    spec = importlib.util.spec_from_file_location("generate_responses", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prompt(*words: str) -> dict:
    return {"messages": [{"role": "user", "content": " ".join(words)}]}


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
