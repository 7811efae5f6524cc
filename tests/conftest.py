import pytest
from ranks import RankPool


@pytest.fixture(scope="session")
def pool():
    """Rank processes shared by all tests."""
    pool = RankPool()
    yield pool
    pool.close()
