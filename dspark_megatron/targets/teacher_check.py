"""Start-up check: the logits that the loss makes are the target's own."""

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from dspark_megatron.config import ConfigError
from dspark_megatron.ops.vocab_parallel import gather_vocab
from dspark_megatron.targets.huggingface import HuggingFaceTarget

_POSITIONS = 16


class _SplitHead(torch.nn.Module):
    """The draft's LM-head shard in the place of the target's own head."""

    def __init__(self, weight: Tensor, vocab_size: int, tp_group: dist.ProcessGroup) -> None:
        super().__init__()
        self.shard, self.vocab_size, self.tp_group = weight, vocab_size, tp_group

    @property
    def weight(self) -> Tensor:
        return self.shard

    def forward(self, hidden: Tensor) -> Tensor:
        local = hidden.to(self.shard.dtype) @ self.shard.t()
        return gather_vocab(local, self.vocab_size, tp_group=self.tp_group)


@torch.no_grad()
def check_teacher_logits(
    target: HuggingFaceTarget,
    lm_head: Tensor,
    input_ids: Tensor,
    vocab_size: int,
    *,
    tp_group: dist.ProcessGroup,
) -> None:
    """Compare `lm_head(last_hidden)` with what the family's own LM class makes of the same weights.

    The LM class is built without weights around the loaded base model, so a logit scale, a soft
    cap, a missing or a doubled final norm shows. lm_head [v/tp, h], input_ids [1, s].
    Raises ConfigError when they differ by more than rounding.
    """
    input_ids = input_ids[:1, :_POSITIONS].to(target.device)
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(target.model.config)
    setattr(causal, causal.base_model_prefix, target.model)
    head = _SplitHead(lm_head, vocab_size, tp_group)
    causal.set_output_embeddings(head)
    own = causal(input_ids=input_ids, use_cache=False).logits.float()
    ours = head(target.states(input_ids).last_hidden).float()
    difference = (own - ours).abs().max().item()
    scale = own.abs().max().item()
    tolerance = 1e-4 if lm_head.dtype == torch.float32 else 0.05
    if not difference <= tolerance * max(scale, 1.0):
        raise ConfigError(
            f"{type(causal).__name__} does not make its logits as lm_head(last_hidden): they "
            f"differ by {difference:.3g} (largest logit {scale:.3g}). A target with a logit scale "
            "or soft cap is not supported; a final norm may be missing or doubled"
        )
