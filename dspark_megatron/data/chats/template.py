"""A chat through the tokenizer's chat template: its text, its tokens, and which the target wrote.

There are two ways to find the assistant's tokens. A template with `{% generation %}` marks them
itself. Any other is rendered turn by turn, and `answers.py` finds what the target saw and wrote.
Some of these render earlier turns differently once more follows, for example without their
reasoning. Such a chat becomes several samples, each as the target saw it.
"""

import re
from datetime import date
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from dspark_megatron.data.chats.answers import AnswerRules, Rendering, not_written, written_answer
from dspark_megatron.data.chats.bounded_rendering import bounded, check_template, checked_text
from dspark_megatron.data.chats.completeness import LeftOut, NotRendered, check_complete
from dspark_megatron.data.chats.loss_mask import (
    AnswerEnds,
    Encoding,
    ReasoningMask,
    Span,
    check_offsets,
    spans_of,
    tokenize,
    tokens_inside,
    without,
)
from dspark_megatron.data.chats.messages import Chat
from dspark_megatron.data.files.bad_lines import NoFurther
from dspark_megatron.errors import ConfigError

GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
CLOCK = "strftime_now"
"""The function by which templates read the clock, in serving engines and Transformers."""
_DIRECTIVES = "aAbBcdHIjmMpSUwWxXyYZGuVDFeT"


class Rendered(NamedTuple):
    """A chat up to an assistant turn, as text."""

    text: str
    answers: list[Span]
    """The parts that the assistant wrote."""


