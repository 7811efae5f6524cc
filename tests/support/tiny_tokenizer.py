"""A tokenizer made on the spot: byte-level BPE with a few merges and ChatML's tokens."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

MERGES = [("Ċ", "Ċ"), ("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("Ġ", "Ġ"), ("i", "n"), ("l", "l")]
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>", "<|pad|>", "<|mask|>"]
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """Exactly `vocab_size` tokens: 256 bytes, the merges, ChatML's four, and reserved ones that
    never occur. eos is `<|im_end|>`; it saves to and loads from a folder like any other."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*alphabet, *(left + right for left, right in MERGES)]
    reserved = vocab_size - len(vocabulary) - len(CHATML_TOKENS)
    if reserved < 0:
        raise ValueError(f"vocab_size ({vocab_size}) must be at least {vocab_size - reserved}")
    ids = {token: i for i, token in enumerate(vocabulary)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    special = [*CHATML_TOKENS, *(f"<|reserved_{i}|>" for i in range(reserved))]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        mask_token="<|mask|>",
        chat_template=CHATML_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
