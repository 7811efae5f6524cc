"""Chats before and after the template: one spelling of messages, and nothing left out."""

import json

import pytest

from dspark_megatron.data.chats.template import ChatTemplate
from dspark_megatron.data.conversation import ConversationEncoder
from dspark_megatron.data.prompts.chat_prompts import load_prompts, make_prompt
from dspark_megatron.errors import ConfigError
from support.chat_lines import write_jsonl
from support.chat_templates import LAST_QUESTION, QWEN3_ANSWER, TEMPLATES, chatml
from support.samples import GENERATION_TEMPLATE, VOCAB_SIZE
from support.template_table import CASES, QUESTION, TOOL, message
from support.tiny_tokenizer import CHATML_TEMPLATE, tiny_tokenizer

ANSWER = message("assistant", "Lima.")
ASKED_ELSEWHERE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBOR"}}


def calling(arguments, name="weather"):
    call = {"id": "call00001", "type": "function", "function": {"name": name}}
    call["function"]["arguments"] = arguments
    return message("assistant", None, tool_calls=[call])


# One spelling


@pytest.mark.parametrize("empty", [None, "", [], {}])
@pytest.mark.parametrize("template", ["qwen3", "llama-3.1", "gpt-oss"])
def test_empty_keys_change_nothing(learnt, empty, template):
    keys = ("tool_calls", "reasoning_content", "reasoning", "function_call", "refusal", "name")
    spelled = {**ANSWER, **{key: empty for key in keys}}
    assert learnt([QUESTION, spelled], template) == learnt([QUESTION, ANSWER], template)


@pytest.mark.parametrize("template", TEMPLATES)
def test_parts_of_text_are_the_text_for_every_template(learnt, template):
    def both(messages):
        try:
            return learnt(messages, template)
        except ConfigError as error:
            return str(error)

    parts = [{"type": "text", "text": "Which city "}, "is the capital ", {"text": "of Peru?"}]
    assert both([message("user", parts), ANSWER]) == both([QUESTION, ANSWER])


def test_a_template_that_reads_parts_only_gets_them(learnt):
    [(whole, text)] = learnt([QUESTION, ANSWER], "smolvlm")
    assert QUESTION["content"] in whole and text == " Lima.<end_of_utterance>\n"


def test_a_part_that_is_no_text_is_refused(learnt):
    with pytest.raises(ConfigError, match=r"message 0 \(user\) has a part that is no text, and"):
        learnt([message("user", [{"type": "text", "text": "See:"}, ASKED_ELSEWHERE]), ANSWER])


@pytest.mark.parametrize(
    "role, known", [("human", "user"), ("GPT", "assistant"), ("ipython", "tool")]
)
def test_roles_have_one_table_for_both_forms(learnt, role, known):
    def line(named):
        return [QUESTION, message(named, "And so?"), message("user", "Go on."), ANSWER]

    turns = [{"from": m["role"], "value": m["content"]} for m in line(role)]
    expected = learnt(line(known))
    assert learnt(line(role)) == learnt({"conversations": turns}) == expected


def test_a_turn_of_a_speaker_keeps_what_else_it_has(learnt):
    turn = {"from": "gpt", "value": "Lima.", "reasoning_content": "Easy."}
    [(_, text)] = learnt({"conversations": [{"from": "human", "value": "hi"}, turn]}, "qwen3")
    assert text == "<think>\nEasy.\n</think>\n\nLima.<|im_end|>"


def test_a_system_text_of_the_line_comes_first_in_both_forms(learnt):
    expected = learnt([message("system", "Be kind."), QUESTION, ANSWER])
    assert learnt([QUESTION, ANSWER], system="Be kind.") == expected


def test_developer_is_system_where_the_template_does_not_know_it(learnt):
    messages = [message("developer", "Be kind."), QUESTION, ANSWER]
    [(whole, _)] = learnt(messages)
    assert whole.startswith("<|im_start|>system\nBe kind.")
    [(whole, _)] = learnt(messages, "gpt-oss")
    assert "<|start|>developer<|message|>Be kind." in whole
    speaks_of_it = "{# no developer here #}" + TEMPLATES["qwen3-instruct-2507"]
    assert learnt(messages, speaks_of_it) == learnt(messages, "qwen3-instruct-2507")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("template", ["qwen3", "gpt-oss", "ministral-3-reasoning"])
def test_reasoning_stands_under_the_name_that_the_template_reads(learnt, key, template):
    [(_, text)] = learnt([QUESTION, {**ANSWER, key: "Easy."}], template)
    assert (
        "Easy." in text
        and text
        == learnt(
            [QUESTION, {**ANSWER, "reasoning_content": "Easy.", "reasoning": "Easy."}], template
        )[0][1]
    )


def test_two_different_reasonings_are_refused(learnt):
    with pytest.raises(ConfigError, match=r"message 1 \(assistant\) has different texts as"):
        learnt([QUESTION, {**ANSWER, "reasoning": "a", "reasoning_content": "b"}], "qwen3")


