"""Objectives side by side: the quickstart's target and data, equal steps, several seeds.

    python examples/quickstart/compare_objectives.py [--seeds 1 2 3] [--jobs 2] [--rows NAME ...]
    python examples/quickstart/compare_objectives.py --table

Trains a drafter with each objective and seed from stored states, evaluates it on answers that it
was not trained on, and prints a table in Markdown; `runs/objectives/comparison.json` has all
figures. A job is one thread. Killed, the same command goes on; a job that is complete is not run
again, but one whose settings or data have changed is, beside what was there.

`objective_figures.json`, beside this program, has the figures of jobs that were run before, on any
machine, and these count as complete; `--keep` adds what is complete here. `--afresh` passes over
it.
"""

import argparse
import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from comparing import (
    MOST_SEEDS,
    ROOT,
    Column,
    command,
    comparison_table,
    split_data,
)

from dspark_megatron.config.loading import config_from_dict, merged_sections, nested_overrides
from dspark_megatron.errors import ConfigError
from dspark_megatron.storage.writing import write_json

RUNS = Path("runs/objectives")
"""Of the repository's root, where all commands run."""
KEPT = ROOT / "examples" / "quickstart" / "objective_figures.json"
TRAIN_SAMPLES, HELDOUT_SAMPLES = 512, 128
SETTINGS = [
    "target.path=runs/quickstart/target",
    "target.dtype=float32",  # as fast as bf16, or much faster, on CPUs without AMX
    "model.num_layers=2",
    "model.block_size=4",
    "model.num_anchors=8",
    "model.target_layer_ids=[4, 16, 28]",
    "model.initialize_from_target_layers=[28, 29]",
    "model.mask_token_id=16",
    "model.markov_rank=64",
    f"data.train_files=[{RUNS}/train.jsonl]",
    "data.max_length=192",
    "data.show_sample=false",
    "optimizer.lr=1.0e-2",
    "optimizer.warmup_ratio=0.1",
    "train.iterations=100",
    "train.micro_batch_size=2",
    "train.global_batch_size=2",
    "train.dtype=float32",
    "train.save_every=50",
    "train.keep_last=1",
    "train.tensorboard=false",
    f"evaluate.prompt_files=[{RUNS}/heldout.jsonl]",
    "evaluate.temperature=1.0",
    "evaluate.heldout_samples=48",
    "evaluate.max_prompts=16",
    "evaluate.max_new_tokens=32",
    "evaluate.batch_size=16",
    "evaluate.compare_plain=false",
]
"""Of every job. They are given whole, so that figures stay what they are when the quickstart's own
settings change."""
DEFAULT_TERMS = {"ce": 0.1, "l1": 0.9}


def loss(terms: dict[str, float], **others: Any) -> dict[str, Any]:
    return {"loss": {"loss_decay_gamma": 4.0, "terms": terms, **others}}


DPACE, DPARD = ({"weighting": {"name": name}} for name in ("dpace", "dpard"))
ROWS: dict[str, dict[str, Any]] = {
    "default: 0.1 CE + 0.9 L1": loss(DEFAULT_TERMS),
    "CE": loss({"ce": 1.0}),
    "L1": loss({"l1": 1.0}),
    "KL": loss({"kl": 1.0}),
    "reverse KL": loss({"reverse_kl": 1.0}),
    "Jensen-Shannon": loss({"js": 1.0}),
    "Renyi-1/2": loss({"renyi_half": 1.0}),
    "LK-alpha": loss({"lk_alpha": 1.0}),
    "LK-hybrid": loss({"lk_hybrid": 1.0}),
    "CE, D-PACE": loss({"ce": 1.0}, **DPACE),
    "default, D-PACE": loss(DEFAULT_TERMS, **DPACE),
    "Renyi-1/2, D-PARD": loss({"renyi_half": 1.0}, **DPARD, confidence_weights="reach"),
    "default, confidence stops": loss(DEFAULT_TERMS, confidence_stop_gradient=True),
    "default, constant rate": {**loss(DEFAULT_TERMS), "optimizer": {"schedule": "constant"}},
    "default, Muon": {**loss(DEFAULT_TERMS), "optimizer": {"name": "muon"}},
    "default, EMA": {
        **loss(DEFAULT_TERMS),
        "optimizer": {"ema_decay": 0.96},  # a memory of about 25 of the 100 steps
        "evaluate": {"weights": "ema"},
    },
}
"""Sections of the config that a row changes. All others are compared with the first."""
COLUMNS = [
    Column("held-out tau", lambda figures: figures["estimate"]["tau"], shows_difference=True),
    Column("decoded tau, T = 0", lambda figures: figures["greedy"]["tau"]),
    Column("decoded tau, T = 1", lambda figures: figures["sampled"]["tau"]),
    Column("ECE", lambda figures: figures["ece"]),
    Column("CPU s / step", lambda figures: figures["cpu_seconds"], is_compared=False),
]


