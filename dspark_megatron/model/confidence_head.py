"""The confidence head: the chance that the target keeps a draft token, as a logit (Eq. 7)."""

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class ConfidenceHead(MegatronModule):
    """`c_k = w . [h_k ; W1[x_{k-1}]] + b`, replicated; without the Markov part when rank is 0."""

    def __init__(self, config: TransformerConfig, markov_rank: int) -> None:
        super().__init__(config)
        self.with_markov = markov_rank > 0
        self.proj = torch.nn.Linear(config.hidden_size + markov_rank, 1, dtype=config.params_dtype)

    def forward(self, hidden: Tensor, embeddings: Tensor | None) -> Tensor:
        """hidden [..., h], embeddings [..., r] -> fp32 confidence_logits [...]. No collective."""
        features = torch.cat([hidden, embeddings], dim=-1) if self.with_markov else hidden
        return self.proj(features).squeeze(-1).float()
