"""Figures as tables on the console, those of acceptance above all."""

from collections.abc import Sequence
from typing import Any

from dspark_megatron.evaluation.context_lengths import spans

SLOTS = 3
"""Accept rates that are shown; the JSON has all."""


def text_table(rows: Sequence[dict[str, Any]], formats: dict[str, str]) -> str:
    """Rows under their column names. formats: a format of each column, "" for text on the left; a
    cell that a row lacks is shown as "-"."""
    lines = [list(formats)]
    for row in rows:
        cells = ((row.get(name), form) for name, form in formats.items())
        lines.append(["-" if value is None else format(value, form) for value, form in cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(formats))]
    left = [not form for form in formats.values()]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(line, widths, left, strict=True)
        ).rstrip()
        for line in lines
    )


def table(rows: dict[str, dict[str, Any]], greedy: bool) -> str:
    """Figures of several prompt files, one line each."""
    return _aligned([_cells(name, figures, greedy) for name, figures in rows.items()])


def drafts_table(drafts: dict[str, dict[str, dict[str, Any]]], greedy: bool) -> str:
    """Figures by draft and prompt file, one line each; files one after the other, so that drafts
    stand below each other. `to the first`: difference of tau, with its 95% interval."""
    files = list(next(iter(drafts.values())))
    lines = []
    for file in files:
        for draft, figures in drafts.items():
            cells = _cells(file, figures[file], greedy)
            named = {"draft": draft, **({"file": file} if len(files) > 1 else {})}
            shown = {"to the first": _difference(figures[file].get("tau_difference"))}
            kept = ("file", "tau", "95%")
            rest = {head: cell for head, cell in cells.items() if head not in kept}
            lines.append({**named, "tau": cells["tau"], "95%": cells["95%"], **shown, **rest})
    return _aligned(lines)


def _difference(found: dict[str, Any] | None) -> str:
    if found is None or found["value"] is None:
        return "-"
    interval = found["interval"]
    around = "" if interval is None else " ({:+.2f} to {:+.2f})".format(*interval)
    return f"{found['value']:+.3f}{around}"


def _aligned(lines: list[dict[str, str]]) -> str:
    """Lines by heading, under the headings."""
    names = "draft", "file"
    return text_table(lines, {head: "" if head in names else ">" for head in lines[0]})


def context_table(rows: dict[str, dict[str, Any]], edges: Sequence[int]) -> str:
    """Acceptance by length of context: a line for each file and length that has rounds."""
    found = [(name, part) for name, figures in rows.items() for part in figures["by_context"]]
    used = {(part["from"], part["to"]) for _, part in found}
    unused = [_span(*span) for span in spans(edges) if span not in used]
    lines = [
        {
            "file": name,
            "context": _span(part["from"], part["to"]),
            "rounds": str(part["rounds"]),
            "tau": _show(part["tau"]),
            **_rates(part),
        }
        for name, part in found
    ]
    without = [f"no rounds with a context of {', '.join(unused)} tokens"] if unused else []
    return "\n".join([*([_aligned(lines)] if lines else []), *without])


def _span(start: int, end: int | None) -> str:
    return f"{start:,} or more" if end is None else f"{start:,}-{end - 1:,}"


def _rates(figures: dict[str, Any]) -> dict[str, str]:
    rates = [*figures["accept_rate"], *[None] * SLOTS][:SLOTS]
    return {f"accept@{slot}": _show(rate) for slot, rate in enumerate(rates)}


def _cells(name: str, figures: dict[str, Any], greedy: bool) -> dict[str, str]:
    """A line by heading."""
    interval = (figures["confidence_intervals"] or {}).get("tau")
    cells = {
        "file": name,
        "prompts": str(figures["prompts"]),
        "tau": _show(figures["tau"]),
        "95%": "{:.2f}-{:.2f}".format(*interval) if interval else "-",
        "estimate": _show(figures.get("estimate", {}).get("tau")),
        **_rates(figures),
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


def _show(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
