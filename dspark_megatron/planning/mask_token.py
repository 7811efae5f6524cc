"""Which token ids of a target may be the draft's mask token, the safest first."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedTokenizerBase

RESERVED = re.compile(r"[<\[].*(reserved|unused|extra_id|placeholder|dummy).*[>\]]", re.IGNORECASE)
"""Names of tokens that a tokenizer's makers have kept free."""
RARE = ("<|fim_pad|>", "<fim_pad>", "<empty_output>")
"""Tokens of code models that chats do not have."""


@dataclass(frozen=True)
class MaskToken:
    id: int
    name: str
    """Empty for a row of the embedding that is no token."""
    why: str

    def words(self) -> str:
        return f"{self.id}, {self.name + ', ' if self.name else ''}{self.why}"


def mask_tokens(
    tokenizer: PreTrainedTokenizerBase, target_config: PretrainedConfig, stop_ids: list[int]
) -> list[MaskToken]:
    """The tokenizer's mask token; its last and its first reserved token; the first and the last
    spare row of the embedding; tokens that chats do not have. None that pads, begins or ends a
    text, or stands in the chat template. Whether data have them is for their reader to see."""
    text, names = target_config.get_text_config(), tokenizer.get_vocab()
    taken = {text.pad_token_id, text.bos_token_id, *stop_ids}
    taken |= {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    template = str(tokenizer.chat_template)
    free = {
        name: token
        for name, token in names.items()
        if token < text.vocab_size and token not in taken and name not in template
    }
    reserved = sorted(filter(RESERVED.fullmatch, free), key=lambda name: free[name])
    spare = [i for i in range(max(names.values()) + 1, text.vocab_size) if i not in taken]

    def named(choices: Iterable[str], why: str) -> Iterator[MaskToken]:
        return (MaskToken(free[name], name, why) for name in choices if name in free)

    found: dict[int, MaskToken] = {}
    for token in (
        *named([str(tokenizer.mask_token)], "the tokenizer's mask token"),
        *named([*reserved[-1:], *reserved[:1]], "a reserved token of the tokenizer"),
        *(MaskToken(i, "", "a row of the embedding that is no token") for i in _ends(spare)),
        *named(RARE, "a token that chats do not have"),
    ):
        found.setdefault(token.id, token)
    return list(found.values())


def _ends(ids: list[int]) -> list[int]:
    return [*ids[:1], *ids[-1:]]
