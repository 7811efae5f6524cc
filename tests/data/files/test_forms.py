"""Forms of a training line: which text each becomes, and which of it is learnt."""

import pytest
from tokenizers import processors

from dspark_megatron.errors import ConfigError
from support.chat_lines import chat, talk, turns
from support.samples import FORGETTING_TEMPLATE, GENERATION_TEMPLATE, VOCAB_SIZE
from support.tiny_tokenizer import tiny_tokenizer

TAGS = ("<think>", "</think>")


# As some reasoning models' do: the prompt opens the reasoning, and past turns lose theirs.
OPENING_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls %}<call>{{ call.function.name }}"
    "{% for k, v in call.function.arguments | items %} {{ k }}={{ v }}{% endfor %}</call>"
    "{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def calling(function):
    call = {"type": "function", "function": function}
    return {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}


# ShareGPT
def test_sharegpt_is_the_chat_of_its_turns(learnt):
    pairs = [("system", "kind"), ("human", "hi"), ("gpt", "hello"), ("tool", "3"), ("gpt", "bye")]
    roles = ["system", "user", "assistant", "tool", "assistant"]
    messages = [{"role": r, "content": c} for r, (_, c) in zip(roles, pairs, strict=True)]
    expected = learnt({"messages": messages})
    assert learnt(turns(*pairs)) == learnt({"conversations": messages}) == expected
    assert learnt({**turns(*pairs[1:]), "system": "kind"}) == expected
    assert expected[0][1] == "hello<|im_end|>bye<|im_end|>"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (turns(("human", "hi"), ("robot", "x")), "turn 1 is \"from\" 'robot', .* one of human,"),
        (turns(("human", "hi"), ("gpt", None)), r'turn 1 \(gpt\) must have a "value"'),
        ({"conversations": []}, '"conversations" must be a list of at least one message'),
        ({"conversations": [{"value": "x"}]}, 'message 0 must be an object with a string "role"'),
        ({**turns(("human", "hi")), "system": 3}, '"system" must be a string, not 3'),
        ({**chat("hi", "x"), "tools": "[{"}, '"tools" must be a list or the JSON text'),
        ({**chat("hi", "x"), "chat_template_kwargs": []}, None),
        ({**chat("hi", "x"), "chat_template_kwargs": 1}, '"chat_template_kwargs" must be an obj'),
        (
            calling({"name": "add", "arguments": "[3"}),
            "calls add with arguments that are no",
        ),
        (
            {"messages": [{"role": "user", "content": "hi", "thinking": True}]},
            r'message 0 \(user\) must have a "thinking" that is a string, not True',
        ),
        (calling({"arguments": {}}), 'tool call without a "function" with a "name"'),
        ({"messages": [{"role": "assistant", "tool_calls": 3}]}, '"tool_calls" that are a list'),
        ({"completion": "x"}, "two strings or two lists of messages, not None and 'x'"),
        ({"prompt": [], "completion": "x"}, r"two strings or .*, not \[\] and 'x'"),
        ({"prompt": "x", "completion": "x", "input_ids": [1]}, "a line must have one of"),
    ],
)
def test_malformed_lines(learnt, record, message):
    if message is None:
        assert learnt(record)
        return
    with pytest.raises(ConfigError, match=message):
        learnt(record)


# Prompt and completion
def test_texts_stay_as_they_are_and_end_with_eos(learnt):
    record = {"prompt": "hi\nthere: ", "completion": "all well"}
    assert learnt(record) == [("hi\nthere: all well<|im_end|>", "all well<|im_end|>")]
    written_out = {**record, "completion": "all well<|im_end|>"}
    assert learnt(written_out) == learnt(record)
    assert learnt({**record, "finish_reason": "length"}) == [("hi\nthere: all well", "all well")]


def test_a_token_that_begins_in_the_prompt_is_not_learnt(learnt):
    [(_, text)] = learnt({"prompt": "h", "completion": "e all"})  # "he" is one token
    assert text == " all<|im_end|>"


def test_texts_get_the_special_tokens_of_the_tokenizer(tokenizer, learnt):
    bos, eos = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<|im_start|>", "<|im_end|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[bos, eos]
    )
    [(whole, text)] = learnt({"prompt": "hi ", "completion": "all"})
    assert (whole, text) == ("<|im_start|>hi all<|im_end|>", "all<|im_end|>")


def test_a_completion_needs_an_end(tokenizer, learnt):
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="eos token, and it has none"):
        learnt({"prompt": "hi", "completion": "all"})


@pytest.mark.parametrize("template", [None, GENERATION_TEMPLATE])
def test_lists_of_messages_go_through_the_template(learnt, template):
    messages = chat("hi", "hello", "and", "bye", "more", "all")["messages"]
    record = {"prompt": messages[:3], "completion": messages[3:]}
    [(whole, text)] = learnt(record, template)
    assert text == "bye<|im_end|>all<|im_end|>"
    assert whole == learnt({"messages": messages}, template)[0][0]
    with pytest.raises(ConfigError, match="nothing to learn"):
        learnt({"prompt": messages, "completion": messages[:1]})