@dataclass(frozen=True)
class Job:
    row: str
    seed: int
    settings: dict[str, Any]
    """The `config` by sections, and digests of the `data`."""
    kept: dict[str, Any] | None = None
    """Its figures of an earlier time."""

    @property
    def name(self) -> str:
        return f"{slug(self.row)}_seed{self.seed}"

    @property
    def folder(self) -> Path:
        return ROOT / RUNS / "jobs" / f"{self.name}_{digest(self.settings)}"

    def figures(self) -> dict[str, Any] | None:
        """None unless the job is complete."""
        file = self.folder / "figures.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else self.kept

    def run(self) -> str | None:
        """Returns what went wrong."""
        if changes := self.changes():
            print(f"{self.name} was run with other {', '.join(changes)}", flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "settings.json", self.settings)
        program = ["examples/quickstart/objective_job.py", str(self.folder)]
        return run_command(self.name, program, self.folder / "job.log")

    def changes(self) -> list[str]:
        """Keys that differ from the settings of this job's newest other folder; none where this
        one has begun."""
        files = self.folder.parent.glob(f"{self.name}_*/settings.json")
        others = sorted(files, key=lambda file: file.stat().st_mtime)
        if self.folder.exists() or not others:
            return []
        return differing(json.loads(others[-1].read_text(encoding="utf-8")), self.settings)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    split_data(ROOT / RUNS, TRAIN_SAMPLES, HELDOUT_SAMPLES)
    try:
        kept = {} if arguments.afresh else kept_figures()
        jobs = list_jobs(arguments.rows, arguments.seeds, arguments.overrides, kept)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error
    failures = [] if arguments.table else run_all(jobs, arguments.jobs)
    print(report(jobs))
    if arguments.keep:
        keep(jobs)
    if failures:
        raise SystemExit("\n".join(failures))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare objectives on the quickstart's data.")
    rows = [slug(row) for row in ROWS]
    parser.add_argument("--rows", nargs="+", choices=rows, help="beside the first; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="at one time, one thread each")
    parser.add_argument("--table", action="store_true", help="of what is complete; run nothing")
    parser.add_argument("--keep", action="store_true", help=f"add figures to {KEPT.name}")
    parser.add_argument("--afresh", action="store_true", help=f"pass over {KEPT.name}")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of every job")
    arguments = parser.parse_intermixed_args(argv)
    if len(set(arguments.seeds)) != len(arguments.seeds) or len(arguments.seeds) > MOST_SEEDS:
        parser.error(f"--seeds {arguments.seeds} must be up to {MOST_SEEDS} different numbers")
    if arguments.jobs < 1:
        parser.error(f"--jobs ({arguments.jobs}) must be at least 1")
    return arguments


def list_jobs(
    rows: list[str] | None,
    seeds: list[int],
    overrides: list[str],
    kept: dict[str, Any] | None = None,
) -> list[Job]:
    """All rows of a seed before those of the next, so that what is complete can be compared. The
    first row is always among them. ConfigError for settings that cannot be used."""
    base = merged_sections(nested_overrides(SETTINGS), nested_overrides(overrides))
    data = {name: file_digest(ROOT / RUNS / name) for name in ("train.jsonl", "heldout.jsonl")}
    shape = {key: base["model"][key] for key in ("target_layer_ids", "block_size")}
    states = {"target": base["target"], "model": shape, "data": base["data"], **data}
    cache = {"provider": "cache", "cache": f"{RUNS}/states_{digest(states)}"}
    base = merged_sections(base, {"target": cache})
    chosen = [row for i, row in enumerate(ROWS) if not i or not rows or slug(row) in rows]
    jobs = []
    for seed in seeds:
        for row in chosen:
            config = merged_sections(merged_sections(base, ROWS[row]), {"train": {"seed": seed}})
            config_from_dict(config)  # every row is checked before the first is run
            job = Job(row, seed, {"config": config, "data": data})
            jobs.append(replace(job, kept=(kept or {}).get(job.folder.name)))
    return jobs


def kept_figures() -> dict[str, Any]:
    """By the name of a job's folder, in which its settings and data are told by a digest."""
    return json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}


