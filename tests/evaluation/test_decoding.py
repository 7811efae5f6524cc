"""Speculative decoding is lossless: greedy output is the target's own, sampled output has the
target's distribution, at every tensor-parallel size."""

import json
import statistics
from unittest import mock

import pytest
import torch

from dspark_megatron.evaluation.figures import acceptance, comparison
from dspark_megatron.evaluation.generation import Decoded, Generation, Round
from dspark_megatron.evaluation.report import table
from dspark_megatron.ops.acceptance import judge, overlap, probabilities
from support.decoded import PROMPTS, decode, two_sample_chi_square
from support.target_families import SCALED_LOGITS, make_family
from support.tiny_target import tiny_config


@pytest.mark.parametrize(
    "tp, batch_size, cut", [(1, 1, None), (2, 3, None), (4, 3, "by_confidence")]
)
@pytest.mark.parametrize("head", ["vanilla", "rnn"])
def test_greedy_output_is_the_targets_own(pool, tiny_run, tp, batch_size, cut, head):
    """Prompts of other lengths in one batch, which has room for three of four."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(
        tiny_run,
        parallel={"tensor_parallel": tp},
        model={"markov_head_type": head},
        evaluate={"batch_size": batch_size},
    )
    ranks = pool.run(decode, world=tp, tp=tp, config=config, prompts=PROMPTS, cut=cut)
    model = AutoModelForCausalLM.from_pretrained(config.target.path)
    for ids, fast, slow, rounds in ranks[0]:
        own = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
        assert fast == slow == own[0, len(ids) :].tolist()
        assert sum(a + b for _, a, b in rounds) >= len(fast) - 1
    assert all(rank == ranks[0] for rank in ranks[1:]), "ranks are out of step"
    proposed = {p for *_, rounds in ranks[0] for p, _, _ in rounds}
    assert cut is None or len(proposed) > 1, "drafts should have been cut at several lengths"


def test_a_batch_changes_nothing(pool, tiny_run):
    """Sampled answers, which end at other places, with a draft and without: the random numbers of a
    prompt are its own."""
    answers = []
    for batch_size in (1, 3):
        evaluate = {"batch_size": batch_size, "temperature": 1.0}
        config = tiny_config(tiny_run, evaluate=evaluate)
        answers.append(
            pool.run(decode, world=1, tp=1, config=config, prompts=PROMPTS, seeds=(1, 2))
        )
    assert answers[0] == answers[1]
    assert len({tuple(fast) for _, fast, _, _ in answers[0][0]}) == 8


def test_verifying_nothing_is_plain_decoding(pool, tiny_run):
    config = tiny_config(tiny_run, evaluate={"temperature": 0.0})
    answers = pool.run(decode, world=1, tp=1, config=config, prompts=PROMPTS, cut="nothing")[0]
    for _, fast, slow, rounds in answers:
        assert fast == slow and set(rounds) == {(0, 0, True)}


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
    """Two-token outputs of 400,000 drafts of lengths 0 to 2 against the exact distribution: total
    variation of as many plain draws is about 0.003, of draws from the draft 0.35."""
    v, k, rounds = 5, 2, 400_000
    generator = torch.Generator().manual_seed(1)
    target = torch.softmax(torch.randn(k + 1, v, generator=generator) * 1.5, dim=-1)
    draft = torch.softmax(torch.randn(k, v, generator=generator) * 1.5, dim=-1)

    def drawn(probs):
        return torch.multinomial(probs, 1, generator=generator).squeeze(1)

    tokens = torch.stack([drawn(row.expand(rounds, v)) for row in draft], dim=1)
    lengths = torch.randint(k + 1, (rounds,), generator=generator)
    accepted, following = judge(
        tokens,
        draft.expand(rounds, k, v),
        target.expand(rounds, k + 1, v),
        lengths,
        torch.rand(rounds, k, generator=generator),
    )
    assert (accepted <= lengths).all() and set(accepted.tolist()) == {0, 1, 2}
    output = torch.cat([tokens, drawn(target[1].expand(rounds, v))[:, None]], dim=1)
    output[torch.arange(rounds), accepted] = drawn(following)
    # A draft that ended before the second token leaves it to the target's plain draw.
    first, second = output[:, 0], torch.where(accepted > 0, output[:, 1], output[:, 2])
    counts = torch.zeros(v, v).index_put_((first, second), torch.ones(rounds), accumulate=True)
    exact = target[0][:, None] * target[1][None]
    assert (counts / rounds - exact).abs().sum() / 2 < 0.006
    assert (draft[0][:, None] * draft[1][None] - exact).abs().sum() / 2 > 0.1
    assert ((accepted > 0) & (lengths > 0)).sum() / (lengths > 0).sum() == pytest.approx(
        overlap(draft[0], target[0]).item(), abs=0.003
    )


def answers_of_a_capped_target(runtime, config):
    """Decoded answers, and the target's logits [1, s, v] of the prompt as the decoder has them."""
    from dspark_megatron.evaluation.decoding import Decoder

    seen, whole = [], Decoder.target_logits

    def target_logits(self, last_hidden):
        seen.append(whole(self, last_hidden))
        return seen[-1]

    with mock.patch.object(Decoder, "target_logits", target_logits):
        answers = decode(runtime, config, PROMPTS[:1])
    return answers, seen[0]


