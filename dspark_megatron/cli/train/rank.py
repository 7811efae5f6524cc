"""What a rank does around its work, for every command that has ranks."""

import contextlib
import io
import os
import signal
from collections.abc import Iterator

from dspark_megatron.cli.output import Output


@contextlib.contextmanager
def words_for(output: Output) -> Iterator[io.StringIO]:
    """Within it stdout is for people: kept to itself where a program reads, or nobody does."""
    kept = io.StringIO()
    if not (output.json or output.quiet):
        yield kept
        return
    if output.quiet:
        os.environ["TQDM_DISABLE"] = "1"  # progress bars
    with contextlib.redirect_stdout(kept):
        yield kept


@contextlib.contextmanager
def ends_by_signal() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does: it unwinds, and what it has locked is let go."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
