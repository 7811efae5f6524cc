"""Parts of an HTML page. What comes from outside is escaped here and nowhere else: `text`, titles
and the cells of tables are text, only `parts` are HTML, made by these functions."""

import base64
import html
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from dspark_megatron.evaluation.pages.plots import png

STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; color: #333; max-width: 62em; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin: 2em 0 .4em; }
table { border-collapse: collapse; margin: .6em 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .8em .2em 0; text-align: right; border-bottom: 1px solid #eee; }
th { font-weight: 600; } th:first-child, td:first-child, .facts td { text-align: left; }
td { white-space: pre; }
div { overflow-x: auto; } img { max-width: 100%; } p { color: #555; max-width: 50em; }
"""


def page(title: str, *parts: str) -> str:
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    return "\n".join([f"<h2>{html.escape(title)}</h2>", *parts])


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def picture(figure: Figure, meaning: str) -> str:
    """The figure itself, within the page."""
    data = base64.b64encode(png(figure)).decode()
    return f'<div><img alt="{html.escape(meaning)}" src="data:image/png;base64,{data}"></div>'


def table(heads: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """heads: may be empty. Cells: numbers, text, or None for what is not known."""
    lines = [_row("th", heads)] if heads else []
    lines += [_row("td", row) for row in rows]
    kind = "" if heads else ' class="facts"'
    return f"<div><table{kind}>" + "\n".join(lines) + "</table></div>"


def shown(value: Any) -> str:
    """A value as text, with the digits that are worth reading."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return str(value)


def _row(tag: str, cells: Sequence[Any]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(shown(c))}</{tag}>" for c in cells) + "</tr>"
