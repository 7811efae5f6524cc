"""A chat endpoint of our own, with its failures."""

import contextlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "secret"


class Server(ThreadingHTTPServer):
    """Answers a prompt with its words in capitals; a prompt may name failures to come first, each
    once, such as "503 drop": then it is answered."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies, self.failed, self.lock = [], Counter(), threading.Lock()
        self.busy = self.most_busy = 0
        self.silence = threading.Event()
        self.scripts = {}
        """What to do instead with a prompt of this text, or with a GET of this path: a function of
        the handler."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def next_failure(self, text):
        """The failure that is due for a prompt, if any."""
        with self.lock:
            tokens = text.split()
            place = self.failed[text]
            self.failed[text] += 1
        due = [token for token in tokens if token in FAILURES or token.isdigit()]
        if "always" in tokens:
            return due[0]
        return due[place] if place < len(due) else None

    def handle_error(self, request, client_address):
        """A client that has hung up is no error of the server's."""


@contextlib.contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.silence.set()
        server.shutdown()
        thread.join()
        server.server_close()


FAILURES = ("drop", "hang", "text", "empty", "filter")


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def reply(self, code, value, headers=()):
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for name, text in (("Content-Length", str(len(content))), *headers):
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        if self.path in self.server.scripts:
            self.server.scripts[self.path](self)
        elif self.headers["Authorization"] != f"Bearer {KEY}":
            self.reply(401, {"error": "no such key"})
        else:
            self.reply(200, {"data": [{"id": "tiny"}]})

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.busy += 1
            server.most_busy = max(server.busy, server.most_busy)
        time.sleep(0.01)
        with server.lock:
            server.busy -= 1
        text = body["messages"][-1]["content"]
        if text in server.scripts:
            server.scripts[text](self)
        else:
            self.answer(text, server.next_failure(text))

    def answer(self, text, failure):
        message, reason = {"role": "assistant", "content": text.upper()}, "stop"
        if failure == "drop":
            self.close_connection = True
            return
        if failure == "hang":
            self.server.silence.wait(10)
            return
        if failure == "text":
            self.reply(200, b"not JSON")
            return
        if failure == "empty":
            message["content"] = None
        elif failure == "filter":
            reason = "content_filter"
        elif failure is not None:
            headers = [("Retry-After", "0.02")] if failure == "429" else []
            self.reply(int(failure), {"error": f"the prompt {text}"}, headers)
            return
        if "think" in text:
            message |= {"reasoning": "hm", "content": None}
        if "call" in text:
            call = self.server.bodies[0]["messages"][1]["tool_calls"][0]
            message, reason = {"content": None, "tool_calls": [call]}, "tool_calls"
        choice = {"message": message, "finish_reason": "length" if "long" in text else reason}
        ids = {}
        if self.server.bodies[-1].get("return_token_ids") and "old" not in text:
            choice["token_ids"], ids = [3, 4], {"prompt_token_ids": [1, 2]}
        self.reply(200, {"choices": [choice], "usage": {"completion_tokens": 7}, **ids})
