"""Answers on disk: those of an unfinished run, and the finished file of prompts with answers."""

import json
import os
from pathlib import Path
from typing import NamedTuple

from dspark_megatron.data.files.jsonl import read_jsonl
from dspark_megatron.errors import require
from dspark_megatron.storage.writing import whole_file

SAMPLE_KEYS = ("input_ids", "loss_mask")
"""Tokens of a line; those of an answer that is replaced go with it."""


class Answer(NamedTuple):
    content: str
    finish_reason: str
    """"stop", "length" or "tool_calls"."""
    tokens: int
    """Length in tokens; the end-of-turn token may be counted or not."""
    parts: dict | None = None
    """What else the turn has: `reasoning_content`, `tool_calls`."""
    prompt_ids: list[int] | None = None
    """The tokens that the model saw, if they are known."""
    token_ids: list[int] | None = None
    """Those that it wrote, with the one that ended its turn; likewise."""

    def turn(self) -> dict:
        """The answer as a message of the chat."""
        return {"role": "assistant", "content": self.content, **(self.parts or {})}

    def sample(self) -> dict:
        """The answer as it is trained on; empty where the tokens are not known."""
        if self.token_ids is None or self.prompt_ids is None:
            return {}
        mask = [0] * len(self.prompt_ids) + [1] * len(self.token_ids)
        return {"input_ids": self.prompt_ids + self.token_ids, "loss_mask": mask}


def json_line(value: dict) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def append_line(path: Path, value: dict) -> None:
    """Append one JSON line; when it returns, the line is on disk."""
    with path.open("ab") as file:
        file.write(json_line(value))
        file.flush()
        os.fsync(file.fileno())


def append_answers(path: Path, answers: dict[int, Answer]) -> None:
    """Keep answers, by index of their prompt, in a partial file."""
    append_line(path, {index: answer._asdict() for index, answer in answers.items()})


def first_settings(path: Path) -> dict:
    """The settings of an earlier run in its partial file; empty where there is none."""
    if not path.is_file():
        return {}
    return next((line for _, line in read_jsonl(path)), {})


def open_partial(path: Path, settings: dict) -> dict[int, Answer]:
    """Answers that an earlier run left, by index; a torn last line is cut off the file.

    The first line holds the settings of that run: ConfigError if they differ from `settings`.
    Without an earlier run, the file is begun.
    """
    path.touch()
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    lines = [line for _, line in read_jsonl(path)]
    if not lines:
        append_line(path, settings)
        return {}
    found = {name: lines[0].get(name) for name in settings}
    changes = [f"{n} {found[n]!r} -> {settings[n]!r}" for n in settings if found[n] != settings[n]]
    require(
        not changes,
        f"{path} was begun with other settings ({', '.join(changes)}); repeat the command that "
        "began it, or delete it to start anew",
    )
    return {int(index): Answer(**answer) for line in lines[1:] for index, answer in line.items()}


def write_responses(output: Path, records: list[dict], answers: dict[int, Answer]) -> None:
    """Write the answered prompts in input order; `output` appears at once and whole."""
    with whole_file(output) as partial, partial.open("wb") as file:
        for index, record in enumerate(records):
            if index in answers:
                answer = answers[index]
                messages = [*record["messages"], answer.turn()]
                chat = {"messages": messages, "finish_reason": answer.finish_reason}
                kept = {key: record[key] for key in record if key not in SAMPLE_KEYS}
                file.write(json_line({**kept, **chat, **answer.sample()}))
