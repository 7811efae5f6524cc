"""Inputs of the head loss, and their part of a rank."""

import torch

from dspark_megatron.ops.vocab_parallel import VocabShard
from dspark_megatron.shape.layout import padded_vocab_size

ROWS, HIDDEN, RANK = 11, 16, 6


def make_inputs(vocab_size, dtype, kind="random", with_latent=True, rows=ROWS):
    generator = torch.Generator().manual_seed(7)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    scale = {"random": 0.5, "extreme": 2000.0}[kind]
    return {
        "hidden": normal(rows, HIDDEN),
        "latent": normal(rows, RANK) if with_latent else None,
        "target_hidden": normal(rows, HIDDEN),
        "labels": torch.randint(0, vocab_size, (rows,), generator=generator),
        "weights": torch.rand(rows, generator=generator),
        "lm_head": normal(vocab_size, HIDDEN, scale=scale),
        "markov_w2": normal(vocab_size, RANK, scale=scale) if with_latent else None,
    }


def shard_of(inputs, tp_group):
    """This rank's rows of the vocabulary matrices, padded with garbage."""
    vocab_size = inputs["lm_head"].shape[0]
    padded = padded_vocab_size(vocab_size, tp_group.size())
    shard = VocabShard.of_group(vocab_size, padded, tp_group)
    local = []
    for matrix in (inputs["lm_head"], inputs["markov_w2"]):
        if matrix is not None:
            garbage = matrix.new_full((padded - vocab_size, matrix.shape[1]), 3.0)
            matrix = torch.cat([matrix, garbage])[shard.vocab_start_index : shard.vocab_end_index]
        local.append(matrix)
    return shard, *local
