"""The commands that faults happen to, on a tiny target, and what each must leave in the end."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from faults.table import SPLIT, Layout
from support.tiny_target import make_chats, make_target, tiny_settings
from support.training_runs import assert_same_curve, curve, curve_lines, status

HERE = Path("/proc/self/cwd")
"""The same path on all ranks, and another place where a rank stands in another folder."""
STEPS, EVERY = 8, 2
HALF = STEPS // 2
FIXED = (".metadata",)
"""Hidden files of a finished run."""


@dataclass(frozen=True)
class Bench:
    """What all faults share: a target, data, and the results of unbroken commands."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "unbroken" / "run"

    @property
    def half(self) -> Path:
        return self.folder / "half" / "run"

    def prepare(self) -> None:
        make_target(self.folder / "target")
        make_chats(self.folder / "chats.jsonl")
        others = self.folder / "others"
        make_target(others / "target", seed=1)
        make_chats(others / "chats.jsonl", 23)

    def room(self, name: str, steps: int = STEPS, every: int = EVERY) -> Path:
        """A new folder to work in: a YAML file, the target and the data."""
        folder = self.folder / name
        folder.mkdir()
        self._furnish(folder)
        settings = tiny_settings(HERE / "target", HERE / "chats.jsonl", HERE / "run")
        settings["train"] |= {"iterations": steps, "save_every": every, "keep_last": 2}
        settings["evaluate"] |= {"prompt_files": [str(HERE / "chats.jsonl")], "max_prompts": 6}
        (folder / "run.yaml").write_text(yaml.safe_dump(settings))
        return folder

    def other_places(self, folder: Path, name: str) -> None:
        """A folder like another node's, which differs in what its name says."""
        place, others = folder / name, self.folder / "others"
        if name == "other_code":
            from faults.processes import ROOT

            package = "dspark_megatron"
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / package, place / package, ignore=ignored)
            with (place / package / "ops" / "head_loss.py").open("a") as file:
                file.write("# changed\n")
            return
        place.mkdir()
        self._furnish(place)
        differs = {"other_target": "target", "other_data": "chats.jsonl"}.get(name)
        if differs:
            (place / differs).unlink()
            (place / differs).symlink_to(others / differs)
            (place / "run").symlink_to(folder / "run")
        (place / "run.yaml").symlink_to(folder / "run.yaml")

    def _furnish(self, folder: Path) -> None:
        for name in ("target", "chats.jsonl"):
            (folder / name).symlink_to(self.folder / name)


def command(kind: str, layout: Layout, bench: Bench) -> list[str]:
    """Arguments of a command, in the words of `faulty.COMMANDS`."""
    config = ["--config", str(HERE / "run.yaml")]
    if kind == "train":
        return [kind, *config, *layout.overrides()]
    if kind == "evaluate":
        checkpoint, output = f"evaluate.checkpoint={bench.run}", HERE / "evaluation.json"
        return [kind, *config, *layout.overrides(), checkpoint, f"evaluate.output={output}"]
    if kind == "store":
        sizes = ["--output", "store", "--shard-mib", "0.02"]
        return [kind, *config, *layout.overrides(), *sizes]
    paths = ["--checkpoint", str(bench.run), "--target", "target", "--output", "export"]
    return [kind, "export", *paths, "--skip-logits"]


def problems_of_training(folder: Path, bench: Bench) -> list[str]:
    found, expected = curve(folder / "run"), curve(bench.run)
    try:
        assert_same_curve(found, expected)
    except AssertionError as error:
        return [f"not the curve of an unbroken run: {str(error).splitlines()[0]}"]
    return []


def problems_of_a_finished_run(folder: Path) -> list[str]:
    """What must hold whether or not a step was skipped on the way."""
    run = folder / "run"
    problems = [] if status(run) == "completed\n" else [f"run_status is {status(run)!r}"]
    for line in curve_lines(run):
        if not all(map(_is_finite, json.loads(line).values())):
            problems.append(f"a metric that is not finite: {line[:80]}")
    hidden = [path for path in run.rglob(".*") if path.name not in FIXED]
    left = [*hidden, *run.rglob("*.lock")]
    problems += [f"left over: {path.relative_to(folder)}" for path in left]
    folders = len(list((run / "checkpoints").glob("iter_*")))
    return problems if folders == 2 else [*problems, f"{folders} checkpoints and not 2"]


def _is_finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _same_bytes(name: str) -> Callable[[Path, Bench], list[str]]:
    def compare(folder: Path, bench: Bench) -> list[str]:
        mine, whole = (
            {
                str(p.relative_to(f / name)): p.read_bytes()
                for p in (f / name).rglob("*")
                if p.is_file()
            }
            for f in (folder, bench.folder / "unbroken")
        )
        names = sorted(n for n in mine.keys() | whole.keys() if mine.get(n) != whole.get(n))
        problems = [f"not the bytes of an unbroken {name}: {', '.join(names)}"] if names else []
        scratch = [path.name for path in folder.glob(f".*{name}*")]
        return [*problems, *(f"left over: {one}" for one in scratch)]

    return compare


def _same_evaluation(folder: Path, bench: Bench) -> list[str]:
    mine, whole = (
        _without_times(json.loads((f / "evaluation.json").read_text()))
        for f in (folder, bench.folder / "unbroken")
    )
    problems = [] if mine == whole else ["not the figures of an unbroken evaluation"]
    return [*problems, *(f"left over: {path.name}" for path in folder.glob(".*"))]


def _without_times(value: object) -> object:
    if isinstance(value, dict):
        kept = (k for k in value if not k.endswith("per_second") and k != "speedup")
        return {k: _without_times(value[k]) for k in kept}
    if isinstance(value, list):
        return [_without_times(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


PROBLEMS: dict[str, Callable[[Path, Bench], list[str]]] = {
    "train": problems_of_training,
    "store": _same_bytes("store"),
    "export": _same_bytes("export"),
    "evaluate": _same_evaluation,
}
UNBROKEN = {
    "train": SPLIT,
    "store": Layout(1, 1, 1),
    "export": Layout(1, 1, 1),
    "evaluate": Layout(1, 1, 1),
}
"""The layouts of the commands that nothing happens to."""
