"""The table of docs/data.md: what becomes of six chats with the templates of chat_templates.py.

PYTHONPATH=tests python -m support.template_table [--write]   # prints it, or puts it into the page
"""

import re
import sys

from dspark_megatron.data.conversation import ConversationEncoder
from dspark_megatron.errors import ConfigError
from support.chat_templates import TEMPLATES
from support.paths import ROOT
from support.tiny_tokenizer import tiny_tokenizer

CALL = {"name": "weather", "arguments": '{"city": "Oslo"}'}
TOOL = {
    "name": "weather",
    "description": "Says how warm it is.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


def message(role: str, content: object, **others: object) -> dict:
    return {"role": role, "content": content, **others}


QUESTION = message("user", "Which city is the capital of Peru?")
CASES = {
    "plain": {"messages": [QUESTION, message("assistant", "Lima.")]},
    "multi-turn": {
        "messages": [
            message("system", "Be brief."),
            QUESTION,
            message("assistant", "Lima."),
            message("user", "And of Chile?"),
            message("assistant", "Santiago."),
        ]
    },
    "reasoning": {
        "messages": [QUESTION, message("assistant", "Lima.", reasoning_content="An easy one.")]
    },
    "tools": {
        "tools": [{"type": "function", "function": TOOL}],
        "messages": [
            message("user", "How warm is it up there?"),
            message(
                "assistant",
                None,
                tool_calls=[{"id": "call00001", "type": "function", "function": CALL}],
            ),
            message("tool", '{"degrees": 3}', tool_call_id="call00001", name="weather"),
            message("assistant", "It is three degrees."),
        ],
    },
    "parts": {
        "messages": [
            message("user", [{"type": "text", "text": QUESTION["content"]}]),
            message("assistant", [{"type": "text", "text": "Lima."}]),
        ]
    },
    "cut": {"messages": [QUESTION, message("assistant", "The capital")], "finish_reason": "length"},
}
REASONS = {
    "leaves out the line's tools": "tools left out",
    "leaves out a call": "calls left out",
    "leaves out the reasoning": "reasoning left out",
    "leaves out the text of message 0 (system)": "system left out",
    "otherwise than its own prompt": "not its prompt",
    "no system role": "no system role",
    "System role not supported": "no system role",
}
"""What an error says, in a few words."""


def verdict(template: str, record: dict) -> str:
    """`trained`, with the number of samples if there are several, or why not."""
    tokenizer = tiny_tokenizer(320)
    tokenizer.chat_template = template
    try:
        samples = ConversationEncoder(tokenizer, len(tokenizer)).encode(record)
    except ConfigError as error:
        short = [short for said, short in REASONS.items() if said in str(error)]
        assert short, f"no short reason for: {error}"
        return short[0]
    return "trained" if len(samples) == 1 else f"trained, {len(samples)} samples"


def rows() -> list[str]:
    """Markdown, the head included."""
    table = [["template", *CASES], ["---"] * (1 + len(CASES))]
    table += [
        [name, *(verdict(template, record) for record in CASES.values())]
        for name, template in TEMPLATES.items()
    ]
    return [f"| {' | '.join(row)} |" for row in table]


def write() -> None:
    page = ROOT / "docs" / "data.md"
    text = page.read_text(encoding="utf-8")
    table = "\n".join(rows()) + "\n"
    text = re.sub(r"(?m)^\| template \|.*\n(\|.*\n)*", lambda _: table, text)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write() if "--write" in sys.argv else print("\n".join(rows()))
