"""Chats through the tokenizer's template: their text, their tokens, and which the model wrote.

Two ways to know the assistant's tokens. A template with `{% generation %}` says so itself (unless
the tokenizer trims spaces). Any other is rendered turn by turn: what the assistant's turn adds to
the text is the assistant's.
"""

import os
import re
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from dspark_megatron.config import ConfigError, require

GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
WAY_OUT = (
    "give lines with input_ids and loss_mask, or a chat template with {% generation %} around "
    "the assistant's text"
)


class ChatTemplate:
    """A tokenizer's chat template, inspected once.

    Raises ConfigError for a tokenizer without a template or without character offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        require(
            tokenizer.is_fast,
            f"{type(tokenizer).__name__} gives no character offsets; use a fast tokenizer "
            "(tokenizer.json); training lines may have input_ids and loss_mask instead",
        )
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise ConfigError(
                "the tokenizer has no (default) chat template; add chat_template.jinja to the "
                "target's folder; training lines may have input_ids and loss_mask instead"
            ) from error
        self._tokenizer = tokenizer
        marked = GENERATION_TAG.search(template) is not None
        self._marks_generation = marked and not _trims_spaces(tokenizer)
        added = tokenizer.added_tokens_decoder.items()
        self._special_ids = {i for i, token in added if token.special}
        self._special_ids.update(tokenizer.all_special_ids)

    def render(self, messages: list[dict], *, add_generation_prompt: bool = False) -> str:
        """The chat as text. ConfigError when the template refuses it."""
        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is foreign code and may raise anything
            raise _template_error(error) from error

    def tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character ranges of a rendered chat: [s] and [s] pairs."""
        try:
            encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        except TypeError as error:  # the tokenizer's answer to a lone surrogate
            raise ConfigError(f"the text is not valid Unicode: {error}") from error
        return encoded["input_ids"], encoded["offset_mapping"]

    def encode(
        self, messages: list[dict], *, cut_short: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Ids of the rendered chat and whether the assistant wrote them: [s] and [s].

        The end-of-turn token counts as written, but not that of a last answer that was cut short;
        white space that the template puts after it does not. Raises ConfigError for a template
        that rewrites earlier turns.
        """
        if self._marks_generation:
            token_ids, mask = self._encode_marked(messages)
        else:
            text = self.render(messages)
            token_ids, offsets = self.tokenize(text)
            mask = _tokens_inside(offsets, self._assistant_spans(messages, text), len(text))
        mask = self._without_space_after_end_of_turn(token_ids, mask)
        if cut_short and any(mask):
            last = len(mask) - 1 - mask[::-1].index(True)
            mask[last] = token_ids[last] not in self._special_ids
        return token_ids, mask

    def _encode_marked(self, messages: list[dict]) -> tuple[list[int], list[bool]]:
        try:
            encoded = self._tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception as error:
            raise _template_error(error) from error
        return encoded["input_ids"], [bool(written) for written in encoded["assistant_masks"]]

    def _assistant_spans(self, messages: list[dict], text: str) -> list[tuple[int, int]]:
        """Half-open character ranges of `text` (all of `messages`), one per assistant turn."""
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self.render(messages[:turn], add_generation_prompt=True)
                last = turn + 1 == len(messages)
                after = text if last else self.render(messages[: turn + 1])
                _check_nested(before, after, turn)
                _check_nested(after, text, turn)
                spans.append((len(before), len(after)))
        return spans

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


def _tokens_inside(
    offsets: list[tuple[int, int]], spans: list[tuple[int, int]], text_length: int
) -> list[bool]:
    """Whether each token starts inside a span of the text. [s] pairs -> [s]."""
    inside = bytearray(text_length)
    for first, last in spans:
        inside[first:last] = b"\x01" * (last - first)
    mask = []
    for start, end in offsets:
        # Byte-level tokenizers may trim spaces off their ranges: a token of nothing but spaces
        # then has the empty range at its own end, and its last character is the one before.
        position = start if end > start else start - 1
        mask.append(position >= 0 and bool(inside[position]))
    return mask


def _check_nested(shorter: str, longer: str, turn: int) -> None:
    if longer.startswith(shorter):
        return
    same = len(os.path.commonprefix([shorter, longer]))
    raise ConfigError(
        f"the chat template renders the turns up to message {turn} (assistant) differently when "
        f"more follows: {shorter[same:][:40]!r} against {longer[same:][:40]!r} after "
        f"{same} equal characters. It rewrites earlier turns (some drop old reasoning), so the "
        f"assistant's tokens cannot be found by comparing; {WAY_OUT}"
    )


def _template_error(error: Exception) -> ConfigError:
    return ConfigError(
        f"the chat template refuses this chat: {type(error).__name__}: {error}; "
        "change the messages or the template"
    )
