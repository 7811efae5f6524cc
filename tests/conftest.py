import pytest

from support.ranks import RankPool


@pytest.fixture(scope="session")
def pool():
    """Rank processes shared by all tests."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """Settings of a tiny run; the target and the data are shared, the output is not to be used."""
    from support.tiny_target import make_chats, make_target, tiny_settings

    folder = tmp_path_factory.mktemp("tiny")
    target = make_target(folder / "target")
    return tiny_settings(target, make_chats(folder / "chats.jsonl"), folder / "unused")


@pytest.fixture(scope="session", autouse=True)
def megatron_without_a_gpu():
    """The plan builds a draft in the test's own process, on the meta device."""
    from dspark_megatron.mcore.prepare import prepare_megatron

    prepare_megatron()
