"""Where the repository and its fixtures lie."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
PUBLIC_CONFIGS = ROOT / "examples/public_configs"
"""Folders with nothing but a target's `config.json`, of its public dimensions."""
