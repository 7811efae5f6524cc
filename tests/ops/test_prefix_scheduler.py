"""The prefix scheduler equals its plain twin, and keeps the target's distribution exactly: every
outcome is enumerated, none is drawn.

Shapes: R requests, k slots, 2 tokens.
"""

from functools import partial
from itertools import product

import pytest
import torch

from dspark_megatron.ops.prefix_scheduler import (
    early_stopping_lengths,
    global_budget,
    lengths_for_budget,
)


def plain_order(confidence):
    """All (request, slot), likeliest first."""
    survival = {}
    for r, row in enumerate(confidence.tolist()):
        product_so_far = torch.tensor(1.0)
        for j, c in enumerate(row):
            product_so_far = product_so_far * torch.tensor(c)  # fp32, as the tensor has it
            survival[r, j] = float(product_so_far)
    return sorted(survival.items(), key=lambda item: (-item[1], item[0][1], item[0][0]))


def plain_early_stopping(confidence, steps_per_second):
    """Algorithm 1, line by line; steps_per_second: of a number of tokens."""
    lengths = [0] * len(confidence)
    tokens, tau = len(confidence), float(len(confidence))
    best = tau * steps_per_second(tokens)
    for (request, slot), chance in plain_order(confidence):
        tokens, tau = tokens + 1, tau + chance
        if tau * steps_per_second(tokens) <= best:
            break
        best = tau * steps_per_second(tokens)
        lengths[request] = slot + 1
    return lengths


def plain_budget(confidence, steps_per_second):
    requests = len(confidence)
    chances = [chance for _, chance in plain_order(confidence)]
    throughputs = [
        (requests + sum(chances[:n])) * steps_per_second(requests + n)
        for n in range(len(chances) + 1)
    ]
    return throughputs.index(max(throughputs))


def table(steps_per_second, requests, slots):
    counts = range(requests, requests * (slots + 1) + 1)
    return torch.tensor([steps_per_second(n) for n in counts], dtype=torch.float64)


def linear(tokens):
    return 1 / (1 + 0.25 * tokens)


