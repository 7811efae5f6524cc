"""Wheels for a GPU machine without network: downloaded in the tested versions, and installed."""

import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import distributions

import pytest

from dspark_megatron.errors import ConfigError
from support.paths import ROOT
from tools.gpu_checks.wheels import install_wheels


def make_wheel(folder, package, version, tags="py3-none-any"):
    """A package of one module, which depends on another that is nowhere to be had."""
    name = package.replace("-", "_")
    info = f"{name}-{version}.dist-info"
    metadata = f"Name: {package}\nVersion: {version}\nRequires-Dist: nowhere-to-be-had\n"
    files = {
        f"{name}.py": f"version = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\n{metadata}",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tags}\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-{tags}.whl", "w") as wheel:
        for path, content in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(path, content)


def test_wheels_are_installed_alone_into_a_folder_of_their_own(tmp_path):
    make_wheel(tmp_path / "wheels", "some-thing", "1.0")
    make_wheel(tmp_path / "wheels", "other", "2.1")
    target = tmp_path / "site"
    assert install_wheels(tmp_path / "wheels", target) == ["other==2.1", "some-thing==1.0"]
    there = {d.name: d.version for d in distributions(path=[str(target)])}
    assert there == {"other": "2.1", "some-thing": "1.0"}
    assert (target / "some_thing.py").is_file()
    with pytest.raises(ConfigError, match="site must be a new folder"):
        install_wheels(tmp_path / "wheels", target)


def test_a_folder_without_wheels_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="must hold wheels and has none"):
        install_wheels(tmp_path, tmp_path / "site")


def test_two_versions_of_a_package_are_refused(tmp_path):
    for version in ("1.0", "1.1"):
        make_wheel(tmp_path, "some-thing", version)
    with pytest.raises(ConfigError, match="one version .* more of some-thing; delete"):
        install_wheels(tmp_path, tmp_path / "site")


def test_a_wheel_of_another_machine_is_refused_with_the_reason(tmp_path):
    make_wheel(tmp_path / "wheels", "some-thing", "1.0", "cp27-cp27m-win32")
    with pytest.raises(ConfigError, match="cannot be installed here: .*not a supported wheel"):
        install_wheels(tmp_path / "wheels", tmp_path / "site")


def test_the_wheels_are_the_tested_versions_for_the_machines_python(tmp_path):
    """Whatever Python downloads them. The index here is a folder with those of other Pythons."""
    index, linux = tmp_path / "index", "cp312-cp312-manylinux_2_28_x86_64"
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    _, megatron = re.findall(r"^megatron-core==(\S+);", constraints, re.MULTILINE)
    transformers, _ = re.findall(r"^transformers==(\S+);", constraints, re.MULTILINE)
    make_wheel(index, "megatron-core", "0.1")
    make_wheel(index, "megatron-core", megatron, linux)
    make_wheel(index, "transformers", transformers)
    make_wheel(index, "transformers", "99.0")
    done = subprocess.run(
        [ROOT / "tools" / "gpu_wheels.sh", tmp_path / "wheels"],
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(index),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    names = [wheel.name for wheel in sorted((tmp_path / "wheels").iterdir())]
    assert names == [
        f"megatron_core-{megatron}-{linux}.whl",
        f"transformers-{transformers}-py3-none-any.whl",
    ]
    assert "holds 1 MB of wheels" in done.stdout
