"""What a template with `{% generation %}` marks as the assistant's and no message says."""

from dspark_megatron.data.chats.answers import find_pieces, white_space_and
from dspark_megatron.data.chats.said import Said, Tags
from dspark_megatron.data.chats.tokens import Span


def not_written(
    text: str, marked: list[Span], messages: list[dict], tags: Tags, *, cut_short: bool
) -> list[Span]:
    """Parts of the marked text that the assistant did not write: an empty block of reasoning before
    an answer, and all that follows an answer without an end. cut_short: of the last message."""
    hidden: list[Span] = []
    position = 0
    answers = [message for message in messages if message["role"] == "assistant"]
    for message in answers:
        said = Said.of(message, tags)
        span = _span(text, marked, said.pieces(), tags, position)
        is_cut = cut_short and message is answers[-1]
        if span is None:
            hidden += marked[-1:] if is_cut else []
            continue
        run = next(run for run in marked if run[0] <= span[0] < run[1])
        lead = max(run[0], position), span[0]
        position = span[1]
        _, closing, rest = text[slice(*lead)].rpartition(tags.closing)
        if closing and said.reasoning is None:
            hidden.append(lead)
        elif closing and said.reasoning.strip():
            hidden.append((lead[0], lead[1] - len(rest.lstrip())))
        if is_cut or said.ends_in_reasoning(tags):  # the stop token behind the marks included
            later = [start for start, _ in marked if start > position]
            hidden.append((position, min(later, default=len(text))))
    return hidden


def _span(
    text: str, marked: list[Span], pieces: list[str], tags: Tags, position: int
) -> Span | None:
    """From the first piece of a message to the last, if they begin in a marked part; empty where it
    has none."""
    for start, end in marked:
        if end <= position:
            continue
        start = max(start, position)
        lead = white_space_and(tags).match(text, start).end()
        spans = find_pieces(text, pieces, start, lead)
        if not pieces:  # calls of tools, or nothing
            return lead, lead
        if spans and spans[0][0] < end:
            return spans[0][0], spans[-1][1]
    return None
