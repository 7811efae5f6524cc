"""What the target saw of a rendered chat, and what it wrote.

A served target sees a prompt and continues it. That is what a draft has to learn. A chat template
renders the finished answer anew, and may differ from this: it may add what nobody wrote (an empty
block of reasoning, the end of an answer that was cut), leave out what was written (reasoning), or
begin in another way than its own prompt does.
"""

import os
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from dspark_megatron.data.chats.loss_mask import Span
from dspark_megatron.data.chats.reasoning import AnswerText, Tags
from dspark_megatron.errors import ConfigError

WAY_OUT = (
    "give lines with input_ids and loss_mask, or a chat template with {% generation %} around "
    "the assistant's text"
)


@dataclass(frozen=True)
class AnswerRules:
    """What decides where answers begin and end, besides the chat template."""

    stop_ids: frozenset[int] = frozenset()
    """Tokens at which a served target stops."""
    tags: Tags = field(default_factory=Tags)
    """What its reasoning begins and ends with."""
    template_date: str | None = None
    """The day (YYYY-MM-DD) for a chat template that reads the clock. None means today."""


class Answer(NamedTuple):
    seen: str
    """The chat up to where the target began to write."""
    wrote: str
    """With the end of the turn, unless the answer was cut."""
    rest: str = ""
    """What the template puts after a cut. Nobody wrote it."""


class Rendering(NamedTuple):
    """What a chat template makes of a chat that ends with an answer."""

    base: str
    """The chat before the answer."""
    prompt: str
    """The same with all that the target is given to continue, such as the answer's header."""
    after: str
    """The chat with the answer."""

    @property
    def nested(self) -> bool:
        return self.after.startswith(self.prompt)

    def opens(self, tags: Tags) -> bool:
        """Whether the prompt begins the reasoning."""
        return self.prompt.rstrip().endswith(tags.opening)

    def closes(self, tags: Tags) -> bool:
        """Whether the prompt ends the reasoning. A target that saw it does not reason."""
        return self.prompt.rstrip().endswith(tags.closing)

    def header_end(self, texts: list[str]) -> int:
        """Where the answer begins in `after`: after the prompt, or after the part of the prompt
        that both share. If one of `texts` begins within that part's end, it is the answer's."""
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
    limit, so tool calls are not part of it. Raises ConfigError if the rendering does not show which
    part is the answer."""
    text, opens = AnswerText.of(message, tags), rendering.opens(tags)
    if opens and cut_short and text.reasoning is None:
        text = AnswerText.of(message, tags, opened=True)
    place = _Place.of(rendering, text, tags)
    if text.reasoning is not None:
        if text.written is None and opens and not place.shows_reasoning:
            text = text.joined(tags)
        written = text.written or tags.opening
        begins = opens or written.lstrip().startswith(tags.opening)
        shown = rendering.nested and place.shows_reasoning and begins
        if text.written is not None and not shown and not rendering.closes(tags):
            return _continued(rendering, place._replace(text=text), tags, cut_short=cut_short)
        if not place.shows_reasoning:  # the template knows no reasoning apart from the content
            text = text.without_reasoning()
            place = _Place.of(rendering, text, tags)
    has_end = not (cut_short or text.ends_in_reasoning(tags))
    if place.spans is None and not has_end:
        return Answer(rendering.prompt, "".join(text.content))
    seen, begin = _rendered(rendering, place, tags)
    end = len(rendering.after) if has_end else place.end
    return Answer(seen, rendering.after[begin:end], rendering.after[end:])


class _Place(NamedTuple):
    """Where an answer stands in its rendering."""

    text: AnswerText
    start: int
    """Where header or prompt end."""
    text_start: int
    """Where the white space and tags of reasoning after that end."""
    has_block: bool
    """Whether reasoning ends between the two."""
    spans: list[Span] | None
    """Of the pieces of the text, in their order. None: one of them is missing."""

    @classmethod
    def of(cls, rendering: Rendering, text: AnswerText, tags: Tags) -> "_Place":
        pieces = text.pieces()
        start = rendering.header_end([*tags, *pieces])
        text_start = _end_of_space_and_tags(tags, rendering.after, start)
        spans = _find_pieces(rendering.after, pieces, start, text_start)
        has_block = tags.closing in rendering.after[start:text_start]
        return cls(text, start, text_start, has_block, spans)

    @property
    def shows_reasoning(self) -> bool:
        said = (self.text.reasoning or "").strip()
        return self.spans is not None and not (said and self.has_block)

    @property
    def begin(self) -> int:
        return self.spans[0][0] if self.spans else self.text_start

    @property
    def end(self) -> int:
        return self.spans[-1][1] if self.spans else self.text_start


def _rendered(rendering: Rendering, place: _Place, tags: Tags) -> tuple[str, int]:
    """What was seen, and where in the rendering the rest begins."""
    has_reasoning = place.text.reasoning is not None
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
    # The target would reason first but has not done so here. So it saw the chat as rendered later.
    return rendering.after[: place.start], place.start


def _continued(rendering: Rendering, place: _Place, tags: Tags, *, cut_short: bool) -> Answer:
    """The prompt, and the text that was written then as it is, since the rendering changes it. Only
    the end of the turn is the rendering's."""
    text, after = place.text, rendering.after
    wrote = text.written or ""
    if rendering.opens(tags) and wrote.lstrip().startswith(tags.opening):
        wrote = wrote.lstrip().removeprefix(tags.opening).lstrip("\n")
    if cut_short or text.ends_in_reasoning(tags):
        return Answer(rendering.prompt, wrote)
    rest = [part for part in text.content if part.strip()]
    spans = _find_pieces(after, rest, place.start, place.text_start)
    if spans is None:
        raise rendering.not_comparable()
    if not spans:
        return Answer(rendering.prompt, wrote + after[place.text_start :])
    words_end = spans[-1][0] + len(after[slice(*spans[-1])].rstrip())
    return Answer(rendering.prompt, wrote.rstrip() + after[words_end:])


