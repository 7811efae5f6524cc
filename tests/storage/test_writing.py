"""Files and folders appear whole or not at all."""

import os
import signal
import stat
from pathlib import Path

import pytest
import torch

from dspark_megatron.errors import ConfigError
from dspark_megatron.storage.safetensors_folder import write_tensors
from dspark_megatron.storage.writing import (
    claim_file,
    claim_folder,
    remove,
    whole_file,
    write_files,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_place_once_it_is_written(tmp_path):
    path = tmp_path / "new" / "file"
    write_text(path, "before")
    with whole_file(path) as partial:
        partial.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after" and names(path.parent) == ["file"]


def test_it_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    calls, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda number: calls.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), replace(*names)))
    write_json(tmp_path / "file", {"a": 1})
    assert calls == ["fsync", "replace"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failed_writer_leaves_what_was_there(tmp_path, failure):
    write_text(tmp_path / "file", "before")
    with pytest.raises(failure), whole_file(tmp_path / "file") as partial:
        partial.write_text("half")
        raise failure
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "before"


def test_several_files_are_all_written_before_the_first_takes_its_place(tmp_path):
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "in the way").touch()
    with pytest.raises(ConfigError, match="cannot write .*/second: Is a directory; make room"):
        write_files(tmp_path, {"first": b"1", "second": b"2", "third": b"3"})
    assert names(tmp_path) == ["first", "second"]
    write_files(tmp_path / "b", {"first": b"1", "third": b"3"})
    assert names(tmp_path / "b") == ["first", "third"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_are_those_of_any_new_file(tmp_path, mask):
    """The safetensors library makes files for their owner alone."""
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "tensors", {"a": torch.zeros(2)})
        write_text(tmp_path / "text", "")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("tensors", "text")}
    assert modes == {0o666 & ~mask}


def test_a_full_disk_is_named_and_nothing_is_left(tmp_path):
    """/dev/full refuses every write."""
    with pytest.raises(ConfigError, match="cannot write .*/file: No space left on device; make"):
        with whole_file(tmp_path / "file"):
            with open("/dev/full", "wb", buffering=0) as full:
                full.write(b"x")
    assert names(tmp_path) == []


def test_what_killed_writers_left_goes_when_the_place_is_claimed(tmp_path):
    def kill_in(path: Path) -> None:
        child = os.fork()
        if not child:
            with whole_file(path):
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)

    for name in ("a.json", "b.json"):
        kill_in(tmp_path / name)
    (tmp_path / ".partial_iter_0000001").mkdir()
    assert len(names(tmp_path)) == 3
    claim_file(tmp_path / "a.json", "--output")
    left = names(tmp_path)
    assert len(left) == 2 and left[0].endswith("_b.json")
    claim_folder(tmp_path, "the folder")
    assert names(tmp_path) == [".partial_iter_0000001"]  # its owner's


def test_a_place_that_cannot_be_written_is_refused_when_it_is_claimed(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--output .*/file/x must be writable: File exists"):
        claim_file(tmp_path / "file" / "x", "--output")
    with pytest.raises(ConfigError, match=f"--output {tmp_path} is a folder; name a file"):
        claim_file(tmp_path, "--output")
    claim_file(tmp_path / "made" / "x", "--output")
    assert names(tmp_path / "made") == []


def test_links_with_the_names_of_leftovers_are_not_followed(tmp_path):
    precious = tmp_path / "precious"
    (precious / "folder").mkdir(parents=True)
    (precious / "file").write_text("keep me")
    run = tmp_path / "run"
    run.mkdir()
    for name, to in (("a", "file"), ("b", "folder"), ("c", "nothing")):
        (run / f".partial_{name}").symlink_to(precious / to)
    claim_folder(run, "the folder")
    assert names(run) == []
    for to in ("file", "folder", "nothing"):
        (run / "link").symlink_to(precious / to)
        remove(run / "link")
    assert names(run) == [] and names(precious) == ["file", "folder"]
    assert (precious / "file").read_text() == "keep me"


def test_nothing_is_written_through_a_link_that_has_the_name_of_a_partial_file(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 8)
    (tmp_path / "precious").write_text("keep me")
    (tmp_path / ".partial_00000000_file").symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match="cannot write .*/file: File exists"):
        write_text(tmp_path / "file", "new")
    assert (tmp_path / "precious").read_text() == "keep me"


def test_a_file_takes_the_place_of_a_link_and_not_of_what_it_leads_to(tmp_path):
    (tmp_path / "precious").write_text("keep me")
    (tmp_path / "file").symlink_to("precious")
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "precious").read_text() == "keep me"
    assert not (tmp_path / "file").is_symlink()


def test_anything_can_be_removed(tmp_path):
    (tmp_path / "folder" / "in").mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe", "nothing"):
        remove(tmp_path / name)
    assert names(tmp_path) == []
