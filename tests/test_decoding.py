"""Speculative decoding is lossless: greedy output is the target's own, sampled output has the
target's distribution, at every tensor-parallel size."""

import json

import pytest
import torch
from tiny_target import tiny_config

from dspark_megatron.evaluation.decoding import Generation, Round
from dspark_megatron.evaluation.report import acceptance, table
from dspark_megatron.ops.acceptance import accept_or_resample, probabilities, sample

PROMPTS = ["hello", "the hill in the", "then all bells", "inn well"]


def decode(runtime, config, prompts, seeds=(0,)):
    """Token ids by plain and by speculative decoding, and the rounds."""
    from dspark_megatron.evaluation.decoding import Decoder
    from dspark_megatron.target_folder import stop_token_ids
    from dspark_megatron.training.setup import (
        build_draft,
        build_target,
        check_run,
        load_target_head,
    )

    plan = check_run(config, runtime.world_size)
    draft, target = build_draft(plan, runtime).eval(), build_target(plan, runtime)
    decoder = Decoder(
        target,
        draft,
        load_target_head(plan, draft, target),
        temperature=config.evaluate.temperature,
        max_new_tokens=config.evaluate.max_new_tokens,
        stop_token_ids=stop_token_ids(config.target.path, plan.tokenizer),
        device=runtime.device,
    )
    out = []
    for text in prompts:
        ids = plan.tokenizer(text)["input_ids"]
        for seed in seeds:
            fast, slow = decoder.speculative(ids, seed), decoder.plain(ids, seed)
            out.append(
                (
                    ids,
                    fast.token_ids,
                    slow.token_ids,
                    [(r.proposed, r.accepted, r.bonus) for r in fast.rounds],
                )
            )
    return out


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("head", ["vanilla", "rnn"])
def test_greedy_output_is_the_targets_own(pool, tiny_run, tp, head):
    from transformers import AutoModelForCausalLM

    config = tiny_config(
        tiny_run, parallel={"tensor_parallel": tp}, model={"markov_head_type": head}
    )
    ranks = pool.run(decode, world=tp, tp=tp, config=config, prompts=PROMPTS)
    model = AutoModelForCausalLM.from_pretrained(config.target.path)
    for ids, fast, slow, rounds in ranks[0]:
        own = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
        assert fast == slow == own[0, len(ids) :].tolist()
        assert sum(a + b for _, a, b in rounds) >= len(fast) - 1
    assert all(rank == ranks[0] for rank in ranks[1:]), "ranks are out of step"


def test_drafts_are_the_same_with_sequence_parallel(pool, tiny_run):
    """A block of 3 slots on 2 ranks: rows that do not divide."""
    answers = []
    for flag in (False, True):
        parallel = {"tensor_parallel": 2, "sequence_parallel": flag}
        config = tiny_config(tiny_run, parallel=parallel)
        answers.append(pool.run(decode, world=2, tp=2, config=config, prompts=PROMPTS))
    assert answers[0] == answers[1]


def test_a_stop_token_ends_the_answer(pool, tiny_run):
    config = tiny_config(tiny_run, evaluate={"temperature": 1.5, "max_new_tokens": 200})
    answers = pool.run(decode, world=1, tp=1, config=config, prompts=PROMPTS, seeds=range(6))[0]
    eos = json.loads(open(f"{config.target.path}/config.json").read())["eos_token_id"]
    stopped = [fast for _, fast, _, _ in answers if eos in fast]
    assert stopped, "some answer should meet the stop token"
    assert all(fast.index(eos) == len(fast) - 1 for fast in stopped)
    assert all(len(fast) <= 200 for _, fast, _, _ in answers)


def test_sampling_keeps_the_targets_distribution():
    """Two-token outputs of 40,000 rounds against the exact distribution; total variation of as
    many plain draws is about 0.01, of draws from the draft 0.35."""
    torch.manual_seed(0)
    v, k, rounds = 5, 2, 40_000
    target = torch.softmax(torch.randn(k + 1, v) * 1.5, dim=-1)
    draft = torch.softmax(torch.randn(k, v) * 1.5, dim=-1)
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(v, v)
    for _ in range(rounds):
        tokens = sample(draft, generator)
        accepted, bonus = accept_or_resample(tokens, draft, target, generator)
        output = [*tokens[:accepted].tolist(), int(bonus)]
        if len(output) < 2:  # the second token is then the target's plain draw
            output.append(int(sample(target[1:2], generator)))
        counts[output[0], output[1]] += 1
    exact = target[0][:, None] * target[1][None]
    assert (counts / rounds - exact).abs().sum() / 2 < 0.02
    assert (draft[0][:, None] * draft[1][None] - exact).abs().sum() / 2 > 0.1


def test_the_first_tokens_of_sampled_answers(pool, tiny_run):
    """The whole decoder at temperature 1: the second token, which a draft always proposes, is
    distributed as in plain decoding (chi-square on pairs, 400 answers each)."""
    config = tiny_config(tiny_run, evaluate={"temperature": 0.5, "max_new_tokens": 2})
    answers = pool.run(decode, world=1, tp=1, config=config, prompts=PROMPTS[:1], seeds=range(400))[
        0
    ]
    seconds = [
        [a[1][1] for a in answers if len(a[1]) > 1],
        [a[2][1] for a in answers if len(a[2]) > 1],
    ]
    tokens = sorted(set(seconds[0]) | set(seconds[1]))
    table_ = torch.tensor([[s.count(t) for t in tokens] for s in seconds], dtype=torch.float64)
    common = table_.sum(0) >= 10
    table_ = torch.cat([table_[:, common], table_[:, ~common].sum(1, keepdim=True)], dim=1)
    table_ = table_[:, table_.sum(0) > 0]
    expected = table_.sum(1, keepdim=True) * table_.sum(0) / table_.sum()
    chi_square = ((table_ - expected) ** 2 / expected).sum().item()
    freedom = table_.shape[1] - 1
    assert freedom >= 2, "the target is too sure of itself for this test"
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_probabilities_at_zero_temperature_are_one_hot():
    assert probabilities(torch.tensor([[1.0, 3.0, 2.0]]), 0).tolist() == [[0, 1, 0]]


def test_figures_of_known_rounds():
    rounds = [Round(3, 3, True), Round(3, 1, True), Round(2, 2, False), Round(3, 0, True)]
    generation = Generation(list(range(11)), rounds, seconds=2.0)
    plain = Generation(list(range(11)), [], seconds=5.0)
    figures = acceptance([(generation, plain)], block_size=3)
    assert figures["tau"] == (4 + 2 + 2 + 1) / 4
    assert figures["accept_rate"] == [3 / 4, 2 / 3, 1 / 1]
    assert figures["prefix_survival"] == [3 / 4, 2 / 4, 1 / 3]
    assert figures["verify_rate"] == 9 / (4 + 4 + 3 + 4)
    assert figures["speedup"] == 2.5 and figures["identical_to_plain"] == 1
    assert "2.250" in table({"file": figures}, greedy=True)
    assert acceptance([], block_size=3)["tau"] is None
