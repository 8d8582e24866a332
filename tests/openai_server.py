"""A real HTTP server on a free port that speaks the OpenAI API and fails on command."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Fault:
    """What happens instead of an answer. `close`: no reply; `hang`, `drip`: seconds of silence, or of single bytes."""

    status: int = 200
    body: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    hang: float = 0.0
    drip: float = 0.0
    close: bool = False


def refusal(status: int, message: str = "no", **fields) -> Fault:
    return Fault(status, json.dumps({"error": {"message": message, **fields}}))


@dataclass(frozen=True)
class Received:
    path: str
    headers: dict[str, str]
    body: dict


def chat(content: str | None, finish_reason: str = "stop", **message) -> str:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": content, **message},
        "finish_reason": finish_reason,
    }
    return json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})


def completion(text: str, logprobs: dict | None = None) -> str:
    choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": "length"}
    return json.dumps({"id": "1", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]})


class OpenAIServer:
    """``with OpenAIServer(answer, faults) as server``: `answer` makes the body (or a fault) for a request."""

    def __init__(self, answer: Callable[[dict], str | Fault], faults: Iterable[Fault | None] = ()):
        self.answer, self.faults, self.received = answer, deque(faults), list[Received]()
        self.lock, self.over = threading.Lock(), threading.Event()
        self.at_once = self.most_at_once = 0

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(handler):  # noqa: N805
                self._serve(handler)

            def log_message(handler, *_):  # noqa: N805
                pass

        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.httpd.daemon_threads = False  # closing waits for every handler, so no socket is left open
        self.url = f"http://127.0.0.1:{self.httpd.server_address[1]}/v1"

    def __enter__(self) -> OpenAIServer:
        self.thread = threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self.httpd.shutdown()
        self.thread.join()
        self.httpd.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self.lock:
            headers = {name.lower(): value for name, value in handler.headers.items()}
            self.received.append(Received(handler.path, headers, body))
            fault = self.faults.popleft() if self.faults else None
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            answer = fault or self.answer(body)
            reply = answer if isinstance(answer, Fault) else Fault(body=answer)
            self.over.wait(reply.hang)
        finally:  # before the reply, after which the client may send the next request at once
            with self.lock:
                self.at_once -= 1
        try:
            self._reply(handler, reply)
        except ConnectionError:
            handler.close_connection = True  # the client has left

    def _reply(self, handler: BaseHTTPRequestHandler, fault: Fault) -> None:
        if fault.close:
            handler.close_connection = True
            return
        data = (fault.body or "").encode()
        handler.send_response(fault.status)
        for name, value in {"Content-Type": "application/json", **fault.headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        for k in range(len(data) if fault.drip else 0):
            handler.wfile.write(data[k : k + 1])
            handler.wfile.flush()
            if self.over.wait(fault.drip):
                handler.close_connection = True
                return
        if not fault.drip:
            handler.wfile.write(data)
