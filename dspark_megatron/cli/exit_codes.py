"""What the exit code of every command says."""

from dataclasses import dataclass

from dspark_megatron.errors import BAD_INPUT, FAILED, INTERRUPTED

DONE = 0
NOT_SOUND = 1


@dataclass(frozen=True)
class ExitCode:
    number: int
    meaning: str


EXIT_CODES = (
    ExitCode(DONE, "done, or stopped as asked with everything saved"),
    ExitCode(NOT_SOUND, "a check found something that does not hold; the lines above say what"),
    ExitCode(BAD_INPUT, "the input cannot work; one sentence says why, and nothing was started"),
    ExitCode(FAILED, "the work broke off; what was saved is whole, and a second start continues"),
    ExitCode(INTERRUPTED, "ended by Ctrl-C before there was anything to save"),
)
