"""Let a target answer prompts, so that a draft is trained on the words it will have to predict.

    python tools/generate_responses.py --target DIR --input prompts.jsonl --output responses.jsonl

Each input line is {"messages": [...]} ending with a user turn; an assistant turn at the end is
dropped and answered anew. Each output line is the same object with the answer appended, and
"finish_reason": "stop", or "length" where --max-new-tokens cut the answer.

Finished batches are kept in OUTPUT.partial; the same command continues there after a kill.

Shapes: b = prompts of a batch, s = longest prompt of the batch, t = longest answer of the batch.
"""

import argparse
import hashlib
import json
import math
import os
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

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

from dspark_megatron.config import ConfigError, require
from dspark_megatron.data.chat_template import ChatTemplate
from dspark_megatron.data.chats import checked_messages
from dspark_megatron.data.jsonl import errors_at, read_jsonl
from dspark_megatron.target_folder import stop_token_ids


class Prompt(NamedTuple):
    record: dict
    """The input line, its chat cut back to end with a user turn."""
    input_ids: list[int]
    """The chat in the target's format, up to where the answer begins."""


class Answer(NamedTuple):
    content: str
    finish_reason: str
    """"stop" or "length"."""
    tokens: int
    """Length in tokens, the end-of-turn token not counted."""


def read_prompts(path: Path, template: ChatTemplate) -> list[Prompt]:
    """The prompts of a JSONL file; ConfigError, naming `file:line`, for a line that is none."""
    prompts = []
    for number, record in read_jsonl(path):
        with errors_at(path, number):
            prompts.append(make_prompt(record, template))
    require(bool(prompts), f"{path} must hold at least one prompt and has no lines")
    return prompts


def make_prompt(record: dict, template: ChatTemplate) -> Prompt:
    messages = checked_messages(record.get("messages"))
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    require(
        bool(messages) and messages[-1]["role"] == "user",
        "the chat must end with a user turn (an answer may follow it)",
    )
    record = {**record, "messages": messages}
    try:
        json_line(record)  # better known now than when the output is written
    except UnicodeEncodeError as error:
        raise ConfigError(f"the line is not valid Unicode: {error}") from error
    input_ids, _ = template.tokenize(template.render(messages, add_generation_prompt=True))
    return Prompt(record, input_ids)


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
        return [self._decode(row) for row in tokens[:, ids.shape[1] :].tolist()]

    def _decode(self, generated: list[int]) -> Answer:
        """t ids, perhaps with a stop token and padding at their end, to an answer."""
        end = next((place for place, token in enumerate(generated) if token in self.stops), None)
        content = self.tokenizer.decode(
            generated[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if end is not None:
            return Answer(content, "stop", end)
        # The cut may fall inside a character of several tokens; its first bytes decode to U+FFFD.
        return Answer(content.rstrip("\ufffd"), "length", len(generated))


def batch_seed(seed: int, batch: int) -> int:
    """A seed of its own for each batch, so that a resumed run draws what an unbroken one draws."""
    # Not seeds.derived_seed: examples/quickstart/train.jsonl was sampled with these seeds, and with
    # others the command in its README would no longer make it again.
    return random.Random(f"{seed}/{batch}").getrandbits(63)


def json_line(value: dict) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def append_line(path: Path, value: dict) -> None:
    """Append one JSON line; when it returns, the line is on disk."""
    with path.open("ab") as file:
        file.write(json_line(value))
        file.flush()
        os.fsync(file.fileno())


def open_partial(path: Path, settings: dict) -> dict[int, Answer]:
    """Answers that an earlier run left, by index; a torn last line is cut off the file.

    The first line holds the settings of that run: ConfigError if they differ from `settings`.
    Without an earlier run, the file is begun.
    """
    path.touch()
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    lines = [line for _, line in read_jsonl(path)]
    if not lines:
        append_line(path, settings)
        return {}
    found = {name: lines[0].get(name) for name in settings}
    changes = [f"{n} {found[n]!r} -> {settings[n]!r}" for n in settings if found[n] != settings[n]]
    require(
        not changes,
        f"{path} was begun with other settings ({', '.join(changes)}); repeat the command that "
        "began it, or delete it to start anew",
    )
    return {int(index): Answer(**answer) for line in lines[1:] for index, answer in line.items()}


def write_responses(output: Path, prompts: list[Prompt], answers: dict[int, Answer]) -> None:
    """Write the answered prompts in input order; `output` appears at once and whole."""
    temporary = output.with_name(f"{output.name}.tmp")
    with temporary.open("wb") as file:
        for index, (record, _) in enumerate(prompts):
            answer = answers[index]
            turn = {"role": "assistant", "content": answer.content}
            chat = {"messages": [*record["messages"], turn], "finish_reason": answer.finish_reason}
            file.write(json_line({**record, **chat}))
    os.replace(temporary, output)


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
    """Answer the prompts of `args.input` and write `args.output`."""
    output = args.output
    require(not output.exists(), f"{output} exists already; delete it or choose another --output")
    tokenizer = load_pretrained(AutoTokenizer, args.target)
    prompts = read_prompts(args.input, ChatTemplate(tokenizer))
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.partial")
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
            answers |= zip(indices, made, strict=True)
            append_line(partial, {index: answers[index]._asdict() for index in indices})
            progress.update(len(indices))
    write_responses(output, prompts, answers)
    partial.unlink()
    return list(answers.values())


def run_settings(args: argparse.Namespace, prompts: list[Prompt]) -> dict:
    """All that decides the answers; a run is resumed with the same settings only."""
    digest = hashlib.sha256(json.dumps([prompt.record for prompt in prompts]).encode()).hexdigest()
    names = ("dtype", "temperature", "max_new_tokens", "batch_size", "seed")
    chosen = {name: getattr(args, name) for name in names}
    return {"target": str(args.target), "prompts_sha256": digest, **chosen}


def summary(answers: list[Answer]) -> str:
    """One line on how long the answers are and how many were cut."""
    count, cut = len(answers), sum(answer.finish_reason == "length" for answer in answers)
    tokens = sum(answer.tokens for answer in answers) / count
    return f"{count} answers, {tokens:.1f} tokens on average, {cut} cut ({cut / count:.1%})"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Answer prompts with a target model.")
    add = parser.add_argument
    add("--target", type=Path, required=True, help="Hugging Face model folder")
    add("--input", type=Path, required=True, help="prompts, JSONL")
    add("--output", type=Path, required=True, help="prompts with answers, JSONL")
    add("--temperature", type=float, default=1.0, help="divides the logits; 0: greedy")
    add("--max-new-tokens", type=int, default=256, help="cut an answer there; counts end of turn")
    add("--batch-size", type=int, default=16, help="prompts answered at once")
    add("--seed", type=int, default=0, help="of the random numbers; each batch has its own")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: as saved")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="default: cuda if there is a GPU, else cpu")
    return parser.parse_args(argv)


def check_ranges(args: argparse.Namespace) -> None:
    for name, least in (("temperature", 0), ("max_new_tokens", 1), ("batch_size", 1)):
        value = getattr(args, name)
        require(least <= value < math.inf, f"{name} must be finite and >= {least}, not {value}")


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        check_ranges(args)
        print(summary(generate_responses(args)))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
