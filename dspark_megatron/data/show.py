"""A sample as text, to see with one's own eyes what will be learnt."""

from itertools import groupby
from operator import itemgetter

from transformers import PreTrainedTokenizerBase

from dspark_megatron.data.conversation import Sample

BRACKETS = ("⟦", "⟧")
GREEN = ("\x1b[32m", "\x1b[0m")


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