@pytest.mark.parametrize("switch", [{"weight": 0}, {"train": False}, {"loss": 0.5}])
def test_turns_that_are_switched_off_are_not_learnt_in_silence(learnt, switch):
    with pytest.raises(ConfigError, match="has .* and every turn of the assistant is learnt"):
        learnt([QUESTION, {**ANSWER, **switch}, QUESTION, ANSWER])
    assert learnt([QUESTION, {**ANSWER, "weight": 1, "train": True}])


def test_a_turn_of_the_prompt_may_be_switched_off():
    """It is context, as the message on others advises."""
    tokenizer = tiny_tokenizer(VOCAB_SIZE)
    record = {"prompt": [QUESTION, {**ANSWER, "weight": 0}, QUESTION], "completion": [ANSWER]}
    assert ConversationEncoder(tokenizer, len(tokenizer)).encode(record)


# Tool calls


@pytest.mark.parametrize("arguments", ['{"city": "Oslo"}', {"city": "Oslo"}])
@pytest.mark.parametrize("template", ["deepseek-v3.1", "qwen3", "llama-3.1", "kimi-k2", "gpt-oss"])
def test_arguments_have_the_form_that_the_template_wants(learnt, arguments, template):
    messages = [
        message("user", "Warm?"),
        calling(arguments),
        message("tool", '{"degrees": 3}', tool_call_id="call00001"),
        message("assistant", "Three."),
    ]
    text = "".join(text for _, text in learnt(messages, template))
    assert '{"city": "Oslo"}' in text and "Three." in text


def test_a_function_call_of_old_is_a_tool_call(learnt):
    call = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    old = message("assistant", None, function_call=call)
    assert learnt([QUESTION, old], "qwen3") == learnt(
        [QUESTION, calling(call["arguments"])], "qwen3"
    )


def test_arguments_that_a_template_prints_as_python_are_refused(learnt):
    answer = "{{ m.content }}{% for c in m.tool_calls %}{{ c.function }}{% endfor %}"
    with pytest.raises(ConfigError, match="prints a call as Python does"):
        learnt([QUESTION, calling({"city": "Oslo"})], chatml(answer))
    of_text = (
        "{% for c in m.tool_calls %}{{ c.function.name }} {{ c.function.arguments }}{% endfor %}"
    )
    [(_, text)] = learnt([QUESTION, calling({"city": "Oslo"})], chatml(of_text))
    assert text == 'weather {"city": "Oslo"}<|im_end|>'
    of_text_in_json = of_text.replace(
        "c.function.arguments", "(c.function.arguments + '') | tojson"
    )
    with pytest.raises(ConfigError, match="leaves out the call of weather of message 1"):
        learnt([QUESTION, calling({"city": "Oslo"})], chatml(of_text_in_json))


@pytest.mark.parametrize("tools", [[TOOL], [{"type": "function", "function": TOOL}]])
def test_tools_have_the_wrapping_that_the_template_wants(learnt, tools):
    names = "{% for tool in tools %}{{ tool.function | tojson }}{% endfor %}"
    [(whole, _)] = learnt([QUESTION, ANSWER], names + CHATML_TEMPLATE, tools=tools)
    assert whole.startswith(json.dumps(TOOL))
    assert learnt([QUESTION, ANSWER], names + CHATML_TEMPLATE, functions=tools)[0][0] == whole


# Nothing left out


