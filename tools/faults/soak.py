"""Kill runs at random places and continue them at random layouts until the time is over."""

import random
import time
from pathlib import Path
from typing import Any

from faults.processes import survivors
from faults.scenario import CONTINUING, NOTHING, OUTLIVE, start
from faults.table import IN_BACKGROUND, OTHERS, SPLIT, WHO, Layout
from faults.works import Bench, command, problems_of_a_finished_run, problems_of_training

STEPS, EVERY = 40, 4
LAYOUTS = (SPLIT, *OTHERS)
PLACES = {"load": 1, "first batch": 20, "step": 20, "save": 4, "save begun": 4, "shards begun": 4}
PLACES |= {"file of a checkpoint": 8, "shards written": 4}
OF_MAIN_RANK = {"rename": 4, "tracker": 4}
"""Places, and the largest number of the call at which the deed is done."""


def soak(bench: Bench, minutes: float, seed: int) -> dict[str, Any]:
    """How many starts, kills and finished runs there were, and all that was wrong."""
    chance, until = random.Random(seed), time.monotonic() + 60 * minutes
    bench.prepare()
    words = command("train", SPLIT, bench)
    room = bench.room("unbroken", STEPS, EVERY)
    ended = start(room, NOTHING, words, SPLIT.ranks).end(CONTINUING)
    assert ended.code == 0, ended.text
    counts = {"starts": 0, "killed": 0, "runs": 0}
    problems: list[str] = []
    while time.monotonic() < until:
        room = bench.room(f"run_{counts['runs']}", STEPS, EVERY)
        problems += one_run(room, bench, chance, until, counts)
        counts["runs"] += 1
        print(f"{counts}, {len(problems)} problems", flush=True)
    return {"seed": seed, "minutes": minutes, **counts, "problems": problems}


def one_run(
    room: Path, bench: Bench, chance: random.Random, until: float, counts: dict[str, int]
) -> list[str]:
    """A run to its end: killed again and again, and left alone once the time is over."""
    problems, history, code = [], [], None
    while code != 0:
        layout, fault, what = random_fault(chance)
        saves = [IN_BACKGROUND] if chance.random() < 0.5 else []
        if time.monotonic() > until:
            fault, what = NOTHING, "left alone"
        history.append(" ".join([f"{layout}: {what}", *saves]))
        words = [*command("train", layout, bench), *saves]
        running = start(room, fault, words, layout.ranks)
        code = running.end(CONTINUING).code
        counts["starts"] += 1
        counts["killed"] += code != 0
        problems += [f"still alive: {name}" for name in survivors(room, OUTLIVE)[1]]
        if code is None or (code != 0 and fault is NOTHING):
            problems.append(f"it ended with {code}: {running.log.read_text()[-300:]}")
            break
    else:
        problems += problems_of_a_finished_run(room) + problems_of_training(room, bench)
    return [f"{room.name}: {problem} after {history}" for problem in problems]


def random_fault(chance: random.Random) -> tuple[Layout, dict[str, Any], str]:
    layout, (who, deed) = chance.choice(LAYOUTS), chance.choice(list(WHO.items()))
    place, most = chance.choice([*PLACES.items(), *OF_MAIN_RANK.items()])
    rank = 0 if place in OF_MAIN_RANK else chance.randrange(layout.ranks)
    call = chance.randint(1, most)
    fault = {"ranks": [rank], "place": place, "call": call, "deed": deed}
    return layout, fault, f"{who} by rank {rank} at {place} {call}"
