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
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

ROLES = ("system", "user", "assistant")
DTYPES = ("auto", "float32", "bfloat16")


class UsageError(ValueError):
    """Something the caller can put right; the message says what and how."""


@dataclass(frozen=True)
class Sampling:
    """What decides the sampled text, apart from the model and the prompts."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token each time."""
    max_new_tokens: int = 256
    """Tokens after which an answer is cut, the end-of-turn token included."""
    batch_size: int = 16
    """Prompts answered at once."""
    seed: int = 0
    """With the index of a batch, fixes the random numbers of that batch."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Answer:
    content: str
    finish_reason: str
    """"stop" or "length"."""
    tokens: int
    """Length in tokens, the end-of-turn token not counted."""


# Reading prompts


def read_prompts(path: Path) -> list[dict]:
    """Read the conversations of a JSONL file, each cut back to end with a user turn.

    Keys other than "messages" are kept. UsageError names the file and line that is malformed.
    """
    if not path.is_file():
        raise UsageError(f"{path} must be a file of prompts and is not there")
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows.append(parse_prompt(line))
            except ValueError as error:
                raise UsageError(f"{path}, line {number}: {error}") from error
    if not rows:
        raise UsageError(f"{path} must hold at least one prompt but is empty")
    return rows


def parse_prompt(line: bytes) -> dict:
    """One line -> its object, without an assistant turn at the end. ValueError if malformed."""
    row = json.loads(line)
    # A lone surrogate is legal JSON and cannot be written again; better known now than at the end.
    json.dumps(row, ensure_ascii=False).encode()
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise UsageError('a line must be an object with a list "messages"')
    messages = row["messages"]
    for position, message in enumerate(messages):
        check_message(message, position)
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise UsageError("the conversation must end with a user turn (an answer may follow it)")
    return {**row, "messages": messages}


def check_message(message: object, position: int) -> None:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise UsageError(f'message {position} must be an object whose "role" is one of {ROLES}')
    if not isinstance(message.get("content"), str):
        raise UsageError(f'message {position} must have a text as "content"')


# Prompts as batches of tokens


def tokenize_prompts(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> list[list[int]]:
    """Token ids of each conversation in the target's chat format, up to where its answer begins."""
    if not tokenizer.chat_template:
        raise UsageError(
            f"the tokenizer of {tokenizer.name_or_path} must have a chat template and has none; "
            "take an instruction-tuned target or add chat_template.jinja to its folder"
        )
    return [
        tokenizer.apply_chat_template(
            row["messages"], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
        for row in rows
    ]


def plan_batches(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Group row indices by length, so that little is padded. The longest come first: if memory does
    not suffice, the first batch shows it."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def left_pad(prompts: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """b lists of ids -> (ids [b, s], mask [b, s] with 1 for a token and 0 for padding)."""
    width = max(map(len, prompts))
    ids = [[pad_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


# Sampling


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All ids that end an answer. A chat model's end of turn is often known only to its generation
    config, while its tokenizer names the end of a document."""
    known = model.generation_config.eos_token_id
    stops = set(known if isinstance(known, list) else [known]) | {tokenizer.eos_token_id}
    stops.discard(None)
    if not stops:
        raise UsageError(
            "the target must name a token that ends an answer; set eos_token_id in its "
            "generation_config.json"
        )
    return sorted(stops)


def configure_sampling(model: PreTrainedModel, stops: list[int], sampling: Sampling) -> None:
    """Make `model.generate` sample from the plain softmax (greedily at temperature 0).

    The target's own generation config is replaced, not amended: it may hold penalties or cuts
    that `generate` would merge in, and the draft has to learn the model's bare distribution.
    """
    choice = {"do_sample": False}
    if sampling.temperature > 0:
        choice = {"do_sample": True, "temperature": sampling.temperature, "top_p": 1.0, "top_k": 0}
    model.generation_config = GenerationConfig(
        **choice,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=stops,
        pad_token_id=stops[0],
    )


def answer_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], seed: int
) -> list[Answer]:
    """Answer b tokenized prompts at once with a model set up by `configure_sampling`."""
    config = model.generation_config
    ids, mask = left_pad(prompts, config.pad_token_id)  # [b, s] both
    torch.manual_seed(seed)
    with torch.inference_mode():
        sequences = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
        )  # [b, s + t]
    generated = sequences[:, ids.shape[1] :].tolist()  # b lists of t ids
    return [decode_answer(tokenizer, row, config.eos_token_id) for row in generated]


