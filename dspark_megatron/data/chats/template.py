"""Chats through the tokenizer's template: their text, their tokens, and which the model wrote.

Two ways to know the assistant's tokens. A template with `{% generation %}` says so itself (unless
the tokenizer trims spaces). Any other is rendered turn by turn, and answers.py tells what the
target saw and wrote. Where such a template renders earlier turns differently when more follows
(some drop old reasoning), a chat becomes several samples, each as the target saw it.
"""

import re
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from dspark_megatron.data.chats.answer_ends import AnswerEnds
from dspark_megatron.data.chats.answers import AnswerRules, Rendering, written_answer
from dspark_megatron.data.chats.marked_answers import not_written
from dspark_megatron.data.chats.messages import Chat
from dspark_megatron.data.chats.reasoning import ReasoningMask
from dspark_megatron.data.chats.rendered import LeftOut, NotRendered, check_rendered
from dspark_megatron.data.chats.template_date import on_day
from dspark_megatron.data.chats.tokens import Span, check_offsets, spans_of, tokenize, tokens_inside
from dspark_megatron.errors import ConfigError

GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Rendered(NamedTuple):
    """A chat up to an assistant turn, as text."""

    text: str
    answers: list[Span]
    """Where the assistant wrote it."""
    end: int
    """Where it stopped writing."""


class ChatTemplate:
    """A tokenizer's chat template, inspected once.

    `reasoning`: takes reasoning out of what is to be learnt; null: it stays. `rules`: where answers
    begin and end.
    Raises ConfigError for a tokenizer without a template or without character offsets.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        reasoning: ReasoningMask | None = None,
        rules: AnswerRules | None = None,
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
        self._reasoning, self._rules = reasoning, rules or AnswerRules()
        marked = GENERATION_TAG.search(template) is not None
        self._knows_developer = "developer" in template
        self._marks_generation = marked and not _trims_spaces(tokenizer)
        self._ends = AnswerEnds(tokenizer, self._rules.stop_ids)

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
        self,
        messages: list[dict],
        options: dict[str, Any] | None,
        add_generation_prompt: bool = False,
    ) -> str:
        """Without a look at what it lacks."""
        options = {**(options or {}), "add_generation_prompt": add_generation_prompt}
        return self._apply(messages, options, tokenize=False)

    def _with_known_roles(self, messages: list[dict]) -> list[dict]:
        """`developer` as `system`, its older name, where the template does not speak of it."""
        if self._knows_developer:
            return messages
        return [
            {**message, "role": "system"} if message["role"] == "developer" else message
            for message in messages
        ]

    def _whole(self, chat: Chat) -> str | None:
        """The text of the whole chat, if it has every answer as it was written."""
        try:
            text = self._render(chat.messages, chat.template_options)
            check_rendered(
                text, chat.messages, chat.template_options, answers=range(len(chat.messages))
            )
        except LeftOut:
            return None
        return text

    def tokenize(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids and character ranges of a rendered chat: [s] and [s] pairs."""
        return tokenize(self._tokenizer, text)

    def encode(self, chat: Chat) -> list[tuple[list[int], list[bool]]]:
        """Ids of the rendered chat and whether the assistant wrote them, to be learnt: [s] and [s];
        several where the template rewrites earlier turns, each up to another assistant turn.

        The end-of-turn token counts as written, but not that of a last answer that was cut short;
        what the template puts after it does not.
        """
        if self._marks_generation and not chat.given and (text := self._whole(chat)) is not None:
            return [self._encode_marked(chat, text)]
        return [self._encode_part(part) for part in self._assistant_parts(chat)]

    def _encode_part(self, part: Rendered) -> tuple[list[int], list[bool]]:
        token_ids, offsets = self.tokenize(part.text)
        mask = tokens_inside(offsets, part.answers, len(part.text))
        length = sum(end <= part.end for _, end in offsets)
        mask = self._ends.trim(token_ids[:length], mask[:length])
        mask += [False] * (len(token_ids) - length)
        return token_ids, self._without_reasoning(part.text, offsets, mask)

    def _encode_marked(self, chat: Chat, text: str) -> tuple[list[int], list[bool]]:
        encoded = self._apply(
            chat.messages,
            chat.template_options,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        token_ids, marks = encoded["input_ids"], [bool(m) for m in encoded["assistant_masks"]]
        offsets = encoded["offset_mapping"]
        marked, tags = spans_of(offsets, marks), self._rules.tags
        hidden = not_written(text, marked, chat.messages, tags, cut_short=chat.cut_short)
        inside = tokens_inside(offsets, hidden, len(text))
        mask = self._ends.trim(token_ids, marks)
        mask = [written and not out for written, out in zip(mask, inside, strict=True)]
        return token_ids, self._without_reasoning(text, offsets, mask)

    def _without_reasoning(self, text: str, offsets: list[Span], mask: list[bool]) -> list[bool]:
        return mask if self._reasoning is None else self._reasoning.hide(text, offsets, mask)

    def _assistant_parts(self, chat: Chat) -> list[Rendered]:
        """The chat up to its last assistant turn to be learnt, in one part while each turn adds
        to the text of the one before."""
        messages, options = chat.messages, chat.template_options
        parts: list[Rendered] = []
        for turn in range(chat.given, len(messages)):
            if messages[turn]["role"] != "assistant":
                continue
            prompt = self.render(messages[:turn], options, add_generation_prompt=True)
            after = base = self._render(messages[: turn + 1], options)
            if not after.startswith(prompt):
                base = self._render(messages[:turn], options)
            is_cut = chat.cut_short and turn == len(messages) - 1
            answer = written_answer(
                Rendering(base, prompt, after), messages[turn], self._rules.tags, cut_short=is_cut
            )
            text = "".join(answer)
            check_rendered(text, messages[: turn + 1], options, answers=range(turn, turn + 1))
            earlier = []
            if parts and answer.seen.startswith(parts[-1].text):
                earlier = parts.pop().answers
            end = len(answer.seen) + len(answer.wrote)
            answers = [*earlier, (len(answer.seen), end)]
            parts.append(Rendered(text, answers, end))
        return parts

    def _apply(self, messages: list[dict], options: dict[str, Any], **how: Any) -> Any:
        """What `apply_chat_template` makes of a chat; ConfigError when the template refuses it."""
        options = {**options, **how}
        if self._rules.template_date is not None:
            template = self._tokenizer.get_chat_template(tools=options.get("tools"))
            options["chat_template"] = on_day(template, self._rules.template_date)
        try:
            return self._tokenizer.apply_chat_template(self._with_known_roles(messages), **options)
        except Exception as error:  # a template is foreign code and may raise anything
            raise _template_error(error) from error


def _trims_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether spaces belong to no token's character range. Transformers then misplaces the marks
    of `{% generation %}`: an answer that starts with a space loses its marks, and one that ends
    with a space marks all that follows."""
    encoded = tokenizer("a  ", add_special_tokens=False, return_offsets_mapping=True)
    return sum(end - start for start, end in encoded["offset_mapping"]) < 3


def _template_error(error: Exception) -> NotRendered:
    return NotRendered(
        f"the chat template refuses this chat: {type(error).__name__}: {error}; "
        "change the messages or the template"
    )
