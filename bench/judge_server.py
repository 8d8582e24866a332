"""Judge answers through a real server (`transformers serve` with SmolLM2), with and without injected faults.

python -m bench.judge_server

Needs the extra ``judge`` and ``pip install "transformers[serving]"``. A proxy in front of the server answers some
requests with HTTP 429 or 500, no reply, broken JSON or a closed connection. Judgements must be the same either way.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from bench.command import header, line
from bench.work import ASPECTS, Case, OpenAISettings, Style, load_behaviour, load_model, load_openai_judge

TIMEOUT = 30.0
FAULTS = {2: "429", 5: "500", 8: "hang", 11: "broken JSON", 14: "closed", 17: "503", 20: "429"}
"""Number of a request, counted from 1 -> the fault that it meets."""
ASKED = "Is this answer true, yes or no?\nAnswer:"
"""Prompt after an answer. The server gives no log-probabilities, so yes or no is read from the text."""


def main() -> None:
    """Print one row per style, without and with faults."""
    chosen = load_behaviour("misconceptions").questions[:10]
    cases = [Case(q.text, answer, q.true, q.false) for q in chosen for answer in (q.true[0], q.false[0])]
    print(header("style", "way", "judged", "yes", "missing", "requests", "faults met", "seconds"))
    with serving() as (url, name):
        # A model with 135M parameters rarely writes JSON, so a few chats suffice to see them end as missing.
        styles: tuple[tuple[Style, str | None], ...] = (("completion", ASKED), ("chat", None))
        for style, prompt in styles:
            asked = cases if style == "completion" else cases[:4]
            found = []
            for way, faults in (("plain", {}), ("faults", FAULTS)):
                with proxy(url, faults) as (address, seen):
                    settings = OpenAISettings(
                        model=name, prompt=prompt, style=style, base_url=address, concurrency=2, timeout=TIMEOUT
                    )
                    judge = load_openai_judge(ASPECTS["truth"], settings, reply_tokens=24)
                    start = time.monotonic()
                    found.append(judge.score(asked))
                    seconds = time.monotonic() - start
                values = [j.probability for j in found[-1] if j.probability is not None]
                counts = len(values), sum(value >= 0.5 for value in values), len(asked) - len(values), len(seen)
                print(line([style, way, *counts, ", ".join(filter(None, seen)), f"{seconds:.0f}"]), flush=True)
            same = sum(a.probability == b.probability for a, b in zip(*found, strict=True))
            print(f"{style}: {same} of {len(asked)} judgements are the same with faults; {judge.estimate(asked)}")
            for reason, n in Counter(j.reason for judged in found for j in judged if j.reason).most_common():
                print(f"missing {n} times: {reason}")


@contextmanager
def serving() -> Iterator[tuple[str, str]]:
    """Run `transformers serve`; yields its address and the model's name.

    SmolLM2 is first saved as a plain checkpoint, because the installed package has it as GGUF.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    url, script = f"http://127.0.0.1:{port}", Path(sys.executable).with_name("transformers")
    with tempfile.TemporaryDirectory() as name:
        model = load_model("smollm2-135m", device="cpu")
        model.lm.save_pretrained(name)
        model.tokenizer.save_pretrained(name)
        command = [str(script), "serve", name, "--host", "127.0.0.1", "--port", port, "--device", "cpu"]
        with subprocess.Popen(command, stdout=sys.stderr, stderr=sys.stderr) as server:
            try:
                deadline = time.monotonic() + 120
                while True:
                    try:
                        urlopen(f"{url}/health", timeout=TIMEOUT).close()
                        break
                    except URLError:
                        if server.poll() is not None or time.monotonic() > deadline:
                            raise
                        time.sleep(1)
                yield url, name
            finally:
                server.terminate()


def post(url: str, body: bytes) -> tuple[int, bytes]:
    """Status and body of the reply to a JSON request."""
    try:
        with urlopen(Request(url, body, {"Content-Type": "application/json"}), timeout=300) as reply:
            return reply.status, reply.read()
    except HTTPError as error:
        with error:
            return error.code, error.read()


@contextmanager
def proxy(target: str, faults: Mapping[int, str]) -> Iterator[tuple[str, list[str]]]:
    """Run a proxy to `target`; yields its address and the list of faults injected so far, one entry per request."""
    seen: list[str] = []
    lock, over = threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                fault = faults.get(len(seen) + 1, "")
                seen.append(fault)
            if fault == "hang":
                over.wait(TIMEOUT + 5)
            elif fault == "broken JSON":
                self.answer(200, b'{"choices": [{"text": " yes", ')
            elif fault.isdecimal():
                self.answer(int(fault), b'{"error": {"message": "try again"}}')
            elif fault != "closed":
                self.answer(*post(target + self.path, body))

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if status == 429:
                self.send_header("Retry-After", "1")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
        finally:
            over.set()
            server.shutdown()
            thread.join()


if __name__ == "__main__":
    main()
