"""Ask an OpenAI-compatible server: several cases at once, with retries, deadlines and no key in anything written.

The `openai` client sends; retries are ours (its own are off), so that a pause can be bounded and tested.
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from locaudit.errors import ConfigError
from locaudit.judges.base import Judgement
from locaudit.judges.wire import shorten

PUBLIC_URL = "https://api.openai.com/v1"
LONGEST_PAUSE = 60.0
"""Seconds. A server that asks for more gets no further attempt for the case."""

_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
"""HTTP statuses after which the same request may succeed."""
_REFUSED = {400, 422, 501}
"""HTTP statuses of a request that the server does not take; see `Dialect.after`."""
_HOPELESS = {401: "refused the API key", 403: "does not allow this", 404: "knows no such model or address"}
"""HTTP statuses that every later request would get too."""


@dataclass(frozen=True)
class Reply:
    """The outcome of one request after its retries."""

    body: str | None
    """Text of HTTP 200, or None."""
    status: int = 200
    """HTTP status; 0 when there was none (connection, time limit)."""
    reason: str = ""
    """What went wrong."""
    message: str = ""
    """What the server said about it, lower case, key removed; for `Dialect.after` and reasons."""

    @property
    def is_refused(self) -> bool:
        """The server does not take such a request."""
        return self.status in _REFUSED

    @property
    def is_hopeless(self) -> bool:
        """No request of this key, model and address can succeed."""
        return self.body is None and (self.status in _HOPELESS or "insufficient_quota" in self.message)


@dataclass(frozen=True)
class Server:
    """Where and how to ask. Holds the name of the key's variable, never the key."""

    base_url: str | None
    api_key_env: str | None
    """None: ``OPENAI_API_KEY`` for api.openai.com, no key for any other server, which has no right to it."""
    concurrency: int
    timeout: float
    max_retries: int
    first_pause: float = 0.5
    """Seconds before the first retry; doubles with each, times a random factor from 0.5 to 1."""

    @property
    def url(self) -> str:
        """The address asked. Said to the client always: else it would take one from the environment."""
        return self.base_url or PUBLIC_URL

    def check(self) -> None:
        """Raise `ConfigError` for a missing package, an unusable address or key."""
        _openai()
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                got="a base_url that is no web address",
                expected="for example http://localhost:8000/v1",
                remedy="mend the judge's base_url",
            )
        if parts.username or parts.password or parts.query:
            raise ConfigError(
                got="a base_url with a user name, a password or a query",
                expected="an address without secrets: it is written to the run folder",
                remedy="put the secret into an environment variable and name it in api_key_env",
            )
        self._key()

    @property
    def key_variable(self) -> str:
        """Name of the environment variable that holds the key; empty when none is sent."""
        is_public = urlsplit(self.url).hostname == urlsplit(PUBLIC_URL).hostname
        return self.api_key_env or ("OPENAI_API_KEY" if is_public else "")

    def _key(self) -> str:
        name = self.key_variable
        key = os.environ.get(name, "").strip() if name else ""
        if not key and urlsplit(self.url).hostname == "api.openai.com":
            raise ConfigError(
                got=f"no API key: the environment variable {name} is not set",
                expected="the key of api.openai.com in it",
                remedy=f"set {name}, name another variable in api_key_env, or set base_url",
            )
        if not all("!" <= letter <= "~" for letter in key):  # else the client's errors would quote it
            raise ConfigError(
                got=f"an environment variable {name} with spaces or letters that no key has",
                expected="an API key",
                remedy=f"set {name} anew",
            )
        return key or "none"

    def run(self, judge: Callable[[Ask], Awaitable[list[Judgement]]]) -> list[Judgement]:
        """Run `judge` with an open connection, also where an event loop runs already. Ctrl-C cancels it."""
        key = self._key()
        openai = _openai()
        anyio = import_module("anyio.from_thread")

        async def main() -> list[Judgement]:
            async with openai.AsyncOpenAI(
                api_key=key, base_url=self.url, timeout=self.timeout, max_retries=0
            ) as client:
                return await judge(Ask(self, client, key))

        # A thread of its own: an event loop that runs already (a notebook's) is left alone.
        with anyio.start_blocking_portal() as portal:
            return portal.call(main)


