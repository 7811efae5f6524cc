"""Answers on disk: those of an unfinished run, and the finished file of prompts with answers."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from dspark_megatron.data.files.jsonl import read_jsonl
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.progress import Progress
from dspark_megatron.storage.writing import whole_file

SAMPLE_KEYS = ("input_ids", "loss_mask")
"""Keys with the tokens of a line. When an answer is replaced, its tokens go, too."""


class Answer(NamedTuple):
    content: str
    finish_reason: str
    """`stop`, `length` or `tool_calls`."""
    tokens: int
    """Length in tokens, with or without the end-of-turn token."""
    parts: dict | None = None
    """What else the message has: `reasoning_content`, `tool_calls`."""
    prompt_ids: list[int] | None = None
    """The tokens that the model saw. None: not known."""
    token_ids: list[int] | None = None
    """Those that it wrote, with the one that ended its turn. None: not known."""

    def checked(self) -> "Answer":
        """This one. TypeError where a part is not of its type, as in a file that was changed."""
        for name, kind in (("content", str), ("finish_reason", str), ("tokens", int)):
            if type(getattr(self, name)) is not kind:
                raise TypeError(f"{name} is {getattr(self, name)!r:.80}")
        if self.parts is not None and type(self.parts) is not dict:
            raise TypeError(f"parts is {self.parts!r:.80}")
        for ids in (self.prompt_ids, self.token_ids):
            if ids is not None and (type(ids) is not list or any(type(i) is not int for i in ids)):
                raise TypeError(f"token ids are {ids!r:.80}")
        return self

    def turn(self) -> dict:
        """The answer as a message of the chat."""
        return {"role": "assistant", "content": self.content, **(self.parts or {})}

    def sample(self) -> dict:
        """The keys of a training line. Empty if the tokens are not known."""
        if self.token_ids is None or self.prompt_ids is None:
            return {}
        mask = [0] * len(self.prompt_ids) + [1] * len(self.token_ids)
        return {"input_ids": self.prompt_ids + self.token_ids, "loss_mask": mask}


class Outcome(NamedTuple):
    answers: list[Answer]
    failures: list[Exception | None]
    """What became of each other prompt. None: it was not asked."""


def json_line(value: dict) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def append_line(path: Path, value: dict) -> None:
    """Append one JSON line; when it returns, the line is on disk."""
    with path.open("ab") as file:
        file.write(json_line(value))
        file.flush()
        os.fsync(file.fileno())


def partial_file(output: Path) -> Path:
    """The file for the answers of an unfinished run. ConfigError if `output` is finished."""
    require(not output.exists(), f"{output} exists already; delete it or choose another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.partial")
    require(
        not partial.is_symlink(),
        f"{partial} is a link, which would be written through; delete it or choose another "
        "--output",
    )
    return partial


def first_settings(path: Path) -> dict:
    """The settings of an earlier run in its partial file. Empty if there is none."""
    if not path.is_file():
        return {}
    return next((line for _, line in read_jsonl(path)), {})


def open_partial(path: Path, settings: dict) -> dict[int, Answer]:
    """Answers that an earlier run left, by index. A torn last line is cut off the file.

    The first line holds the settings of that run. ConfigError if they differ from `settings`.
    Without an earlier run, the file is begun.
    """
    path.touch()
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    lines = [line for _, line in read_jsonl(path)]
    if not lines:
        append_line(path, settings)
        return {}
    began = {name: lines[0].get(name) for name in settings}
    changes = [f"{n} {began[n]!r} -> {settings[n]!r}" for n in settings if began[n] != settings[n]]
    require(
        not changes,
        f"{path} was begun with other settings ({', '.join(changes)}); repeat the command that "
        "began it, or delete it to start anew",
    )
    try:
        found = {int(i): Answer(**answer) for line in lines[1:] for i, answer in line.items()}
        return {i: answer.checked() for i, answer in found.items()}
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} holds other things than answers ({error}); delete it to start anew"
        ) from error


def describe_answers(answers: list[Answer]) -> str:
    """One line on how long the answers are and how many were cut."""
    count, cut = len(answers), sum(answer.finish_reason == "length" for answer in answers)
    tokens = sum(answer.tokens for answer in answers) / max(count, 1)
    share = cut / max(count, 1)
    return f"{count} answers, {tokens:.1f} tokens on average, {cut} cut ({share:.1%})"


def collect_answers(
    output: Path,
    records: list[dict],
    settings: dict,
    answer: Callable[[list[int]], Iterable[Mapping[int, Answer | Exception]]],
    *,
    leave_out_failed: bool = False,
) -> Outcome:
    """Let `answer` answer all prompts that an earlier run has not, and keep each answer at once.

    `settings`: all else that decides the answers. A run continues with the same ones only.
    `answer`: gives the results for these indices as they come: answers, or why there is none.
    `output` is written once all are answered, or all were asked and failed ones may be left out.
    """
    partial = partial_file(output)
    digest = hashlib.sha256(json.dumps(records).encode()).hexdigest()
    answers = open_partial(partial, {"prompts_sha256": digest, **settings})
    failures = dict.fromkeys(i for i in range(len(records)) if i not in answers)
    with Progress(len(records), "answering", "answers", done=len(answers)) as progress:
        for results in answer(list(failures)):
            failures |= results
            made = {i: result for i, result in results.items() if isinstance(result, Answer)}
            if made:
                append_line(partial, {i: result._asdict() for i, result in made.items()})
            for i in made:
                del failures[i]
            answers |= made
            progress.update(len(made))
    asked_all = None not in failures.values()
    if not failures or (leave_out_failed and asked_all and answers):
        write_responses(output, records, answers)
        partial.unlink()
    return Outcome(list(answers.values()), list(failures.values()))


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
