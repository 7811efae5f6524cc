"""`dspark generate`: let a target answer prompts, so that a draft is trained on the words that
it will have to predict.

With --target, Transformers answers on one device, from the model's plain softmax. With --endpoint,
any OpenAI-compatible server does (vLLM, SGLang). What a request leaves out is up to the server:
vLLM takes it from the model's generation_config.json.

Each input line is {"messages": [...]} ending with a user turn (or a tool's). An assistant turn at
the end is dropped and answered anew. Each output line is the same object with the answer appended,
and "finish_reason": "stop", or "length" where --max-new-tokens cut the answer. "tools" and
"chat_template_kwargs" of a line are used. "input_ids" and "loss_mask" are the very tokens that the
target saw and wrote (with --endpoint, if --token-ids asks for them). Training takes these.

Finished answers are kept in OUTPUT.partial. The same command continues there after a kill, and asks
an endpoint again for what had no answer. The exit code is 1 while a prompt has none.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from dspark_megatron.cli.exit_codes import DONE, NOT_SOUND
from dspark_megatron.cli.output import Output
from dspark_megatron.data.prompts.endpoint import SENT_IF_GIVEN

EXAMPLES = """\
  dspark generate --target models/Qwen3-8B --input prompts.jsonl --output answers.jsonl
  dspark generate --endpoint http://localhost:8000/v1 --model Qwen3-8B --token-ids \\
      --input prompts.jsonl --output answers.jsonl --concurrency 64

Finished answers are kept in OUTPUT.partial, where the same command continues."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flag: dict[str, Any] = {"action": "store_const", "const": True}  # null, unless it is given
    add = parser.add_argument
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--target", type=Path, help="Hugging Face model folder, answering here")
    who.add_argument("--endpoint", help="URL of a server, such as http://localhost:8000/v1")
    add("--input", required=True, help="prompts: JSONL, ... (docs/data.md), or chat, maths, code")
    add("--output", type=Path, required=True, help="prompts with answers, JSONL")
    add("--temperature", type=float, default=1.0, help="divides the logits; 0: greedy")
    add("--max-new-tokens", type=int, default=256, help="cut an answer there; counts end of turn")
    add("--seed", type=int, default=0, help="of the random numbers; each batch has its own")
    add = parser.add_argument_group("with --target").add_argument
    add("--batch-size", type=int, default=16, help="prompts answered at once")
    add("--messages-only", help="leave token ids out of the output", **flag)
    add("--template-date", help="YYYY-MM-DD, for a chat template that reads the clock; today")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: as saved")
    add("--device", help="default: cuda if there is a GPU, else cpu")
    add = parser.add_argument_group("with --endpoint").add_argument
    add("--model", default="", help="the name by which the server knows the target")
    add("--concurrency", type=int, default=16, help="requests at one time")
    add("--timeout", type=float, default=600, help="seconds that a request may take in all")
    add("--retries", type=int, default=5, help="after a 429, 5xx, timeout or broken connection")
    add("--retry-delay", type=float, default=1, help="seconds before the first; doubled each time")
    add("--api-key-variable", default="OPENAI_API_KEY", help="environment variable with the key")
    add("--insecure", action="store_true", help="allow http:// to another host than this one")
    add("--token-ids", dest="return_token_ids", help="ask for token ids and keep them", **flag)
    add("--leave-out-failed", action="store_true", help="write the output without failed prompts")
    for name in SENT_IF_GIVEN:
        kind = int if name == "top_k" else float
        add(f"--{name.replace('_', '-')}", type=kind, help="sent if given")


def run(args: argparse.Namespace, output: Output) -> int:
    from dspark_megatron.cli.prepare.answering import answer_prompts
    from dspark_megatron.data.prompts import endpoint, response_file

    outcome = answer_prompts(args)
    record = {
        "output": str(args.output),
        "answers": len(outcome.answers),
        "failures": len(outcome.failures),
    }
    output.result(record, [response_file.describe_answers(outcome.answers)])
    if outcome.failures:
        print(endpoint.describe_failures(outcome.failures, args.output), file=sys.stderr)
    return NOT_SOUND if outcome.failures else DONE
