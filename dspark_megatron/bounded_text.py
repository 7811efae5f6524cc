"""YAML and JSON that somebody else wrote, read within bounds: regular files of a limited size, no
endless nesting, no key twice, no aliases that expand without end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from dspark_megatron.errors import ConfigError, require

MOST_YAML_BYTES = 2**20
MOST_JSON_BYTES = 2**26
MOST_VALUES = 100_000
"""Of a YAML text whose aliases are written out."""


def read_text(path: str | Path, most_bytes: int) -> str:
    """A file's text. ConfigError unless it is a readable, regular file of at most so many bytes, in
    UTF-8."""
    path = Path(path)
    try:
        problem = _not_readable(path, most_bytes)
        require(not problem, f"cannot read {path}: {problem}")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} must be text in UTF-8, and its byte {error.start:,} is not; save it as UTF-8"
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _not_readable(path: Path, most_bytes: int) -> str:
    if not path.exists():
        return "the link leads nowhere" if path.is_symlink() else "there is no such file"
    if not path.is_file():
        return "it is a folder, pipe or device, not a file"
    size = path.stat().st_size
    return f"it has {size:,} bytes, and at most {most_bytes:,} are read" * (size > most_bytes)


def read_json(path: str | Path, most_bytes: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """The object that a JSON file holds. ConfigError when it holds none."""
    text = read_text(path, most_bytes)
    found = _parsed(lambda: json.loads(text), f"{path}", "JSON", "copy it again")
    require(
        isinstance(found, dict),
        f"{path} must hold a JSON object, has a {type(found).__name__}; copy it again",
    )
    return found


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. where: what it is, for messages."""
    loader = _parsed(lambda: _StrictLoader(text, where), where, "YAML")
    try:
        return _parsed(loader.get_single_data, where, "YAML")
    finally:
        loader.dispose()


def _parsed(parse: Callable[[], Any], where: str, form: str, way_out: str = "") -> Any:
    try:
        return parse()
    except ConfigError:
        raise
    except RecursionError as error:
        raise ConfigError(f"{where} is nested too deeply to be read as {form}") from error
    except Exception as error:  # PyYAML's constructors raise whatever a value leads them to
        reason = f"{' '.join(str(error).split())}{'; ' if way_out else ''}{way_out}"
        raise ConfigError(f"{where} is not valid {form}: {reason}") from error


class _StrictLoader(yaml.SafeLoader):
    def __init__(self, text: str, where: str) -> None:
        super().__init__(text)
        self._where = where

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            self._count(node, {}, set())
        return node

    def _count(self, node: yaml.Node, counts: dict[int, int], above: set[int]) -> int:
        """Values in a node with its aliases written out. ConfigError for more than are read, for a
        node inside itself, and for a key that is given twice."""
        if id(node) in counts:
            return counts[id(node)]
        require(
            id(node) not in above,
            f"{self._where} has an alias inside of what it stands for, in line {_line(node)}",
        )
        above.add(id(node))
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node)
            inner = [part for pair in node.value for part in pair]
        else:
            inner = node.value if isinstance(node, yaml.SequenceNode) else []
        count = 1 + sum(self._count(part, counts, above) for part in inner)
        require(
            count <= MOST_VALUES,
            f"{self._where} has more than {MOST_VALUES:,} values with its aliases written out, in "
            f"line {_line(node)}; at most so many are read",
        )
        above.remove(id(node))
        counts[id(node)] = count
        return count

    def _check_keys(self, node: yaml.MappingNode) -> None:
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused when it is constructed
            name = key.value if key.tag.endswith(":merge") else self.construct_object(key)
            require(
                name not in lines,
                f"{self._where} gives the key {name!r} twice, in line {lines.get(name)} and in "
                f"line {_line(key)}; take one of them out",
            )
            lines[name] = _line(key)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
