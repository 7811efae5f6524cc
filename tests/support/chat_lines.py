"""Lines of JSON files: chats, prompts and token ids."""

import json
from pathlib import Path


def chat(*texts: str) -> dict:
    """User and assistant by turns; "<" marks a system text, ">" a further answer."""
    messages, role = [], "assistant"
    for text in texts:
        if text.startswith("<"):
            messages.append({"role": "system", "content": text[1:]})
            continue
        if not text.startswith(">"):
            role = "user" if role == "assistant" else "assistant"
        messages.append({"role": role, "content": text.removeprefix(">")})
    return {"messages": messages}


def tokens(ids: list[int], mask: list[int]) -> dict:
    return {"input_ids": ids, "loss_mask": mask}


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def talk(*texts):
    """User and assistant by turns."""
    return turns(*zip(["human", "gpt"] * len(texts), texts, strict=False))


def turns(*pairs):
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in pairs]}


def prompt(*words: str) -> dict:
    return {"messages": [{"role": "user", "content": " ".join(words)}]}


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