@pytest.mark.parametrize("tp", [1, 2])
def test_decoding_with_a_capped_target_is_lossless(pool, tiny_run, tmp_path, tp):
    """The cap moves no argmax, so greedy answers alone would not show it: the logits that tokens
    are drawn from are the class's own. The draft's scale moves no answer."""
    from transformers import AutoModelForCausalLM

    settings = SCALED_LOGITS["gemma2"][0] | {"initializer_range": 1.0}
    path = make_family(tmp_path / "target", "gemma2", **settings)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    sections = dict(
        target={"path": str(path), "attention": "eager"},
        parallel={"tensor_parallel": tp},
        model={"logit_scale": 0.5},
    )
    config = tiny_config(tiny_run, **sections)
    answers, seen = pool.run(answers_of_a_capped_target, world=tp, tp=tp, config=config)[0]
    ids, fast, slow, _ = answers[0]
    with torch.no_grad():
        own = model(torch.tensor([ids])).logits[:, -1:]
        expected = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
    assert fast == slow == expected[0, len(ids) :].tolist()
    torch.testing.assert_close(seen, own, rtol=1e-4, atol=1e-4)
    assert seen.abs().max() > 2.9, "the cap should bend them"


@pytest.mark.parametrize("cut", [None, "by_confidence"])
def test_the_first_tokens_of_sampled_answers(pool, tiny_run, cut):
    """The whole decoder, many sequences at once: the second and third token, which a draft always
    proposes, are distributed as in plain decoding (chi-square on pairs, 600 answers each)."""
    evaluate = {"temperature": 0.5, "max_new_tokens": 3, "batch_size": 32}
    config = tiny_config(tiny_run, evaluate=evaluate)
    seeds = range(600)
    answers = pool.run(
        decode, world=1, tp=1, config=config, prompts=PROMPTS[:1], seeds=seeds, cut=cut
    )[0]
    for place in (1, 2):
        samples = [[a[way][place] for a in answers if len(a[way]) > place] for way in (1, 2)]
        chi_square, freedom = two_sample_chi_square(samples)
        assert freedom >= 2, "the target is too sure of itself for this test"
        assert chi_square < freedom + 5 * (2 * freedom) ** 0.5
    proposed = [p for *_, rounds in answers for p, _, _ in rounds]
    assert cut is None or 0 < proposed.count(0) < len(proposed)


def test_probabilities_at_zero_temperature_are_one_hot():
    assert probabilities(torch.tensor([[1.0, 3.0, 2.0]]), 0).tolist() == [[0, 1, 0]]


ROUNDS = [Round(3, 3, True), Round(3, 1, True), Round(2, 2, False), Round(3, 0, True)]


def test_figures_of_known_rounds():
    answer = Generation(list(range(11)), ROUNDS)
    figures = acceptance([answer], num_draft_tokens=3)
    assert figures["tau"] == (4 + 2 + 2 + 1) / 4
    assert figures["accept_rate"] == [3 / 4, 2 / 3, 1 / 1]
    assert figures["prefix_survival"] == [3 / 4, 2 / 4, 1 / 3]
    assert figures["verify_rate"] == 9 / (4 + 4 + 3 + 4)
    assert figures["confidence_intervals"] is None, "one prompt says nothing of others"
    plain = Decoded([Generation(list(range(11)), [])], 5.0)
    figures |= comparison([Decoded([answer], 2.0)], [plain])
    assert figures["drafts_per_second"] == 2 and figures["plain_tokens_per_second"] == 2
    assert figures["speedup"] == 2.5 and figures["identical_to_plain"] == 1
    assert "2.250" in table({"file": figures}, greedy=True)
    assert acceptance([], num_draft_tokens=3)["tau"] is None


def test_confidence_intervals():
    """Of a mean of independent prompts they are those of the normal distribution; prompts that are
    all alike leave no doubt; a slot that no draft has stays null."""
    rng = torch.Generator().manual_seed(0)
    kept = torch.randint(0, 4, (200,), generator=rng).tolist()
    figures = acceptance([Generation([0], [Round(3, n, True)]) for n in kept], num_draft_tokens=4)
    mean, spread = statistics.mean(kept) + 1, statistics.stdev(kept)
    low, high = figures["confidence_intervals"]["tau"]
    assert low == pytest.approx(mean - 1.96 * spread / 200**0.5, abs=0.02)
    assert high == pytest.approx(mean + 1.96 * spread / 200**0.5, abs=0.02)
    assert figures["confidence_intervals"]["accept_rate"][3] is None
    alike = acceptance([Generation([0], ROUNDS)] * 5, num_draft_tokens=3)
    assert alike["confidence_intervals"]["tau"] == [2.25, 2.25]
