"""Answers of a target that Transformers runs here, on one device.

Shapes: b = prompts of a batch, s = longest prompt of the batch, t = longest answer of the batch.
"""

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dspark_megatron.data.chats.template import reads_clock
from dspark_megatron.data.prompts.chat_prompts import Prompt
from dspark_megatron.data.prompts.response_file import Answer, first_settings
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.storage.target_folder import load_target_config, stop_token_ids


def template_day(
    tokenizer: PreTrainedTokenizerBase, given: str | None, partial: Path
) -> str | None:
    """The day for a chat template that reads the clock: the given one, or that of the run which
    left a partial file, or today. None for any other template."""
    if not reads_clock(tokenizer.chat_template):
        return None
    return given or first_settings(partial).get("template_date") or date.today().isoformat()


def plan_batches(prompts: list[Prompt], batch_size: int) -> list[list[int]]:
    """Group indices by length, so that little is padded. The longest come first: if memory does
    not suffice, the first batch shows it."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index].input_ids))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def batch_seed(seed: int, batch: int) -> int:
    """A seed of its own for each batch, so that a resumed run draws what an unbroken one draws."""
    # Not seeds.derived_seed: examples/quickstart/chats.jsonl was sampled with these seeds, and with
    # others the command in its README would no longer make it again.
    return random.Random(f"{seed}/{batch}").getrandbits(63)


@dataclass
class LocalTarget:
    """A target that samples from its plain softmax, or greedily at temperature 0."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    temperature: float
    max_new_tokens: int
    dtype: str = "auto"
    device: str = "cpu"
    messages_only: bool = False
    """Answers do not keep their tokens."""

    @cached_property
    def _stops(self) -> list[int]:
        return stop_token_ids(self.folder, self.tokenizer)

    @cached_property
    def _model(self) -> PreTrainedModel:
        """Loaded when the first answer is wanted. Code of the target's folder is never run."""
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                self.folder,
                config=load_target_config(self.folder),
                dtype=self.dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except Exception as error:  # a damaged folder raises whatever its reader does
            reason = " ".join(str(error).split())  # Transformers writes several lines
            raise ConfigError(f"Transformers cannot load {self.folder}: {reason}") from error
        missing = sorted(found["missing_keys"])  # which Transformers leaves random
        require(
            not missing,
            f"the target's folder {self.folder} lacks {len(missing)} of the weights that "
            f"Transformers expects ({', '.join(missing[:3])}{', ...' * (len(missing) > 3)})",
        )
        choice: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            choice = {"do_sample": True, "temperature": self.temperature, "top_p": 1.0, "top_k": 0}
        # The target's own generation config is replaced, not amended: it may hold penalties or cuts
        # that `generate` would merge in, and the draft has to learn the model's bare distribution.
        model.generation_config = GenerationConfig(
            **choice,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self._stops,
            pad_token_id=self._stops[0],
        )
        return model.to(self.device).eval()

    def answer_all(
        self, prompts: list[Prompt], missing: Collection[int], batch_size: int, seed: int
    ) -> Iterator[dict[int, Answer]]:
        """The answers of each batch that has a missing one, by index of their prompts."""
        # Planned over all prompts, answered or not: a resumed run must have the same batches.
        for number, indices in enumerate(plan_batches(prompts, batch_size)):
            if not set(indices).isdisjoint(missing):
                batch = [prompts[index].input_ids for index in indices]
                answers = self.answer(batch, batch_seed(seed, number))
                yield dict(zip(indices, answers, strict=True))

    def answer(self, prompts: list[list[int]], seed: int) -> list[Answer]:
        """Answer b tokenized prompts at once."""
        left = partial(pad_sequence, batch_first=True, padding_side="left")
        whole = [torch.tensor(prompt, device=self.device) for prompt in prompts]
        ids = left(whole, padding_value=self._stops[0])  # [b, s]
        mask = left([torch.ones_like(prompt) for prompt in whole])  # [b, s]
        torch.manual_seed(seed)
        with torch.inference_mode():
            tokens = self._model.generate(ids, attention_mask=mask)  # [b, s + t]
        written = tokens[:, ids.shape[1] :].tolist()
        return [self._answer(prompt, row) for prompt, row in zip(prompts, written, strict=True)]

    def _answer(self, prompt: list[int], generated: list[int]) -> Answer:
        """The answer of t ids, perhaps with a stop token and padding at their end."""
        end = next((place for place, token in enumerate(generated) if token in self._stops), None)
        content = self.tokenizer.decode(
            generated[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        written = generated if end is None else generated[: end + 1]
        tokens = (None, None) if self.messages_only else (prompt, written)
        if end is not None:
            return Answer(content, "stop", end, None, *tokens)
        # The cut may fall inside a character of several tokens; its first bytes decode to U+FFFD.
        return Answer(content.rstrip("\ufffd"), "length", len(generated), None, *tokens)
