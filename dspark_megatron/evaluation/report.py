"""Acceptance figures as a table on the console."""

from typing import Any

SLOTS = 3
"""Accept rates that are shown; the JSON has all."""


def table(rows: dict[str, dict[str, Any]], greedy: bool) -> str:
    """Figures of several prompt files, one line each."""
    lines = [_cells(name, figures, greedy) for name, figures in rows.items()]
    columns = [[head, *(line[head] for line in lines)] for head in lines[0]]
    padded = [_padded(column, left=i == 0) for i, column in enumerate(columns)]
    return "\n".join("  ".join(line) for line in zip(*padded, strict=True))


def _cells(name: str, figures: dict[str, Any], greedy: bool) -> dict[str, str]:
    """A line by heading."""
    interval = (figures["confidence_intervals"] or {}).get("tau")
    rates = [*figures["accept_rate"], *[None] * SLOTS][:SLOTS]
    cells = {
        "file": name,
        "prompts": str(figures["prompts"]),
        "tau": _show(figures["tau"]),
        "95%": "{:.2f}-{:.2f}".format(*interval) if interval else "-",
        "estimate": _show(figures.get("estimate", {}).get("tau")),
        **{f"accept@{slot}": _show(rate) for slot, rate in enumerate(rates)},
        "verify rate": _show(figures["verify_rate"]),
        "tok/s": _show(figures.get("tokens_per_second"), 1),
        "plain tok/s": _show(figures.get("plain_tokens_per_second"), 1),
        "speed-up": _show(figures.get("speedup")),
    }
    if greedy:
        cells["= plain"] = f"{figures.get('identical_to_plain', '-')}/{figures['prompts']}"
        if ties := figures.get("ties_with_plain"):
            cells["= plain"] += f" ({ties} at a tie)"
    return cells


def _padded(column: list[str], *, left: bool) -> list[str]:
    width = max(map(len, column))
    return [cell.ljust(width) if left else cell.rjust(width) for cell in column]


def _show(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
