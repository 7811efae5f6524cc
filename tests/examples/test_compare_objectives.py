"""The comparison of objectives: its list of jobs, what is run again, the rule, the table."""

import json
import math
import sys
from pathlib import Path

import pytest

from dspark_megatron.config.loading import config_from_dict
from support.paths import ROOT

sys.path.append(str(ROOT / "examples" / "quickstart"))

import compare_objectives as tool  # noqa: E402
from comparing import Column, comparison_table, mean_and_range, paired_difference  # noqa: E402

FIRST = next(iter(tool.ROWS))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder of jobs, none of them complete, where no command runs."""
    monkeypatch.setattr(tool, "RUNS", tmp_path)
    monkeypatch.setattr(tool, "KEPT", tmp_path / "objective_figures.json")
    monkeypatch.setattr(tool, "store_states", lambda job: None)
    monkeypatch.setattr(tool, "run_command", finish)
    tool.split_data(tmp_path, tool.TRAIN_SAMPLES)
    return tmp_path


def finish(name: str, program: list[str], log: Path) -> str | None:
    """Stands for a job that learns something from its seed."""
    settings = json.loads((log.parent / "settings.json").read_text())
    if "broken" in settings["config"]:
        return f"{name} failed"
    tau = 1.0 + settings["config"]["train"]["seed"] / 10
    figures = {"estimate": {"tau": tau}, "greedy": {"tau": tau}, "sampled": {"tau": tau}}
    (log.parent / "figures.json").write_text(
        json.dumps({**figures, "ece": 0.01, "cpu_seconds": 1.0, "seconds": 2.0})
    )
    return None


def jobs(**changes):
    arguments = {"rows": ["ce"], "seeds": [1, 2], "overrides": [], **changes}
    return tool.list_jobs(**arguments)


def test_every_row_is_a_config_that_differs_from_the_first_in_its_sections_alone(runs):
    listed = tool.list_jobs(None, [7], [])
    assert [job.row for job in listed] == list(tool.ROWS)
    first = listed[0].settings["config"]
    for job in listed[1:]:
        config_from_dict(job.settings["config"]).validate(trains=False)
        changed = tool.differing(first, job.settings["config"])
        assert changed and {name.partition(".")[0] for name in changed} <= set(tool.ROWS[job.row])


def test_a_seed_is_run_with_all_rows_before_the_next_and_the_first_row_is_always_there(runs):
    assert [(job.row, job.seed) for job in jobs()] == [
        (FIRST, 1),
        ("CE", 1),
        (FIRST, 2),
        ("CE", 2),
    ]


def test_a_complete_job_is_not_run_again(runs, capsys):
    assert tool.run_all(jobs(seeds=[1]), 1) == []
    (runs / "jobs" / jobs()[1].folder.name / "figures.json").unlink()  # CE's was killed
    assert tool.run_all(jobs(), 2) == []
    assert "3 of 4 jobs are left" in capsys.readouterr().out
    assert all(job.figures() for job in jobs())
    assert tool.run_all(jobs(), 1) == []
    assert capsys.readouterr().out == ""


def test_figures_that_are_kept_count_as_complete_elsewhere(runs, capsys):
    tool.run_all(jobs(seeds=[1]), 1)
    tool.keep(jobs(seeds=[1]))
    for file in runs.glob("jobs/*/figures.json"):
        file.unlink()
    tool.run_all(jobs(), 1)
    tool.keep(jobs(seeds=[2]))  # beside the others
    capsys.readouterr()
    listed = jobs(kept=tool.kept_figures())
    assert len(tool.kept_figures()) == len(listed) and tool.run_all(listed, 1) == []
    assert capsys.readouterr().out == ""
    longer = jobs(overrides=["train.iterations=300"], kept=tool.kept_figures())
    assert not any(job.figures() for job in longer)


def test_a_job_of_other_settings_is_run_again_and_what_differs_is_said(runs, capsys):
    tool.run_all(jobs(seeds=[1]), 1)
    capsys.readouterr()
    longer = jobs(seeds=[1], overrides=["train.iterations=300"])
    assert not any(job.figures() for job in longer)
    tool.run_all(longer, 1)
    assert f"{longer[1].name} was run with other config.train.iterations" in capsys.readouterr().out
    assert all(job.figures() for job in [*longer, *jobs(seeds=[1])])  # the old ones are kept


def test_a_job_of_other_data_is_run_again(runs):
    tool.run_all(jobs(seeds=[1]), 1)
    (runs / "train.jsonl").write_text("other\n")
    assert not any(job.figures() for job in jobs(seeds=[1]))


def test_a_failed_job_leaves_the_others_alone(runs, monkeypatch):
    monkeypatch.setitem(tool.ROWS, "CE", {"broken": {}, **tool.ROWS["CE"]})
    monkeypatch.setattr(tool, "config_from_dict", lambda config: None)
    listed = jobs()
    assert tool.run_all(listed, 1) == ["ce_seed1 failed", "ce_seed2 failed"]
    assert [bool(job.figures()) for job in listed] == [True, False, True, False]


def test_the_difference_is_judged_seed_by_seed():
    mean, half = paired_difference([1.3, 1.4, 1.5], [1.2, 1.3, 1.4])
    assert math.isclose(mean, 0.1) and half < 1e-9  # seeds differ, pairs do not
    mean, half = paired_difference([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert math.isclose(mean, 2.0) and math.isclose(half, 4.303 / 3**0.5)
    assert paired_difference([1.0], [0.0]) == (1.0, math.inf)


def test_the_table_marks_what_differs_and_says_which_seeds_are_missing():
    own = {"first": [1.2, 1.3, 1.4], "ahead": [1.31, 1.4, 1.5], "noise": [1.4, 1.2, 1.4]}
    rows = {
        name: {seed: {"tau": value} for seed, value in enumerate(values)}
        for name, values in own.items()
    }
    rows["begun"] = {0: {"tau": 1.25}}
    rows["to come"] = {}
    columns = [
        Column("tau", lambda figures: figures["tau"], shows_difference=True),
        Column("seconds", lambda figures: figures["tau"], is_compared=False),
    ]
    lines = comparison_table(rows, columns, seeds=[0, 1, 2]).splitlines()
    assert lines[0] == "|  | tau | difference | seconds |"
    assert lines[2] == "| first | 1.300 (1.200-1.400) | - | 1.300 (1.200-1.400) |"
    assert lines[3].startswith("| ahead | 1.403 (1.310-1.500) * | +0.103 ± 0.014 |")
    assert lines[4].startswith("| noise | 1.333 (1.200-1.400) | +0.033 ±")
    assert lines[5] == "| begun (1 of 3 seeds) | 1.250 | +0.050 | 1.250 |"
    assert lines[6] == "| to come (0 of 3 seeds) | - | - | - |"
    assert "*" not in "".join(line.split("|")[-2] for line in lines)  # of a figure not compared


def test_figures_are_shown_with_their_range():
    assert mean_and_range([1.0, 2.0, 6.0], digits=1) == "3.0 (1.0-6.0)"
    assert mean_and_range([2.0]) == "2.000"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "1", "1"], "different numbers"),
        (["--seeds", *map(str, range(20))], "different numbers"),
        (["--jobs", "0"], "at least 1"),
        (["--rows", "nonsense"], "invalid choice"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        tool.parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_an_unknown_key_is_refused_before_any_job_runs(runs):
    with pytest.raises(SystemExit, match="unknown config key train.steps"):
        tool.main(["train.steps=3"])


def test_a_missing_target_is_named_before_any_job_runs(runs, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(tool, "RUNS", runs)
    listed = jobs(overrides=["target.path=nowhere"])
    (said,) = tool.run_all(listed, 1)
    assert "no target in nowhere" in said and not (runs / "jobs").exists()
