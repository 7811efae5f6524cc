"""Chats through the tokenizer's template: their text, their tokens, and which the model wrote.

Two ways to know the assistant's tokens. A template with `{% generation %}` says so itself (unless
the tokenizer trims spaces). Any other is rendered turn by turn: what the assistant's turn adds to
the text is the assistant's. Where such a template renders earlier turns differently when more
follows (some drop old reasoning), a chat becomes several samples, each as the target saw it.
"""

import os
import re
from itertools import groupby
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from dspark_megatron.config import ConfigError
from dspark_megatron.data.chats import Chat
from dspark_megatron.data.reasoning import ReasoningMask
from dspark_megatron.data.rendered import LeftOut, NotRendered, check_rendered
from dspark_megatron.data.tokens import Span, check_offsets, tokenize, tokens_inside

GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
WAY_OUT = (
    "give lines with input_ids and loss_mask, or a chat template with {% generation %} around "
    "the assistant's text"
)


class Rendered(NamedTuple):
    """A chat up to an assistant turn, as text."""

    text: str
    answers: list[Span]
    """Where the assistant wrote it."""


class ChatTemplate:
    """A tokenizer's chat template, inspected once.

    `reasoning`: takes reasoning out of what is to be learnt; null: it stays.
    Raises ConfigError for a tokenizer without a template or without character offsets.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        reasoning: ReasoningMask | None = None,
    ) -> None:
        check_offsets(tokenizer)
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise ConfigError(
                "the tokenizer has no (default) chat template; add chat_template.jinja to the "
                "target's folder; training lines may have input_ids and loss_mask instead"
            ) from error
        self._tokenizer = tokenizer
        self._reasoning = reasoning
        marked = GENERATION_TAG.search(template) is not None
        self._knows_developer = "developer" in template
        self._marks_generation = marked and not _trims_spaces(tokenizer)
        added = tokenizer.added_tokens_decoder.items()
        self._special_ids = {i for i, token in added if token.special}
        self._special_ids.update(tokenizer.all_special_ids)

    def render(
        self,
        messages: list[dict],
        options: dict[str, Any] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The chat as text; `options` go to the template. ConfigError when it refuses the chat,
        LeftOut when the text lacks something that the chat says."""
        text = self._render(messages, options, add_generation_prompt)
        last = len(messages) - 1
        answers = range(0) if add_generation_prompt else range(last, last + 1)
        check_rendered(text, messages, options or {}, answers=answers)
        return text

    def render_prompt(self, chat: Chat) -> str:
        """The chat as text, up to where the assistant begins to write."""
        return self.render(chat.messages, chat.template_options, add_generation_prompt=True)

    def _render(
        self, messages: list[dict], options: dict[str, Any] | None, add_generation_prompt: bool
    ) -> str:
        options = {**(options or {}), "add_generation_prompt": add_generation_prompt}
        try:
            return self._tokenizer.apply_chat_template(
                self._with_known_roles(messages), tokenize=False, **options
            )
        except Exception as error:  # a template is foreign code and may raise anything
            raise _template_error(error) from error

    def _with_known_roles(self, messages: list[dict]) -> list[dict]:
        """`developer` as `system`, its older name, where the template does not speak of it."""
        if self._knows_developer:
            return messages
        return [
            {**message, "role": "system"} if message["role"] == "developer" else message
            for message in messages
        ]

    def _says_all_at_once(self, chat: Chat) -> bool:
        """Whether the whole chat has every answer as it was written."""
        try:
            text = self._render(chat.messages, chat.template_options, False)
            check_rendered(
                text, chat.messages, chat.template_options, answers=range(len(chat.messages))
            )
        except LeftOut:
            return False
        return True

    def tokenize(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids and character ranges of a rendered chat: [s] and [s] pairs."""
        return tokenize(self._tokenizer, text)

    def encode(self, chat: Chat) -> list[tuple[list[int], list[bool]]]:
        """Ids of the rendered chat and whether the assistant wrote them, to be learnt: [s] and [s];
        several where the template rewrites earlier turns, each up to another assistant turn.

        The end-of-turn token counts as written, but not that of a last answer that was cut short;
        white space that the template puts after it does not.
        """
        if self._marks_generation and not chat.given and self._says_all_at_once(chat):
            return [self._finished(*self._encode_marked(chat), chat.cut_short)]
        parts = self._assistant_parts(chat)
        last = len(parts) - 1
        return [
            self._finished(*self._encode_part(part), chat.cut_short and i == last)
            for i, part in enumerate(parts)
        ]

    def _encode_part(self, part: Rendered) -> tuple[list[int], list[bool]]:
        token_ids, offsets = self.tokenize(part.text)
        mask = tokens_inside(offsets, part.answers, len(part.text))
        return token_ids, self._without_reasoning(part.text, offsets, mask)

    def _encode_marked(self, chat: Chat) -> tuple[list[int], list[bool]]:
        try:
            encoded = self._tokenizer.apply_chat_template(
                self._with_known_roles(chat.messages),
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **chat.template_options,
            )
        except Exception as error:
            raise _template_error(error) from error
        mask = [bool(written) for written in encoded["assistant_masks"]]
        if self._reasoning is not None:
            text = self.render(chat.messages, chat.template_options)
            mask = self._without_reasoning(text, self.tokenize(text)[1], mask)
        return encoded["input_ids"], mask

    def _without_reasoning(self, text: str, offsets: list[Span], mask: list[bool]) -> list[bool]:
        return mask if self._reasoning is None else self._reasoning.hide(text, offsets, mask)

    def _finished(
        self, token_ids: list[int], mask: list[bool], cut_short: bool
    ) -> tuple[list[int], list[bool]]:
        mask = self._without_space_after_end_of_turn(token_ids, mask)
        if cut_short and any(mask):
            last = len(mask) - 1 - mask[::-1].index(True)
            mask[last] = token_ids[last] not in self._special_ids
        return token_ids, mask

    def _assistant_parts(self, chat: Chat) -> list[Rendered]:
        """The chat up to its last assistant turn to be learnt, in one part while each turn adds
        to the text of the one before. ConfigError where a turn does not add to its own prompt."""
        messages, options = chat.messages, chat.template_options
        parts: list[Rendered] = []
        for turn in range(chat.given, len(messages)):
            if messages[turn]["role"] != "assistant":
                continue
            before = self.render(messages[:turn], options, add_generation_prompt=True)
            after = self.render(messages[: turn + 1], options)
            _check_nested(before, after, turn)
            earlier = []
            if parts and before.startswith(parts[-1].text):
                earlier = parts.pop().answers
            parts.append(Rendered(after, [*earlier, (len(before), len(after))]))
        return parts

    def _without_space_after_end_of_turn(
        self, token_ids: list[int], mask: list[bool]
    ) -> list[bool]:
        """ChatML's "\\n" after `<|im_end|>` belongs to the turn, but no model ever writes it."""
        kept, start = [], 0
        for written, run in groupby(mask):
            end = start + len(list(run))
            special = [i for i in range(start, end) if token_ids[i] in self._special_ids]
            cut = special[-1] + 1 if written and special else end
            if self._tokenizer.decode(token_ids[cut:end]).strip():
                cut = end  # words follow: the last special token does not end the turn
            kept += [written] * (cut - start) + [False] * (end - cut)
            start = end
        return kept


def _trims_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether spaces belong to no token's character range. Transformers then misplaces the marks
    of `{% generation %}`: an answer that starts with a space loses its marks, and one that ends
    with a space marks all that follows."""
    encoded = tokenizer("a  ", add_special_tokens=False, return_offsets_mapping=True)
    return sum(end - start for start, end in encoded["offset_mapping"]) < 3


def _check_nested(before: str, after: str, turn: int) -> None:
    if after.startswith(before):
        return
    same = len(os.path.commonprefix([before, after]))
    raise ConfigError(
        f"the chat template renders message {turn} (assistant) otherwise than its own prompt for "
        f"it: {before[same:][:40]!r} against {after[same:][:40]!r} after {same} equal characters, "
        f"so the assistant's tokens cannot be found by comparing; {WAY_OUT}"
    )


def _template_error(error: Exception) -> NotRendered:
    return NotRendered(
        f"the chat template refuses this chat: {type(error).__name__}: {error}; "
        "change the messages or the template"
    )
