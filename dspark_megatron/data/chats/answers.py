"""An answer as its target wrote it: the text that the target saw, and what it wrote then.

A served target sees a prompt and writes on; that is what a draft has to learn. A chat template
renders the finished answer anew. It may add what nobody wrote (an empty block of reasoning, the end
of an answer that was cut), leave out what was written (reasoning), or begin otherwise than its own
prompt does.
"""

import os
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from dspark_megatron.data.chats.said import Said, Tags
from dspark_megatron.data.chats.tokens import Span
from dspark_megatron.errors import ConfigError

WAY_OUT = (
    "give lines with input_ids and loss_mask, or a chat template with {% generation %} around "
    "the assistant's text"
)


@dataclass(frozen=True)
class AnswerRules:
    """What decides where answers begin and end, beside the chat template."""

    stop_ids: frozenset[int] = frozenset()
    """Tokens at which a served target stops."""
    tags: Tags = field(default_factory=Tags)
    """What its reasoning begins and ends with."""
    template_date: str | None = None
    """The day that a chat template reads off the clock, YYYY-MM-DD; None: today."""


class Answer(NamedTuple):
    seen: str
    """The chat up to where the target began to write."""
    wrote: str
    """With the end of the turn, unless it was cut."""
    rest: str = ""
    """What the template put there after a cut; nobody wrote it."""


class Rendering(NamedTuple):
    """What a chat template makes of a chat that ends with an answer."""

    base: str
    """The chat before the answer."""
    prompt: str
    """The same, with the header of the answer and whatever else the target is given to go on."""
    after: str
    """The chat with the answer."""

    @property
    def nested(self) -> bool:
        return self.after.startswith(self.prompt)

    def opens(self, tags: Tags) -> bool:
        """Whether the prompt begins the reasoning."""
        return self.prompt.rstrip().endswith(tags.opening)

    def closes(self, tags: Tags) -> bool:
        """Whether the prompt ends the reasoning: no target that saw it reasons then."""
        return self.prompt.rstrip().endswith(tags.closing)

    def header_end(self, texts: list[str]) -> int:
        """Where the answer begins in `after`: where the prompt ends, or the part of it that both
        share. One of `texts` that begins like the end of the prompt is the answer's."""
        if self.nested:
            return len(self.prompt)
        shared = len(os.path.commonprefix([self.prompt, self.after]))
        if not self.prompt.startswith(self.base) or shared < len(self.base):
            raise self.not_comparable()
        for text in map(str.strip, texts):
            for begun in range(min(len(text), shared - len(self.base)), 0, -1):
                if self.after.startswith(text, shared - begun):
                    return shared - begun
        return shared

    def not_comparable(self) -> ConfigError:
        shared = len(os.path.commonprefix([self.prompt, self.after]))
        return ConfigError(
            "the chat template renders an answer otherwise than its own prompt for it: "
            f"{self.prompt[shared:][:40]!r} against {self.after[shared:][:40]!r} after {shared} "
            "equal characters, so the assistant's tokens cannot be found by comparing; " + WAY_OUT
        )


def written_answer(
    rendering: Rendering, message: dict, tags: Tags, *, cut_short: bool = False
) -> Answer:
    """What the target saw and wrote of an assistant's message. cut_short: the answer ran into a
    limit; calls of tools are not part of it then. ConfigError where the rendering does not show
    what is the answer's."""
    said, opens = Said.of(message, tags), rendering.opens(tags)
    if opens and cut_short and said.reasoning is None:
        said = Said.of(message, tags, opened=True)
    place = _Place.of(rendering, said, tags)
    if said.reasoning is not None:
        if said.written is None and opens and not place.shows_reasoning:
            said = said.joined(tags)
        written = said.written or tags.opening
        begins = opens or written.lstrip().startswith(tags.opening)
        shown = rendering.nested and place.shows_reasoning and begins
        if said.written is not None and not shown and not rendering.closes(tags):
            return _continued(rendering, place._replace(said=said), tags, cut_short=cut_short)
        if not place.shows_reasoning:  # a template that knows of no reasoning beside the content
            said = said.without_reasoning()
            place = _Place.of(rendering, said, tags)
    has_end = not (cut_short or said.ends_in_reasoning(tags))
    if place.spans is None and not has_end:
        return Answer(rendering.prompt, "".join(said.content))
    seen, begin = _rendered(rendering, place, tags)
    end = len(rendering.after) if has_end else place.end
    return Answer(seen, rendering.after[begin:end], rendering.after[end:])


