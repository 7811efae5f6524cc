"""`dspark doctor`: what it says of this machine, on one rank and on two."""

import json
import os
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from dspark_megatron.cli.exit_codes import BAD_INPUT, NOT_SOUND
from dspark_megatron.cli.main import main
from dspark_megatron.cli.prepare import machine_checks
from dspark_megatron.cli.prepare.doctor import _merged
from support.paths import ROOT


@pytest.mark.slow
def test_two_ranks_and_a_folder_that_is_not_there(tmp_path):
    command = [sys.executable, "-m", "dspark_megatron", "doctor", "--gpus", "2", "--json"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path / "none")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == NOT_SOUND, done.stderr
    record = json.loads(done.stdout)
    found = {one["check"]: one for one in record["findings"]}
    assert record["ranks"] == 2 and not record["sound"]
    assert found["import"]["ranks"] == [0] and found["import"]["verdict"] == "ok"
    assert found["gloo all-reduce"]["text"] == "works over 2 ranks"
    assert found["shared folder"]["verdict"] == "missing"
    assert "on ranks [0, 1]; make it" in found["shared folder"]["text"]
    assert [name for name, one in found.items() if one["verdict"] == "missing"] == ["shared folder"]


def test_a_package_out_of_range_has_a_way_out():
    wrong = machine_checks._problem(Requirement("torch>=99"))
    assert wrong.startswith("torch is ") and wrong.endswith("; pip install 'torch>=99'")
    absent = machine_checks._problem(Requirement("no-such-package>=1"))
    assert absent.startswith("no-such-package is not installed")
    assert not machine_checks._problem(Requirement("torch>=2"))


def test_a_package_that_does_not_import_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken_kernels.py").write_text("raise OSError('undefined symbol:\\n _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    found = machine_checks.imports("broken_kernels")
    assert found.verdict == machine_checks.MISSING
    assert "cannot be imported (OSError: undefined symbol: _ZN3c10); install" in found.text


def test_little_shared_memory_is_a_warning(tmp_path):
    assert machine_checks.shared_memory(str(tmp_path / "shm")).verdict == machine_checks.WARNING


def test_equal_findings_of_ranks_are_one():
    told = [[("GPU", "ok", "8"), ("disk", "ok", "x")], [("GPU", "missing", "7")]]
    found = [(one["check"], one["verdict"], one["ranks"]) for one in _merged(told)]
    assert found == [("GPU", "ok", [0]), ("GPU", "missing", [1]), ("disk", "ok", [0])]


def test_arguments_that_cannot_be(capsys, monkeypatch):
    assert main(["doctor", "--gpus", "0"]) == BAD_INPUT
    assert main(["doctor", "run.yaml", "--folder", "runs"]) == BAD_INPUT
    monkeypatch.setenv("RANK", "0")
    assert main(["doctor", "--gpus", "2"]) == BAD_INPUT
    assert "leave out --gpus" in capsys.readouterr().err
