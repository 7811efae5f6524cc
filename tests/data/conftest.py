import pytest

from support.samples import VOCAB_SIZE
from support.tiny_tokenizer import tiny_tokenizer


@pytest.fixture
def tokenizer():
    return tiny_tokenizer(VOCAB_SIZE)
