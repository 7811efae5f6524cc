"""Decoded prompts, and how samples of tokens compare."""

import torch

PROMPTS = ["hello", "the hill in the", "then all bells", "inn well"]


def decode(runtime, config, prompts, seeds=(0,), cut=None, confidence_scale=0):
    """Token ids by plain and by speculative decoding, and the rounds. cut: a name of CUTS, or one
    of the decoder's own kind. confidence_scale: of random weights for the confidence head."""
    from dspark_megatron.evaluation.decoding import Decoder, Sampling
    from dspark_megatron.run.build import build_draft, build_target, load_target_head
    from dspark_megatron.run.check import check
    from dspark_megatron.storage.target_folder import stop_token_ids

    plan, settings = check(config, runtime.world_size), config.evaluate
    draft, target = build_draft(plan, runtime).eval(), build_target(plan, runtime)
    if confidence_scale:
        weight = draft.confidence_head.proj.weight
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            weight.copy_(confidence_scale * torch.randn(weight.shape, generator=generator))
            weight[:, : plan.shape.hidden_size] = 0
    stops = frozenset(stop_token_ids(config.target.path, plan.tokenizer))
    decoder = Decoder(
        target,
        draft,
        load_target_head(plan, draft, target),
        Sampling(settings.temperature, settings.max_new_tokens, stops),
        batch_size=settings.batch_size,
        cut=CUTS.get(cut, cut),
    )
    ids = [plan.tokenizer(text)["input_ids"] for text in prompts for _ in seeds]
    seeds = [seed for _ in prompts for seed in seeds]
    fast, slow = decoder.speculative(ids, seeds), decoder.plain(ids, seeds)
    return [
        (prompt, f.token_ids, s.token_ids, [(r.proposed, r.accepted, r.bonus) for r in f.rounds])
        for prompt, f, s in zip(ids, fast.generations, slow.generations, strict=True)
    ]


def by_confidence(logits):
    """Verify up to the first slot of little confidence, which is made before the slot's token."""
    return (logits > 0).long().cumprod(dim=1).sum(dim=1)


CUTS = {
    "by_confidence": by_confidence,
    "nothing": lambda logits: torch.zeros(len(logits), dtype=torch.int64),
}


def two_sample_chi_square(samples):
    """Statistic and degrees of freedom for two lists of tokens being draws of one distribution;
    tokens seen fewer than ten times count as one."""
    tokens = sorted({*samples[0], *samples[1]})
    counts = torch.tensor([[s.count(t) for t in tokens] for s in samples], dtype=torch.float64)
    common = counts.sum(0) >= 10
    counts = torch.cat([counts[:, common], counts[:, ~common].sum(1, keepdim=True)], dim=1)
    counts = counts[:, counts.sum(0) > 0]
    expected = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
    return ((counts - expected) ** 2 / expected).sum().item(), counts.shape[1] - 1
