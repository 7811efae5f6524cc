"""Let a target answer prompts, so that a draft is trained on the words it will have to predict.

    python tools/generate_responses.py --target DIR --input prompts.jsonl --output responses.jsonl
    python tools/generate_responses.py --endpoint http://localhost:8000/v1 --model NAME \\
        --input prompts.jsonl --output responses.jsonl [--concurrency 64]

With --target, Transformers answers on one device, from the model's plain softmax. With --endpoint,
any OpenAI-compatible server does (vLLM, SGLang). What a request leaves out is up to the server:
vLLM takes it from the model's generation_config.json.

Each input line is {"messages": [...]} ending with a user turn (or a tool's); an assistant turn at
the end is dropped and answered anew. Each output line is the same object with the answer appended,
and "finish_reason": "stop", or "length" where --max-new-tokens cut the answer. "tools" and
"chat_template_kwargs" of a line are used. "input_ids" and "loss_mask" are the very tokens that the
target saw and wrote (with --endpoint, if --token-ids asks for them); training takes these.

Finished answers are kept in OUTPUT.partial; the same command continues there after a kill, and asks
an endpoint again for what had no answer. The exit code is 1 while a prompt has none.

Shapes: b = prompts of a batch, s = longest prompt of the batch, t = longest answer of the batch.
"""

import argparse
import hashlib
import json
import math
import os
import random
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dspark_megatron.config.data import is_day
from dspark_megatron.data.chats.answers import AnswerRules
from dspark_megatron.data.chats.template import ChatTemplate
from dspark_megatron.data.chats.template_date import reads_clock
from dspark_megatron.data.prompts.chat_prompts import Prompt, read_prompts
from dspark_megatron.data.prompts.endpoint import (
    ChatEndpoint,
    NoAnswer,
    ask_all,
    describe_failures,
    request_body,
)
from dspark_megatron.data.prompts.response_file import (
    Answer,
    append_answers,
    first_settings,
    open_partial,
    write_responses,
)
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.ops.seeds import derived_seed
from dspark_megatron.storage.target_folder import stop_token_ids

PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
SENT_IF_GIVEN = ("top_p", "top_k", "min_p", *PENALTIES)
"""Sampling parameters of a request, each under its own name."""