class _Place(NamedTuple):
    """Where an answer stands in its rendering."""

    said: Said
    start: int
    """Header or prompt end here."""
    text_start: int
    """White space and tags of reasoning end here."""
    has_block: bool
    """Reasoning ends between the two."""
    spans: list[Span] | None
    """Of the pieces of what is said; None: not all of them are there, in order."""

    @classmethod
    def of(cls, rendering: Rendering, said: Said, tags: Tags) -> "_Place":
        pieces = said.pieces()
        start = rendering.header_end([*tags, *pieces])
        lead = white_space_and(tags).match(rendering.after, start)
        spans = find_pieces(rendering.after, pieces, start, lead.end())
        return cls(said, start, lead.end(), tags.closing in lead.group(), spans)

    @property
    def shows_reasoning(self) -> bool:
        return self.spans is not None and not (self.said.reasoning.strip() and self.has_block)

    @property
    def begin(self) -> int:
        return self.spans[0][0] if self.spans else self.text_start

    @property
    def end(self) -> int:
        return self.spans[-1][1] if self.spans else self.text_start


def _rendered(rendering: Rendering, place: _Place, tags: Tags) -> tuple[str, int]:
    """What was seen, and where in the rendering the rest begins."""
    has_reasoning = place.said.reasoning is not None
    if place.has_block and not has_reasoning:  # which nobody wrote
        return rendering.after[: place.begin], place.begin
    if rendering.nested:
        return rendering.prompt, place.start
    if place.spans is None:
        raise rendering.not_comparable()
    if not rendering.opens(tags):
        return rendering.prompt, place.start
    if has_reasoning:
        return rendering.prompt, place.begin
    # The target would reason first, but has not here: so it is the chat as it is told later.
    return rendering.after[: place.start], place.start


def _continued(rendering: Rendering, place: _Place, tags: Tags, *, cut_short: bool) -> Answer:
    """The prompt and the text that was written then, as it is, since the rendering changes it; its
    end is the rendering's."""
    said, after = place.said, rendering.after
    wrote = said.written
    if rendering.opens(tags) and wrote.lstrip().startswith(tags.opening):
        wrote = wrote.lstrip().removeprefix(tags.opening).lstrip("\n")
    if cut_short or said.ends_in_reasoning(tags):
        return Answer(rendering.prompt, wrote)
    rest = [text for text in said.content if text.strip()]
    spans = find_pieces(after, rest, place.start, place.text_start)
    if spans is None:
        raise rendering.not_comparable()
    if not spans:
        return Answer(rendering.prompt, wrote + after[place.text_start :])
    words_end = spans[-1][0] + len(after[slice(*spans[-1])].rstrip())
    return Answer(rendering.prompt, wrote.rstrip() + after[words_end:])


def white_space_and(tags: Tags) -> re.Pattern[str]:
    """Matches any run of white space and tags."""
    return re.compile(rf"(?:\s|{'|'.join(map(re.escape, tags))})*")


def find_pieces(text: str, pieces: list[str], start: int, text_start: int) -> list[Span] | None:
    """Where the pieces stand, in order; None if one is not found. Their words are looked for from
    `text_start` on; as much of their own white space is theirs as is there, from `start` on."""
    spans: list[Span] = []
    for piece in pieces:
        words = piece.strip()
        found = text.find(words, text_start)
        if found < 0:
            return None
        before, _, after = piece.partition(words)
        own_before = os.path.commonprefix([before[::-1], text[start:found][::-1]])
        end = found + len(words)
        start = text_start = end + len(os.path.commonprefix([after, text[end:]]))
        spans.append((found - len(own_before), start))
    return spans
