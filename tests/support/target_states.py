"""States of a target as Transformers itself makes them."""

import torch

from dspark_megatron.data.batch import Batch
from dspark_megatron.run.check import check

IDS = torch.arange(30).view(2, 15) + 40


def tapped(runtime, config):
    """Taps, last hidden states and the check of the logits of a target at this layout."""
    from dspark_megatron.run.build import build_draft, build_target, load_target_head
    from dspark_megatron.targets.start_checks import check_target_logits

    plan = check(config, runtime.world_size)
    target, draft = build_target(plan, runtime), build_draft(plan, runtime)
    states = target.states(Batch(IDS))
    head = load_target_head(plan, draft, target)
    check_target_logits(target, config.target.path, head, draft.vocab_shard, IDS)
    cached = cached_taps(target)
    embedding = draft.embed_tokens.weight
    return states.taps, states.last_hidden, cached, embedding, elements(target.model)


def cached_taps(target):
    """Taps [2, 15, m*h] of both rows of IDS through one cache: rows come one after another and
    stand at other lengths, drafts of other lengths are rejected, a third sequence comes and goes.
    """
    cache = target.new_cache()
    done = [[target.add_sequence(IDS[:1, :8], cache).taps[0]]]
    target.add_sequence(IDS[1:, 5:9], cache)
    done.append([target.add_sequence(IDS[1:, :5], cache).taps[0]])
    target.keep(cache, [0, 2])
    for first, second in ((9, 8), (12, 10), (13, 15), (15, 15)):
        ends, starts = (first, second), [sum(map(len, row)) for row in done]
        tokens = [row[start:end] for row, start, end in zip(IDS, starts, ends, strict=True)]
        width = 2 + max(map(len, tokens))
        drafts = torch.full((2, width), 7)  # the rest is rejected
        for row, own in zip(drafts, tokens, strict=True):
            row[: len(own)] = own
        taps = target.extend(drafts, cache).taps
        target.forget(cache, [width - len(own) for own in tokens])
        for row, own, states in zip(done, tokens, taps, strict=True):
            row.append(states[: len(own)])
    return torch.stack([torch.cat(row) for row in done])


def elements(module):
    return sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in module.parameters())
