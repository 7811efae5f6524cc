"""Lines of chats, tokenizers and the samples made of them."""

from transformers import PreTrainedTokenizerFast

from dspark_megatron.data.blocks import DEFAULT_LOSS
from dspark_megatron.data.conversation import Sample
from dspark_megatron.data.rules import SampleRules

VOCAB_SIZE = 320
GENERATION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{%- generation -%}{{ message['content'] + '<|im_end|>' + '\n' }}{%- endgeneration -%}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# Like Qwen3's: the reasoning stays in the last turn only.
FORGETTING_TEMPLATE = (
    "{% for message in messages %}{% set text = message['content'] %}"
    "{% if not loop.last %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + text + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def supervised_text(tokenizer: PreTrainedTokenizerFast, sample: Sample) -> str:
    return tokenizer.decode(sample.input_ids[sample.loss_mask])


def sample_rules(max_length: int, min_loss_tokens: int, **rules: object) -> SampleRules:
    """With the default rule of anchors."""
    return SampleRules(
        max_length=max_length,
        min_loss_tokens=min_loss_tokens,
        num_draft_tokens=4,
        loss=DEFAULT_LOSS,
        **rules,
    )
