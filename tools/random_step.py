"""What benchmarks of whole steps share: a synthetic draft in bf16 over samples of random states."""

import argparse

import torch

from dspark_megatron.config import LossConfig, OptimizerConfig
from dspark_megatron.mcore.optimizer import build_optimizer, wrap_data_parallel
from dspark_megatron.run.ranks.runtime import Runtime
from dspark_megatron.shape import DraftShape
from dspark_megatron.training.metrics import MetricSums
from dspark_megatron.training.step import GradientStep
from support.tiny_draft import CachedStates as RandomStates
from support.tiny_draft import build_tiny_draft, make_samples, rank_micro_batches


def draft_shape(args: argparse.Namespace) -> DraftShape:
    return DraftShape(
        hidden_size=args.hidden,
        ffn_hidden_size=3 * args.hidden,
        num_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=args.hidden // 128,
        head_dim=64,
        vocab_size=1024,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        max_position_embeddings=4096,
        num_target_layers=30,
        target_layer_ids=(1, 14, 28),
        mask_token_id=1023,
        block_size=7,
        markov_rank=64,
        markov_head_type="vanilla",
        enable_confidence_head=True,
        confidence_head_with_markov=True,
    )


class RandomStep:
    """A draft that is trained on the same samples again and again."""

    def __init__(
        self, args: argparse.Namespace, runtime: Runtime, settings: OptimizerConfig
    ) -> None:
        self.shape, self.device = draft_shape(args), runtime.device
        self.draft = build_tiny_draft(runtime, self.shape, torch.bfloat16)
        model = wrap_data_parallel(self.draft, settings)
        self.optimizer = build_optimizer(settings, model, torch.bfloat16)
        lengths = (args.seq_length,) * 2 * runtime.dp_group.size()
        samples = make_samples(self.shape, lengths=lengths)
        samples.taps = [taps.bfloat16() for taps in samples.taps]
        samples.last_hidden = [last.bfloat16() for last in samples.last_hidden]
        self.batches = rank_micro_batches(runtime, samples, self.shape.num_draft_tokens, 1)
        states = RandomStates(samples, runtime.device)
        groups = {"tp_group": runtime.tp_group, "dp_group": runtime.dp_group}
        self.step = GradientStep(LossConfig(), model, states, **groups, device=runtime.device)
        self.metrics = MetricSums.zeros(self.shape.num_draft_tokens, runtime.device)

    def make_gradients(self) -> None:
        self.step.run(self.batches, self.metrics)
