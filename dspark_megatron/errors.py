"""The one error that a user sees without a traceback, and how it is raised."""


class ConfigError(ValueError):
    """The user's settings cannot work; the message says what must hold and the way out."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
