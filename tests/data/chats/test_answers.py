"""What a target saw and wrote of an answer, under templates that render it otherwise."""

import pytest

from dspark_megatron.data.chats.answers import AnswerRules
from dspark_megatron.data.chats.reasoning import Tags
from dspark_megatron.data.conversation import ConversationEncoder, describe_sample
from dspark_megatron.errors import ConfigError
from support.samples import VOCAB_SIZE
from support.tiny_tokenizer import CHATML_TEMPLATE, tiny_tokenizer

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
TAIL = "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n"
SPLIT = (
    "{% set text = m.content %}{% set why = m.reasoning_content or '' %}{% if '</think>' in text %}"
    "{% set why = text.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set text = text.split('</think>')[-1].lstrip() %}{% endif %}"
)
# The last answer gets a block of reasoning, an empty one if need be; earlier answers lose theirs.
BLOCK = (
    f"{HEAD}{SPLIT}{{% if loop.last %}}<think>\n{{{{ why }}}}\n</think>\n\n{{% endif %}}"
    f"{{{{ text }}}}{TAIL}{PROMPT}{{% endif %}}"
)
# The prompt opens the reasoning, and no answer is told with any.
DROPPED = f"{HEAD}{{{{ m.content.split('</think>')[-1] }}}}{TAIL}{PROMPT}<think>\n{{% endif %}}"
# The prompt opens the reasoning, and answers without any get an empty block.
CLOSED = (
    f"{HEAD}{SPLIT}{{% if why %}}<think>\n{{{{ why }}}}\n</think>\n{{% else %}}<think></think>"
    f"{{% endif %}}{{{{ text }}}}{TAIL}{PROMPT}<think>\n{{% endif %}}"
)
# The prompt has an empty channel that answers are not told with.
PREFIX = f"{HEAD}{{{{ m.content | trim }}}}{TAIL}{PROMPT}<|thought|><thought|>{{% endif %}}"
# The model names its channel itself.
CHANNEL = (
    f"{HEAD}{{% if m.reasoning_content %}}[analysis]{{{{ m.reasoning_content }}}}[end]{{% endif %}}"
    f"[final]{{{{ m.content }}}}{TAIL}{PROMPT}{{% endif %}}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    + SPLIT
    + "{% generation %}<think>\n{{ why }}\n</think>\n\n{{ text }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)
TEMPLATES = {
    "plain": CHATML_TEMPLATE,
    "block": BLOCK,
    "dropped": DROPPED,
    "closed": CLOSED,
    "prefix": PREFIX,
    "channel": CHANNEL,
    "marked": MARKED,
}
WHY, TEXT = "so the inn", "hello there"
WRITTEN = f"<think>\n{WHY}\n</think>\n\n{TEXT}"


def told(content, **keys):
    answer = {"role": "assistant", "content": content, **keys}
    return {"messages": [{"role": "user", "content": "hi"}, answer]}


@pytest.fixture
def answers():
    """Of each sample what follows the last header, with marks around what is learnt."""

    def answers(record, template, masked=None, **rules):
        tokenizer = tiny_tokenizer(VOCAB_SIZE)
        tokenizer.chat_template = TEMPLATES.get(template, template)
        rules = AnswerRules(stop_ids=frozenset([tokenizer.eos_token_id]), **rules)
        samples = ConversationEncoder(tokenizer, VOCAB_SIZE, masked, rules).encode(record)
        texts = [describe_sample(sample, tokenizer).partition("\n")[2] for sample in samples]
        return [text.rpartition("<|im_start|>assistant\n")[2].removesuffix("\n") for text in texts]

    return answers


END = "<|im_end|>⟧"


def up_to_the_cut(texts):
    """Of one sample; what the template puts behind a cut is context that nothing reads."""
    [text] = texts
    assert text.count("⟧") == 1
    return text.partition("⟧")[0] + "⟧"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain", f"⟦{TEXT}{END}"),
        ("block", f"<think>\n\n</think>\n\n⟦{TEXT}{END}"),
        ("dropped", f"⟦{TEXT}{END}"),
        ("closed", f"<think></think>⟦{TEXT}{END}"),
        ("prefix", f"<|thought|><thought|>⟦{TEXT}{END}"),
        ("channel", f"⟦[final]{TEXT}{END}"),
        ("marked", f"<think>\n\n</think>\n\n⟦{TEXT}{END}"),
    ],
)
def test_an_answer_without_reasoning_learns_no_block_that_nobody_wrote(answers, template, expected):
    assert answers(told(TEXT), template) == [expected]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain", f"⟦{WRITTEN}{END}"),
        ("block", f"⟦{WRITTEN}{END}"),
        ("dropped", f"<think>\n⟦{WHY}\n</think>\n\n{TEXT}{END}"),
        ("closed", f"<think>\n⟦{WHY}\n</think>\n{TEXT}{END}"),
        ("marked", f"⟦{WRITTEN}{END}"),
    ],
)
def test_reasoning_that_was_written_is_learnt_with_its_tags(answers, template, expected):
    """Also where the template drops it, and where the prompt opens it."""
    assert answers(told(WRITTEN), template) == [expected]
    if "<think>\n⟦" in expected:  # as a server gives it that takes nothing out
        raw = WRITTEN.removeprefix("<think>\n")
        assert answers(told(raw), template) == [expected]


