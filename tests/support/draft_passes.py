"""What a draft says of blocks when it decodes, and when it is trained."""

import torch

from support.tiny_draft import build_tiny_draft, make_samples, sample_logits


def drafted_and_trained(runtime, shape):
    """Logits of the blocks of two sequences by the drafter, which takes in context a few tokens at
    a time, and by a training pass; and the most tokens that the drafter's layers held."""
    from dspark_megatron.model.drafting import Drafter
    from dspark_megatron.ops.vocab_parallel import gather_vocab

    lengths, first = (20, 15), (6, 2)
    samples = make_samples(shape, lengths=lengths)
    draft = build_tiny_draft(runtime, shape).eval()
    drafter, found, wanted, held = Drafter(draft), [], [], 0
    for taps, end in zip(samples.taps, first, strict=True):
        drafter.add(taps[:end])
    for step in (0, 1, 4, 3):
        ends = [n + step for n in drafter.lengths]
        parts = zip(samples.taps, drafter.lengths, ends, strict=True)
        if step:
            drafter.extend([taps[a:b] for taps, a, b in parts])
        tokens = torch.stack(
            [
                ids[a : a + shape.block_size + 1]
                for ids, a in zip(samples.input_ids, ends, strict=True)
            ]
        )
        logits = []

        def forced(of_slot, logits=logits, tokens=tokens):
            logits.append(of_slot)
            return tokens[:, len(logits)], of_slot

        drafter.propose(tokens[:, 0], forced)
        found.append(torch.stack(logits, dim=1))
        passes = []
        for ids, taps, a in zip(samples.input_ids, samples.taps, ends, strict=True):
            own = sample_logits(draft, taps, ids, torch.tensor([a]))[1]
            passes.append(gather_vocab(own, shape.vocab_size, tp_group=runtime.tp_group)[0])
        wanted.append(torch.stack(passes))
        held = max(held, *(len(k) for context in drafter._contexts for k, _ in context))
    return torch.stack(found), torch.stack(wanted), held
