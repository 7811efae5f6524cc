"""Reasoning inside answers: `<think>...</think>`, or whatever the target's tags are."""

from dspark_megatron.data.chats.tokens import Span, spans_of, tokens_inside


class ReasoningMask:
    """Takes the reasoning between two tags, tags included, out of what is learnt.

    Reasoning may begin in the prompt (a template that opens it for the model) and may be left open
    by an answer that was cut short.
    """

    def __init__(self, opening: str, closing: str) -> None:
        self._tags = (opening, closing)
        self.hidden_tokens = 0
        """Of all texts so far."""

    def hide(self, text: str, offsets: list[Span], mask: list[bool]) -> list[bool]:
        """The mask of a text's tokens without those of reasoning. [s] -> [s]."""
        answers = spans_of(offsets, mask)
        spans = [part for answer in answers for part in _reasoning(text, answer, self._tags)]
        inside = tokens_inside(offsets, spans, len(text))
        kept = [written and not hidden for written, hidden in zip(mask, inside, strict=True)]
        self.hidden_tokens += sum(mask) - sum(kept)
        return kept


def _reasoning(text: str, run: Span, tags: tuple[str, str]) -> list[Span]:
    """The parts of a run from an opening tag to the closing one, or to the run's end."""
    opening, closing = tags
    position, end = run
    is_open = text[:position].rstrip().endswith(opening)
    spans = []
    while True:
        start = position if is_open else text.find(opening, position, end)
        if start < 0:
            return spans
        close = text.find(closing, start, end)
        position = end if close < 0 else close + len(closing)
        spans.append((start, position))
        is_open = False
