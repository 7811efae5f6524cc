"""Answers of a model behind an OpenAI-compatible chat endpoint, such as vLLM's or SGLang's."""

import contextlib
import json
import random
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from dspark_megatron.data.chats.messages import template_options
from dspark_megatron.data.prompts.response_file import Answer
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.ops.seeds import derived_seed

PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
SENT_IF_GIVEN = ("top_p", "top_k", "min_p", *PENALTIES)
"""Sampling parameters of a request, each under its own name."""

WHOLE = ("stop", "length", "tool_calls")
"""Finish reasons of answers that can be learnt from."""
LONGEST_DELAY = 60.0
"""The most seconds between two tries, whatever the server asks for."""
HOPELESS = ("HTTP 401", "HTTP 403", "HTTP 404")
"""Failures that every prompt will have: a wrong key, path or model."""


class NoAnswer(Exception):
    """A prompt got no answer. Failures are counted by `reason`; the text tells more."""

    def __init__(self, reason: str, detail: str, *, passing: bool = False) -> None:
        """passing: another try may succeed."""
        super().__init__(f"{reason}: {detail}")
        self.reason, self.passing = reason, passing
        self.delay: float | None = None
        """Seconds that the server asks to wait before the next try."""


@dataclass(frozen=True)
class ChatEndpoint:
    url: str
    """Where `/chat/completions` is, such as http://localhost:8000/v1."""
    model: str
    api_key: str = field(default="", repr=False)
    timeout: float = 600.0
    """Seconds that the server may be silent."""
    retries: int = 5
    """Further tries after a 429, a 5xx, a timeout or a broken connection."""
    retry_delay: float = 1.0
    """Seconds before the first further try. They double for each one after it."""

    def check(self) -> None:
        """ConfigError unless the endpoint is there, takes the key and, if it lists its models, has
        this one."""
        try:
            listed = self._request("/models").get("data", [])
        except NoAnswer as error:
            if error.reason in ("HTTP 404", "HTTP 405", "HTTP 501"):
                return  # it does not list them
            raise ConfigError(f"the endpoint {self.url} cannot be used: {error}") from error
        names = [model["id"] for model in listed]
        require(
            not names or self.model in names,
            f"the endpoint {self.url} does not serve --model {self.model}; "
            f"it serves {', '.join(names)}",
        )

    def answer(self, body: dict[str, Any], stop: threading.Event) -> Answer:
        """The answer to a request of `messages` and sampling parameters. Raises NoAnswer after the
        last try, or once `stop` is set."""
        body = {"model": self.model, **body}
        for tries in range(self.retries + 1):
            try:
                response = self._request("/chat/completions", body)
                return _answer_of(response, wants_tokens="return_token_ids" in body)
            except NoAnswer as error:
                if not error.passing or tries == self.retries:
                    raise
                delay = self.retry_delay * 2**tries * random.uniform(0.5, 1)
                if stop.wait(min(error.delay or delay, LONGEST_DELAY)):
                    raise
        raise AssertionError("the last try returns or raises")

    def _request(self, path: str, body: dict | None = None) -> dict[str, Any]:
        request = urllib.request.Request(self.url.rstrip("/") + path)
        request.add_header("Content-Type", "application/json")
        if self.api_key:
            request.add_header("Authorization", f"Bearer {self.api_key}")
        if body is not None:
            request.data = json.dumps(body).encode()
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            raise _refusal(error) from error
        except (OSError, HTTPException) as error:  # URLError and TimeoutError are OSErrors
            if isinstance(getattr(error, "reason", error), TimeoutError):
                raise NoAnswer("timeout", f"none in {self.timeout:g} s", passing=True) from error
            raise NoAnswer("no connection", str(error), passing=True) from error
        try:
            parsed = json.loads(content)
        except ValueError as error:
            raise NoAnswer("malformed answer", repr(content[:100]), passing=True) from error
        if not isinstance(parsed, dict):
            raise NoAnswer("malformed answer", repr(content[:100]))
        return parsed


def _refusal(error: urllib.error.HTTPError) -> NoAnswer:
    text = " ".join(error.read(300).decode(errors="replace").split())
    passing = error.code in (408, 429) or error.code >= 500
    refusal = NoAnswer(f"HTTP {error.code}", text or error.reason, passing=passing)
    with contextlib.suppress(ValueError, TypeError):  # it may be a date, or missing
        refusal.delay = max(0.0, float(error.headers.get("Retry-After", "")))
    return refusal


def _answer_of(response: dict[str, Any], *, wants_tokens: bool) -> Answer:
    try:
        choice = response["choices"][0]
        message, finish_reason = choice["message"], choice["finish_reason"]
        tokens = (response.get("usage") or {}).get("completion_tokens") or 0
        content = message.get("content")
        # vLLM calls reasoning_content reasoning in newer versions; chat templates do not.
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        calls = message.get("tool_calls")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise NoAnswer("malformed answer", f"{type(error).__name__} {error}") from error
    if finish_reason not in WHOLE:
        raise NoAnswer(f"finish_reason {finish_reason}", "no whole answer")
    if content is None and not reasoning and not calls:
        raise NoAnswer("no content", f"finish_reason {finish_reason}")
    parts = {"reasoning_content": reasoning, "tool_calls": calls}
    parts = {name: value for name, value in parts.items() if value}
    prompt_ids, token_ids = response.get("prompt_token_ids"), choice.get("token_ids")
    answer = Answer(content or "", finish_reason, tokens, parts or None, prompt_ids, token_ids)
    if wants_tokens and not answer.sample():
        raise NoAnswer("no token ids", "the server does not tell those of prompt and answer")
    return answer


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


def describe_failures(failures: list[NoAnswer | None], output: Path) -> str:
    """How many prompts have no answer, by reason with an example of each, and what to do. None: a
    prompt was not asked."""
    known = [failure for failure in failures if failure is not None]
    reasons = Counter(failure.reason for failure in known)
    examples = {failure.reason: failure for failure in known}
    lines = [f"{len(failures)} prompts have no answer:"]
    lines += [f"  {count} times {examples[reason]}" for reason, count in reasons.most_common()]
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
