"""From one line of a training file to token ids and their loss mask.

Shapes: s tokens of one sample.
"""

from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dspark_megatron.data.chats.answers import WAY_OUT, AnswerRules
from dspark_megatron.data.chats.loss_mask import (
    Encoding,
    ReasoningMask,
    check_offsets,
    detokenize,
    tokenize,
    tokens_inside,
    up_to_first_stop,
)
from dspark_megatron.data.chats.messages import (
    chat_of,
    check_learnt,
    checked_messages,
    is_cut_short,
    shown,
)
from dspark_megatron.data.chats.reasoning import AnswerText, Tags
from dspark_megatron.data.chats.spellings import in_first_spelling
from dspark_megatron.data.chats.template import ChatTemplate
from dspark_megatron.errors import ConfigError, require

FORMS = ("messages", "conversations", "completion", "input_ids")
"""The keys that tell a line's form. A line has exactly one of them. Only an answered chat with the
tokens that its target saw and wrote has two, `messages` and `input_ids`."""
BRACKETS, GREEN = ("⟦", "⟧"), ("\x1b[32m", "\x1b[0m")
"""Marks around what is supervised when a sample is printed."""


class Sample(NamedTuple):
    """A conversation as the draft sees it."""

    input_ids: Tensor
    """[s] int32 where it is encoded and stored, int64 where the dataset gives it."""
    loss_mask: Tensor
    """[s] bool. True where the target wrote the token, so that it may be learnt."""


class ConversationEncoder:
    """Turns the lines of a file into samples for one tokenizer and one target.

    `vocab_size`: rows of the target's embedding. Every id must be below it.
    `reasoning_tags`: reasoning between these is not learnt. None: it is learnt.
    `rules`: where answers begin and end.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        reasoning_tags: tuple[str, str] | None = None,
        rules: AnswerRules | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._rules = rules or AnswerRules()
        self.reasoning = ReasoningMask(reasoning_tags)

    def encode(self, record: dict) -> list[Sample]:
        """The samples of a line in one of the forms of docs/data.md. It is one sample, unless
        the chat template rewrites earlier turns.

        `"finish_reason": "length"` says that the last answer was cut short, so its end is not
        learnt. Other keys are ignored. Raises ConfigError (which does not name the line) for a line
        of no form or of several, malformed parts, ids outside the vocabulary, a chat without an
        assistant turn, and a chat template that does not show the assistant's tokens.
        """
        forms = [key for key in FORMS if key in record]
        require(
            len(forms) == 1 or forms == ["messages", "input_ids"],
            'a line must have one of "messages", "conversations", "completion" with "prompt", and '
            f'"input_ids" with "loss_mask"; it has the keys {sorted(record)}',
        )
        if forms == ["input_ids"]:
            encodings = [_checked_tokens(record)]
        elif "input_ids" in forms:
            encodings = [self._encode_answered(record)]
        elif forms == ["completion"] and _is_text(record):
            encodings = [self._encode_text(record)]
        else:
            encodings = self._encode_chat(record)
        for token_ids, _ in encodings:
            self._check_vocabulary(token_ids)
        return [
            Sample(torch.tensor(token_ids, dtype=torch.int32), torch.tensor(mask, dtype=torch.bool))
            for token_ids, mask in encodings
        ]

    def encode_document(self, token_ids: Tensor) -> Sample:
        """A document of an indexed dataset, [s] of any integer type. Every token may be learnt."""
        outside = (token_ids < 0) | (token_ids >= self._vocab_size)
        self._check_vocabulary(token_ids[outside].tolist())
        return Sample(token_ids.int(), torch.ones(len(token_ids), dtype=torch.bool))

    @cached_property
    def _template(self) -> ChatTemplate:
        """Made at the first chat, since a file of ids needs no template."""
        return ChatTemplate(self._tokenizer, self.reasoning, self._rules)

    def _encode_chat(self, record: dict) -> list[Encoding]:
        chat = chat_of(record)
        roles = [message["role"] for message in chat.messages[chat.given :]]
        after = f" after the first {chat.given}, which are context" if chat.given else ""
        require(
            "assistant" in roles,
            f'no message has the role "assistant"{after} (roles: {", ".join(roles)}), so there is '
            "nothing to learn; answer the prompts first, or remove the line",
        )
        for position in range(chat.given, len(chat.messages)):
            check_learnt(position, chat.messages[position])
        encodings = in_first_spelling(chat, self._template.encode)
        marks = [sum(mask) for _, mask in encodings]
        require(
            any(marks) or self.reasoning.tags is not None or chat.cut_short,
            f"the chat has an assistant turn, but the chat template marks none of its "
            f"{len(encodings[0][0])} tokens as the assistant's; {WAY_OUT}",
        )
        return encodings

    def _encode_answered(self, record: dict) -> Encoding:
        """A chat with the tokens that its target saw and wrote, as `dspark generate`
        keeps them. It needs no template, and reasoning may be masked as in any chat."""
        token_ids, mask = _checked_tokens(record)
        self._check_vocabulary(token_ids)
        answer = [i for i, written in zip(token_ids, mask, strict=True) if written]
        text = self._tokenizer.decode(
            answer, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        answers = [m for m in checked_messages(record["messages"]) if m["role"] == "assistant"]
        pieces = [piece for last in answers[-1:] for piece in AnswerText.of(last, Tags()).pieces()]
        missing = [piece for piece in pieces if piece.strip() not in text]
        require(
            not missing,
            '"input_ids" must be the tokens of "messages", and what "loss_mask" marks of them is '
            f"{shown(text)}, without {shown(missing[:1])}; the tokens are of another tokenizer or "
            'the messages were changed: take "input_ids" and "loss_mask" out of the line',
        )
        return token_ids, self.reasoning.hide(*detokenize(self._tokenizer, token_ids), mask)

    def _encode_text(self, record: dict) -> Encoding:
        """Prompt and completion as they are, as TRL does it. There is no template, but the
        tokenizer's special tokens are added, and its eos token ends the completion."""
        check_offsets(self._tokenizer)
        eos, cut_short = self._tokenizer.eos_token_id, is_cut_short(record)
        require(
            eos is not None or cut_short,
            "a completion ends with the tokenizer's eos token, and it has none; set eos_token in "
            "tokenizer_config.json, or give lines with input_ids and loss_mask",
        )
        prompt, text = record["prompt"], record["prompt"] + record["completion"]
        token_ids, offsets = tokenize(self._tokenizer, text, add_special_tokens=True)
        mask = tokens_inside(offsets, [(len(prompt), len(text))], len(text))
        if token_ids[-1:] == [eos]:  # written out in the completion, or added by the tokenizer
            token_ids, offsets, mask = token_ids[:-1], offsets[:-1], mask[:-1]
        answer = up_to_first_stop(token_ids, mask, self._rules.stop_ids)
        end = [] if cut_short or answer != mask else [eos]
        answer = self.reasoning.hide(text, offsets, answer)
        return token_ids + end, answer + [True] * len(end)

    def _check_vocabulary(self, token_ids: list[int]) -> None:
        outside = [i for i in token_ids if not 0 <= i < self._vocab_size]
        require(
            not outside,
            f"token ids {outside[:5]} are outside the target's vocabulary "
            f"[0, {self._vocab_size}); tokenize with the target's own tokenizer",
        )


