"""Sets of prompts that come with the package, so that an evaluation can name them by one word."""

import os
from pathlib import Path

from dspark_megatron.data.files.sources import DataFile, find_files
from dspark_megatron.errors import require

SETS = {
    name: Path(__file__).with_name("sets") / f"{name}.jsonl" for name in ("chat", "maths", "code")
}


def prompt_path(entry: str | Path) -> str | Path:
    """The file of the set that an entry names, or the entry as it is. Only a text names a set, a
    Path is always a file. ConfigError if the name is that of a file or folder, too."""
    if not isinstance(entry, str) or entry not in SETS:
        return entry
    require(
        not os.path.lexists(entry),
        f"{entry} is a set of prompts that comes with the package, and the working directory has "
        f"a file or folder of that name; write ./{entry} for the latter, or rename it to use the "
        "set",
    )
    return SETS[entry]


def find_prompts(entry: str | Path) -> list[DataFile]:
    """The files of an entry of evaluate.prompt_files: what `find_files` takes, or a set's name."""
    return find_files(prompt_path(entry), or_else=f", or a set of prompts ({', '.join(SETS)})")
