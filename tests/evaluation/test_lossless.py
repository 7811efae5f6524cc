"""Greedy answers unlike the target's own: ties are shown to be ties, others are faults."""

from types import SimpleNamespace

import pytest
import torch

from dspark_megatron.errors import ConfigError
from dspark_megatron.evaluation.generation import Decoded, Generation
from dspark_megatron.evaluation.lossless import check_lossless
from dspark_megatron.evaluation.run import FileResult
from dspark_megatron.ops.logit_transform import TargetHead


def check(logits, ours, own, dtype=torch.float32):
    """One prompt [1, 2], answered with a draft and without. logits: of the target after the tokens
    that both answers share, as it is asked for them."""
    asked = []

    def states(batch):
        asked.append(batch.input_ids.tolist())
        size = 1, batch.input_ids.shape[1], -1
        return SimpleNamespace(hidden=torch.tensor(logits).expand(size))

    decoder = SimpleNamespace(
        target=SimpleNamespace(states=states),
        target_head=TargetHead(torch.zeros(1, dtype=dtype)),
        target_logits=lambda hidden: hidden,
        device=torch.device("cpu"),
    )
    files = {"file": [SimpleNamespace(input_ids=[1, 2])]}
    fast, slow = ([Decoded([Generation(ids)], 1.0)] for ids in (ours, own))
    return check_lossless(decoder, files, {"file": FileResult(fast, slow)}), asked


def test_the_same_answers_ask_nothing_of_the_target():
    assert check([0.0], [5, 6], [5, 6]) == ({"file": 0}, [])


def test_a_tie_is_counted():
    logits = [0.0, 9.00001, 1.0, 9.0]
    assert check(logits, [2, 1, 2], [2, 3, 3]) == ({"file": 1}, [[[1, 2, 2]]])


def test_bfloat16_rounds_more():
    logits = [0.0, 9.1, 1.0, 9.0]
    assert check(logits, [1], [3], torch.bfloat16)[0] == {"file": 1}
    with pytest.raises(ConfigError, match=r"1 of 1 greedy answers.*after 0 tokens.*0.1 apart"):
        check(logits, [1], [3])


def test_two_tokens_alike_below_a_larger_one_are_no_tie():
    with pytest.raises(ConfigError, match="9 apart in logits"):
        check([9.0, 0.0, 0.0], [1], [2])


def test_an_answer_that_ends_where_the_other_goes_on():
    with pytest.raises(ConfigError, match="after 2 tokens"):
        check([0.0], [5, 6], [5, 6, 7])
