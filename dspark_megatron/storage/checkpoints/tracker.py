"""Which checkpoint of a run is meant: the files that say it, and what is found without them.

A tracker that is lost, cannot be read or names what is not there never means that a run has no
checkpoints: the newest whole one is taken then, and that is said.
"""

from pathlib import Path

from dspark_megatron.errors import ConfigError, require
from dspark_megatron.storage.checkpoints.meta import iteration_of, parse_meta
from dspark_megatron.storage.checkpoints.whole import iterations_in, newest_whole
from dspark_megatron.storage.notices import say_once
from dspark_megatron.storage.writing import write_text

TRACKER = "latest_checkpointed_iteration.txt"
BEST_TRACKER = "best_checkpointed_iteration.txt"
BEST = "best"
"""In place of an iteration: the one of the best held-out tau."""
_MOST_DIGITS = 15


def latest_iteration(checkpoints: Path) -> int | None:
    """The newest complete checkpoint of a checkpoints folder; None where there is none and none is
    named. ConfigError where a tracker or folders are there, and no whole one."""
    there, tracker = iterations_in(checkpoints), checkpoints / TRACKER
    named, problem = _tracked(tracker)
    if named in there:
        return named
    if not there:
        require(
            not tracker.exists(),
            f"{tracker} {problem or f'names iteration {named}'}, and {checkpoints} has no "
            "checkpoint; put them back, or delete that file to start anew",
        )
        return None
    problem = problem or f"names iteration {named}, which is not there"
    return _found_without(tracker, problem, there)


def best_iteration(checkpoints: Path) -> int:
    """The one of the best held-out tau. ConfigError where none is known."""
    there, tracker = iterations_in(checkpoints), checkpoints / BEST_TRACKER
    named, problem = _tracked(tracker)
    if named in there:
        assert named is not None
        return named
    problem = problem or f"names iteration {named}, which is not there"
    newest = newest_whole(checkpoints)
    best = parse_meta(newest).get("best") if newest else None
    if best and best["iteration"] in there:
        assert newest is not None
        say_once(f"{tracker} {problem}; by {newest.name} the best is {best['iteration']}")
        return best["iteration"]
    listing = ", ".join(folder.name for folder in there.values()) or "none"
    raise ConfigError(
        f"{tracker} {problem}, so the best checkpoint is unknown; iter_* folders there: {listing}; "
        "name one of them (runs with evaluate.every keep a best one)"
    )


def mend_tracker(newest: Path) -> None:
    """Let the tracker beside a checkpoint name it, if it does not."""
    tracker, iteration = newest.parent / TRACKER, iteration_of(newest)
    if _tracked(tracker)[0] != iteration:
        write_text(tracker, f"{iteration}\n")


def _found_without(tracker: Path, problem: str, there: dict[int, Path]) -> int:
    newest = newest_whole(tracker.parent)
    if newest is None:
        raise ConfigError(
            f"{tracker} {problem}, and no checkpoint there is whole ("
            f"{', '.join(folder.name for folder in there.values())}); put a whole one back, or "
            "start anew with train.resume=false train.overwrite=true or in another folder"
        )
    say_once(f"{tracker} {problem}; the newest whole checkpoint there is used: {newest.name}")
    found = iteration_of(newest)
    assert found is not None
    return found


def _tracked(tracker: Path) -> tuple[int | None, str]:
    """The iteration that it names, or what is wrong with it."""
    if not tracker.is_file():
        return None, "is no file" if tracker.exists() else "is not there"
    try:
        text = tracker.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        return None, f"cannot be read ({type(error).__name__})"
    if not (text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS):
        return None, f"holds {text[:40]!r}, no number of an iteration"
    return int(text), ""
