"""What a release holds: the wheel works outside the repository, and the source archive makes it."""

import os
import shutil
import subprocess
import sys
import tarfile

import pytest

import dspark_megatron
from support.paths import ROOT

pytestmark = pytest.mark.slow

SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """Source archive and wheel, built from a copy of what git keeps of the package."""
    folder = tmp_path_factory.mktemp("release")
    copy = folder / "copy"
    leave_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dspark_megatron", copy / "dspark_megatron", ignore=leave_out)
    for name in SOURCES:
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", copy]
    subprocess.run(command, check=True, capture_output=True)
    (archive,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return archive, wheel


@pytest.fixture(scope="module")
def site(release, tmp_path_factory):
    """The wheel, installed beside nothing else of ours."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", folder, release[1]], check=True, capture_output=True)
    return folder


def run(site, cwd, *words):
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_names_carry_the_version(release):
    for file in release:
        assert file.name.startswith(f"dspark_megatron-{dspark_megatron.__version__}")


def test_the_archive_holds_what_the_wheel_is_made_of(release):
    with tarfile.open(release[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    package = ROOT / "dspark_megatron"
    files = [p for p in package.rglob("*") if p.is_file() and p.suffix != ".pyc"]
    wanted = {p.relative_to(ROOT).as_posix() for p in files}
    assert not wanted - held


def test_the_wheel_holds_the_sets_of_prompts(site):
    for file in (ROOT / "dspark_megatron").rglob("*.jsonl"):
        copy = site / file.relative_to(ROOT)
        assert copy.is_file() and copy.read_bytes() == file.read_bytes(), file


def test_commands_work_outside_the_repository(site, tmp_path):
    where = run(site, tmp_path, "-c", "import dspark_megatron; print(dspark_megatron.__file__)")
    assert where.strip() == str(site / "dspark_megatron" / "__init__.py")
    assert dspark_megatron.__version__ in run(site, tmp_path, site / "bin" / "dspark", "--version")
    config = ROOT / "examples" / "public_configs" / "qwen3-8b"
    words = ("--target", config, "--gpus-per-node", 1, "--seq-length", 512)
    planned = run(site, tmp_path, site / "bin" / "dspark", "plan", *words)
    assert "tensor_parallel: 1" in planned
