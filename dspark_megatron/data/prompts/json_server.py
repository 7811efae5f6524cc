"""Requests to a server that may be broken or hostile: JSON there and back, within limits."""

import contextlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPMessage, HTTPSConnection
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
)

from dspark_megatron.data.prompts.address import is_this_host
from dspark_megatron.errors import printable

LARGEST_BODY = 32 * 2**20
"""The most bytes of an answer."""
LONGEST_DELAY = 60.0
"""The most seconds between two tries, whatever the server asks for."""
_LARGEST_ERROR, _SHOWN = 2**16, 300


class NoAnswer(Exception):
    """A prompt got no answer. Failures are counted by `reason`; the text tells more."""

    def __init__(self, reason: str, detail: str, *, passing: bool = False) -> None:
        """passing: another try may succeed."""
        super().__init__(f"{reason}: {detail}")
        self.reason, self.passing = reason, passing
        self.delay: float | None = None
        """Seconds that the server asks to wait before the next try."""


@dataclass(frozen=True)
class JsonServer:
    url: str
    """A checked address."""
    api_key: str = field(default="", repr=False)
    timeout: float = 600.0
    """Seconds that a request may take, until its answer is there in full."""

    def request(self, path: str, body: dict | None = None) -> dict[str, Any]:
        """The JSON object that the server answers with. Raises NoAnswer."""
        request = Request(self.url + path)
        request.add_header("Content-Type", "application/json")
        if self.api_key:
            request.add_header("Authorization", f"Bearer {self.api_key}")
        if body is not None:
            request.data = json.dumps(body).encode()
        with _TimeLimit(self.timeout) as limit:
            try:
                headers, content = self._exchange(request, limit)
            except (OSError, HTTPException, ValueError) as error:  # URLError is an OSError
                late = isinstance(getattr(error, "reason", error), TimeoutError)
                if not late and not limit.is_over:
                    detail = self.shown(str(error) or type(error).__name__)
                    raise NoAnswer("no connection", detail, passing=True) from error
                limit.is_over = True
        if limit.is_over:
            detail = f"no whole answer in {self.timeout:g} s, the limit of --timeout"
            raise NoAnswer("timeout", detail, passing=True)
        return self._parsed(headers, content)

    def shown(self, text: str) -> str:
        """Words of the server for a message: without the key, in one line, not too long."""
        if self.api_key:
            text = re.sub("".join(map(_any_spelling, self.api_key)), "***", text)
        text = printable(" ".join(text.split()))
        more = len(text) - _SHOWN
        return text if more <= 0 else f"{text[:_SHOWN]}... and {more:,} characters more"

    def _exchange(self, request: Request, limit: "_TimeLimit") -> tuple[HTTPMessage, bytes]:
        opener = _opener(limit, through_proxy=not is_this_host(urlsplit(self.url)))
        try:
            with opener.open(request, timeout=self.timeout) as response:
                return response.headers, response.read(LARGEST_BODY + 1)
        except HTTPError as error:
            with error:
                refusal = self._refusal(error)
            if limit.is_over:
                raise TimeoutError from error
            raise refusal from error

    def _refusal(self, error: HTTPError) -> NoAnswer:
        if 300 <= error.code < 400:
            place = self.shown(str(error.headers.get("Location")))
            return NoAnswer(
                "redirect",
                f"HTTP {error.code} to {place}, which is not followed, so that no other server "
                "gets the key; give the address that answers as --endpoint",
            )
        content = b""
        with contextlib.suppress(OSError, HTTPException, ValueError):
            content = error.read(_LARGEST_ERROR)
        delay, remark = _delay(error.headers.get("Retry-After"))
        passing = error.code in (408, 429) or error.code >= 500
        detail = (self._excerpt(content) or self.shown(str(error.reason))) + self.shown(remark)
        refusal = NoAnswer(f"HTTP {error.code}", detail, passing=passing)
        refusal.delay = delay
        return refusal

    def _parsed(self, headers: HTTPMessage, content: bytes) -> dict[str, Any]:
        problem = ""
        if len(content) > LARGEST_BODY:
            raise NoAnswer("too long an answer", f"more than {LARGEST_BODY:,} bytes, the limit")
        if "Content-Type" in headers and not headers.get_content_subtype().endswith("json"):
            problem = f"Content-Type {self.shown(headers['Content-Type'])}, not application/json"
        try:
            parsed = json.loads(content)
        except (ValueError, RecursionError) as error:
            problem = problem or f"no JSON ({type(error).__name__})"
        if problem:
            detail = f"{problem}: {self._excerpt(content)}"
            raise NoAnswer("malformed answer", detail, passing=True)
        if not isinstance(parsed, dict):
            raise NoAnswer("malformed answer", f"no JSON object: {self._excerpt(content)}")
        return parsed

    def _excerpt(self, content: bytes) -> str:
        if len(content) >= _LARGEST_ERROR:  # a key at the cut could not be told any more
            content = content[: _LARGEST_ERROR - 6 * len(self.api_key)]
        return self.shown(content.decode(errors="replace"))


def _any_spelling(character: str) -> str:
    """The pattern of a character as it stands in plain text, a URL or a JSON string."""
    code = ord(character)
    return rf"(?:\\?{re.escape(character)}|(?i:%{code:02x}|\\u{code:04x}))"


def _delay(asked: str | None) -> tuple[float | None, str]:
    """How long to wait as a server asks, and a remark where that is not what it asks."""
    if asked is None:
        return None, ""
    try:
        seconds = float(asked)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        return None, f" (its Retry-After, {asked!r}, is no number of seconds and is passed over)"
    if seconds > LONGEST_DELAY:
        return LONGEST_DELAY, f" (of its Retry-After, {asked}, {LONGEST_DELAY:g} s are waited)"
    return seconds, ""


class _TimeLimit:
    """Ends a request that takes too long. Its socket's own limit does not: that is for each wait,
    and a server may send a byte now and then for ever."""

    def __init__(self, seconds: float) -> None:
        self.is_over = False
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self._socket: socket.socket | None = None

    def watch(self, one: socket.socket) -> None:
        self._socket = one
        if self.is_over:
            self._end()

    def _end(self) -> None:
        self.is_over = True
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it is closed already
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # also below TLS

    def __enter__(self) -> "_TimeLimit":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def _opener(limit: _TimeLimit, *, through_proxy: bool) -> OpenerDirector:
    """Without a handler of redirects, which would send the key on."""

    class Plain(HTTPConnection):
        def connect(self) -> None:
            super().connect()
            limit.watch(self.sock)

    class Encrypted(HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            limit.watch(self.sock)

    class PlainHandler(HTTPHandler):
        def http_open(self, request: Request) -> Any:
            return self.do_open(Plain, request)

    class EncryptedHandler(HTTPSHandler):
        def https_open(self, request: Request) -> Any:
            return self.do_open(Encrypted, request)

    opener = OpenerDirector()
    proxies = ProxyHandler(None if through_proxy else {})
    ends = HTTPErrorProcessor(), HTTPDefaultErrorHandler()
    for handler in (proxies, PlainHandler(), EncryptedHandler(), *ends):
        opener.add_handler(handler)
    return opener