@pytest.mark.parametrize(
    "messages, template, line, what",
    [
        ([message("critic", "Hm."), QUESTION, ANSWER], "qwen3", {}, "the text of message 0 .crit"),
        ([QUESTION, ANSWER], "llama-3", {"tools": [TOOL]}, "the line's tools: 'weather'"),
        ([QUESTION, calling("{}")], "llama-3", {}, r"a call of message 1 \(assistant\): 'weather'"),
        ([QUESTION, {**ANSWER, "reasoning": "Easy."}], "llama-3.1", {}, "the reasoning of messa"),
        ([QUESTION, {**ANSWER, "refusal": "No."}], "qwen3", {}, "the refusal of message 1"),
        ([QUESTION, ANSWER], "llama-3", {"tools": [{"type": "web"}]}, "the line's tools: 'type'"),
        ([QUESTION, {**ANSWER, "reasoning": "Easy."}], "lfm2", {}, "the reasoning of message 1"),
        ([QUESTION, message("assistant", "<think>Easy.</think>Lima.")], "deepseek-v3.1", {},
         "the text of message 1 .assistant.: 'Easy.'"),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_is_named(learnt, messages, template, line, what):
    with pytest.raises(ConfigError, match=f"the chat template leaves out {what}"):
        learnt(messages, template, **line)


def test_parts_are_never_learnt_as_data(learnt):
    """A template that prints whatever it is given would print lists of parts."""
    assert learnt([QUESTION, ANSWER], "lfm2")[0][1] == "Lima.<|im_end|>"
    prints = chatml("{{ '' if m.content is string else m.content }}")
    with pytest.raises(ConfigError, match=r"leaves out the text of message 1 .assistant.: 'Lima.'"):
        learnt([QUESTION, ANSWER], prints)


def test_a_text_must_stand_in_its_order(learnt):
    """A result that vanishes is not found in the question that has the same text."""
    without = CHATML_TEMPLATE.replace("in messages %}", "in messages if message.role != 'tool' %}")
    question = message("user", "Is it 3?")
    messages = [question, ANSWER, message("tool", "3"), message("assistant", "Yes.")]
    assert learnt(messages)
    with pytest.raises(ConfigError, match="leaves out the text of message 2 .tool.: '3'"):
        learnt(messages, without)


def test_earlier_reasoning_may_be_dropped_but_not_that_of_the_answer_learnt(learnt):
    thought = "<think>\nEasy.\n</think>\n\nLima."
    messages = [QUESTION, message("assistant", thought), QUESTION, message("assistant", thought)]
    texts = [text for _, text in learnt(messages, "qwen3")]
    assert texts == [f"{thought}<|im_end|>"] * 2


def test_texts_that_a_template_trims_or_escapes_are_there(learnt):
    messages = [
        message("user", " Warm?\n"),
        calling({"city": 'Os"lo', "days": 3, "now": True, "of": [None, {"a": "ü"}]}),
        message("tool", '{"degrees": "3 ü"}'),
        message("assistant", "\nThree. "),
    ]
    for template in ("llama-3.1", "qwen3", "qwen3-coder", "deepseek-v3.1"):
        assert learnt(messages, template)


def test_marked_answers_are_whole_or_compared(learnt):
    """A template with marks that drops earlier reasoning teaches no answer without its own."""
    marked = "{% generation %}" + QWEN3_ANSWER + "<|im_end|>{% endgeneration %}"
    template = chatml(assistant="<|im_start|>assistant\n" + marked + "\n", before=LAST_QUESTION)
    thought = {**ANSWER, "reasoning_content": "Easy."}
    samples = learnt([QUESTION, thought, QUESTION, thought], template)
    assert [text for _, text in samples] == ["<think>\nEasy.\n</think>\n\nLima.<|im_end|>"] * 2


def test_prompts_are_checked_and_spelled_as_chats_are(tmp_path):
    tokenizer = tiny_tokenizer(VOCAB_SIZE)
    tokenizer.chat_template = TEMPLATES["llama-3"]
    parts = {"messages": [message("human", [{"type": "text", "text": "Peru?"}])]}
    path = write_jsonl(tmp_path / "prompts.jsonl", [parts])
    assert "\n\nPeru?<|eot_id|>" in load_prompts(path, tokenizer, None, 999)[0].text
    write_jsonl(path, [{**parts, "tools": [TOOL]}, parts, {"messages": []}])
    with pytest.raises(ConfigError, match="2 of 3 lines") as error:
        load_prompts(path, tokenizer, None, 999)
    assert "prompts.jsonl:1: the chat template leaves out the line's tools" in str(error.value)
    assert "prompts.jsonl:3: " in str(error.value)


def test_an_answered_prompt_is_learnt_as_it_was_asked(learnt):
    """Roles and the line's system text are in the messages that a server gets, and on disk."""
    tokenizer = tiny_tokenizer(VOCAB_SIZE)
    line = {"system": "Be kind.", "messages": [message("human", "Peru?"), ANSWER]}
    ids, _, record = make_prompt(line, ChatTemplate(tokenizer))
    assert record == {"messages": [message("system", "Be kind."), message("user", "Peru?")]}
    [(whole, _)] = learnt([*record["messages"], ANSWER])
    assert whole.startswith(tokenizer.decode(ids)) and whole == learnt(line)[0][0]


# Chats that begin with the assistant


@pytest.mark.parametrize("system", [[], [message("system", "Be kind.")]])
@pytest.mark.parametrize("template", [CHATML_TEMPLATE, GENERATION_TEMPLATE, "llama-3.1", "qwen3"])
def test_a_greeting_is_context(learnt, template, system):
    greeting = message("assistant", "Hello!")
    samples = learnt([*system, greeting, QUESTION, ANSWER], template)
    assert len(samples) == 1 and "Hello!" in samples[0][0]
    assert samples[0][1] == learnt([QUESTION, ANSWER], template)[0][1]


def test_a_greeting_that_the_template_refuses_is_refused_with_its_reason(learnt):
    with pytest.raises(ConfigError, match="refuses this chat: TemplateError: roles must alternate"):
        learnt([message("assistant", "Hello!"), QUESTION, ANSWER], "gemma-2")


def test_an_answer_to_a_system_text_alone_is_learnt(learnt):
    assert (
        learnt([message("system", "Greet."), message("assistant", "Hi.")])[0][1] == "Hi.<|im_end|>"
    )
    with pytest.raises(ConfigError, match='"assistant" after the first 1, which are context'):
        learnt([message("assistant", "Hi.")])


def test_every_case_of_the_table_says_what_its_name_says():
    assert [name for name, line in CASES.items() if "tools" in line] == ["tools"]
