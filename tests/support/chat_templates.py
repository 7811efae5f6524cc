"""Small chat templates of our own that behave as those of well-known models do.

Each does what matters for training as the template that it is named after: what it renders, drops,
refuses or adds, and where the prompt ends. No text of a model's own template is in here.
"""

TOOLS = "{{ tools | tojson }}"
CALLS = (
    "{% for call in m.tool_calls %}<tool_call>{{ call.function.name }} "
    "{{ call.function.arguments | tojson }}</tool_call>{% endfor %}"
)
CALLS_OF_TEXT = (
    "{% for call in m.tool_calls %}{{ '<call>' + call.function.name + '<sep>' "
    "+ call.function.arguments + '</call>' }}{% endfor %}"
)
CALLS_BY_PARAMETER = (
    "{% for call in m.tool_calls %}<function={{ call.function.name }}>"
    "{% for k, v in call.function.arguments | items %}<parameter={{ k }}>"
    "{{ v if v is string else v | tojson }}</parameter>{% endfor %}</function>{% endfor %}"
)
LAST_QUESTION = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
WITHOUT_SYSTEM = (
    "{% set system = '' %}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
)
TEXT = "{{ m.content }}"
TRIMMED = "{{ m.content | trim }}"
TEXT_OF_EITHER = (
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}{% endif %}"
)
TEXT_OF_PARTS = "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
STRIPPED_ANSWER = "{{ m.content.split('</think>')[-1] }}"


def turns(prompt: str = "", before: str = "", after: str = "", **roles: str) -> str:
    """A template of what each role's turn becomes (`any`: of further roles, which vanish without),
    the prompt for an answer, and what stands before and after all turns."""
    further = roles.pop("any", "")
    tests = [f"m.role == '{role}' %}}{turn}" for role, turn in roles.items()]
    body = "{% elif ".join(tests)
    body = f"{{% if {body}{{% else %}}{further}{{% endif %}}" if tests else further
    return (
        f"{before}{{% for m in messages %}}{body}{{% endfor %}}{after}"
        f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )


def chatml(
    answer: str = TEXT + CALLS,
    *,
    prompt: str = "",
    before: str = "",
    text: str = TEXT,
    **roles: str,
) -> str:
    """ChatML, tools in a system turn of their own and their results as a user's."""
    tools = f"{{% if tools %}}<|im_start|>tools\n{TOOLS}<|im_end|>\n{{% endif %}}"
    head, end = "<|im_start|>", "<|im_end|>\n"
    plain = {
        "user": f"{head}user\n{text}{end}",
        "system": f"{head}system\n{text}{end}",
        "assistant": f"{head}assistant\n{answer}{end}",
        "tool": f"{head}user\n<tool_response>{text}</tool_response>{end}",
    }
    return turns(f"{head}assistant\n{prompt}", before + tools, **{**plain, **roles})


