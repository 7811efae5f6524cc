"""Answers of a model behind an OpenAI-compatible chat endpoint, such as vLLM's or SGLang's."""

import random
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_megatron.data.chats.messages import template_options
from dspark_megatron.data.prompts.chat_answer import answer_of
from dspark_megatron.data.prompts.json_server import LONGEST_DELAY, JsonServer, NoAnswer
from dspark_megatron.data.prompts.response_file import Answer
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.ops.seeds import derived_seed

PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
SENT_IF_GIVEN = ("top_p", "top_k", "min_p", *PENALTIES)
"""Sampling parameters of a request, each under its own name."""

HOPELESS = ("HTTP 401", "HTTP 403", "HTTP 404", "redirect")
"""Failures that every prompt will have: a wrong key, path or model."""
_SHOWN_NAMES = _SHOWN_REASONS = 10


@dataclass(frozen=True)
class ChatEndpoint:
    server: JsonServer
    """Its address is where `/chat/completions` is, such as http://localhost:8000/v1."""
    model: str
    retries: int = 5
    """Further tries after a 429, a 5xx, a timeout or a broken connection."""
    retry_delay: float = 1.0
    """Seconds before the first further try. They double for each one after it."""

    def check(self) -> None:
        """ConfigError unless the endpoint is there, takes the key and, if it lists its models, has
        this one."""
        try:
            names = self._models()
        except NoAnswer as error:
            if error.reason in ("HTTP 404", "HTTP 405", "HTTP 501"):
                return  # it does not list them
            raise ConfigError(f"the endpoint {self.server.url} cannot be used: {error}") from error
        served = ", ".join(names[:_SHOWN_NAMES])
        more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
        require(
            not names or self.model in names,
            f"the endpoint {self.server.url} does not serve --model {self.model}; "
            f"it serves {self.server.shown(served)}{more}",
        )

    def _models(self) -> list[str]:
        listed = self.server.request("/models").get("data") or []
        if not isinstance(listed, list) or not all(
            isinstance(model, dict) and isinstance(model.get("id"), str) for model in listed
        ):
            raise NoAnswer("malformed answer", "/models must list objects with an id each")
        return [model["id"] for model in listed]

    def answer(self, body: dict[str, Any], stop: threading.Event) -> Answer:
        """The answer to a request of `messages` and sampling parameters. Raises NoAnswer after the
        last try, or once `stop` is set."""
        body = {"model": self.model, **body}
        for tries in range(self.retries + 1):
            try:
                response = self.server.request("/chat/completions", body)
                return answer_of(response, self.server, wants_tokens="return_token_ids" in body)
            except NoAnswer as error:
                if not error.passing or tries == self.retries:
                    raise
                delay = self.retry_delay * 2.0 ** min(tries, 99) * random.uniform(0.5, 1)
                if stop.wait(min(error.delay or delay, LONGEST_DELAY)):
                    raise
        raise AssertionError("the last try returns or raises")


def ask_all(
    endpoint: ChatEndpoint,
    records: list[dict],
    missing: Iterable[int],
    seed: int,
    sampling: dict[str, Any],
    concurrency: int,
) -> Iterator[dict[int, Answer | NoAnswer]]:
    """The results for the missing records as they come, `concurrency` requests at a time.

    Ends early when no prompt can fare better, or when none of the last ones (twice as many as run
    at a time, at least 8) got through all its tries.
    """
    stop = threading.Event()
    limit, failed = max(8, 2 * concurrency), 0
    running: dict[Future, int] = {}
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="endpoint")
    source = iter(missing)
    try:
        while True:
            while len(running) < concurrency and (index := next(source, None)) is not None:
                body = _body(records[index], derived_seed("answer", seed, index), sampling)
                running[pool.submit(endpoint.answer, body, stop)] = index
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                error = future.exception()
                failure = error if isinstance(error, NoAnswer) else None
                yield {running.pop(future): failure or future.result()}
                failed = failed + 1 if failure and failure.passing else 0
                if failed >= limit or (failure and failure.reason in HOPELESS):
                    stop.set()
                    source = iter(())  # what runs may still end well
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _body(record: dict, seed: int, sampling: dict[str, Any]) -> dict[str, Any]:
    """The request for a line with `messages`. Any server takes 31 bits of the seed."""
    options = template_options(record)
    tools = options.pop("tools", None)
    template = {"tools": tools, "chat_template_kwargs": options}
    return {
        "messages": record["messages"],
        "seed": seed >> 32,
        **sampling,
        **{name: value for name, value in template.items() if value},
    }


def describe_failures(failures: Sequence[Exception | None], output: Path) -> str:
    """How many prompts have no answer, by reason with an example of each, and what to do. None: a
    prompt was not asked."""
    known = [failure for failure in failures if isinstance(failure, NoAnswer)]
    reasons = Counter(failure.reason for failure in known)
    examples = {failure.reason: failure for failure in known}
    lines = [f"{len(failures)} prompts have no answer:"]
    common = reasons.most_common(_SHOWN_REASONS)
    lines += [f"  {count} times {examples[reason]}" for reason, count in common]
    if len(reasons) > len(common):
        rest = len(known) - sum(count for _, count in common)
        lines.append(f"  {rest} times {len(reasons) - len(common)} other reasons")
    if len(known) < len(failures):
        lines.append(f"  {len(failures) - len(known)} were not asked, since all seemed to fail")
    if output.exists():
        lines.append(f"{output} was written without them")
    else:
        lines.append(
            f"the answers are kept in {output}.partial: the same command asks for the others "
            "again, and with --leave-out-failed writes the output without them"
        )
    return "\n".join(lines)
