"""The figures of a serving simulation as a picture."""

from typing import Any

from matplotlib.figure import Figure


def serving_plot(figures: list[dict[str, Any]]) -> Figure:
    """Three panels: throughput by requests, throughput by the speed of each request (upper right is
    better), and verified slots by requests. figures: of `simulate_serving`."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(figures, key=lambda row: row["requests"]):
        curves.setdefault(row["policy"], []).append(row)
    picture = Figure(figsize=(15, 4.5), layout="constrained")
    panels = (
        ("requests", "tokens_per_second", "tokens / s, all requests"),
        ("per_request", "tokens_per_second", "tokens / s, all requests"),
        ("requests", "verified", "verified slots of a request"),
    )
    axes = picture.subplots(1, len(panels))
    for axis, (x, y, label) in zip(axes, panels, strict=True):
        for style, (policy, rows) in zip(_styles(curves), curves.items(), strict=True):
            axis.plot([row[x] for row in rows], [row[y] for row in rows], label=policy, **style)
        axis.set_xlabel("requests at once" if x == "requests" else "tokens / s of one request")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if x == "requests":
            ticks = sorted({row[x] for row in figures})
            axis.set_xscale("log", base=2)
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
    handles, labels = axes[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside right center")
    return picture


def _styles(curves: dict[str, list]) -> list[dict[str, Any]]:
    """Fixed lengths are shades of grey, the others have colours."""
    fixed = [name for name in curves if name.startswith("fixed")]
    styles, colours = [], iter(f"C{i}" for i in range(len(curves)))
    for name in curves:
        if name in fixed:
            grey = 0.75 - 0.5 * fixed.index(name) / len(fixed)
            styles.append({"color": str(grey), "linewidth": 1, "linestyle": "--"})
        else:
            styles.append({"color": next(colours), "linewidth": 1.8, "marker": "o"})
    return styles
