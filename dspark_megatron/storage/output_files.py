"""Files of a result, each of which appears whole or not at all."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from dspark_megatron.errors import ConfigError, require


def claim_file(path: Path, key: str) -> None:
    """Make the folder of a file to be written later; ConfigError if it will not be possible.
    key: of the config, which names the file."""
    require(not path.is_dir(), f"{key} {path} is a folder; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".partial_{path.name}.{os.getpid()}")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{key} {path} must be writable: {error.strerror}") from error


def write_json(path: Path, content: dict[str, Any], indent: int = 2) -> None:
    write_files(path.parent, {path.name: f"{json.dumps(content, indent=indent)}\n".encode()})


def write_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Write all, then put them in place in their order; an earlier file of a name is replaced."""
    partial = {name: folder / f".partial_{name}" for name in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            partial[name].write_bytes(content)
        for name, path in partial.items():
            path.replace(folder / name)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}") from error
    finally:
        for path in partial.values():
            with contextlib.suppress(OSError):
                path.unlink()
