"""A folder that ranks write into is one folder for all of them, or the run does not begin."""

import pytest

from support.tiny_target import tiny_config
from support.training_runs import train_in_own_folder


def train_at_home(runtime, config, folders):
    """A rank whose relative paths lead to a disk of its own."""
    from dspark_megatron.run.ranks import shared_folder

    shared_folder._LATE_SECONDS = 0.2
    train_in_own_folder(runtime, config, folders)


@pytest.fixture
def disks(tmp_path):
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    return folders


@pytest.mark.parametrize("tp", [1, 2])
def test_one_path_on_two_disks_is_refused_before_the_first_step(pool, tiny_run, disks, tp):
    layout = {"parallel": {"tensor_parallel": tp}, "train": {"output_dir": "run"}}
    config = tiny_config(tiny_run, **layout)
    with pytest.raises(AssertionError) as error:
        pool.run(train_at_home, world=2, tp=tp, config=config, folders=disks)
    said = str(error.value)
    assert "train.output_dir run must be one folder on a file system that all nodes share" in said
    assert f"does not see in {disks[1] / 'run'} what the main rank wrote there" in said
    assert "rank 1 (" in said and said.count("must be one folder") == 2, "every rank says it"
    assert not [file for file in disks[0].rglob("*") if file.is_file()], "nor a lock is left"


def test_checkpoints_on_disks_of_their_own_are_found(pool, tiny_run, disks, tmp_path):
    """The folder of the run is shared; what its checkpoints lead to is not."""
    config = tiny_config(tiny_run, train={"output_dir": str(tmp_path / "run")})
    with pytest.raises(AssertionError, match=f"rank 1 .* does not see in {disks[1]} what"):
        pool.run(train_with_own_checkpoints, world=2, tp=1, config=config, folders=disks)


def train_with_own_checkpoints(runtime, config, folders):
    """A rank whose checkpoints lie on its own disk."""
    from dspark_megatron.run import output

    check_shared = output.check_shared

    def on_this_node(what, run, checkpoints, *, runtime):
        check_shared(what, run, folders[runtime.rank], runtime=runtime)

    output.check_shared = on_this_node
    try:
        train_at_home(runtime, config, folders)
    finally:
        output.check_shared = check_shared


def test_a_shared_folder_is_left_as_it_was(pool, tmp_path):
    pool.run(check_this, world=2, tp=1, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def check_this(runtime, folder):
    from dspark_megatron.run.ranks.shared_folder import check_shared

    check_shared("this", folder, runtime=runtime)


def test_a_rank_that_may_not_write_is_named(pool, tmp_path):
    with pytest.raises(AssertionError, match="rank 1 .* cannot write in .*Permission denied"):
        pool.run(check_without_permission, world=2, tp=1, folder=tmp_path)


def check_without_permission(runtime, folder):
    from dspark_megatron.run.ranks import shared_folder

    make = shared_folder.tempfile.TemporaryFile

    def refused(**arguments):
        raise PermissionError(13, "Permission denied")

    if runtime.rank == 1:
        shared_folder.tempfile.TemporaryFile = refused
    try:
        shared_folder.check_shared("this", folder, runtime=runtime)
    finally:
        shared_folder.tempfile.TemporaryFile = make
