"""Let a target answer prompts, on this machine or by a server: the work of `dspark generate`."""

import argparse
import math
import os
from pathlib import Path
from typing import Any

import torch

from dspark_megatron.config.data import is_day
from dspark_megatron.data.chats.answers import AnswerRules
from dspark_megatron.data.chats.template import ChatTemplate
from dspark_megatron.data.prompts import endpoint, response_file
from dspark_megatron.data.prompts.address import checked_address, checked_key
from dspark_megatron.data.prompts.chat_prompts import Prompt, read_prompts
from dspark_megatron.data.prompts.json_server import JsonServer
from dspark_megatron.data.prompts.local_target import LocalTarget, template_day
from dspark_megatron.errors import require
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


def answer_prompts(args: argparse.Namespace) -> response_file.Outcome:
    """Ask whom the options name, after they are checked. ConfigError where they cannot work."""
    check_arguments(args)
    if args.endpoint:
        return ask_endpoint(args)
    return ask_target(args, response_file.partial_file(args.output))


def ask_target(args: argparse.Namespace, partial: Path) -> response_file.Outcome:
    check_weights_described(args.target, load_target_config(args.target))
    tokenizer = load_tokenizer(args.target)
    args.template_date = template_day(tokenizer, args.template_date, partial)
    rules = AnswerRules(template_date=args.template_date)
    prompts = read_prompts(args.input, ChatTemplate(tokenizer, rules=rules))
    how = given(args, "dtype", "temperature", "max_new_tokens", "messages_only")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    target = LocalTarget(args.target, tokenizer, device=device, **how)
    return response_file.collect_answers(
        args.output,
        records_of(prompts),
        {"target": str(args.target), **how, **given(args, "batch_size", "seed", "template_date")},
        lambda missing: target.answer_all(prompts, missing, args.batch_size, args.seed),
    )


def ask_endpoint(args: argparse.Namespace) -> response_file.Outcome:
    records = records_of(read_prompts(args.input, None))
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


def records_of(prompts: list[Prompt]) -> list[dict[str, Any]]:
    """The lines that were read, which every prompt of a file has."""
    return [prompt.record for prompt in prompts if prompt.record is not None]


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


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
