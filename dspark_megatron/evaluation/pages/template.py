"""From a template of this folder to HTML. Whatever comes from outside is escaped there."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dspark_megatron.evaluation.pages.drawing import dark_colors


def render(template: str, **content: Any) -> str:
    templates = Environment(
        loader=PackageLoader("dspark_megatron.evaluation", "pages"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    templates.filters |= {"shown": shown}
    templates.globals |= {"dark_colors": dark_colors()}
    return templates.get_template(template).render(**content)


def shown(value: Any) -> str:
    """A value as text, with the digits that are worth reading."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return str(value)
