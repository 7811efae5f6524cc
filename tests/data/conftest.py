import pytest

from dspark_megatron.data.conversation import ConversationEncoder
from support.chat_templates import TEMPLATES
from support.samples import VOCAB_SIZE, supervised_text
from support.tiny_tokenizer import CHATML_TEMPLATE, tiny_tokenizer


@pytest.fixture
def tokenizer():
    return tiny_tokenizer(VOCAB_SIZE)


@pytest.fixture
def learnt(tokenizer):
    """The whole text and the learnt text of each sample of a record (or of its messages), with a
    template or the template of that name."""

    def learnt(record, template=None, tags=None, **line):
        tokenizer.chat_template = TEMPLATES.get(template, template or CHATML_TEMPLATE)
        record = record if isinstance(record, dict) else {"messages": record, **line}
        samples = ConversationEncoder(tokenizer, VOCAB_SIZE, tags).encode(record)
        return [(tokenizer.decode(s.input_ids), supervised_text(tokenizer, s)) for s in samples]

    return learnt