def plan_batches(prompts: list[Prompt], batch_size: int) -> list[list[int]]:
    """Group indices by length, so that little is padded. The longest come first: if memory does
    not suffice, the first batch shows it."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index].input_ids))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class Answerer:
    """A target set up to sample from its plain softmax, or greedily at temperature 0."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        temperature: float,
        max_new_tokens: int,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.stops = stop_token_ids(model.name_or_path, tokenizer)
        choice = {"do_sample": False}
        if temperature > 0:
            choice = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        # The target's own generation config is replaced, not amended: it may hold penalties or cuts
        # that `generate` would merge in, and the draft has to learn the model's bare distribution.
        model.generation_config = GenerationConfig(
            **choice,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.stops,
            pad_token_id=self.stops[0],
        )

    def answer(self, prompts: list[list[int]], seed: int) -> list[Answer]:
        """Answer b tokenized prompts at once."""
        left = {"batch_first": True, "padding_side": "left"}
        rows = [torch.tensor(prompt, device=self.model.device) for prompt in prompts]
        ids = pad_sequence(rows, padding_value=self.stops[0], **left)  # [b, s]
        mask = pad_sequence([torch.ones_like(row) for row in rows], **left)  # [b, s]
        torch.manual_seed(seed)
        with torch.inference_mode():
            tokens = self.model.generate(ids, attention_mask=mask)  # [b, s + t]
        written = tokens[:, ids.shape[1] :].tolist()
        return [self._answer(prompt, row) for prompt, row in zip(prompts, written, strict=True)]

    def _answer(self, prompt: list[int], generated: list[int]) -> Answer:
        """t ids, perhaps with a stop token and padding at their end, to an answer."""
        end = next((place for place, token in enumerate(generated) if token in self.stops), None)
        content = self.tokenizer.decode(
            generated[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if end is not None:
            return Answer(content, "stop", end, None, prompt, generated[: end + 1])
        # The cut may fall inside a character of several tokens; its first bytes decode to U+FFFD.
        content = content.rstrip("\ufffd")
        return Answer(content, "length", len(generated), None, prompt, generated)


def batch_seed(seed: int, batch: int) -> int:
    """A seed of its own for each batch, so that a resumed run draws what an unbroken one draws."""
    # Not seeds.derived_seed: examples/quickstart/train.jsonl was sampled with these seeds, and with
    # others the command in its README would no longer make it again.
    return random.Random(f"{seed}/{batch}").getrandbits(63)


def load_pretrained(kind: Any, target: Path, **options: Any) -> Any:
    """`kind.from_pretrained` of the target's folder, whose own code is never run."""
    require(target.is_dir(), f"the target's folder {target} must exist and does not")
    options |= {"local_files_only": True, "trust_remote_code": False}
    try:
        return kind.from_pretrained(target, **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())  # Transformers writes several lines
        raise ConfigError(f"{kind.__name__} cannot load {target}: {reason}") from error


def generate_responses(args: argparse.Namespace) -> list[Answer]:
    """Answer the prompts of `args.input` with the target and write `args.output`."""
    tokenizer = load_pretrained(AutoTokenizer, args.target)
    partial = partial_file(args.output)
    args.template_date = template_day(args, tokenizer, partial)
    rules = AnswerRules(template_date=args.template_date)
    prompts = read_prompts(args.input, ChatTemplate(tokenizer, rules=rules))
    answers = open_partial(partial, run_settings(args, prompts))

    model = load_pretrained(AutoModelForCausalLM, args.target, dtype=args.dtype)
    model.to(args.device).eval()
    answerer = Answerer(model, tokenizer, args.temperature, args.max_new_tokens)
    with tqdm(total=len(prompts), initial=len(answers), unit="answer") as progress:
        # Planned over all prompts, answered or not: a resumed run must have the same batches.
        for number, indices in enumerate(plan_batches(prompts, args.batch_size)):
            if answers.keys() >= set(indices):
                continue
            batch = [prompts[index].input_ids for index in indices]
            made = answerer.answer(batch, batch_seed(args.seed, number))
            if args.messages_only:
                made = [answer._replace(prompt_ids=None, token_ids=None) for answer in made]
            answers |= zip(indices, made, strict=True)
            append_answers(partial, {index: answers[index] for index in indices})
            progress.update(len(indices))
    write_responses(args.output, [prompt.record for prompt in prompts], answers)
    partial.unlink()
    return list(answers.values())


def partial_file(output: Path) -> Path:
    require(not output.exists(), f"{output} exists already; delete it or choose another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    return output.with_name(f"{output.name}.partial")


def run_settings(args: argparse.Namespace, prompts: list[Prompt]) -> dict:
    """All that decides the answers; a run is resumed with the same settings only."""
    digest = hashlib.sha256(json.dumps([prompt.record for prompt in prompts]).encode()).hexdigest()
    if args.endpoint:  # which may be at another address by then
        settings = {"model": args.model, "prompts_sha256": digest, "seed": args.seed}
        return {**settings, **request_settings(args)}
    names = ("dtype", "temperature", "max_new_tokens", "batch_size", "seed")
    chosen = {name: getattr(args, name) for name in names}
    younger = {name: getattr(args, name) for name in ("messages_only", "template_date")}
    chosen |= {name: value for name, value in younger.items() if value}
    return {"target": str(args.target), "prompts_sha256": digest, **chosen}


def template_day(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, partial: Path
) -> str | None:
    """The day for a chat template that reads the clock: as given, or that of the run which left a
    partial file, or today; None for any other template."""
    if not reads_clock(tokenizer.chat_template):
        return None
    return args.template_date or first_settings(partial).get("template_date") or str(date.today())


def ask_endpoint(args: argparse.Namespace) -> tuple[list[Answer], list[NoAnswer | None]]:
    """Answer the prompts of `args.input` through an endpoint. The answers, and what became of the
    other prompts: the failure, or None where none was asked.

    `args.output` is written once all are answered, or all were asked and `args.leave_out_failed`.
    """
    prompts = read_prompts(args.input, None)
    partial = partial_file(args.output)
    endpoint = ChatEndpoint(
        args.endpoint,
        args.model,
        os.environ.get(args.api_key_variable, ""),
        args.timeout,
        args.retries,
        args.retry_delay,
    )
    endpoint.check()
    answers = open_partial(partial, run_settings(args, prompts))
    failures = dict.fromkeys(set(range(len(prompts))) - answers.keys())
    sampling = request_settings(args)
    bodies = (
        (i, request_body(prompts[i].record, derived_seed("answer", args.seed, i), sampling))
        for i in sorted(failures)
    )
    with tqdm(total=len(prompts), initial=len(answers), unit="answer") as progress:
        for index, result in ask_all(endpoint, bodies, args.concurrency):
            if isinstance(result, NoAnswer):
                failures[index] = result
                continue
            del failures[index]
            answers[index] = result
            append_answers(partial, {index: result})
            progress.update()
    asked_all = None not in failures.values()
    if not failures or (args.leave_out_failed and asked_all and answers):
        write_responses(args.output, [prompt.record for prompt in prompts], answers)
        partial.unlink()
    return list(answers.values()), list(failures.values())


def request_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters of every request."""
    given = {name: getattr(args, name) for name in SENT_IF_GIVEN}
    given = {name: value for name, value in given.items() if value is not None}
    if args.token_ids:
        given["return_token_ids"] = True
    return {"temperature": args.temperature, "max_tokens": args.max_new_tokens, **given}


def account(failures: list[NoAnswer | None], output: Path) -> str:
    """What became of the prompts without an answer, and what to do."""
    if output.exists():
        return f"{describe_failures(failures)}\n{output} was written without them"
    return (
        f"{describe_failures(failures)}\n"
        f"the answers are kept in {output}.partial: the same command asks for the others again, "
        "and with --leave-out-failed writes the output without them"
    )


def summary(answers: list[Answer]) -> str:
    """One line on how long the answers are and how many were cut."""
    count, cut = len(answers), sum(answer.finish_reason == "length" for answer in answers)
    tokens = sum(answer.tokens for answer in answers) / max(count, 1)
    share = cut / max(count, 1)
    return f"{count} answers, {tokens:.1f} tokens on average, {cut} cut ({share:.1%})"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Answer prompts with a target model.")
    add = parser.add_argument
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--target", type=Path, help="Hugging Face model folder, answering here")
    who.add_argument("--endpoint", help="URL of a server, such as http://localhost:8000/v1")
    add("--input", type=Path, required=True, help="prompts, JSONL")
    add("--output", type=Path, required=True, help="prompts with answers, JSONL")
    add("--temperature", type=float, default=1.0, help="divides the logits; 0: greedy")
    add("--max-new-tokens", type=int, default=256, help="cut an answer there; counts end of turn")
    add("--seed", type=int, default=0, help="of the random numbers; each batch has its own")
    here = parser.add_argument_group("with --target").add_argument
    here("--batch-size", type=int, default=16, help="prompts answered at once")
    here("--messages-only", action="store_true", help="leave token ids out of the output")
    here("--template-date", help="YYYY-MM-DD, for a chat template that reads the clock; today")
    here("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: as saved")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    here("--device", default=device, help="default: cuda if there is a GPU, else cpu")
    add_endpoint_arguments(parser.add_argument_group("with --endpoint").add_argument)
    return parser.parse_args(argv)


def add_endpoint_arguments(add: Callable[..., Any]) -> None:
    add("--model", default="", help="the name by which the server knows the target")
    add("--concurrency", type=int, default=16, help="requests at one time")
    add("--timeout", type=float, default=600, help="seconds that the server may be silent")
    add("--retries", type=int, default=5, help="after a 429, 5xx, timeout or broken connection")
    add("--retry-delay", type=float, default=1, help="seconds before the first; doubled each time")
    add("--api-key-variable", default="OPENAI_API_KEY", help="environment variable with the key")
    add("--token-ids", action="store_true", help="ask for token ids and keep them (vLLM, SGLang)")
    add("--leave-out-failed", action="store_true", help="write the output without failed prompts")
    for name in SENT_IF_GIVEN:
        kind = int if name == "top_k" else float
        add(f"--{name.replace('_', '-')}", type=kind, help="sent if given")


def check_arguments(args: argparse.Namespace) -> None:
    least = {"temperature": 0, "max_new_tokens": 1, "batch_size": 1}
    least |= {"concurrency": 1, "timeout": 0.001, "retries": 0, "retry_delay": 0}
    for name, bound in least.items():
        value = getattr(args, name)
        require(bound <= value < math.inf, f"{name} must be finite and >= {bound}, not {value}")
    day = args.template_date
    require(day is None or is_day(day), f"--template-date ({day}) must be like 2026-01-31")
    if args.endpoint is None:
        require(not args.token_ids, "--token-ids needs --endpoint; --target keeps them anyway")
        sent = [name for name in SENT_IF_GIVEN if getattr(args, name) is not None]
        require(not sent, f"{', '.join(sent)} need --endpoint; --target samples the plain softmax")
        return
    require(
        args.endpoint.startswith(("http://", "https://")) and bool(args.model),
        f"--endpoint ({args.endpoint}) must be a URL, such as http://localhost:8000/v1, and "
        f"--model ({args.model!r}) the name of what it serves",
    )


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        check_arguments(args)
        if args.endpoint is None:
            answers, failures = generate_responses(args), []
        else:
            answers, failures = ask_endpoint(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(summary(answers))
    if failures:
        print(account(failures, args.output), file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
