"""The texts of an assistant's message: its reasoning, wherever it stands, and its content."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from dspark_megatron.data.chats.normalize import REASONING_KEYS


class Tags(NamedTuple):
    """What reasoning begins and ends with in the text that a model writes, white space aside."""

    opening: str = "<think>"
    closing: str = "</think>"


@dataclass(frozen=True)
class Said:
    """What an assistant's message says."""

    content: list[str]
    """After the reasoning."""
    reasoning: str | None = None
    """None: it has none, not even an empty block."""
    written: str | None = None
    """Reasoning, tags and content as one text, if the message has them as one."""
    has_calls: bool = False

    @classmethod
    def of(cls, message: dict, tags: Tags, *, opened: bool = False) -> "Said":
        """opened: a message without any tag is reasoning that its prompt began."""
        content, has_calls = message.get("content") or "", bool(message.get("tool_calls"))
        for key in REASONING_KEYS:
            if isinstance(message.get(key), str) and message[key].strip():
                return cls(_texts(content), message[key], has_calls=has_calls)
        if isinstance(content, list):
            thinking = [part["thinking"] for part in content if "thinking" in part]
            return cls(_texts(content), "".join(thinking) or None, has_calls=has_calls)
        head, closing, rest = content.partition(tags.closing)
        begins = head.lstrip().startswith(tags.opening)
        if begins or opened or (closing and tags.opening not in head):
            reasoning = head.lstrip().removeprefix(tags.opening)
            return cls([rest], reasoning, content, has_calls)
        return cls(_texts(content), has_calls=has_calls)

    def joined(self, tags: Tags) -> "Said":
        """Reasoning that has a key of its own, with the content as one text. Servers that strip
        white space leave none at the seams; then it is as most models write it."""
        rest, reasoning = "".join(self.content), self.reasoning or ""
        if self.ends_in_reasoning(tags):
            return replace(self, written=reasoning)
        before = "" if reasoning[-1:].isspace() else "\n"
        after = "" if rest[:1].isspace() else "\n\n"
        return replace(self, written=f"{reasoning}{before}{tags.closing}{after}{rest}")

    def without_reasoning(self) -> "Said":
        return Said(self.content, has_calls=self.has_calls)

    def pieces(self) -> list[str]:
        """All of it that is more than white space, in order."""
        return [text for text in (self.reasoning or "", *self.content) if text.strip()]

    def ends_in_reasoning(self, tags: Tags) -> bool:
        """Whether nothing tells that the reasoning came to its end."""
        if self.reasoning is None or self.has_calls or "".join(self.content).strip():
            return False
        return self.written is None or tags.closing not in self.written


def _texts(content: str | list) -> list[str]:
    if isinstance(content, str):
        return [content]
    parts = (part.get("text") for part in content if isinstance(part, dict))
    return [text for text in parts if isinstance(text, str)]
