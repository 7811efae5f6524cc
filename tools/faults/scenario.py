"""One fault from its start to its verdict: break a command, look around, continue, compare."""

import json
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from faults.damage import DAMAGE, PRECIOUS
from faults.processes import Command, Ended, survivors
from faults.table import Fault
from faults.works import HALF, PROBLEMS, UNBROKEN, Bench, command, problems_of_a_finished_run

FAULTY = str(Path(__file__).with_name("faulty.py"))
NOTHING: dict[str, Any] = {"ranks": []}
OUTLIVE = 35.0
"""Seconds after which no process of a broken command may be there: ranks have 30 to notice that
their launcher is gone."""
CONTINUING = 900.0


@dataclass
class Verdict:
    fault: Fault
    problems: list[str] = field(default_factory=list)
    words: str = ""
    """What the broken command said."""
    seconds: float = 0.0
    outlived: float = 0.0
    """Seconds that processes outlived the broken command."""

    @property
    def line(self) -> str:
        mark = "FAILED" if self.problems else "ok    "
        text = f"{mark} {self.seconds:5.1f} s  {self.fault.name}"
        return "\n".join([text, *(f"           {problem}" for problem in self.problems)])

    def row(self) -> dict[str, Any]:
        kept = {"problems": self.problems, "words": self.words, "outlived": self.outlived}
        return {**asdict(self.fault), "ok": not self.problems, "seconds": self.seconds, **kept}


def start(folder: Path, fault: dict[str, Any], words: list[str], ranks: int) -> Command:
    alone = words[0] == "export"
    return Command(folder, [FAULTY, json.dumps(fault), *words], None if alone else ranks)


def prepare(bench: Bench, faults: Iterable[Fault]) -> None:
    """The results of commands that nothing happens to, and the half of a run, as they are needed
    for these faults."""
    bench.prepare()
    room, kinds = bench.room("unbroken"), {"train", *(fault.command for fault in faults)}
    for kind in filter(kinds.__contains__, UNBROKEN):
        layout = UNBROKEN[kind]
        ended = start(room, NOTHING, command(kind, layout, bench), layout.ranks).end(CONTINUING)
        assert ended.code == 0, ended.text
    if not any(fault.begins for fault in faults):
        return
    room, layout = bench.room("half"), UNBROKEN["train"]
    fault = {"ranks": [0], "place": "step", "call": HALF + 1, "deed": "kill all"}
    start(room, fault, command("train", layout, bench), layout.ranks).end(CONTINUING)
    survivors(room, 0)
    assert (bench.half / "checkpoints" / f"iter_{HALF:07d}").is_dir()


def run_fault(fault: Fault, bench: Bench) -> Verdict:
    verdict, started = Verdict(fault), time.monotonic()
    folder = bench.room(re.sub(r"\W+", "_", fault.name))
    _furnish(fault, folder, bench)
    words = [*command(fault.command, fault.start, bench), *fault.arguments]
    ended = _broken(fault, folder, words, verdict)
    verdict.words = _last_words(fault, ended.text)
    verdict.outlived, alive = survivors(folder, OUTLIVE)
    verdict.problems += [f"still alive {OUTLIVE:.0f} s later: {name}" for name in alive]
    verdict.problems += _problems_of_the_end(fault, ended)
    if not fault.goes_on:
        _continue(fault, folder, bench, verdict)
    if not verdict.problems:
        verdict.problems += _problems_of_the_result(fault, folder, bench)
    verdict.seconds = time.monotonic() - started
    return verdict


def _furnish(fault: Fault, folder: Path, bench: Bench) -> None:
    if fault.begins:
        shutil.copytree(bench.half, folder / "run", symlinks=True)
    if fault.damage:
        DAMAGE[fault.damage](folder / "run" / "checkpoints")
    for key in ("cwd", "root"):
        if name := fault.others.get(key):
            bench.other_places(folder, name)


def _broken(fault: Fault, folder: Path, words: list[str], verdict: Verdict) -> Ended:
    spec: dict[str, Any] = {"ranks": fault.ranks, **fault.others}
    if fault.deed:
        spec |= {"place": fault.place, "call": fault.call, "deed": fault.deed}
    running = start(folder, spec, words, fault.start.ranks)
    if not fault.second:
        return running.end(fault.seconds)
    while not (folder / "reached").exists() and running.process.poll() is None:
        time.sleep(0.1)
    second = start(folder, NOTHING, words, fault.start.ranks)
    other = second.process.wait(fault.seconds)
    (folder / "go_on").touch()
    ended = running.end(fault.seconds)
    if other == 0:
        verdict.problems.append("the second start ended well")
    return Ended(ended.code, second.log.read_text(errors="replace"), ended.seconds)


def _problems_of_the_end(fault: Fault, ended: Ended) -> list[str]:
    if ended.code is None:
        return [f"it hung, and was ended after {fault.seconds:.0f} s"]
    problems = []
    if (ended.code == 0) != fault.goes_on:
        problems.append(f"it ended with code {ended.code}")
    if fault.says and not re.search(fault.says, ended.text):
        problems.append(f"it did not say {fault.says!r}")
    return problems


def _continue(fault: Fault, folder: Path, bench: Bench, verdict: Verdict) -> None:
    words = [*command(fault.command, fault.then, bench), *fault.way_out]
    ended = start(folder, NOTHING, words, fault.then.ranks).end(CONTINUING)
    if ended.code != 0:
        last = ended.text.strip().splitlines()[-1:]
        verdict.problems.append(f"it could not be continued at {fault.then}: {last}")
    survivors(folder, 5)


def _problems_of_the_result(fault: Fault, folder: Path, bench: Bench) -> list[str]:
    problems = problems_of_a_finished_run(folder) if fault.command == "train" else []
    if fault.same_curve:
        problems += PROBLEMS[fault.command](folder, bench)
    if fault.damage == "link" and (folder / PRECIOUS / "file").read_text() != "kept":
        problems.append("a folder that a link led to was changed")
    if fault.deed == "not a number":
        skipped = (folder / "run" / "skipped_samples.jsonl").read_text().splitlines()
        problems += [] if len(skipped) == 1 else [f"{len(skipped)} steps were skipped and not 1"]
    return problems


def _last_words(fault: Fault, text: str) -> str:
    """The line that was waited for, or the one that speaks of an error."""
    pattern = fault.says or r"(?i)^error|failed:"
    lines = [line for line in re.split(r"[\r\n]+", text) if re.search(pattern, line)]
    return lines[0][:400] if lines else ""