# Qwen3: reasoning after the last question only, and an empty block for a last answer without.
QWEN3_ANSWER = (
    "{% set text = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if not thought and '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought }}\n</think>\n\n"
    "{% endif %}{{ text }}" + CALLS
)
# Those that open the reasoning in the prompt: kept after the last question, given or not.
OPENED_ANSWER = QWEN3_ANSWER.replace(" and (loop.last or thought)", "")
# Reasoning is kept where it is given, and earlier turns lose theirs.
IF_GIVEN_ANSWER = (
    "{% if loop.index0 > ns.last and m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n"
    "</think>\n\n{% endif %}{{ m.content }}" + CALLS
)
# No line break in the empty block, so that an answer without reasoning leaves its prompt.
NEMOTRON_ANSWER = (
    "{% if loop.index0 > ns.last and m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n"
    "</think>\n{% else %}<think></think>{% endif %}{{ m.content }}" + CALLS
)
LLAMA_HEAD, LLAMA_END = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n", "<|eot_id|>"
LLAMA_PROMPT = "<|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA_TOOLS = "{% if tools and loop.first %}" + TOOLS + "\n\n{% endif %}"
GEMMA_MODEL = "<start_of_turn>model\n"
MISTRAL_IDS = (
    "{% for m in messages %}{% for call in m.tool_calls %}{% if call.id | length != 9 %}"
    "{{ raise_exception('ids of calls have 9 characters') }}{% endif %}{% endfor %}{% endfor %}"
)
MISTRAL_CALLS = (
    "{% for call in m.tool_calls %}[TOOL_CALLS]{{ call.function.name }}[ARGS]"
    "{{ call.function.arguments | tojson }}{% endfor %}"
)
MISTRAL_TOOLS = "{% if tools %}[AVAILABLE_TOOLS]" + TOOLS + "[/AVAILABLE_TOOLS]{% endif %}"
GPT_OSS_ANSWER = (
    "{% if m.tool_calls %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "{% endif %}<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}"
    "<|channel|>commentary json<|message|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% else %}{% if loop.last and not add_generation_prompt and m.thinking %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}"
    "{% endif %}"
)
GLM_ANSWER = (
    "<|assistant|>{{ '\n' }}{% if loop.index0 > ns.last and m.reasoning_content %}<think>"
    "{{ m.reasoning_content }}</think>{% else %}<think></think>{% endif %}{{ '\n' + m.content }}"
    + CALLS
)
ROLE, END_OF_ROLE = "<|start_of_role|>{{ m.role }}<|end_of_role|>", "<|end_of_text|>\n"
GRANITE_PROMPT = "<|start_of_role|>assistant<|end_of_role|>"
GRANITE_TOOLS = (
    "{% if tools %}<|start_of_role|>available_tools<|end_of_role|>"
    + TOOLS
    + END_OF_ROLE
    + "{% endif %}"
)
COMMAND_TURN = "<|START_OF_TURN_TOKEN|><|{}_TOKEN|>" + TRIMMED + "<|END_OF_TURN_TOKEN|>"
SEED_TOOLS = "{% if tools %}<seed:bos>system\n" + TOOLS + "<seed:eos>{% endif %}"
SEED_ANSWER = (
    "<seed:bos>assistant\n{% if m.reasoning_content %}<seed:think>{{ m.reasoning_content }}"
    "</seed:think>\n{% endif %}{{ m.content }}" + CALLS_BY_PARAMETER + "<seed:eos>"
)
SEED_TURN = "<seed:bos>{{ m.role }}\n{{ m.content }}<seed:eos>"
DEEPSEEK_SYSTEM = "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
DEEPSEEK_END = "<｜end▁of▁sentence｜>"
DEEPSEEK_TOOL = "<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>"
DEEPSEEK_PROMPT = "{% if messages[-1].role != 'tool' %}<｜Assistant｜>{}{% endif %}"
KIMI_TURN = "<|im_{}|>{{{{ m.role }}}}<|im_middle|>{{{{ m.content }}}}{}<|im_end|>"
MISTRAL_THOUGHTS = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'thinking' %}[THINK]{{ part.thinking }}[/THINK]{% else %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endif %}"
)
GEMMA4_ANSWER = (
    "{% if messages[loop.index0 - 1].role != 'tool' %}<|turn>model\n{% endif %}"
    "{% for call in m.tool_calls %}<|tool_call>call:{{ call.function.name }} "
    "{% for k, v in call.function.arguments | items %}{{ k }}:{{ v }}{% endfor %}<tool_call|>"
    "{% endfor %}{{ m.content | trim }}{% if not m.tool_calls %}<turn|>\n{% endif %}"
)

