"""The frozen target as a Python program uses it: texts to tokens, and tokens to states."""

from collections.abc import Mapping, Sequence
from datetime import date
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dspark_megatron.config import Config, ParallelConfig, TargetConfig
from dspark_megatron.data.batch import Batch, padded
from dspark_megatron.data.chats.answers import AnswerRules
from dspark_megatron.data.chats.template import ChatTemplate
from dspark_megatron.data.conversation import ConversationEncoder, Sample
from dspark_megatron.data.prompts.chat_prompts import make_prompt
from dspark_megatron.errors import require
from dspark_megatron.run.ranks.runtime import Runtime, join
from dspark_megatron.storage.target_folder import load_target_config, load_tokenizer, stop_token_ids
from dspark_megatron.targets.base import TargetStates
from dspark_megatron.targets.huggingface.quantization import check_quantization
from dspark_megatron.targets.huggingface.split import TargetSplit, check_target_split
from dspark_megatron.targets.huggingface.target import HuggingFaceTarget, load_base_model

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | Tensor
"""A user's turn, the messages of a chat, or token ids."""


class Target:
    """A frozen target; make one with `Target.from_pretrained`."""

    def __init__(self, settings: TargetConfig, runtime: Runtime) -> None:
        self.settings, self.runtime = settings, runtime
        self.config: PretrainedConfig = load_target_config(settings.path)
        """Transformers' config of it."""
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(settings.path)
        parallel = ParallelConfig(tensor_parallel=runtime.tp_group.size())
        split = TargetSplit.of(Config(target=settings, parallel=parallel), runtime.dp_group.size())
        check_target_split(self.config, split)
        check_quantization(self.config, split)
        self._split, self._tapped = split, dict[tuple[int, ...], HuggingFaceTarget]()
        self._model = load_base_model(settings, split)

    @classmethod
    def from_pretrained(
        cls,
        folder: str,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        attention: str = "sdpa",
        tensor_parallel: int | None = None,
    ) -> "Target":
        """Load the target of a local folder (Transformers' layout, with its tokenizer).

        Where `torch.distributed` is initialized, its ranks call this together and share the target:
        over Megatron-Core's tensor-parallel groups if it has any, else over new groups of
        `tensor_parallel` ranks. Else this process becomes a job of one rank.

        Args:
            folder: The target's folder.
            dtype: Type of the weights: `auto` (as saved), `float32`, `bfloat16` or `float16`.
            device: Must be where the process group works: the GPU of `LOCAL_RANK` (0 without it)
                if PyTorch sees one, else the CPU. None takes that.
            attention: Transformers' attention implementation.
            tensor_parallel: Ranks that share the target and each draft. None takes all ranks, or
                the groups that Megatron-Core has.

        Raises:
            ConfigError: Something cannot work; the message says the way out.
        """
        name: Any = str(dtype).removeprefix("torch.")
        settings = TargetConfig(path=str(folder), dtype=name, attention=attention)
        Config(target=settings).validate(trains=False)
        load_target_config(settings.path)  # a wrong folder is told before ranks are joined
        runtime = join(tensor_parallel)
        _check_device(device, runtime.device)
        return cls(settings, runtime)

    @property
    def device(self) -> torch.device:
        """Where it works."""
        return self.runtime.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of its weights and states."""
        return self._model.dtype

    @cached_property
    def stop_token_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset(stop_token_ids(self.settings.path, self.tokenizer))

    def encode(self, records: Sequence[dict[str, Any]]) -> list[Sample]:
        """Lines of training data, such as `{"messages": [...]}`, as samples: token ids, and which
        of them the target wrote. A line may become several samples."""
        encoder = ConversationEncoder(
            self.tokenizer, self.config.get_text_config().vocab_size, rules=self._rules
        )
        return [
            Sample(sample.input_ids.long(), sample.loss_mask)
            for record in records
            for sample in encoder.encode(record)
        ]

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. A text is a user's turn, and messages are a chat that ends with
        one: both go through the chat template. Token ids stay as they are."""
        if isinstance(prompt, Tensor):
            prompt = prompt.flatten().tolist()
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if any(isinstance(part, Mapping) for part in prompt):
            template = ChatTemplate(self.tokenizer, rules=self._rules)
            return make_prompt({"messages": list(prompt)}, template).input_ids
        ids, size = list(prompt), self.config.get_text_config().vocab_size
        require(
            bool(ids) and all(isinstance(i, int) and 0 <= i < size for i in ids),
            f"a prompt must be a text, messages, or at least one token id in [0, {size})",
        )
        return [i for i in ids if isinstance(i, int)]

    def states(self, samples: Sequence[Sample | Tensor], layer_ids: Sequence[int]) -> TargetStates:
        """Outputs of these layers, `[b, s, m*h]` side by side, and the last hidden state
        `[b, s, h]`, without gradient. Shorter samples are padded on the right. A draft's layers are
        `draft.target_layer_ids`."""
        ids = [one.input_ids if isinstance(one, Sample) else one for one in samples]
        require(bool(ids), "states need at least one sample")
        return self.tapped(tuple(layer_ids)).states(Batch(padded(ids)))

    def tapped(self, layer_ids: tuple[int, ...]) -> HuggingFaceTarget:
        """The provider that keeps the outputs of these layers; all of them share the weights."""
        last = self.config.get_text_config().num_hidden_layers - 1
        require(
            bool(layer_ids) and all(0 <= i <= last for i in layer_ids),
            f"layers {list(layer_ids)} must be in [0, {last}], and at least one",
        )
        if layer_ids not in self._tapped:
            self._tapped[layer_ids] = HuggingFaceTarget(
                self.settings,
                layer_ids,
                split=self._split,
                dp_group=self.runtime.dp_group,
                device=self.device,
                model=self._model,
            )
        return self._tapped[layer_ids]

    @property
    def _rules(self) -> AnswerRules:
        """A template that reads the clock is given today."""
        return AnswerRules(stop_ids=self.stop_token_ids, template_date=date.today().isoformat())


def _check_device(wanted: str | torch.device | None, found: torch.device) -> None:
    if wanted is None:
        return
    device = torch.device(wanted)
    require(
        device.type == found.type and device.index in (None, found.index),
        f"device ({device}) must be where the process group works, {found}; choose a GPU with "
        "CUDA_VISIBLE_DEVICES (empty: the CPU), or leave it out",
    )
