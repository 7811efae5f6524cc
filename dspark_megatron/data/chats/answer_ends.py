"""The last token of an answer.

Shapes: s tokens of the text.
"""

from transformers import PreTrainedTokenizerBase

from dspark_megatron.data.chats.tokens import runs


def up_to_first_stop(
    token_ids: list[int], mask: list[bool], stop_ids: frozenset[int]
) -> list[bool]:
    """The mask of answers up to the first stop token of each: what follows it is not the target's,
    and one that stands right behind an answer is. [s] -> [s]."""
    kept = list(mask)
    for start, end in runs(mask):
        stop = next((i for i in range(start, end) if token_ids[i] in stop_ids), None)
        if stop is not None:
            kept[stop + 1 : end] = [False] * (end - stop - 1)
        elif end < len(mask) and token_ids[end] in stop_ids:
            kept[end] = True
    return kept


class AnswerEnds:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int]) -> None:
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        added = tokenizer.added_tokens_decoder.items()
        self._special_ids = {i for i, token in added if token.special}
        self._special_ids.update(tokenizer.all_special_ids)

    def trim(self, token_ids: list[int], mask: list[bool]) -> list[bool]:
        """The mask of answers as far as the target writes them. [s] -> [s]."""
        mask = up_to_first_stop(token_ids, mask, self._stop_ids)
        return self._without_space_after_end_of_turn(token_ids, mask)

    def _without_space_after_end_of_turn(
        self, token_ids: list[int], mask: list[bool]
    ) -> list[bool]:
        """ChatML's "\\n" after `<|im_end|>` belongs to the turn, but no model ever writes it."""
        kept = list(mask)
        for start, end in runs(mask):
            special = [i for i in range(start, end) if token_ids[i] in self._special_ids]
            cut = special[-1] + 1 if special else end
            if not self._tokenizer.decode(token_ids[cut:end]).strip():
                kept[cut:end] = [False] * (end - cut)  # else words follow: it ends no turn
        return kept
