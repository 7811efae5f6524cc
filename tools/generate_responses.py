"""Let a target answer prompts, so that a draft is trained on the words it will have to predict.

    python tools/generate_responses.py --target DIR --input prompts.jsonl --output responses.jsonl
    python tools/generate_responses.py --endpoint http://localhost:8000/v1 --model NAME \\
        --input prompts.jsonl --output responses.jsonl [--concurrency 64]

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
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch

from dspark_megatron.config.data import is_day
from dspark_megatron.data.chats.answers import AnswerRules
from dspark_megatron.data.chats.template import ChatTemplate
from dspark_megatron.data.prompts import endpoint, response_file
from dspark_megatron.data.prompts.address import checked_address, checked_key
from dspark_megatron.data.prompts.chat_prompts import read_prompts
from dspark_megatron.data.prompts.json_server import JsonServer
from dspark_megatron.data.prompts.local_target import LocalTarget, template_day
from dspark_megatron.errors import ConfigError, print_error, require
from dspark_megatron.storage.target_folder import load_target_config, load_tokenizer
from dspark_megatron.targets.folder_check import check_weights_described

BOUNDS = {
    "temperature": (0, 10**6),
    "max_new_tokens": (1, 10**7),
    "batch_size": (1, 10**5),
    "concurrency": (1, 4096),
    "timeout": (0.001, 7 * 24 * 3600),
    "retries": (0, 1000),
    "retry_delay": (0, 3600),
}
"""The least and the most of each number."""


def ask_target(args: argparse.Namespace, partial: Path) -> response_file.Outcome:
    check_weights_described(args.target, load_target_config(args.target))
    tokenizer = load_tokenizer(args.target)
    args.template_date = template_day(tokenizer, args.template_date, partial)
    rules = AnswerRules(template_date=args.template_date)
    prompts = read_prompts(args.input, ChatTemplate(tokenizer, rules=rules))
    how = given(args, "dtype", "temperature", "max_new_tokens", "messages_only")
    target = LocalTarget(args.target, tokenizer, device=args.device, **how)
    return response_file.collect_answers(
        args.output,
        [prompt.record for prompt in prompts],
        {"target": str(args.target), **how, **given(args, "batch_size", "seed", "template_date")},
        lambda missing: target.answer_all(prompts, missing, args.batch_size, args.seed),
    )


def ask_endpoint(args: argparse.Namespace) -> response_file.Outcome:
    records = [prompt.record for prompt in read_prompts(args.input, None)]
    key = checked_key(os.environ.get(args.api_key_variable, ""), args.api_key_variable)
    server = JsonServer(args.endpoint, key, args.timeout)
    asked = endpoint.ChatEndpoint(server, args.model, **given(args, "retries", "retry_delay"))
    asked.check()
    sampling = {"temperature": args.temperature, "max_tokens": args.max_new_tokens}
    sampling |= given(args, *endpoint.SENT_IF_GIVEN, "return_token_ids")
    return response_file.collect_answers(
        args.output,
        records,
        {"model": args.model, "seed": args.seed, **sampling},  # the address may change
        lambda missing: endpoint.ask_all(
            asked, records, missing, args.seed, sampling, args.concurrency
        ),
        leave_out_failed=args.leave_out_failed,
    )


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Answer prompts with a target model.")
    flag = {"action": "store_const", "const": True}  # null, unless it is given
    add = parser.add_argument
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--target", type=Path, help="Hugging Face model folder, answering here")
    who.add_argument("--endpoint", help="URL of a server, such as http://localhost:8000/v1")
    add("--input", required=True, help="prompts: JSONL, Parquet, ... (docs/data.md)")
    add("--output", type=Path, required=True, help="prompts with answers, JSONL")
    add("--temperature", type=float, default=1.0, help="divides the logits; 0: greedy")
    add("--max-new-tokens", type=int, default=256, help="cut an answer there; counts end of turn")
    add("--seed", type=int, default=0, help="of the random numbers; each batch has its own")
    add = parser.add_argument_group("with --target").add_argument
    add("--batch-size", type=int, default=16, help="prompts answered at once")
    add("--messages-only", help="leave token ids out of the output", **flag)
    add("--template-date", help="YYYY-MM-DD, for a chat template that reads the clock; today")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: as saved")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="default: cuda if there is a GPU, else cpu")
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
    for name in endpoint.SENT_IF_GIVEN:
        kind = int if name == "top_k" else float
        add(f"--{name.replace('_', '-')}", type=kind, help="sent if given")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    for name, (least, most) in BOUNDS.items():
        value = getattr(args, name)
        require(
            least <= value <= most,
            f"{name} must be finite and >= {least} and <= {most:,}, not {value}",
        )
    for name in given(args, *endpoint.SENT_IF_GIVEN):
        require(math.isfinite(getattr(args, name)), f"{name} must be finite")
    day = args.template_date
    require(day is None or is_day(day), f"--template-date ({day}) must be like 2026-01-31")
    if args.endpoint is None:
        require(not args.return_token_ids, "--token-ids needs --endpoint; --target keeps them")
        sent = list(given(args, *endpoint.SENT_IF_GIVEN))
        require(not sent, f"{', '.join(sent)} need --endpoint; --target samples the plain softmax")
        return
    args.endpoint = checked_address(args.endpoint, insecure=args.insecure)
    require(bool(args.model), "--model must be the name of what --endpoint serves")


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        check_arguments(args)
        partial = response_file.partial_file(args.output)
        outcome = ask_endpoint(args) if args.endpoint else ask_target(args, partial)
    except ConfigError as error:
        return print_error(error)
    print(response_file.describe_answers(outcome.answers))
    if outcome.failures:
        print(endpoint.describe_failures(outcome.failures, args.output), file=sys.stderr)
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