TEMPLATES = {
    "qwen2.5": chatml(
        before="{% if messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n"
        "{% endif %}"
    ),
    "qwen3": chatml(QWEN3_ANSWER, before=LAST_QUESTION),
    "qwen3-instruct-2507": chatml(),
    "qwen3-coder": chatml(TEXT + CALLS_BY_PARAMETER),
    "qwen3.5": chatml(OPENED_ANSWER, before=LAST_QUESTION, prompt="<think>\n", text=TEXT_OF_EITHER),
    "qwen2.5-vl": turns(
        "<|im_start|>assistant\n",
        any="<|im_start|>{{ m.role }}\n" + TEXT_OF_EITHER + "<|im_end|>\n",
    ),
    "qwq": chatml(STRIPPED_ANSWER + CALLS, prompt="<think>\n"),
    "llama-3": turns(LLAMA_PROMPT, any=LLAMA_HEAD + TRIMMED + LLAMA_END),
    "llama-3.1": turns(
        LLAMA_PROMPT,
        WITHOUT_SYSTEM + "<|start_header_id|>system<|end_header_id|>\n\nToday Date: "
        "{{ date_string or '26 Jul 2024' }}\n\n{{ system }}<|eot_id|>",
        user=LLAMA_HEAD + LLAMA_TOOLS + TRIMMED + LLAMA_END,
        assistant=LLAMA_HEAD + "{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}"
        "{{ raise_exception('one call at a time') }}{% endif %}"
        + CALLS
        + "{% else %}"
        + TRIMMED
        + "{% endif %}"
        + LLAMA_END,
        tool="<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>",
        any=LLAMA_HEAD + TRIMMED + LLAMA_END,
    ),
    "gemma-2": turns(
        GEMMA_MODEL,
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + ALTERNATE,
        user="<start_of_turn>user\n" + TRIMMED + "<end_of_turn>\n",
        assistant=GEMMA_MODEL + TRIMMED + "<end_of_turn>\n",
    ),
    "gemma-3": turns(
        GEMMA_MODEL,
        WITHOUT_SYSTEM + ALTERNATE,
        user="<start_of_turn>user\n{% if loop.first and system %}{{ system }}\n\n{% endif %}"
        + TEXT_OF_EITHER
        + "<end_of_turn>\n",
        assistant=GEMMA_MODEL + TEXT_OF_EITHER + "<end_of_turn>\n",
    ),
    "gemma-4": turns(
        "{% if messages[-1].role != 'tool' %}<|turn>model\n{% endif %}",
        "{% if tools %}<|turn>system\n" + TOOLS + "<turn|>\n{% endif %}",
        user="<|turn>user\n" + TRIMMED + "<turn|>\n",
        system="<|turn>system\n" + TRIMMED + "<turn|>\n",
        assistant=GEMMA4_ANSWER,
        tool="<|tool_response>{{ m.content }}<tool_response|>",
    ),
    "mistral-nemo": turns(
        "",
        WITHOUT_SYSTEM + MISTRAL_IDS + LAST_QUESTION,
        user="{% if loop.index0 == ns.last %}" + MISTRAL_TOOLS + "{% endif %}[INST]"
        "{% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]",
        assistant="{{ m.content }}" + MISTRAL_CALLS + "{{ eos_token }}",
        tool="[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]",
    ),
    "mistral-small-3.2": turns(
        "",
        WITHOUT_SYSTEM
        + MISTRAL_IDS
        + "[SYSTEM_PROMPT]{{ system or 'Today is ' + strftime_now('%d-%m-%Y') }}[/SYSTEM_PROMPT]"
        + MISTRAL_TOOLS,
        user="[INST]" + TEXT_OF_EITHER + "[/INST]",
        assistant=TEXT_OF_EITHER + MISTRAL_CALLS + "{{ eos_token }}",
        tool="[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]",
    ),
    "ministral-3-reasoning": turns(
        "",
        WITHOUT_SYSTEM
        + "[SYSTEM_PROMPT]{{ system or 'Think first.' }}[/SYSTEM_PROMPT]"
        + MISTRAL_TOOLS,
        user="[INST]" + TEXT_OF_EITHER + "[/INST]",
        assistant=MISTRAL_THOUGHTS + MISTRAL_CALLS + "{{ eos_token }}",
        tool="[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]",
    ),
    "phi-3.5": turns(
        "<|assistant|>\n",
        after="{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
        user="<|user|>\n{{ m.content }}<|end|>\n",
        system="<|system|>\n{{ m.content }}<|end|>\n",
        assistant="<|assistant|>\n{{ m.content }}<|end|>\n",
    ),
    "gpt-oss": turns(
        "<|start|>assistant",
        "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}<|end|>"
        "{% if tools %}<|start|>developer<|message|>" + TOOLS + "<|end|>{% endif %}",
        user="<|start|>user<|message|>{{ m.content }}<|end|>",
        system="<|start|>developer<|message|>{{ m.content }}<|end|>",
        developer="<|start|>developer<|message|>{{ m.content }}<|end|>",
        assistant=GPT_OSS_ANSWER,
        tool="<|start|>functions to=assistant<|channel|>commentary<|message|>"
        "{{ m.content | tojson }}<|end|>",
    ),
    "deepseek-r1-distill": turns(
        DEEPSEEK_PROMPT.replace("{}", "<think>\n"),
        DEEPSEEK_SYSTEM,
        user="<｜User｜>{{ m.content }}",
        assistant="{% if m.tool_calls and m.content is none %}" + CALLS_OF_TEXT + "{% else %}"
        "{% if messages[loop.index0 - 1].role != 'tool' %}<｜Assistant｜>{% endif %}"
        + STRIPPED_ANSWER
        + DEEPSEEK_END
        + "{% endif %}",
        tool=DEEPSEEK_TOOL,
    ),
    "deepseek-v3.1": turns(
        DEEPSEEK_PROMPT.replace("{}", "<think></think>"),
        DEEPSEEK_SYSTEM,
        user="<｜User｜>{{ m.content }}",
        assistant="{% if messages[loop.index0 - 1].role != 'tool' %}<｜Assistant｜><think></think>"
        "{% endif %}" + STRIPPED_ANSWER + CALLS_OF_TEXT + DEEPSEEK_END,
        tool=DEEPSEEK_TOOL,
    ),
    "kimi-k2": turns(
        "<|im_assistant|>assistant<|im_middle|>",
        "{% if tools %}<|im_system|>tool_declare<|im_middle|>" + TOOLS + "<|im_end|>{% endif %}",
        user=KIMI_TURN.format("user", ""),
        assistant=KIMI_TURN.format("assistant", CALLS),
        any=KIMI_TURN.format("system", ""),
    ),
    "glm-4.5": turns(
        "<|assistant|>",
        "[gMASK]<sop>{% if tools %}<|system|>\n" + TOOLS + "{% endif %}" + LAST_QUESTION,
        user="<|user|>\n" + TEXT_OF_EITHER,
        system="<|system|>\n" + TEXT_OF_EITHER,
        assistant=GLM_ANSWER,
        tool="<|observation|>\n{{ m.content }}",
    ),
    "minimax-m2": turns(
        "]~b]ai\n<think>\n",
        WITHOUT_SYSTEM
        + "]~b]system\n{{ system }}{% if tools %}"
        + TOOLS
        + "{% endif %}[e~[\n"
        + LAST_QUESTION,
        user="]~b]user\n" + TEXT_OF_EITHER + "[e~[\n",
        assistant="]~b]ai\n" + IF_GIVEN_ANSWER + "[e~[\n",
        tool="]~b]tool\n{{ m.content }}[e~[\n",
    ),
    "nemotron-3-nano": chatml(NEMOTRON_ANSWER, before=LAST_QUESTION, prompt="<think>\n"),
    "granite-3.3": turns(
        GRANITE_PROMPT,
        "{% if messages[0].role != 'system' %}<|start_of_role|>system<|end_of_role|>Today's Date: "
        "{{ strftime_now('%B %d, %Y') }}.<|end_of_text|>\n{% endif %}" + GRANITE_TOOLS,
        any=ROLE + TEXT + END_OF_ROLE,
    ),
    "granite-4.0": turns(
        GRANITE_PROMPT, GRANITE_TOOLS, any=ROLE + TEXT_OF_EITHER + CALLS + END_OF_ROLE
    ),
    "command-r": turns(
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        WITHOUT_SYSTEM
        + ALTERNATE
        + "{% if system %}<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{{ system }}<|END_OF_TURN_TOKEN|>"
        "{% endif %}",
        user=COMMAND_TURN.replace("{}", "USER"),
        assistant=COMMAND_TURN.replace("{}", "CHATBOT"),
    ),
    "lfm2": turns(
        "<|im_start|>assistant\n",
        "{% if tools %}<|im_start|>system\n" + TOOLS + "<|im_end|>\n{% endif %}",
        any="<|im_start|>{{ m.role }}\n"
        "{{ m.content if m.content is string else m.content | tojson }}<|im_end|>\n",
    ),
    "seed-oss": turns("<seed:bos>assistant\n", SEED_TOOLS, assistant=SEED_ANSWER, any=SEED_TURN),
    "smolvlm": turns(
        "Assistant:", any="{{ m.role | capitalize }}: " + TEXT_OF_PARTS + "<end_of_utterance>\n"
    ),
    "llava-next": turns(
        "",
        user="[INST] " + TEXT_OF_PARTS + " [/INST]",
        system="<<SYS>>{{ m.content[0].text }}<</SYS>>",
        assistant=" {{ m.content[0].text }}</s> ",
    ),
}
