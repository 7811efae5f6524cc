"""The pages that `make docs` builds: every page of docs/ is in its navigation, every key in the
reference. The build itself needs mkdocs, and fails on a dead link.
"""

import re
import sys

import yaml

from dspark_megatron.config import Config
from support.paths import ROOT

MADE = {"index.md", "api.md", "keys.md"}
"""Pages that are no files: docs/reference/hooks.py makes them."""


def pages(entry) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry
    return [page for part in parts for page in pages(part)]


def test_the_navigation_names_every_page_once():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = pages(settings["nav"])
    assert len(named) == len(set(named))
    docs = ROOT / "docs"
    there = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    assert set(named) == there | MADE and not there & MADE


def test_every_key_is_in_the_reference_with_its_meaning(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs" / "reference"), *sys.path])
    from keys import key_reference

    text = key_reference()
    parts = dict(re.findall(r"(?ms)^### (\S+)\n\n(.+?)(?=^##|\Z)", text))
    config = Config().to_dict()
    assert {f"{name}.{key}" for name, section in config.items() for key in section} <= set(parts)
    assert "`int`, default `7`\n\nSlots of one anchor's block (k)." in parts["model.block_size"]
    assert parts["optimizer.lr_scale.context"].endswith("`fc` and its norm.\n\n")
