"""Acceptance by the length of the context that a round drafts from."""

import pytest

from dspark_megatron.config import EvaluateConfig
from dspark_megatron.errors import ConfigError
from dspark_megatron.evaluation.context_lengths import by_context, spans
from dspark_megatron.evaluation.generation import Generation, Round
from dspark_megatron.evaluation.report import context_table
from support.decoded import PROMPTS
from support.tiny_target import tiny_config


def rounds_of(runtime, config):
    """Of two batches: lengths of the prompts, tokens gained and contexts of their rounds."""
    from dspark_megatron.evaluation.decoding import Decoder, Sampling
    from dspark_megatron.run.build import build_draft, build_target, load_target_head
    from dspark_megatron.run.check import check

    plan = check(config, runtime.world_size)
    draft, target = build_draft(plan, runtime).eval(), build_target(plan, runtime)
    head = load_target_head(plan, draft, target)
    decoder = Decoder(target, draft, head, Sampling(1.0, 20, frozenset()), batch_size=2)
    prompts = [plan.tokenizer(text)["input_ids"] for text in PROMPTS]
    decoded = decoder.speculative(prompts, range(len(prompts)))
    found = [
        [(r.length, r.context) for r in generation.rounds] for generation in decoded.generations
    ]
    return [len(prompt) for prompt in prompts], found


@pytest.mark.parametrize("model", [{}, {"attention": {"window": 4}}, {"sample_from_anchor": False}])
def test_the_context_of_a_round_is_all_before_its_anchor(pool, tiny_run, model):
    [(lengths, prompts)] = pool.run(
        rounds_of, world=1, tp=1, config=tiny_config(tiny_run, model=model)
    )
    for length, rounds in zip(lengths, prompts, strict=True):
        assert len(rounds) > 1
        for gained, context in rounds:
            assert context == length
            length += gained


def test_figures_are_of_the_rounds_of_a_length():
    early, late = Round(3, 3, True, context=3), Round(3, 0, True, context=4)
    answers = [Generation([1, 2], [early, late]), Generation([1], [late]), Generation([1], [])]
    short, long = by_context(answers, 3, [4, 64])
    assert (short["from"], short["to"], long["from"], long["to"]) == (0, 4, 4, 64)
    assert (short["tau"], long["tau"], long["rounds"], long["prompts"]) == (4, 1, 2, 2)
    assert by_context(answers, 3, [])[0]["rounds"] == 3
    text = context_table({"file": {"by_context": [short, long]}}, [4, 64])
    assert "0-3" in text and "4-63" in text
    assert text.endswith("no rounds with a context of 64 or more tokens")
    assert spans([4]) == [(0, 4), (4, None)]


@pytest.mark.parametrize("edges", [[0, 4], [8, 4], [4, 4], [-1]])
def test_edges_that_part_nothing_are_refused(edges):
    with pytest.raises(ConfigError, match="context_edges .* strictly increasing"):
        EvaluateConfig(context_edges=edges).validate()
