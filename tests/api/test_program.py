"""A program of its own: a light import, the example, ranks that are not joined yet."""

import os
import subprocess
import sys

import pytest

import dspark_megatron
from support.paths import ROOT


def python(*words, **environment):
    kept = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


def test_the_import_is_light():
    code = (
        "import sys, dspark_megatron as d; d.load_config; dir(d); "
        "print(sorted({'torch', 'transformers', 'megatron'} & set(sys.modules)))"
    )
    done = python("-c", code)
    assert done.stdout.strip() == "[]", done.stderr


def test_all_names_are_there():
    for name in dspark_megatron.__all__:
        assert getattr(dspark_megatron, name).__name__ == name
    with pytest.raises(AttributeError, match="Drafter"):
        dspark_megatron.Drafter  # noqa: B018


@pytest.mark.commands
def test_the_example_runs(tiny_run, unbroken, tmp_path):
    program = ROOT / "examples" / "python_api.py"
    target = tiny_run["target"]["path"]
    words = ("--target", target, "--draft", unbroken, "--output", tmp_path / "export")
    done = python(program, *words)
    assert done.returncode == 0, done.stderr
    assert "tau" in done.stdout and "loss" in done.stdout
    assert (tmp_path / "export" / "config.json").is_file()


@pytest.mark.commands
def test_ranks_that_are_not_joined_are_told(tiny_run):
    code = "import sys, dspark_megatron as d; d.Target.from_pretrained(sys.argv[1])"
    done = python("-c", code, tiny_run["target"]["path"], WORLD_SIZE="2", RANK="0")
    assert done.returncode != 0
    assert "call torch.distributed.init_process_group() first" in done.stderr
