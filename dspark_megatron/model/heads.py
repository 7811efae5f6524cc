"""The two heads behind the backbone: the Markov head, the previous token's say in the next one
(paper Eq. 5, 6), and the confidence head, the chance that the target keeps a draft token, as a
logit (Eq. 7). Slot 0 is here the first that drafts a token, whose previous token is the anchor.

Shapes: n blocks, d slots that draft, h hidden, r Markov rank, v padded vocabulary.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from dspark_megatron.model.vocab_parallel_weight import VocabParallelWeight


class MarkovHead(MegatronModule):
    """Vanilla head: z = W1[x_{k-1}] (Eq. 5). `markov_w1`, `markov_w2`: [v/tp, r]."""

    def __init__(
        self,
        config: TransformerConfig,
        padded_vocab_size: int,
        rank: int,
        *,
        tp_group: dist.ProcessGroup,
    ) -> None:
        super().__init__(config)
        self.tp_group = tp_group
        self.rank = rank
        self.markov_w1 = VocabParallelEmbedding(
            padded_vocab_size,
            rank,
            init_method=config.init_method,
            config=config,
            tp_group=tp_group,
        )
        self.markov_w2 = VocabParallelWeight(config, padded_vocab_size, rank, tp_group=tp_group)
        self.add_projection(config)

    def add_projection(self, config: TransformerConfig) -> None:
        """What a kind of head has beside W1 and W2: the same on every rank."""

    def embed(self, prev_token_ids: Tensor) -> Tensor:
        """W1 rows, [...] -> [..., r]. One all-reduce of the result; none in backward."""
        return self.markov_w1(prev_token_ids)

    def latents(self, embeddings: Tensor, hidden: Tensor) -> Tensor:
        """embeddings [n, d, r], hidden [n, d, h] -> z [n, d, r], teacher forced. No collective."""
        state, steps = None, []
        for slot in range(hidden.shape[1]):
            z, state = self.step(embeddings[:, slot], hidden[:, slot], state)
            steps.append(z)
        return torch.stack(steps, dim=1)

    def step(
        self, embedding: Tensor, hidden: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One slot: embedding [n, r], hidden [n, h], state of the slot before (None at slot 0)
        -> z [n, r] and the next state."""
        return embedding, None


class GatedMarkovHead(MarkovHead):
    """z = sigmoid(W_g [h_k ; e] + b_g) * e with e = W1[x_{k-1}]."""

    def add_projection(self, config: TransformerConfig) -> None:
        self.gate_proj = _linear(config, config.hidden_size + self.rank, self.rank)

    def step(
        self, embedding: Tensor, hidden: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        gate = self.gate_proj(torch.cat([hidden, embedding], dim=-1)).sigmoid()
        return gate * embedding, None


class RNNMarkovHead(MarkovHead):
    """A gated recurrence over the block (Eq. 6): [g; c; o] = W_j [s; e; h] + b_j,
    s' = sigmoid(g) s + (1 - sigmoid(g)) tanh(c), z = tanh(o), s_0 = 0."""

    def add_projection(self, config: TransformerConfig) -> None:
        self.joint_proj = _linear(config, config.hidden_size + 2 * self.rank, 3 * self.rank)

    def step(
        self, embedding: Tensor, hidden: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        state = torch.zeros_like(embedding) if state is None else state
        projected = self.joint_proj(torch.cat([state, embedding, hidden], dim=-1))
        gate, candidate, output = projected.chunk(3, dim=-1)
        gate = gate.sigmoid()
        return output.tanh(), gate * state + (1 - gate) * candidate.tanh()


MARKOV_HEADS: dict[str, Callable[..., MarkovHead]] = {
    "vanilla": MarkovHead,
    "gated": GatedMarkovHead,
    "rnn": RNNMarkovHead,
}


def _linear(config: TransformerConfig, inputs: int, outputs: int) -> torch.nn.Linear:
    return torch.nn.Linear(inputs, outputs, dtype=config.params_dtype)


class ConfidenceHead(MegatronModule):
    """`c_k = w . [h_k ; W1[x_{k-1}]] + b`, replicated; without the Markov part when rank is 0."""

    def __init__(self, config: TransformerConfig, markov_rank: int) -> None:
        super().__init__(config)
        self.with_markov = markov_rank > 0
        self.proj = torch.nn.Linear(config.hidden_size + markov_rank, 1, dtype=config.params_dtype)

    def forward(
        self, hidden: Tensor, embeddings: Tensor | None, *, stop_gradient: bool = False
    ) -> Tensor:
        """hidden [..., h], embeddings [..., r] -> fp32 confidence_logits [...]. stop_gradient: none
        leaves the head. No collective."""
        features = hidden
        if self.with_markov and embeddings is not None:
            features = torch.cat([hidden, embeddings], dim=-1)
        if stop_gradient:
            features = features.detach()
        return self.proj(features).squeeze(-1).float()
