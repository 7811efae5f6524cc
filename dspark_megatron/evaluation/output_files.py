"""Several files of one result, each of which appears whole or not at all."""

import contextlib
from pathlib import Path

from dspark_megatron.config import ConfigError


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