def staircase(tokens):
    """Floor look-up: flat between probes."""
    return {0: 1.0, 1: 0.9, 2: 0.88, 3: 0.5}[min(tokens // 4, 3)]


@pytest.mark.parametrize("steps_per_second", [linear, staircase])
def test_equals_the_plain_twin(steps_per_second):
    torch.manual_seed(0)
    shapes = [(1, 1), (1, 7), (5, 1), (3, 4), (8, 7)]
    seen = set()
    for trial, (requests, slots) in product(range(20), shapes):
        confidence = torch.rand(requests, slots)
        if trial % 2:  # ties, ones and zeros
            confidence = (confidence * 4).round() / 4
        sps = table(steps_per_second, requests, slots)
        lengths = early_stopping_lengths(confidence, sps)
        assert lengths.tolist() == plain_early_stopping(confidence, steps_per_second)
        assert int(global_budget(confidence, sps)) == plain_budget(confidence, steps_per_second)
        for budget in range(requests * slots + 1):
            chosen = [place for place, _ in plain_order(confidence)[:budget]]
            per_request = [sum(r == request for r, _ in chosen) for request in range(requests)]
            # As many slots as there are is not enough: they must be the first ones.
            assert all((r, j) in chosen for r in range(requests) for j in range(per_request[r]))
            assert lengths_for_budget(confidence, budget).tolist() == per_request
        seen |= set(lengths.tolist())
    assert len(seen) > 4, "the cases should not all end alike"


def test_free_tokens_are_all_verified_and_dear_ones_never():
    confidence = torch.full((4, 3), 0.9)
    assert early_stopping_lengths(confidence, torch.ones(13)).tolist() == [3] * 4
    assert int(global_budget(confidence, torch.ones(13))) == 12
    dear = 2.0 ** -torch.arange(13)
    assert early_stopping_lengths(confidence, dear).tolist() == [0] * 4
    assert int(global_budget(confidence, dear)) == 0
    # No growth is no reason to verify: a token that is certain to be rejected gains nothing.
    hopeless = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    assert early_stopping_lengths(hopeless, torch.ones(7)).tolist() == [1, 0]
    assert int(global_budget(hopeless, torch.ones(7))) == 1


def test_equal_slots_are_taken_by_place_then_by_request():
    certain = torch.ones(3, 2)
    by_budget = [lengths_for_budget(certain, n).tolist() for n in range(7)]
    expected = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [2, 1, 1], [2, 2, 1], [2, 2, 2]]
    assert by_budget == expected


def test_a_table_of_another_size_is_refused():
    with pytest.raises(ValueError, match="13 values, for 4 to 16 tokens"):
        early_stopping_lengths(torch.ones(4, 3), torch.ones(12))


class Model:
    """Draft p, target q and confidences of one request over 2 tokens; each depends on the tokens
    before. The confidences need not be right, nor calibrated."""

    def __init__(self, slots, generator):
        def chances():
            first = torch.rand(2**slots * 2, generator=generator, dtype=torch.float64)
            return torch.stack([first, 1 - first], dim=1)

        self.slots, self.p, self.q = slots, chances(), chances()
        self.confidences = torch.rand(2**slots, generator=generator)

    def at(self, values, prefix):
        """The value after a prefix; a different one for each prefix."""
        return values[int("1" + "".join(map(str, prefix)), 2)]

    def confidence(self, draft):
        return torch.stack([self.at(self.confidences, draft[:j]) for j in range(self.slots)])

    def chance_of_draft(self, draft):
        return torch.stack([self.at(self.p, draft[:j])[draft[j]] for j in range(len(draft))]).prod()

    def outputs(self, draft, length):
        """Distribution of k tokens when `length` slots of a draft are verified, as a tensor
        [2, ..., 2]: kept tokens, the one after them, then the target's own."""
        out = torch.zeros([2] * self.slots, dtype=torch.float64)
        for tokens in product((0, 1), repeat=self.slots):
            out[tokens] = self._chance(tokens, draft, length)
        return out

    def _chance(self, tokens, draft, length):
        total, kept = 0.0, 1.0
        for j in range(length):
            p, q = self.at(self.p, draft[:j]), self.at(self.q, draft[:j])
            keep = min(1.0, float(q[draft[j]] / p[draft[j]]))
            residual = (q - p).clamp(min=0)
            if tokens[:j] == draft[:j] and keep < 1:
                replaced = float(residual[tokens[j]] / residual.sum())
                total += kept * (1 - keep) * replaced * self.own_chance(tokens, j + 1)
            kept *= keep
        if tokens[:length] == draft[:length]:
            total += kept * self.own_chance(tokens, length)
        return total

    def own_chance(self, tokens, start=0):
        """Of the target alone, from a place on."""
        chances = [float(self.at(self.q, tokens[:j])[tokens[j]]) for j in range(start, len(tokens))]
        return float(torch.tensor(chances, dtype=torch.float64).prod())


def joint_outputs(models, schedule):
    """Exact joint distribution of the outputs of two requests, and of the target's own."""
    drafts = list(product((0, 1), repeat=models[0].slots))
    joint, lengths_seen = 0.0, set()
    for pair in product(drafts, repeat=2):
        confidence = torch.stack([m.confidence(d) for m, d in zip(models, pair, strict=True)])
        lengths = schedule(confidence).tolist()
        lengths_seen.add(tuple(lengths))
        first, second = (
            model.chance_of_draft(draft) * model.outputs(draft, length)
            for model, draft, length in zip(models, pair, lengths, strict=True)
        )
        joint = joint + torch.tensordot(first, second, dims=0)
    own = [
        torch.tensor([m.own_chance(t) for t in drafts], dtype=torch.float64).view([2] * m.slots)
        for m in models
    ]
    return joint, torch.tensordot(*own, dims=0), lengths_seen


def best_of_this_step(confidence, sps):
    """What must not be done: a budget from the confidences that it is spent on."""
    return lengths_for_budget(confidence, global_budget(confidence, sps))


def test_outputs_of_two_requests_are_the_targets_own_jointly():
    """Early stopping and every fixed budget are exact in each of ten random cases; the budget that
    is best for its own step's confidences is far off in some of the same."""
    sps = torch.tensor([1, 0.8, 0.72, 0.55, 0.55])
    stopping, biased = partial(early_stopping_lengths, sps=sps), partial(best_of_this_step, sps=sps)
    various, bias = 0, []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        models = [Model(2, generator) for _ in range(2)]
        for schedule in (stopping, *(partial(lengths_for_budget, budget=n) for n in range(5))):
            joint, own, lengths = joint_outputs(models, schedule)
            torch.testing.assert_close(joint, own, rtol=0, atol=1e-12)
            various += schedule is stopping and len(lengths) > 1
        joint, own, _ = joint_outputs(models, biased)
        bias.append(float((joint - own).abs().sum()))
    assert various and max(bias) > 0.1, (various, bias)


class Counterexample(Model):
    """The paper's case of Appendix A, rebuilt from its result: the target's first token is
    (0.7, 0.3), the draft's (0.5, 0.5), so slot 0 is kept with chance 0.8. After token 0 the second
    slot is certain to be kept, after token 1 it is certain to be rejected."""

    def __init__(self):
        super().__init__(2, torch.Generator())
        self.q[1], self.p[1] = torch.tensor([0.7, 0.3]), torch.tensor([0.5, 0.5])
        self.confidences[1:] = torch.tensor([0.8, 1.0, 0.0])  # of (), (0,), (1,)


def test_the_counterexample_of_the_paper():
    """One slot alone does not pay: 1.8 * 0.5 < 1. Both do after token 0 (2.8 * 0.5 > 1), and after
    token 1 they do not. Verifying on that ground keeps token 0 half of the time, and redraws it
    from the target the other half: 0.5 + 0.5 * 0.7 = 0.85."""
    model, sps = Counterexample(), torch.tensor([1.0, 0.5, 0.5])
    first_token, lengths = {}, {}
    for schedule in (best_of_this_step, early_stopping_lengths):
        total = 0.0
        for draft in product((0, 1), repeat=2):
            length = int(schedule(model.confidence(draft)[None], sps))
            lengths[schedule, draft[0]] = length
            total = total + model.chance_of_draft(draft) * model.outputs(draft, length)
        first_token[schedule] = total.sum(dim=1)
    expected = torch.tensor([[0.85, 0.15], [0.7, 0.3]], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(list(first_token.values())), expected)
    assert [lengths[best_of_this_step, token] for token in (0, 1)] == [2, 0]
    assert [lengths[early_stopping_lengths, token] for token in (0, 1)] == [0, 0]


@pytest.mark.parametrize("budget", [0, 1, 2])
def test_any_earlier_budget_is_exact_on_the_counterexample(budget):
    model, total = Counterexample(), 0.0
    for draft in product((0, 1), repeat=2):
        length = int(lengths_for_budget(model.confidence(draft)[None], budget))
        total = total + model.chance_of_draft(draft) * model.outputs(draft, length)
    expected = torch.tensor([0.7, 0.3], dtype=torch.float64)
    torch.testing.assert_close(total.sum(dim=1), expected)
