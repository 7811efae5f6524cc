"""How every picture of a page looks: colours with their dark twins, axes, and SVG inside HTML.

Figures are drawn by their own Agg canvas: pyplot and the backend of the process are not touched.
"""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure

INK, FAINT, GRID = "#333333", "#cccccc", "#eeeeee"
BLUE, ORANGE, GREEN = "#1f6fb4", "#d9822b", "#3a8a4d"
COLORS = (BLUE, ORANGE, GREEN, "#8250a0", "#b03a48", "#5b6670", "#a08a1f", "#2a9d9d")
LINES = ("-", "--", ":")
"""The first eight series are solid, the next dashed, then dotted."""
DARK = {
    "#333333": "#d8dce0",
    "#cccccc": "#4b5158",
    "#eeeeee": "#2b3036",
    "#000000": "#d8dce0",
    "#1f6fb4": "#6cb0ee",
    "#d9822b": "#f0a75a",
    "#3a8a4d": "#6cc281",
    "#8250a0": "#c39be0",
    "#b03a48": "#ec7f8b",
    "#5b6670": "#a9b4bf",
    "#a08a1f": "#d6c05a",
    "#2a9d9d": "#5fd0d0",
}
"""What a colour becomes where the reader has asked for dark pages."""
_RAMP = LinearSegmentedColormap.from_list("slots", ["#3f6fd1", "#1f9aa8", "#5aa33c", "#d08a1d"])
"""Neither light nor dark, so it is seen on both."""


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style(
    axes: Axes, *, title: str = "", xlabel: str = "", limits: tuple[float, float] | None = None
) -> None:
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    axes.set_xlabel(xlabel, fontsize=8, color=INK)
    axes.yaxis.label.set(fontsize=8, color=INK)
    axes.tick_params(which="both", labelsize=8, color=FAINT, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    if limits:
        axes.set(xlim=limits, ylim=limits)


def from_zero(axes: Axes) -> None:
    """Let the axis of values begin at 0, and end above the largest one."""
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])


def legend(axes: Axes, title: str | None = None) -> None:
    found = axes.legend(title=title, fontsize=7, title_fontsize=7, frameon=False, labelcolor=INK)
    found.get_title().set_color(INK)


def legend_beside(figure: Figure, axes: Axes, title: str) -> None:
    """A legend that no curve can run into."""
    found = figure.legend(
        *axes.get_legend_handles_labels(),
        title=title,
        loc="outside right upper",
        fontsize=7,
        title_fontsize=7,
        handlelength=1.2,
        frameon=False,
        labelcolor=INK,
    )
    found.get_title().set_color(INK)


def series_style(order: int) -> dict[str, Any]:
    """Colour and line of the series at this place."""
    return {
        "color": COLORS[order % len(COLORS)],
        "linestyle": LINES[order // len(COLORS) % len(LINES)],
    }


def ramp(count: int) -> list[str]:
    """Colours from the first slot to the last."""
    return [to_hex(_RAMP(i / max(count - 1, 1))) for i in range(count)]


def gaps(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def plain(label: str) -> str:
    """A name, which is no formula, and which Matplotlib would leave out behind a "_"."""
    return (
        f"\u200b{label}".replace("$", r"\$") if label.startswith("_") else label.replace("$", r"\$")
    )


def svg(figure: Figure, name: str) -> str:
    """The picture as an element of a page, without a size of its own. Its colours follow
    `dark_colors`. name: what a reader is told who does not see it; ids are made from it, too, so
    pictures of one page need different names.

    Texts stay texts, in the page's font: they are laid out for DejaVu Sans, which is wider than
    most.
    """
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    layout = figure.get_layout_engine()
    if layout is not None:  # saving would draw everything once more for it
        layout.execute(figure)
        figure.set_layout_engine("none")
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata=nothing)
    text = file.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # nothing refers to them, and each picture has them
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", body)
    body = body.replace("xlink:href", "href")
    body = re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda found: themed(found[0]), body)
    width, height = (72 * inches for inches in figure.get_size_inches())
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{_escaped(name)}">{body}'
    )


def themed(color: str) -> str:
    """The colour as CSS that `dark_colors` may change."""
    return f"var(--c-{color[1:]}, {color})" if color in DARK else color


def dark_colors() -> str:
    """Declarations for the root of a page that is shown dark."""
    return " ".join(f"--c-{light[1:]}: {dark};" for light, dark in DARK.items())


def _escaped(text: str) -> str:
    for letter, name in {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}.items():
        text = text.replace(letter, name)
    return text