def not_written(
    rendered: str, marked: list[Span], messages: list[dict], tags: Tags, *, cut_short: bool
) -> list[Span]:
    """The parts that a template with `{% generation %}` marks although the assistant did not write
    them: an empty block of reasoning before an answer, and all that follows an answer without an
    end. cut_short: the last answer was cut."""
    hidden: list[Span] = []
    position = 0
    answers = [message for message in messages if message["role"] == "assistant"]
    for message in answers:
        text = AnswerText.of(message, tags)
        place = _marked_place(rendered, marked, text.pieces(), tags, position)
        is_cut = cut_short and message is answers[-1]
        if place is None:
            hidden += marked[-1:] if is_cut else []
            continue
        start, begin, position = place
        _, closing, rest = rendered[start:begin].rpartition(tags.closing)
        if closing and text.reasoning is None:
            hidden.append((start, begin))
        elif closing and text.reasoning and text.reasoning.strip():
            hidden.append((start, begin - len(rest.lstrip())))
        if is_cut or text.ends_in_reasoning(tags):  # also the stop token behind the marks
            later = [start for start, _ in marked if start > position]
            hidden.append((position, min(later, default=len(rendered))))
    return hidden


def _marked_place(
    rendered: str, marked: list[Span], pieces: list[str], tags: Tags, position: int
) -> tuple[int, int, int] | None:
    """Where the marked part of a message starts, and its first piece begins and its last one ends.
    None if no marked part has them."""
    for start, end in marked:
        if end <= position:
            continue
        start = max(start, position)
        lead = _end_of_space_and_tags(tags, rendered, start)
        if not pieces:  # tool calls, or nothing
            return start, min(lead, end), min(lead, end)
        spans = _find_pieces(rendered, pieces, start, lead)
        if spans and spans[0][0] < end:
            return start, spans[0][0], spans[-1][1]
    return None


def _end_of_space_and_tags(tags: Tags, text: str, start: int) -> int:
    """Where the run of white space and tags ends that begins at `start`, maybe at once."""
    run = re.compile(rf"(?:\s|{'|'.join(map(re.escape, tags))})*").match(text, start)
    assert run is not None
    return run.end()


def _find_pieces(text: str, pieces: list[str], start: int, text_start: int) -> list[Span] | None:
    """Where the pieces stand, in their order, or None if one is not found. Their words are looked
    for from `text_start` on. White space around them, from `start` on, belongs to a piece as far as
    the piece has it."""
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
