"""Acceptance by the length of the context that a round drafts from."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from dspark_megatron.evaluation.figures import acceptance
from dspark_megatron.evaluation.generation import Generation


def by_context(
    generations: Sequence[Generation], num_draft_tokens: int, edges: Sequence[int]
) -> list[dict[str, Any]]:
    """Figures of the rounds whose context has `from` tokens or more and fewer than `to` (null: no
    end). Lengths without a round are left out; a prompt counts wherever it has rounds."""
    found = []
    for index, (start, end) in enumerate(spans(edges)):
        of_prompts = [
            [r for r in generation.rounds if bisect_right(edges, r.context) == index]
            for generation in generations
        ]
        inside = [Generation(rounds=rounds) for rounds in of_prompts if rounds]
        if inside:
            figures = acceptance(inside, num_draft_tokens)
            del figures["new_tokens"]
            found.append({"from": start, "to": end, **figures})
    return found


def spans(edges: Sequence[int]) -> list[tuple[int, int | None]]:
    """All lengths, parted at the edges."""
    return list(zip([0, *edges], [*edges, None], strict=True))