class ChatTemplate:
    """A tokenizer's chat template, inspected once.

    `reasoning` takes reasoning out of what is learnt. `rules` say where answers begin and end.
    Raises ConfigError for a tokenizer without a template or character offsets.
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
        self._reasoning, self._rules = reasoning or ReasoningMask(None), rules or AnswerRules()
        check_template(str(template))
        marked = GENERATION_TAG.search(template) is not None
        self._knows_developer = "developer" in template
        self._marks_generation = marked and not _trims_spaces(tokenizer)
        self._ends = AnswerEnds(tokenizer, self._rules.stop_ids)

    def render_prompt(self, chat: Chat) -> str:
        """The chat as text, up to where the assistant begins to write. Raises ConfigError when the
        template refuses the chat, LeftOut when the text lacks something that the chat says."""
        text = self._text(chat, add_generation_prompt=True)
        check_complete(text, chat.messages, chat.template_options, answers=range(0))
        return text

    def tokenize(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids and character ranges of a rendered chat: [s] and [s] pairs."""
        return tokenize(self._tokenizer, text)

    def encode(self, chat: Chat) -> list[Encoding]:
        """The rendered chat, of which is learnt what the assistant wrote. There are several if the
        template rewrites earlier turns, each up to another assistant turn.

        The token that ends a turn counts as written, unless it ends a last answer that was cut
        short. What the template puts after that token does not count.
        """
        if self._marks_generation and not chat.given and (text := self._whole(chat)) is not None:
            return [self._encode_marked(chat, text)]
        return [self._encode_part(part) for part in self._assistant_parts(chat)]

    def _whole(self, chat: Chat) -> str | None:
        """The text of the whole chat, if it has every answer as it was written."""
        try:
            text = self._text(chat)
            every = range(len(chat.messages))
            check_complete(text, chat.messages, chat.template_options, answers=every)
        except LeftOut:
            return None
        return text

    def _encode_marked(self, chat: Chat, text: str) -> Encoding:
        encoded = self._apply(
            chat,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        token_ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        marks = [bool(mark) for mark in encoded["assistant_masks"]]
        marked, tags = spans_of(offsets, marks), self._rules.tags
        hidden = not_written(text, marked, chat.messages, tags, cut_short=chat.cut_short)
        mask = self._ends.trim(token_ids, marks)
        mask = without(mask, tokens_inside(offsets, hidden, len(text)))
        return token_ids, self._reasoning.hide(text, offsets, mask)

    def _encode_part(self, part: Rendered) -> Encoding:
        token_ids, offsets = self.tokenize(part.text)
        mask = tokens_inside(offsets, part.answers, len(part.text))
        length = sum(end <= part.answers[-1][1] for _, end in offsets)
        mask = self._ends.trim(token_ids[:length], mask[:length])
        mask += [False] * (len(token_ids) - length)
        return token_ids, self._reasoning.hide(part.text, offsets, mask)

    def _assistant_parts(self, chat: Chat) -> list[Rendered]:
        """The chat up to its last assistant turn to be learnt. It is one part as long as each turn
        continues the text of the one before."""
        parts: list[Rendered] = []
        for turn in range(chat.given, len(chat.messages)):
            message = chat.messages[turn]
            if message["role"] != "assistant":
                continue
            before = chat._replace(messages=chat.messages[:turn])
            upto = chat._replace(messages=chat.messages[: turn + 1])
            prompt = self.render_prompt(before)
            after = self._text(upto)
            base = after if after.startswith(prompt) else self._text(before)
            is_cut = chat.cut_short and turn == len(chat.messages) - 1
            rendering = Rendering(base, prompt, after)
            answer = written_answer(rendering, message, self._rules.tags, cut_short=is_cut)
            text, this = "".join(answer), range(turn, turn + 1)
            check_complete(text, upto.messages, chat.template_options, answers=this)
            continues = parts and answer.seen.startswith(parts[-1].text)
            earlier = parts.pop().answers if continues else []
            end = len(answer.seen) + len(answer.wrote)
            parts.append(Rendered(text, [*earlier, (len(answer.seen), end)]))
        return parts

    def _text(self, chat: Chat, *, add_generation_prompt: bool = False) -> str:
        """What the template makes of a chat, complete or not."""
        how = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        return checked_text(self._apply(chat, **how))

    def _apply(self, chat: Chat, **how: Any) -> Any:
        """What `apply_chat_template` makes of a chat. ConfigError when the template refuses it."""
        options = {**chat.template_options, **how}
        if self._rules.template_date is not None:
            template = self._tokenizer.get_chat_template(tools=options.get("tools"))
            options["chat_template"] = on_day(template, self._rules.template_date)
        messages = chat.messages
        if not self._knows_developer:  # `system` is its older name
            roles = ("system" if m["role"] == "developer" else m["role"] for m in messages)
            messages = [{**m, "role": role} for m, role in zip(messages, roles, strict=True)]
        try:
            with bounded():
                return self._tokenizer.apply_chat_template(messages, **options)
        except NoFurther:
            raise
        except Exception as error:  # a template is foreign code and may raise anything
            raise NotRendered(
                f"the chat template refuses this chat: {type(error).__name__}: {error}; "
                "change the messages or the template"
            ) from error


def _trims_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether spaces belong to no token's character range. Transformers then misplaces the marks
    of `{% generation %}`: an answer that starts with a space loses its marks, and one that ends
    with a space marks all that follows."""
    encoded = tokenizer("a  ", add_special_tokens=False, return_offsets_mapping=True)
    return sum(end - start for start, end in encoded["offset_mapping"]) < 3


def reads_clock(template: str | dict[str, str] | None) -> bool:
    return CLOCK in str(template)


def on_day(template: str, day: str) -> str:
    """The template with a clock that stands at the beginning of a day (YYYY-MM-DD), so that its
    text is the same on every day and every rank."""
    if not reads_clock(template):
        return template
    moment, text = date.fromisoformat(day), "format"
    for letter in _DIRECTIVES:
        for directive in (f"%-{letter}", f"%{letter}"):
            text += f".replace({directive!r}, {moment.strftime(directive)!r})"
    # The line ends here: a template may depend on what its first line begins with, and Jinja takes
    # the line break after a block away.
    return f"{{% macro {CLOCK}(format) %}}{{{{ {text} }}}}{{% endmacro %}}\n{template}"