def test_an_empty_answer_learns_its_end_alone(answers):
    assert answers(told(""), "marked") == [f"<think>\n\n</think>\n\n⟦{END}"]
    assert answers(told(""), "block") == [f"<think>\n\n</think>\n\n⟦{END}"]


def test_reasoning_with_a_key_of_its_own(answers):
    record = told(TEXT, reasoning_content=WHY)
    assert answers(record, "block") == [f"⟦{WRITTEN}{END}"]
    assert answers(record, "dropped") == [f"<think>\n⟦{WHY}\n</think>\n\n{TEXT}{END}"]
    assert answers(record, "closed") == [f"<think>\n⟦{WHY}\n</think>\n{TEXT}{END}"]
    assert answers(record, "channel") == [f"⟦[analysis]{WHY}[end][final]{TEXT}{END}"]
    assert answers(record, "marked") == [f"⟦{WRITTEN}{END}"]


def test_an_empty_block_in_the_message_was_written(answers):
    """By a model that was told not to think."""
    block = "<think>\n\n</think>\n\n"
    assert answers(told(f"{block}{TEXT}"), "block") == [f"⟦{block}{TEXT}{END}"]
    assert answers(told(f"{block}{TEXT}"), "marked") == [f"⟦{block}{TEXT}{END}"]
    expected = f"<think>\n⟦</think>\n\n{TEXT}{END}"
    assert answers(told(f"{block}{TEXT}"), "dropped") == [expected]


@pytest.mark.parametrize("template", ["plain", "block", "dropped", "closed", "marked"])
def test_a_cut_answer_learns_what_was_written_and_no_end(answers, template):
    seen = "<think>\n" if template in ("dropped", "closed") else ""
    for written in (f"<think>\n{WHY}", f"<think>\n{WHY}\n</think>\n\nhello th"):
        [text] = answers({**told(written), "finish_reason": "length"}, template)
        learnt = text.partition("⟦")[2].partition("⟧")[0]
        assert learnt == written.removeprefix(seen).replace(
            "\n\n", "\n" * (2 - (template == "closed"))
        )
        if template != "marked":
            assert text.startswith(f"{seen}⟦")


@pytest.mark.parametrize("template", ["block", "dropped", "closed", "marked"])
@pytest.mark.parametrize("reason", ["length", "stop", None])
def test_reasoning_that_came_to_no_end_learns_no_closing_tag(answers, template, reason):
    """Servers give it a key of its own, and templates close it."""
    record = {**told("", reasoning_content=WHY), "finish_reason": reason}
    text = up_to_the_cut(answers(record, template))
    assert text.replace("⟦", "") == f"<think>\n{WHY}⟧" and "⟦" in text


def test_a_cut_answer_without_reasoning_keeps_the_block_as_context(answers):
    record = {**told("hello th"), "finish_reason": "length"}
    assert up_to_the_cut(answers(record, "block")) == "<think>\n\n</think>\n\n⟦hello th⟧"
    assert up_to_the_cut(answers(record, "prefix")) == "<|thought|><thought|>⟦hello th⟧"
    assert up_to_the_cut(answers(record, "channel")) == "⟦[final]hello th⟧"
    assert (
        up_to_the_cut(answers(record, "dropped")) == "<think>\n⟦hello th⟧"
    )  # it was still reasoning


def test_words_that_stand_in_the_markup_too(answers):
    """An end is looked for behind the header, not in it nor in the end of the turn."""
    for word in ("t", "think", "assistant", "end", "<"):
        record = {**told(word), "finish_reason": "length"}
        assert up_to_the_cut(answers(record, "block")) == f"<think>\n\n</think>\n\n⟦{word}⟧"
        assert up_to_the_cut(answers(record, "plain")) == f"⟦{word}⟧"
        assert answers(told(word), "closed") == [f"<think></think>⟦{word}{END}"]
        assert answers(told(word), "prefix") == [f"<|thought|><thought|>⟦{word}{END}"]


def test_white_space_of_the_answer_is_learnt_as_far_as_the_template_keeps_it(answers):
    record = {**told("  hello \n"), "finish_reason": "length"}
    assert up_to_the_cut(answers(record, "plain")) == "⟦  hello \n⟧"
    assert up_to_the_cut(answers(record, "prefix")) == "<|thought|><thought|>⟦hello⟧"


def test_every_turn_is_as_the_target_saw_it(answers):
    record = told(WRITTEN)
    record["messages"] += told("then all")["messages"]
    both = answers(record, "dropped")
    assert both == [f"<think>\n⟦{WHY}\n</think>\n\n{TEXT}{END}", f"⟦then all{END}"]
    both = answers(record, "prefix")
    assert both[1] == f"<|thought|><thought|>⟦then all{END}"