def decode_answer(
    tokenizer: PreTrainedTokenizerBase, generated: list[int], stops: list[int]
) -> Answer:
    """Generated ids, perhaps with a stop token and padding behind them -> the answer."""
    end = next((place for place, token in enumerate(generated) if token in stops), None)
    content = tokenizer.decode(
        generated[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    if end is not None:
        return Answer(content, "stop", end)
    # The cut may fall inside a character of several tokens; its first bytes decode to U+FFFD.
    return Answer(content.rstrip("\ufffd"), "length", len(generated))


def batch_seed(seed: int, batch: int) -> int:
    """A seed of its own for each batch, so that a resumed run draws what an unbroken one draws."""
    return random.Random(f"{seed}/{batch}").getrandbits(63)


# Keeping what is done


def partial_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


def load_partial(path: Path, settings: dict) -> dict[int, Answer]:
    """Answers that an earlier run left, by row index; an unfinished last line is cut off the file.

    The first line holds the settings of that run: UsageError if they differ from `settings`.
    """
    *lines, torn = path.read_bytes().split(b"\n") if path.exists() else [b""]
    if torn:
        os.truncate(path, path.stat().st_size - len(torn))
    if not lines:
        append_line(path, settings)
        return {}
    check_same_settings(path, json.loads(lines[0]), settings)
    return {
        int(index): Answer(**answer)
        for line in lines[1:]
        for index, answer in json.loads(line).items()
    }


def check_same_settings(path: Path, found: dict, wanted: dict) -> None:
    changed = [name for name in wanted if found.get(name) != wanted[name]]
    if changed:
        differences = ", ".join(f"{n} {found.get(n)!r} -> {wanted[n]!r}" for n in changed)
        raise UsageError(
            f"{path} was begun with other settings ({differences}); repeat the command that began "
            "it, or delete it to start anew"
        )


def append_line(path: Path, value: dict) -> None:
    """Append one JSON line; when it returns, the line is on disk."""
    with path.open("ab") as file:
        file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def write_responses(output: Path, rows: list[dict], answers: dict[int, Answer]) -> None:
    """Write the answered rows in input order; `output` appears at once and whole."""
    temporary = output.with_name(f"{output.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        for index, row in enumerate(rows):
            file.write(json.dumps(with_answer(row, answers[index]), ensure_ascii=False) + "\n")
    os.replace(temporary, output)


def with_answer(row: dict, answer: Answer) -> dict:
    turn = {"role": "assistant", "content": answer.content}
    return {**row, "messages": [*row["messages"], turn], "finish_reason": answer.finish_reason}


# The whole run


def answer_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    sampling: Sampling,
    done: set[int],
) -> Iterator[dict[int, Answer]]:
    """Answer the prompts whose index is not in `done`, a batch at a time, by index.

    Batches are planned over all prompts, done or not, so that a resumed run has the same ones.
    """
    batches = plan_batches([len(prompt) for prompt in prompts], sampling.batch_size)
    for number, indices in enumerate(batches):
        if done.issuperset(indices):
            continue
        batch = [prompts[index] for index in indices]
        answers = answer_prompts(model, tokenizer, batch, batch_seed(sampling.seed, number))
        yield dict(zip(indices, answers, strict=True))


def generate_responses(
    target: str, source: Path, output: Path, sampling: Sampling, *, dtype: str, device: str
) -> dict[int, Answer]:
    """Answer the prompts of `source` and write `output`; returns the answers by row index."""
    if output.exists():
        raise UsageError(f"{output} exists already; delete it or choose another --output")
    rows = read_prompts(source)
    tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=False)
    prompts = tokenize_prompts(tokenizer, rows)

    output.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(output)
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    settings = {"target": target, "dtype": dtype, "prompts_sha256": digest, **asdict(sampling)}
    answers = load_partial(partial, settings)

    model = AutoModelForCausalLM.from_pretrained(target, dtype=dtype, trust_remote_code=False)
    model.to(device).eval()
    configure_sampling(model, stop_token_ids(model, tokenizer), sampling)
    with tqdm(total=len(rows), initial=len(answers), unit="answer") as progress:
        for batch in answer_batches(model, tokenizer, prompts, sampling, set(answers)):
            append_line(partial, {index: asdict(answer) for index, answer in batch.items()})
            answers |= batch
            progress.update(len(batch))
    write_responses(output, rows, answers)
    partial.unlink()
    return answers


def summary(answers: dict[int, Answer]) -> str:
    """One line on how long the answers are and how many were cut."""
    tokens = sum(answer.tokens for answer in answers.values())
    cut = sum(answer.finish_reason == "length" for answer in answers.values())
    count = len(answers)
    return f"{count} answers, {tokens / count:.1f} tokens on average, {cut} cut ({cut / count:.1%})"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Answer prompts with a target model.")
    parser.add_argument("--target", required=True, help="Hugging Face model folder")
    parser.add_argument("--input", type=Path, required=True, help="prompts, JSONL")
    parser.add_argument("--output", type=Path, required=True, help="prompts with answers, JSONL")
    parser.add_argument("--temperature", type=float, default=Sampling.temperature, help="0: greedy")
    parser.add_argument("--max-new-tokens", type=int, default=Sampling.max_new_tokens)
    parser.add_argument("--batch-size", type=int, default=Sampling.batch_size)
    parser.add_argument("--seed", type=int, default=Sampling.seed)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: as it was saved")
    parser.add_argument("--device", help="default: cuda if there is a GPU, else cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        sampling = Sampling(args.temperature, args.max_new_tokens, args.batch_size, args.seed)
        answers = generate_responses(
            args.target, args.input, args.output, sampling, dtype=args.dtype, device=device
        )
    except UsageError as error:
        sys.exit(f"error: {error}")
    print(summary(answers))


if __name__ == "__main__":
    main()