def _is_text(record: dict) -> bool:
    """Whether prompt and completion are strings, and not lists of messages. ConfigError for
    anything else."""
    kinds = {type(record.get(name)) for name in ("prompt", "completion")}
    require(
        kinds in ({str}, {list}),
        '"prompt" and "completion" must be two strings or two lists of messages, not '
        f"{shown(record.get('prompt'))} and {shown(record['completion'])}",
    )
    return kinds == {str}


def _checked_tokens(record: dict) -> Encoding:
    token_ids: Any = record["input_ids"]
    mask: Any = record.get("loss_mask")
    for name, values in (("input_ids", token_ids), ("loss_mask", mask)):
        require(isinstance(values, list), f'"{name}" must be a list, not {shown(values)}')
    require(
        len(token_ids) == len(mask),
        f'"input_ids" ({len(token_ids)}) and "loss_mask" ({len(mask)}) must be equally long',
    )
    for position, (token_id, learn) in enumerate(zip(token_ids, mask, strict=True)):
        if type(token_id) is not int:
            raise ConfigError(f"input_ids[{position}] must be an integer, not {shown(token_id)}")
        if learn not in (0, 1):
            raise ConfigError(f"loss_mask[{position}] must be 0 or 1, not {shown(learn)}")
    return token_ids, list(map(bool, mask))


def describe_sample(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, marks: tuple[str, str] = BRACKETS
) -> str:
    """A line of token counts, then the whole text with supervised parts between the marks."""
    before, after = marks
    token_ids, mask = sample.input_ids.tolist(), sample.loss_mask.tolist()
    parts = []
    for supervised, run in groupby(zip(token_ids, mask, strict=True), key=itemgetter(1)):
        ids = [token_id for token_id, _ in run]
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        parts.append(f"{before}{text}{after}" if supervised else text)
    return (
        f"a sample of {len(mask):,} tokens, {sum(mask):,} of them supervised, "
        f"marked {before}like this{after}:\n" + "".join(parts)
    )
