"""What a command prints: lines for people, or one JSON object for programs."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dspark_megatron.errors import printable


@dataclass(frozen=True)
class Output:
    """Errors and warnings go to stderr whatever is chosen here."""

    json: bool = False
    """The result alone, as one JSON object on stdout."""
    quiet: bool = False
    """Nothing on stdout: the exit code and the files tell."""

    def line(self, text: str) -> None:
        """Say how the work goes."""
        if not (self.json or self.quiet):
            print(printable(text), flush=True)

    def result(self, record: dict[str, Any], lines: Iterable[str] = ()) -> None:
        """What the command is for: the record for programs, or these lines for people."""
        if self.json:
            print(json.dumps(record, indent=2, default=str), flush=True)
            return
        for text in lines:
            self.line(text)