# Templates that rewrite earlier turns
def test_a_rewritten_chat_is_one_sample_for_each_turn_as_the_target_saw_it(learnt):
    record = chat("hi", "hm</think>hello", "and?", "so</think>bye")
    first, second = learnt(record, FORGETTING_TEMPLATE)
    assert first[1] == "hm</think>hello<|im_end|>"
    assert second[1] == "so</think>bye<|im_end|>"
    assert "\nhello<|im_end|>" in second[0] and "hm</think>" not in second[0]
    cut = learnt({**record, "finish_reason": "length"}, FORGETTING_TEMPLATE)
    assert [text for _, text in cut] == [first[1], "so</think>bye"]


def test_turns_that_are_not_rewritten_share_a_sample(learnt):
    record = chat("hi", "one", "and?", "hm</think>two", "more", "three", "end")
    samples = learnt(record, FORGETTING_TEMPLATE)
    assert [text for _, text in samples] == [
        "one<|im_end|>hm</think>two<|im_end|>",
        "three<|im_end|>",
    ]
    assert all("end" not in whole.replace("<|im_end|>", "") for whole, _ in samples)


# Reasoning
@pytest.mark.parametrize("template", [None, GENERATION_TEMPLATE])
def test_reasoning_is_kept_or_masked(learnt, template):
    record = talk("hi", "<think>the\n</think>\n\nhello", "<think>", "in <think>he</think>the")
    [kept] = learnt(record, template)
    [masked] = learnt(record, template, TAGS)
    assert masked[0] == kept[0]
    assert kept[1] == "<think>the\n</think>\n\nhello<|im_end|>in <think>he</think>the<|im_end|>"
    assert masked[1] == "\n\nhello<|im_end|>in the<|im_end|>"


def test_reasoning_that_the_prompt_opens(learnt):
    messages = chat("hi", "hello", "and", "bye")["messages"]
    for message in messages[1::2]:
        message["reasoning_content"] = "hm"
    kept = learnt({"messages": messages}, OPENING_TEMPLATE)
    assert [text for _, text in kept] == ["hm</think>hello<|im_end|>", "hm</think>bye<|im_end|>"]
    masked = learnt({"messages": messages}, OPENING_TEMPLATE, TAGS)
    assert [text for _, text in masked] == ["hello<|im_end|>", "bye<|im_end|>"]


def test_reasoning_that_is_never_closed(learnt):
    record = {"prompt": "hi", "completion": "all<think>the", "finish_reason": "length"}
    assert learnt(record, tags=TAGS)[0][1] == "all"
    [(_, text)] = learnt(talk("hi", "<think>the"), tags=TAGS)
    assert text == ""


def test_other_tags(learnt):
    record = {"prompt": "hi", "completion": "[THINK]the[/THINK]all"}
    assert learnt(record, tags=("[THINK]", "[/THINK]"))[0][1] == "all<|im_end|>"


# Tools
def test_tool_calls_and_the_options_of_the_template(learnt):
    call = {"type": "function", "function": {"name": "add", "arguments": '{"n": 3}'}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
    ]
    [(whole, text)] = learnt({"messages": messages, "tools": '[{"name": "add"}]'}, OPENING_TEMPLATE)
    assert text == "hm</think><call>add n=3</call><|im_end|>"
    assert whole.startswith('<|im_start|>tools\n[{"name": "add"}]<|im_end|>')
    [(named, _)] = learnt(
        {**chat("hi", "all"), "chat_template_kwargs": {"name": "the"}},
        "{{ name }}" + tiny_tokenizer(VOCAB_SIZE).chat_template,
    )
    assert named.startswith("the<|im_start|>")


def test_rules_of_samples_are_the_rules_of_training(tiny_run):
    """Under the rule `token` a gap does not drop a sample that has something to learn."""
    import torch

    from dspark_megatron.data.blocks import has_block
    from dspark_megatron.run.data import sample_rules
    from support.tiny_target import tiny_config

    masks = {"adjacent": [0, 1, 1], "gap": [1, 0, 1], "far": [1, 0, 0, 0, 1], "last": [0, 0, 1]}

    def kept(**loss):
        rules = sample_rules(tiny_config(tiny_run, loss=loss))
        return {
            name
            for name, mask in masks.items()
            if has_block(torch.tensor(mask).bool(), rules.num_draft_tokens, rules.loss)
        }

    token = {"anchor_rule": "token"}
    assert kept() == kept(**token) == {"adjacent"}
    assert kept(**token, supervised_slots="all") == {"adjacent", "gap"}  # slots reach 3 ahead
    assert kept(**token, slot_mask="input") == {"adjacent", "gap", "far"}
