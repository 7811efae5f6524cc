"""Text to tokens with their character ranges, and the tokens of a part of the text.

Shapes: s tokens of the text.
"""

from itertools import accumulate, groupby

from transformers import PreTrainedTokenizerBase

from dspark_megatron.errors import ConfigError, require

Span = tuple[int, int]
"""A half-open range of characters."""


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
    """Ids and character ranges of a text: [s] and [s] pairs; (0, 0) for a token that the tokenizer
    adds."""
    try:
        encoded = tokenizer(
            text, add_special_tokens=add_special_tokens, return_offsets_mapping=True
        )
    except TypeError as error:  # the tokenizer's answer to a lone surrogate
        raise ConfigError(f"the text is not valid Unicode: {error}") from error
    return encoded["input_ids"], encoded["offset_mapping"]


def spelled_out(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> tuple[str, list[Span]]:
    """Tokens one by one as text, and the range of each: [s] pairs. Letters of several tokens are
    lost."""
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


def runs(mask: list[bool]) -> list[Span]:
    """Half-open ranges of tokens that are set."""
    found, start = [], 0
    for is_set, run in groupby(mask):
        end = start + len(list(run))
        if is_set:
            found.append((start, end))
        start = end
    return found


def spans_of(offsets: list[Span], mask: list[bool]) -> list[Span]:
    """The text of each run of tokens that are set."""
    return [(offsets[start][0], offsets[end - 1][1]) for start, end in runs(mask)]