def keep(jobs: list[Job]) -> None:
    """Add what is complete to the figures of earlier times."""
    found = {job.folder.name: figures for job in jobs if (figures := job.figures())}
    write_json(KEPT, dict(sorted({**kept_figures(), **found}.items())))


def run_all(jobs: list[Job], at_once: int) -> list[str]:
    """What failed. A failure of one job leaves the others alone."""
    left = [job for job in jobs if job.figures() is None]
    if not left:
        return []
    print(f"{len(left)} of {len(jobs)} jobs are left", flush=True)
    if failure := store_states(jobs[0]):
        return [failure]
    with ThreadPoolExecutor(at_once) as pool:
        return [failure for failure in pool.map(Job.run, left) if failure]


def store_states(job: Job) -> str | None:
    """The target's states, once for all jobs; returns what went wrong."""
    config = job.settings["config"]
    if not (ROOT / config["target"]["path"] / "config.json").is_file():
        return (
            f"error: there is no target in {config['target']['path']}; make it: "
            "python examples/quickstart/prepare_target.py"
        )
    folder = ROOT / config["target"]["cache"]
    if (folder / "manifest.json").is_file():
        return None
    settings = folder.with_suffix(".json")  # JSON is YAML
    write_json(settings, merged_sections(config, {"train": {"output_dir": str(RUNS / "states")}}))
    program = ["tools/prepare_target_cache.py", "--config", str(settings), "--output", str(folder)]
    return run_command("states of the target", program, folder.with_suffix(".log"))


def run_command(name: str, program: list[str], log: Path) -> str | None:
    """Returns what went wrong."""
    try:
        command(name, program, log)
    except SystemExit as failure:
        return str(failure)
    return None


def report(jobs: list[Job]) -> str:
    """The table of what is complete; its figures are kept."""
    rows: dict[str, dict[int, Any]] = {job.row: {} for job in jobs}
    for job in jobs:
        if figures := job.figures():
            rows[job.row][job.seed] = figures
    if not any(rows.values()):
        return "no job is complete"
    write_json(ROOT / RUNS / "comparison.json", {"settings": jobs[0].settings, "rows": rows})
    return comparison_table(rows, COLUMNS, seeds=sorted({job.seed for job in jobs}))


def slug(name: str) -> str:
    """A row's name on the command line and of its folders."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differing(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of what is not the same in both."""
    names = []
    for key in sorted({*old, *new}):
        one, other = old.get(key), new.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            names += differing(one, other, f"{prefix}{key}.")
        elif one != other:
            names.append(f"{prefix}{key}")
    return names


if __name__ == "__main__":
    main()
