"""The reasoning of an assistant's message, wherever it stands, and its content."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from dspark_megatron.data.chats.messages import REASONING_KEYS


class Tags(NamedTuple):
    """The texts that open and close reasoning in what a model writes, without white space."""

    opening: str = "<think>"
    closing: str = "</think>"


def texts_and_reasoning(message: dict) -> tuple[list[str], str | None]:
    """The texts of a message in any spelling, and the reasoning that stands apart from them: under
    a key of its own or in a part."""
    content = message.get("content") or ""
    parts = [{"text": content}] if isinstance(content, str) else content
    reasoning = [message[key] for key in REASONING_KEYS if key in message]
    reasoning += [part["thinking"] for part in parts if "thinking" in part]
    return [part["text"] for part in parts if "text" in part], "".join(reasoning) or None


@dataclass(frozen=True)
class AnswerText:
    """What an assistant's message says."""

    content: list[str]
    """What follows the reasoning."""
    reasoning: str | None = None
    """None if there is none, not even an empty block."""
    written: str | None = None
    """Reasoning, tags and content as one text, if the message has them as one."""
    has_calls: bool = False

    @classmethod
    def of(cls, message: dict, tags: Tags, *, opened: bool = False) -> "AnswerText":
        """opened: the prompt has begun the reasoning, so a message without any tag is reasoning."""
        texts, reasoning = texts_and_reasoning(message)
        has_calls = bool(message.get("tool_calls"))
        if reasoning is not None or isinstance(message.get("content"), list):
            return cls(texts, reasoning, has_calls=has_calls)
        [text] = texts
        head, closing, rest = text.partition(tags.closing)
        begins = head.lstrip().startswith(tags.opening)
        if begins or opened or (closing and tags.opening not in head):
            return cls([rest], head.lstrip().removeprefix(tags.opening), text, has_calls)
        return cls(texts, has_calls=has_calls)

    def joined(self, tags: Tags) -> "AnswerText":
        """The same with reasoning and content as one text. Servers that strip white space leave
        none between them; then it is as most models write it."""
        rest, reasoning = "".join(self.content), self.reasoning or ""
        if self.ends_in_reasoning(tags):
            return replace(self, written=reasoning)
        before = "" if reasoning[-1:].isspace() else "\n"
        after = "" if rest[:1].isspace() else "\n\n"
        return replace(self, written=f"{reasoning}{before}{tags.closing}{after}{rest}")

    def without_reasoning(self) -> "AnswerText":
        return AnswerText(self.content, has_calls=self.has_calls)

    def pieces(self) -> list[str]:
        """All texts in it that are more than white space, in order."""
        return [text for text in (self.reasoning or "", *self.content) if text.strip()]

    def ends_in_reasoning(self, tags: Tags) -> bool:
        """Whether nothing shows that the reasoning came to its end."""
        if self.reasoning is None or self.has_calls or "".join(self.content).strip():
            return False
        return self.written is None or tags.closing not in self.written
