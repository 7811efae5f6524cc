"""Calls that are timed take turns. No time is tested."""

import torch

from dspark_megatron.evaluation.serving.timing import interleaved_seconds


def test_calls_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = interleaved_seconds(calls, torch.device("cpu"), rounds=2)
    assert order == list("ababab")
    assert list(seconds) == ["a", "b"]
