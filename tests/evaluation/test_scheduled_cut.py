"""The scheduler inside the decoder: lossless, cheaper, and refused where it cannot work."""

import pytest
import torch

from dspark_megatron.errors import ConfigError
from dspark_megatron.evaluation.scheduled_cut import ScheduledCut
from dspark_megatron.evaluation.serving.settings import LAG
from dspark_megatron.evaluation.serving.sps_table import SampledSps
from dspark_megatron.ops.prefix_scheduler import early_stopping_lengths, global_budget
from support.decoded import PROMPTS, decode, two_sample_chi_square
from support.tiny_target import tiny_config

STEEP = SampledSps(
    [1, 2, 3, 4, 5, 6, 8, 12, 16], [1.0, 0.8, 0.62, 0.5, 0.42, 0.36, 0.28, 0.2, 0.15], 16
)
"""Each token costs about as much as the last."""
SCHEDULERS = ("early_stopping", "lagged_budget")


def scheduled_decode(runtime, config, prompts, scheduler, seeds=(0,), steep=False):
    """steep: the confidence goes by the token before the slot."""
    cut = ScheduledCut(scheduler, STEEP, config.model.block_size, temperatures=None)
    return decode(runtime, config, prompts, seeds, cut=cut, confidence_scale=100 * steep)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("tp", [1, 2])
def test_greedy_output_is_the_targets_own(pool, tiny_run, tp, scheduler):
    config = tiny_config(
        tiny_run, parallel={"tensor_parallel": tp}, evaluate={"batch_size": 3, "temperature": 0.0}
    )
    ranks = pool.run(
        scheduled_decode, world=tp, tp=tp, config=config, prompts=PROMPTS, scheduler=scheduler
    )
    assert all(rank == ranks[0] for rank in ranks)
    assert all(fast == slow for _, fast, slow, _ in ranks[0])
    proposed = {p for *_, rounds in ranks[0] for p, _, _ in rounds}
    assert len(proposed) > 1, "drafts should have been cut at several lengths"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_sampled_answers(pool, tiny_run, scheduler):
    """Second and third tokens of 600 answers, scheduled together in batches of 4 at temperature 1
    by a confidence that depends much on the token before, against as many of plain decoding
    (chi-square). It finds gross faults; the exact proof, which a biased budget fails, is in
    test_prefix_scheduler.py."""
    evaluate = {"temperature": 1.0, "max_new_tokens": 3, "batch_size": 4}
    config = tiny_config(tiny_run, evaluate=evaluate)
    answers = pool.run(
        scheduled_decode,
        world=1,
        tp=1,
        config=config,
        prompts=PROMPTS[:1],
        scheduler=scheduler,
        seeds=range(600),
        steep=True,
    )[0]
    for place in (1, 2):
        samples = [[a[way][place] for a in answers if len(a[way]) > place] for way in (1, 2)]
        chi_square, freedom = two_sample_chi_square(samples)
        assert freedom >= 2 and chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_the_lengths_are_the_schedulers():
    """Early stopping takes the calibrated confidences of the step, whatever their number; a budget
    those of two steps ago, scaled to the sequences there are now."""
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(b, 3, generator=generator) for b in (4, 4, 2, 4)]
    temperatures = [2.0, 1.0, 0.5]
    confidences = [(logits / torch.tensor(temperatures)).sigmoid() for logits in steps]
    early = ScheduledCut("early_stopping", STEEP, 3, temperatures)
    lagged = ScheduledCut("lagged_budget", STEEP, 3, temperatures)
    sums = []
    for logits, confidence in zip(steps, confidences, strict=True):
        b = len(logits)
        sps = STEEP.steps_per_second(torch.arange(b, 4 * b + 1), b)
        assert torch.equal(early(logits), early_stopping_lengths(confidence, sps))
        sums.append(int(lagged(logits).sum()))
    sps = STEEP.steps_per_second(torch.arange(4, 17), 4)
    first = int(global_budget(torch.ones(4, 3), sps))
    known = [int(global_budget(c, sps)) for c in confidences[:2]]
    assert LAG == 2 and sums == [first, first, known[0] // 2, known[1]]


@pytest.mark.parametrize(
    ("evaluate", "model", "message"),
    [
        ({"scheduler": "early_stoping", "sps_table": "x"}, {}, "early_stopping"),
        ({"scheduler": "early_stopping"}, {}, "evaluate.sps_table"),
        ({"sps_table": "sps.json"}, {}, "evaluate.scheduler"),
        ({"temperatures": "export"}, {}, "evaluate.temperatures"),
        (
            {"scheduler": "early_stopping", "sps_table": "x"},
            {"enable_confidence_head": False},
            "confidence head",
        ),
    ],
)
def test_settings_that_do_not_go_together(tiny_run, evaluate, model, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(tiny_run, evaluate=evaluate, model=model)
