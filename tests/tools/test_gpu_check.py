"""The runner of the checks on a GPU survives what they do; the checks themselves are rehearsed on
the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import gpu_check
import pytest
from gpu_checks.processes import FAILED, NOT_RUN, PASSED, SKIPPED, run_in_process

from support.paths import ROOT
from support.tool_runs import run_python


def run(folder, code, limit=60):
    """A check that is this code; its folder is its last argument."""
    begin = "import json, pathlib, sys, time; folder = pathlib.Path(sys.argv[-1])\n"
    command = [sys.executable, "-c", begin + code]
    return run_in_process(command, folder, limit, dict(os.environ))


def test_a_check_that_dies_leaves_its_figures_and_its_last_words(tmp_path):
    code = "(folder / 'figures.json').write_text('{\"ms\": 3}'); sys.exit('out of memory')"
    result = run(tmp_path / "dies", code)
    assert result["verdict"] == FAILED and result["figures"] == {"ms": 3}
    assert result["error"] == "ended with code 1: out of memory"


def test_a_check_that_hangs_is_ended_with_all_its_processes(tmp_path):
    code = (
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "(folder / 'figures.json').write_text(json.dumps({'child': child.pid}))\n"
        "print('waiting', flush=True); time.sleep(600)"
    )
    result = run(tmp_path / "hangs", code, limit=5)
    assert result["error"] == "ended by its limit of 5 s: waiting"
    while _runs(result["figures"]["child"]):  # it is on its way; the suite has a limit of its own
        time.sleep(0.05)


def _runs(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().split()[2] != "Z"


def results(*options, checks, outcomes, output):
    """The report after checks of made-up outcomes."""
    made = [gpu_check.Check(name, f"about {name}", seconds) for name, seconds in checks.items()]
    with (
        mock.patch.object(gpu_check, "CHECKS", made),
        mock.patch.object(gpu_check, "run_in_process", side_effect=outcomes) as started,
    ):
        code = gpu_check.main(["--output", str(output), *options])
    return code, json.loads((output / "gpu_check.json").read_text()), started


def outcome(verdict, **more):
    return {"verdict": verdict, "error": None, "seconds": 1.0, "figures": {}, **more}


def test_it_goes_on_after_a_failure_and_says_so_at_its_end(tmp_path, capsys):
    where = {"machine": {"gpu": "a card"}, "versions": {"torch": "2"}}
    outcomes = [outcome(FAILED, where=where), outcome(PASSED), outcome(SKIPPED)]
    checks = dict.fromkeys(("first", "second", "third"), 1)
    code, report, _ = results(checks=checks, outcomes=outcomes, output=tmp_path / "out")
    assert code == 1
    assert [check["verdict"] for check in report["checks"]] == [FAILED, PASSED, SKIPPED]
    assert report["machine"] == {"gpu": "a card"} and report["versions"] == {"torch": "2"}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == [FAILED, PASSED, SKIPPED]


def test_what_does_not_fit_the_budget_is_not_started(tmp_path):
    checks = {"short": 10, "long": 61, "short too": 10}
    code, report, started = results(
        *("--budget-minutes", "1"),
        checks=checks,
        outcomes=[outcome(PASSED)] * 2,
        output=tmp_path / "out",
    )
    assert code == 0 and started.call_count == 2
    assert [check["verdict"] for check in report["checks"]] == [PASSED, NOT_RUN, PASSED]
    assert started.call_args.args[2] <= 60, "no check may outlast the budget"


def test_every_check_that_has_ended_is_in_the_file(tmp_path):
    checks = dict.fromkeys(("first", "second"), 1)
    with pytest.raises(KeyboardInterrupt):
        results(checks=checks, outcomes=[outcome(PASSED), KeyboardInterrupt], output=tmp_path / "o")
    report = json.loads((tmp_path / "o" / "gpu_check.json").read_text())
    assert [check["name"] for check in report["checks"]] == ["first"]


def test_a_folder_of_other_files_is_not_emptied(tmp_path, capsys):
    kept = tmp_path / "thesis.tex"
    kept.touch()
    assert gpu_check.main(["--output", str(tmp_path)]) == 2
    assert kept.is_file() and "holds files that are not of this command" in capsys.readouterr().err


def test_a_second_run_replaces_the_report_of_the_first(tmp_path):
    for verdict in (FAILED, PASSED):
        _, report, _ = results(
            checks={"only": 1}, outcomes=[outcome(verdict)], output=tmp_path / "out"
        )
        assert [check["verdict"] for check in report["checks"]] == [verdict]


def test_missing_wheels_are_said_in_one_sentence(tmp_path, capsys):
    assert gpu_check.main(["--wheels", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "must hold wheels and has none" in capsys.readouterr().err


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The checks that take seconds on any CPU. tests/megatron_lm/ rehearses that of pretrain(), and
    `tools/gpu_check.py --device cpu` all others, before a GPU is used."""
    output = tmp_path_factory.mktemp("rehearsal") / "out"
    names = ["target", "sharded"]
    command = ["tools/gpu_check.py", "--device", "cpu", "--output", output]
    ended = run_python(*command, "--budget-minutes", 60, "--only", *names, PYTHONPATH="")
    report = json.loads((output / "gpu_check.json").read_text())
    return ended, {check["name"]: check for check in report["checks"]}


@pytest.mark.slow
def test_short_checks_are_rehearsed(rehearsal):
    (code, text), checks = rehearsal
    assert code == 0, text
    for name, check in checks.items():
        assert check["verdict"] == (SKIPPED if name == "sharded" else PASSED), check["error"]
        assert name == "sharded" or check["figures"], name


@pytest.mark.slow
def test_a_killed_runner_takes_its_check_along(tmp_path):
    """Its checks have sessions of their own, so nothing else would end them."""
    command = [sys.executable, "tools/gpu_check.py", "--device", "cpu", "--only", "head_loss"]
    runner = subprocess.Popen(
        [*command, "--output", str(tmp_path / "out")], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    log = tmp_path / "out" / "head_loss" / "log.txt"
    while not log.exists():
        time.sleep(0.05)
    [check] = _children(runner.pid)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    while _runs(check):  # the test's own time limit is the suite's
        time.sleep(0.1)


def _children(pid):
    while not (found := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        time.sleep(0.05)
    return [int(child) for child in found]
