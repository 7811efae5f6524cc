"""One record of a training file to token ids and the mask of the tokens to learn.

Shapes: s tokens of one sample.
"""

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dspark_megatron.config import ConfigError, require
from dspark_megatron.data.chat_template import WAY_OUT, ChatTemplate


class Sample(NamedTuple):
    """A conversation as the draft sees it."""

    input_ids: Tensor
    """[s] int64."""
    loss_mask: Tensor
    """[s] bool: the target wrote this token, so it may be learnt."""


class ConversationEncoder:
    """Turns records into samples for one tokenizer and one target.

    `vocab_size`: rows of the target's embedding; every id must be below it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size

    def encode(self, record: dict) -> Sample:
        """`{"messages": [...]}` or `{"input_ids": [...], "loss_mask": [...]}` to a Sample.

        `"finish_reason": "length"` says that the last answer was cut short, so its end-of-turn
        token is not to be learnt. Other keys are ignored. Raises ConfigError (without the line)
        for a record of neither form or of both, malformed parts, ids outside the vocabulary, a
        chat without an assistant turn, and a chat template that does not tell the assistant's
        tokens.
        """
        require(
            ("messages" in record) != ("input_ids" in record),
            'a line must have either "messages" or "input_ids" with "loss_mask"; '
            f"it has the keys {sorted(record)}",
        )
        if "messages" in record:
            cut_short = record.get("finish_reason") == "length"
            token_ids, mask = self._encode_chat(record["messages"], cut_short)
        else:
            token_ids, mask = _checked_tokens(record)
        self._check_vocabulary(token_ids)
        return Sample(
            torch.tensor(token_ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.bool)
        )

    @cached_property
    def _template(self) -> ChatTemplate:
        """Made at the first chat: a file of ids needs no template."""
        return ChatTemplate(self._tokenizer)

    def _encode_chat(self, messages: object, cut_short: bool) -> tuple[list[int], list[bool]]:
        messages = checked_messages(messages)
        roles = [message["role"] for message in messages]
        require(
            "assistant" in roles,
            f'no message has the role "assistant" (roles: {", ".join(roles)}), so there is '
            "nothing to learn; answer the prompts first, or remove the line",
        )
        token_ids, mask = self._template.encode(messages, cut_short=cut_short)
        require(
            any(mask),
            f"the chat has an assistant turn, but the chat template marks none of its "
            f"{len(token_ids)} tokens as the assistant's; {WAY_OUT}",
        )
        return token_ids, mask

    def _check_vocabulary(self, token_ids: list[int]) -> None:
        outside = [i for i in token_ids if not 0 <= i < self._vocab_size]
        require(
            not outside,
            f"token ids {outside[:5]} are outside the target's vocabulary "
            f"[0, {self._vocab_size}); tokenize with the target's own tokenizer",
        )


def checked_messages(messages: object) -> list[dict]:
    """`messages` itself, if it is a chat: a non-empty list of objects, each with a string `role`
    and a `content` that is a string or a list of parts. ConfigError otherwise."""
    require(
        isinstance(messages, list) and bool(messages),
        f'"messages" must be a list of at least one message, not {_shown(messages)}',
    )
    for position, message in enumerate(messages):
        require(
            isinstance(message, dict) and isinstance(message.get("role"), str),
            f'message {position} must be an object with a string "role", not {_shown(message)}',
        )
        require(
            isinstance(message.get("content"), str | list),
            f'message {position} ({message["role"]}) must have a "content" that is a string '
            f"or a list of parts, not {_shown(message.get('content'))}",
        )
    return messages


def _checked_tokens(record: dict) -> tuple[list[int], list[bool]]:
    token_ids, mask = record["input_ids"], record.get("loss_mask")
    for name, values in (("input_ids", token_ids), ("loss_mask", mask)):
        require(isinstance(values, list), f'"{name}" must be a list, not {_shown(values)}')
    require(
        len(token_ids) == len(mask),
        f'"input_ids" ({len(token_ids)}) and "loss_mask" ({len(mask)}) must be equally long',
    )
    for position, (token_id, learn) in enumerate(zip(token_ids, mask, strict=True)):
        if type(token_id) is not int:
            raise ConfigError(f"input_ids[{position}] must be an integer, not {_shown(token_id)}")
        if learn not in (0, 1):
            raise ConfigError(f"loss_mask[{position}] must be 0 or 1, not {_shown(learn)}")
    return token_ids, mask


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
