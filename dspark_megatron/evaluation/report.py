"""Acceptance figures as a table on the console."""

from typing import Any


def table(rows: dict[str, dict[str, Any]], greedy: bool) -> str:
    """Figures of several prompt files, one line each."""
    header = [
        "file",
        "prompts",
        "tau",
        "95%",
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
        interval = (figures["confidence_intervals"] or {}).get("tau")
        line += [
            _show(figures["tau"]),
            "-" if interval is None else "{:.2f}-{:.2f}".format(*interval),
        ]
        line += [_show(x) for x in (*rates, figures["verify_rate"])]
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


def _show(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