class Ask:
    """An open connection: ``await ask(style, request)`` gives a `Reply` and does not raise."""

    def __init__(self, server: Server, client: Any, key: str):
        self._server, self._key = server, key
        create = {"chat": client.chat.completions, "completion": client.completions}
        self._create = {style: resource.with_raw_response.create for style, resource in create.items()}
        self._random = random.Random()

    async def __call__(self, style: str, request: dict[str, Any]) -> Reply:
        """Send a request, again after failures that may pass, with growing pauses; `Retry-After` is honoured."""
        attempt = 0
        while True:
            reply, wait = await self._once(style, request)
            if reply.body is not None or wait is None:
                return reply
            attempt += 1
            if attempt > self._server.max_retries:
                return Reply(None, reply.status, f"{reply.reason} ({attempt} attempts)", reply.message)
            pause = self._server.first_pause * 2 ** (attempt - 1) * self._random.uniform(0.5, 1)
            if wait > LONGEST_PAUSE:
                return Reply(None, reply.status, f"{reply.reason}; it asks for a pause of {wait:.0f} s", reply.message)
            await asyncio.sleep(max(wait, min(pause, LONGEST_PAUSE)))

    async def _once(self, style: str, request: dict[str, Any]) -> tuple[Reply, float | None]:
        """A reply and the pause in seconds that the server asks for; None: the same request is not worth sending."""
        openai = _openai()
        try:
            # The client's own limit is for each read; this one is for the whole request.
            async with asyncio.timeout(self._server.timeout):
                raw = await self._create[style](**request)
                return Reply(self._without_key(raw.http_response.text)), None
        except (TimeoutError, openai.APITimeoutError):
            return Reply(None, 0, f"no reply within {self._server.timeout:g} s"), 0.0
        except openai.APIStatusError as error:
            message = self._without_key(str(error.body if error.body is not None else error.response.text))
            message = shorten(message, 300).lower()
            reply = Reply(None, error.status_code, f"HTTP {error.status_code}", message)
            if error.status_code not in _AGAIN or reply.is_hopeless:
                # What a server says about a key may hold part of it.
                said = "" if error.status_code in (401, 403) else f": {shorten(message)}"
                return Reply(None, error.status_code, reply.reason + said, message), None
            return reply, _asked_pause(error.response.headers)
        except openai.APIConnectionError:
            return Reply(None, 0, "the connection failed"), 0.0
        except openai.APIError as error:
            return Reply(None, 0, f"the client gave up: {type(error).__name__}"), None

    def _without_key(self, text: str) -> str:
        # Shorter ones are placeholders of local servers, and may be ordinary words.
        return text.replace(self._key, "[key]") if len(self._key) >= 8 else text


def stop_if_hopeless(reply: Reply, server: Server, model: str) -> None:
    """Raise `ConfigError` where every request would fail like this one (wrong key, unknown model, no credit)."""
    if reply.is_hopeless:
        what = _HOPELESS.get(reply.status, "says that the account has no credit left")
        raise ConfigError(
            got=f"HTTP {reply.status} from {server.url} for the model {model!r}: the server {what}",
            expected="a server that judges",
            remedy=f"check the key ({server.key_variable or 'none is sent: set api_key_env'}), the model and base_url",
        )


async def gather(n: int, concurrency: int, one: Callable[[int], Awaitable[None]]) -> None:
    """Await ``one(0) .. one(n - 1)``, at most `concurrency` at once."""
    numbers = iter(range(n))

    async def worker() -> None:
        for i in numbers:
            await one(i)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(n, concurrency)):
                group.create_task(worker())
    except* ConfigError as several:
        first: BaseException = several
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        error = first
    else:
        error = None
    if error is not None:
        raise error


def _asked_pause(headers: Any) -> float:
    """Seconds from ``retry-after-ms`` or ``Retry-After`` (seconds or a date); 0 without them."""
    milliseconds, seconds = headers.get("retry-after-ms"), headers.get("retry-after")
    for text, scale in ((milliseconds, 0.001), (seconds, 1.0)):
        try:
            value = float(text) * scale
        except (TypeError, ValueError):
            continue
        if math.isfinite(value):
            return max(value, 0.0)
    date = email.utils.parsedate_tz(seconds) if seconds else None
    return max(email.utils.mktime_tz(date) - time.time(), 0.0) if date else 0.0


def _openai() -> Any:
    try:
        return import_module("openai")
    except ImportError:
        raise ConfigError(
            got="an openai judge without the package openai",
            expected="the extra judge installed",
            remedy="run: pip install 'locaudit[judge]'",
        ) from None
