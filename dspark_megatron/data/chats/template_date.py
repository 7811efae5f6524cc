"""Chat templates that read the clock: the same text on every day and every rank."""

from datetime import date

CLOCK = "strftime_now"
"""The function that serving engines and Transformers give to templates."""
_DIRECTIVES = "aAbBcdHIjmMpSUwWxXyYZGuVDFeT"


def reads_clock(template: str | dict[str, str] | None) -> bool:
    return CLOCK in str(template)


def on_day(template: str, day: str) -> str:
    """The template with a clock that stands at the beginning of a day (YYYY-MM-DD)."""
    if not reads_clock(template):
        return template
    moment, text = date.fromisoformat(day), "format"
    for letter in _DIRECTIVES:
        for directive in (f"%-{letter}", f"%{letter}"):
            text += f".replace({directive!r}, {moment.strftime(directive)!r})"
    # The line ends here: a template may depend on what its first line begins with, and Jinja takes
    # the line break after a block away.
    return f"{{% macro {CLOCK}(format) %}}{{{{ {text} }}}}{{% endmacro %}}\n{template}"
