"""Reasoning inside answers: `<think>...</think>`, or whatever the target's tags are."""

from itertools import groupby

from dspark_megatron.data.tokens import Span, tokens_inside


def without_reasoning(
    text: str, offsets: list[Span], mask: list[bool], tags: tuple[str, str]
) -> list[bool]:
    """The mask without the tokens of reasoning, tags included. [s] -> [s].

    Reasoning may begin in the prompt (a template that opens it for the model) and may be left open
    by an answer that was cut short.
    """
    spans = [part for run in _runs(offsets, mask) for part in _reasoning(text, run, tags)]
    inside = tokens_inside(offsets, spans, len(text))
    return [written and not hidden for written, hidden in zip(mask, inside, strict=True)]


def _runs(offsets: list[Span], mask: list[bool]) -> list[Span]:
    """The text of each run of supervised tokens."""
    spans, start = [], 0
    for written, run in groupby(mask):
        end = start + len(list(run))
        if written:
            spans.append((offsets[start][0], offsets[end - 1][1]))
        start = end
    return spans


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
