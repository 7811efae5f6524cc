"""Tokens with the characters that they stand for, and which of them are learnt.

Shapes: s tokens of the text.
"""

from itertools import accumulate, groupby

from transformers import PreTrainedTokenizerBase

from dspark_megatron.errors import ConfigError, require

Span = tuple[int, int]
"""A half-open range of characters, or of tokens."""
Encoding = tuple[list[int], list[bool]]
"""The token ids of a text, and whether each is learnt: [s] and [s]."""


def check_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    """ConfigError for a tokenizer that does not tell which characters a token stands for."""
    require(
        tokenizer.is_fast,
        f"{type(tokenizer).__name__} gives no character offsets; use a fast tokenizer "
        "(tokenizer.json); training lines may have input_ids and loss_mask instead",
    )


def tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False
) -> tuple[list[int], list[Span]]:
    """Ids and character ranges of a text: [s] and [s] pairs. A token that the tokenizer adds has
    the range (0, 0)."""
    try:
        encoded = tokenizer(
            text, add_special_tokens=add_special_tokens, return_offsets_mapping=True
        )
    except TypeError as error:  # the tokenizer's answer to a lone surrogate
        raise ConfigError(f"the text is not valid Unicode: {error}") from error
    return encoded["input_ids"], encoded["offset_mapping"]


def detokenize(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> tuple[str, list[Span]]:
    """The text of tokens that are decoded one by one, and the range of each: [s] pairs. A letter
    that is spread over several tokens is lost."""
    texts = tokenizer.batch_decode([[i] for i in token_ids], clean_up_tokenization_spaces=False)
    ends = list(accumulate(map(len, texts)))
    return "".join(texts), list(zip([0, *ends], ends, strict=False))


def tokens_inside(offsets: list[Span], spans: list[Span], text_length: int) -> list[bool]:
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


def spans_of(offsets: list[Span], mask: list[bool]) -> list[Span]:
    """The characters of each run of tokens that are set."""
    return [(offsets[start][0], offsets[end - 1][1]) for start, end in _runs(mask)]


def without(mask: list[bool], hidden: list[bool]) -> list[bool]:
    return [learnt and not out for learnt, out in zip(mask, hidden, strict=True)]


def _runs(mask: list[bool]) -> list[Span]:
    """Ranges of consecutive tokens that are set."""
    found, start = [], 0
    for is_set, run in groupby(mask):
        end = start + len(list(run))
        if is_set:
            found.append((start, end))
        start = end
    return found


def up_to_first_stop(
    token_ids: list[int], mask: list[bool], stop_ids: frozenset[int]
) -> list[bool]:
    """The mask of answers, each up to its first stop token. The target writes nothing after that.
    A stop token right behind an answer is part of it. [s] -> [s]."""
    kept = list(mask)
    for start, end in _runs(mask):
        stop = next((i for i in range(start, end) if token_ids[i] in stop_ids), None)
        if stop is not None:
            kept[stop + 1 : end] = [False] * (end - stop - 1)
        elif end < len(mask) and token_ids[end] in stop_ids:
            kept[end] = True
    return kept


class AnswerEnds:
    """Finds the last token of each answer that the target itself writes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int]) -> None:
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        added = tokenizer.added_tokens_decoder.items()
        self._special_ids = {i for i, token in added if token.special}
        self._special_ids.update(tokenizer.all_special_ids)

    def trim(self, token_ids: list[int], mask: list[bool]) -> list[bool]:
        """The mask of answers as far as the target writes them. [s] -> [s]."""
        kept = up_to_first_stop(token_ids, mask, self._stop_ids)
        for start, end in _runs(kept):
            # In ChatML a "\n" after `<|im_end|>` belongs to the turn, but no model ever writes it.
            special = [i for i in range(start, end) if token_ids[i] in self._special_ids]
            cut = special[-1] + 1 if special else end
            if not self._tokenizer.decode(token_ids[cut:end]).strip():
                kept[cut:end] = [False] * (end - cut)  # else words follow: it ends no turn
        return kept


class ReasoningMask:
    """Takes the reasoning between two tags, and the tags, out of what is learnt. tags: None leaves
    it in.

    The prompt may open the reasoning for the model, and an answer that was cut short may leave it
    open.
    """

    def __init__(self, tags: tuple[str, str] | None) -> None:
        self.tags = tags
        self.hidden_tokens = 0
        """How many tokens were taken out of all texts so far."""

    def hide(self, text: str, offsets: list[Span], mask: list[bool]) -> list[bool]:
        """The mask of a text's tokens without those of reasoning. [s] -> [s]."""
        if self.tags is None:
            return mask
        answers = spans_of(offsets, mask)
        spans = [span for answer in answers for span in _reasoning_in(text, answer, *self.tags)]
        kept = without(mask, tokens_inside(offsets, spans, len(text)))
        self.hidden_tokens += sum(mask) - sum(kept)
        return kept


def _reasoning_in(text: str, answer: Span, opening: str, closing: str) -> list[Span]:
    """The parts of an answer from an opening tag to the closing one, or to its end."""
    position, end = answer
    is_open = text[:position].rstrip().endswith(opening)
    spans: list[Span] = []
    while True:
        start = position if is_open else text.find(opening, position, end)
        if start < 0:
            return spans
        close = text.find(closing, start, end)
        position = end if close < 0 else close + len(closing)
        spans.append((start, position))
        is_open = False
