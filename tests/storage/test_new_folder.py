"""A new folder takes its place whole, and what killed writers of it left goes."""

import os
import signal
from pathlib import Path

import pytest

from dspark_megatron.errors import ConfigError
from dspark_megatron.storage import new_folder as module
from dspark_megatron.storage import notices
from dspark_megatron.storage.new_folder import new_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed_in(call) -> None:
    """Run it in a process that is to end by its own SIGKILL."""
    child = os.fork()
    if not child:
        call()
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


def kill(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_until_killed(output: Path) -> None:
    with new_folder(output) as folder:
        (folder / "half").touch()
        kill()


def test_a_folder_takes_its_place_once_it_is_filled(tmp_path):
    output = tmp_path / "out"
    with new_folder(output) as folder:
        (folder / "file").touch()
        assert not output.exists()
    with pytest.raises(RuntimeError), new_folder(output) as folder:
        (folder / "other").touch()
        raise RuntimeError
    assert names(tmp_path) == ["out"] and names(output) == ["file"]
    with new_folder(output):
        pass
    assert names(tmp_path) == ["out"] and names(output) == []


def test_what_killed_writers_left_goes_with_the_next_of_the_same_folder(tmp_path):
    for name in ("out", "other"):
        killed_in(lambda name=name: fill_until_killed(tmp_path / name))
    (tmp_path / ".out.abcdefgh").mkdir()  # nothing in it yet
    foreign = tmp_path / ".out.somebody"
    foreign.mkdir()
    (foreign / "notes").touch()
    assert len(names(tmp_path)) == 4
    with new_folder(tmp_path / "out"):
        pass
    left = names(tmp_path)
    assert left[0].startswith(".other.") and left[1:] == [".out.somebody", "out"]


def test_a_writer_at_work_is_left_alone(tmp_path):
    with new_folder(tmp_path / "out") as one:
        with new_folder(tmp_path / "out") as other:
            assert one.is_dir() and other.is_dir()


def test_an_earlier_folder_comes_back_that_a_killed_writer_had_moved(tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    with new_folder(output) as folder:
        (folder / "earlier").touch()
    notices._said.clear()

    def replace(output, new, old):
        output.rename(old)
        kill()

    def fill():
        monkeypatch.setattr(module, "_replace", replace)
        with new_folder(output):
            pass

    killed_in(fill)
    assert not output.exists()
    with pytest.raises(RuntimeError), new_folder(output):
        raise RuntimeError
    assert names(tmp_path) == ["out"] and names(output) == ["earlier"]
    assert "out was put back: its writer was killed" in capsys.readouterr().err


def test_links_are_not_followed(tmp_path):
    precious = tmp_path / "precious"
    (precious / "new").mkdir(parents=True)
    (tmp_path / ".out.abcdefgh").symlink_to(precious)
    scratch = tmp_path / ".out.hgfedcba"
    scratch.mkdir()
    (scratch / "old").symlink_to(precious)
    with new_folder(tmp_path / "out"):
        pass
    assert names(precious) == ["new"] and "out" in names(tmp_path)


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write .*/file/out: "):
        with new_folder(tmp_path / "file" / "out"):
            pass
