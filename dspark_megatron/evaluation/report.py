"""Acceptance figures of decoded prompts, as numbers and as a table."""

from collections.abc import Sequence
from typing import Any

from dspark_megatron.evaluation.decoding import Generation

Pair = tuple[Generation, Generation | None]
"""Speculative and plain decoding of the same prompt."""


def acceptance(pairs: Sequence[Pair], block_size: int) -> dict[str, Any]:
    """Figures over all prompts. A figure with nothing to count is null.

    `tau`: mean tokens of a round, bonus token included. `accept_rate[k]`: share of the tokens at
    slot k that were kept, of those whose predecessors were. `prefix_survival[k]`: share of the
    proposals with a slot k whose first k + 1 tokens were all kept. `verify_rate`: tokens
    gained per token that the target had to verify.
    """
    generations = [speculative for speculative, _ in pairs]
    rounds = [r for g in generations for r in g.rounds]
    kept = [sum(r.accepted > k for r in rounds) for k in range(block_size)]
    offered = [sum(r.proposed > k for r in rounds) for k in range(block_size)]
    reached = [sum(r.proposed > k and r.accepted >= k for r in rounds) for k in range(block_size)]
    gained = sum(r.length for r in rounds)
    figures = {
        "prompts": len(pairs),
        "new_tokens": sum(len(g.token_ids) for g in generations),
        "rounds": len(rounds),
        "tau": _ratio(gained, len(rounds)),
        "accept_rate": [_ratio(a, b) for a, b in zip(kept, reached, strict=True)],
        "prefix_survival": [_ratio(a, b) for a, b in zip(kept, offered, strict=True)],
        "verify_rate": _ratio(gained, sum(r.proposed + 1 for r in rounds)),
        "tokens_per_second": _rate(generations),
    }
    plain = [p for _, p in pairs if p is not None]
    if plain:
        figures["plain_tokens_per_second"] = _rate(plain)
        figures["speedup"] = _ratio(figures["tokens_per_second"] or 0, _rate(plain) or 0)
        figures["identical_to_plain"] = sum(s.token_ids == p.token_ids for s, p in pairs)
    return figures


def table(rows: dict[str, dict[str, Any]], greedy: bool) -> str:
    """Figures of several prompt files, one line each."""
    header = [
        "file",
        "prompts",
        "tau",
        "accept@0",
        "accept@1",
        "accept@2",
        "verify rate",
        "tok/s",
        "plain tok/s",
        "speed-up",
    ]
    if greedy:
        header.append("= plain")
    lines = [header]
    for name, figures in rows.items():
        rates = [*figures["accept_rate"], None, None, None][:3]
        line = [name, str(figures["prompts"])]
        line += [_show(x) for x in (figures["tau"], *rates, figures["verify_rate"])]
        line += [
            _show(figures.get(key), 1) for key in ("tokens_per_second", "plain_tokens_per_second")
        ]
        line.append(_show(figures.get("speedup")))
        if greedy:
            line.append(f"{figures.get('identical_to_plain', '-')}/{figures['prompts']}")
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _rate(generations: Sequence[Generation]) -> float | None:
    """Tokens per second of one replica; the first token belongs to the prompt's forward pass."""
    tokens = sum(len(g.token_ids) - 1 for g in generations)
    return _ratio(tokens, sum(g.seconds for g in generations))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _show(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