def test_calls_of_tools_are_learnt_behind_reasoning_that_the_template_drops(answers):
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    template = DROPPED.replace(
        TAIL, "{% for c in m.tool_calls %}[{{ c.function.name }}]{% endfor %}" + TAIL
    )
    record = told(f"<think>\n{WHY}\n</think>\n\n", tool_calls=[call])
    assert answers(record, template) == [f"<think>\n⟦{WHY}\n</think>\n\n[add]{END}"]
    block = BLOCK.replace(
        TAIL, "{% for c in m.tool_calls %}[{{ c.function.name }}]{% endfor %}" + TAIL
    )
    assert answers(told("", tool_calls=[call]), block) == [f"<think>\n\n</think>\n\n⟦[add]{END}"]


def test_tags_are_those_of_the_target(answers):
    template = BLOCK.replace("think>", "why>")
    expected = f"<why>\n\n</why>\n\n⟦{TEXT}{END}"
    assert answers(told(TEXT), template) != [expected]
    assert answers(told(TEXT), template, tags=Tags("<why>", "</why>")) == [expected]


def test_masked_reasoning_that_the_template_drops(answers):
    tags = ("<think>", "</think>")
    assert answers(told(WRITTEN), "dropped", tags) == [f"<think>\n{WHY}\n</think>⟦\n\n{TEXT}{END}"]
    assert answers(told(TEXT), "closed", tags) == [f"<think></think>⟦{TEXT}{END}"]


# Ends


def test_a_stop_token_right_behind_an_answer_is_the_targets(answers):
    """Where the marks leave it out, and where the next turn's header begins with it."""
    assert MARKED.index("endgeneration") < MARKED.index("<|im_end|>")
    assert answers(told(TEXT), "marked")[0].endswith(END)
    template = "{% for m in messages %}{% if m.role == 'user' %}<|im_end|>{{ m.content }}\n"
    template += "<|im_start|>assistant\n{% else %}{{ m.content }}{% endif %}{% endfor %}"
    record = told("one")
    record["messages"] += [{"role": "user", "content": "and"}]
    record["messages"] += [{"role": "assistant", "content": "two"}]
    tokenizer = tiny_tokenizer(VOCAB_SIZE)
    tokenizer.chat_template = template
    rules = AnswerRules(stop_ids=frozenset([tokenizer.eos_token_id]))
    [sample] = ConversationEncoder(tokenizer, VOCAB_SIZE, None, rules).encode(record)
    assert tokenizer.decode(sample.input_ids[sample.loss_mask]) == "one<|im_end|>two"


def test_what_follows_the_first_stop_token_is_not_the_answers(answers):
    assert answers(told("one<|im_end|> two"), "plain") == ["⟦one<|im_end|>⟧ two<|im_end|>"]
    record = {"prompt": "hi ", "completion": "one<|im_end|> two"}
    assert answers(record, "plain") == ["hi ⟦one<|im_end|>⟧ two"]
    assert answers({**record, "completion": "one"}, "plain") == ["hi ⟦one<|im_end|>⟧"]


# Tokens beside messages


def answered(tokenizer, prompt, answer, **message):
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer)]
    mask = [0] * len(ids[0]) + [1] * len(ids[1])
    return {**told(**message), "input_ids": sum(ids, []), "loss_mask": mask}


def test_the_targets_own_tokens_need_no_template(answers):
    tokenizer = tiny_tokenizer(VOCAB_SIZE)
    record = answered(tokenizer, "<|im_start|>hi?", f"{WHY}</think>{TEXT}<|im_end|>", content=TEXT)
    assert answers(record, "{{ raise_exception('no') }}") == [
        f"<|im_start|>hi?⟦{WHY}</think>{TEXT}{END}"
    ]
    masked = answers(record, "plain", ("<think>", "</think>"))
    assert masked == [f"<|im_start|>hi?⟦{WHY}</think>{TEXT}{END}"]  # nothing opens it
    record = answered(tokenizer, "hi<think>", f"{WHY}</think>größe<|im_end|>", content="größe")
    assert answers(record, "plain", ("<think>", "</think>")) == [
        f"hi<think>{WHY}</think>⟦größe{END}"
    ]


def test_tokens_of_another_text_are_refused(answers):
    record = answered(tiny_tokenizer(VOCAB_SIZE), "hi", "one", content="two")
    with pytest.raises(ConfigError, match=r'tokens of "messages".*\'one\', without \[\'two\'\]'):
        answers(record, "plain")


def test_a_prompt_that_is_no_header_and_prefix_is_refused(answers):
    template = "{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}"
    with pytest.raises(
        ConfigError, match="otherwise than its own prompt .*input_ids and loss_mask"
    ):
        answers(told(TEXT), template)
