"""What mkdocs does beside its settings: pages made of the README and of the code, links that lead
out of docs/, and anchors as GitHub makes them.
"""

import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File
from pymdownx.slugs import slugify

sys.path.insert(0, str(Path(__file__).parent))

from keys import key_reference  # noqa: E402

ROOT = Path(__file__).parents[2]
API = """\
# Python API

What `from dspark_megatron import ...` gives. The [page about it](python.md) shows how it is used.

::: dspark_megatron.api.target.Target

::: dspark_megatron.api.draft
    options:
      members: [Draft, Loss, Drafted, Generated]

::: dspark_megatron.evaluation.generation.Round

::: dspark_megatron.config.loading.load_config

::: dspark_megatron.targets.base.TargetStates

## Mathematics

Functions on tensors, usable without the rest. Process groups are keyword arguments.

::: dspark_megatron.ops.acceptance

::: dspark_megatron.ops.prefix_scheduler

::: dspark_megatron.ops.head_loss

::: dspark_megatron.ops.vocab_parallel
"""


def on_config(config: Any) -> Any:
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_files(files: Any, config: Any) -> Any:
    """The pages of nav that are no files of docs/."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    made = {
        "index.md": re.sub(r"\]\(docs/", "](", readme),
        "keys.md": key_reference(),
        "api.md": API,
    }
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to files of the repository that are no pages lead to the repository, if its address is
    known, and are plain text otherwise."""

    # The README is a page of docs/ here, and its other links start at the root.
    is_readme = page.file.src_uri == "index.md"
    folder = ROOT if is_readme else (ROOT / "docs" / page.file.src_uri).parent

    def out(match: re.Match) -> str:
        text, place = match[2], (folder / match[3]).resolve()
        named = match[3] if is_readme else os.path.relpath(place, ROOT / "docs")
        if "://" in match[3] or files.get_file_from_path(named) is not None:
            return match[0]
        if not place.exists():
            return match[0]  # the strict build names it
        if not config.repo_url:
            return text
        kind = "tree" if place.is_dir() else "blob"
        address = f"{config.repo_url.rstrip('/')}/{kind}/main/{place.relative_to(ROOT)}"
        return f"{match[1]}[{text}]({address}{match[4] or ''})"

    return re.sub(r"(!?)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)", out, markdown)
