"""What tests of several rooms share."""

import gc

import pytest

from support.ranks import RankPool


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """`make test-fast` leaves out whole commands, and rank processes but for those that compare the
    draft model's step with the plain one at every size."""
    for item in items:
        needs_ranks = "pool" in item.fixturenames and item.path.name != "test_draft_model.py"
        if needs_ranks or item.get_closest_marker("commands"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def pool():
    """Rank processes shared by all tests."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session", autouse=True)
def megatron_without_a_gpu():
    """The plan builds a draft in the test's own process, on the meta device."""
    from dspark_megatron.mcore.prepare import prepare_megatron

    prepare_megatron()
    gc.freeze()  # what is imported by now, and all tests that pytest has found


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """Settings of a tiny run; the target and the data are shared, the output is not to be used."""
    from support.tiny_target import make_chats, make_target, tiny_settings

    folder = tmp_path_factory.mktemp("tiny")
    target = make_target(folder / "target")
    return tiny_settings(target, make_chats(folder / "chats.jsonl"), folder / "unused")


@pytest.fixture(scope="session")
def unbroken(pool, tiny_run, tmp_path_factory):
    """The output of twenty steps on one rank; to be read, and copied before it is changed."""
    from support.tiny_target import tiny_config
    from support.training_runs import run_training

    output = tmp_path_factory.mktemp("unbroken")
    config = tiny_config(tiny_run, train={"output_dir": str(output), "micro_batch_size": 4})
    pool.run(run_training, world=1, tp=1, config=config)
    return output
