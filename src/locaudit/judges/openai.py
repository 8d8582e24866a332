"""A judge behind an OpenAI-compatible server: a chat model with a rubric, or a fine-tuned completion model.

The `openai` client sends, waits and tries again; what is sent and how a reply is read is in `locaudit.judges.wire`.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from locaudit.errors import ConfigError
from locaudit.judges.base import Aspect, Case, Judgement, import_extra, needed_model
from locaudit.judges.settings import OpenAISettings
from locaudit.judges.wire import VERSION, Dialect, read, request, shorten
from locaudit.records import content_hash
from locaudit.registry import ASPECTS

PUBLIC_URL = "https://api.openai.com/v1"
PAUSES = 120.0
"""Seconds that one request may wait between its attempts, all together."""
LETTERS_PER_TOKEN = 4
"""Rule of thumb for English text: an estimate knows no tokenizer."""
CHAT_REPLY_TOKENS = 12
"""Tokens of ``{"yes_probability": 0.97}``, about."""
_REFUSED = {400, 422, 501}
"""HTTP statuses of a request that the server does not take; see `Dialect.after`."""
_HOPELESS = {401: "refused the API key", 403: "does not allow this", 404: "knows no such model or address"}
"""HTTP statuses that every later request would get too."""


@dataclass(frozen=True)
class Reply:
    """What became of one request after all its attempts."""

    body: str | None
    """Text of HTTP 200, or None."""
    reason: str = ""
    """What went wrong."""
    status: int = 0
    """HTTP status of a failure; 0 when there was none (connection, time limit)."""
    message: str = ""
    """What the server said about a failure, lower case, without the key."""


@dataclass(eq=False)
class OpenAIJudge:
    """Asks a server. Made by `load_openai_judge`. Holds the name of the key's variable, never the key."""

    aspect: Aspect
    settings: OpenAISettings
    prompt: str
    """Rubric (chat) or suffix (completion)."""
    reply_tokens: int = 512
    """Limit of a chat reply; 8 times as many for a model that counts its reasoning (``max_completion_tokens``)."""
    _dialect: Dialect = field(default_factory=Dialect, init=False, repr=False)
    _settled: bool = field(default=False, init=False, repr=False)
    """Whether the server has answered: its dialect is known, and key and model are right."""

    @property
    def name(self) -> str:
        """Model and aspect."""
        return f"{self.settings.model} ({self.aspect.name})"

    @property
    def url(self) -> str:
        """The address asked. Said to the client always: else it would take one from the environment."""
        return self.settings.base_url or PUBLIC_URL

    @property
    def key_variable(self) -> str:
        """Name of the environment variable that holds the key; empty when none is sent."""
        is_public = urlsplit(self.url).hostname == urlsplit(PUBLIC_URL).hostname
        return self.settings.api_key_env or ("OPENAI_API_KEY" if is_public else "")

    @property
    def fingerprint(self) -> str:
        """Hash of style, address, served model, prompt and version.

        The address counts: servers call different models by one name, such as ``judge``.
        """
        parts = [self.settings.style, self.url, self.settings.model, self.aspect.name, self.prompt]
        return content_hash(["openai", VERSION, *parts])

    @property
    def uses_references(self) -> bool:
        """A chat judge reads them; a completion judge's prompt has no place for them."""
        return self.settings.style == "chat"

    def estimate(self, cases: Sequence[Case]) -> str:
        """Requests, tokens and cost of judging the cases once, roughly: without retries and hidden reasoning."""
        is_chat, prices = self.settings.style == "chat", (self.settings.price_in, self.settings.price_out)
        asked = [self._request(case, self._dialect) for case in cases]
        texts = ["".join(m["content"] for m in x["messages"]) if is_chat else x["prompt"] for x in asked]
        tokens = sum(math.ceil(len(text) / LETTERS_PER_TOKEN) for text in texts)
        replies = len(cases) * (CHAT_REPLY_TOKENS if is_chat else 1)
        dollars = [n * price / 1e6 for n, price in zip((tokens, replies), prices, strict=True) if price is not None]
        return (
            f"{len(cases):,} requests, about {tokens:,} prompt and {replies:,} completion tokens at "
            f"{LETTERS_PER_TOKEN} characters a token" + (f", about ${sum(dollars):,.2f}" if len(dollars) == 2 else "")
        )

    def score(self, cases: Sequence[Case]) -> list[Judgement]:
        """One judgement a case, in order, up to `concurrency` at once.

        A request that fails for good, and a reply that is no judgement twice, are missing. When
        2 * concurrency cases in a row (at least 4) fail for good, the rest is not asked and missing too. Until the
        server has answered once, a wrong key, model or address (401, 403, 404) or an empty account raises
        `ConfigError`.
        """
        if not cases:
            return []
        # A thread of its own: an event loop that runs already (a notebook's) is left alone, and Ctrl-C cancels it.
        with import_module("anyio.from_thread").start_blocking_portal() as portal:
            return portal.call(self._score, cases)

    async def _score(self, cases: Sequence[Case]) -> list[Judgement]:
        settings, key = self.settings, self.key()
        out = [Judgement(None)] * len(cases)
        gate = asyncio.Semaphore(settings.concurrency)
        failures, last = 0, ""

        async def one(i: int) -> None:
            nonlocal failures, last
            async with gate:
                if failures >= max(4, 2 * settings.concurrency):
                    out[i] = Judgement(None, f"not asked: {failures} cases before it failed, the last with {last}")
                    return
                out[i], answered = await self._judge(client, key, cases[i])
                failures = 0 if answered else failures + 1
                last = out[i].reason

        limits = {"timeout": settings.timeout, "max_retries": settings.max_retries}
        async with import_extra("openai").AsyncOpenAI(api_key=key, base_url=self.url, **limits) as client:
            await one(0)  # alone: it finds out about key, model and dialect
            await asyncio.gather(*map(one, range(1, len(cases))))
        return out

    async def _judge(self, client: Any, key: str, case: Case) -> tuple[Judgement, bool]:
        """The judgement, and whether the server took the request."""
        judgement = Judgement(None)
        for again in (False, True):
            reply = await self._ask(client, key, case, again)
            if reply.body is None:
                return Judgement(None, reply.reason), reply.status in _REFUSED and self._settled
            judgement = read(reply.body, self.settings.style)
            if judgement.probability is not None:
                return judgement, True
        return Judgement(None, f"{judgement.reason} (asked twice)"), True

    async def _ask(self, client: Any, key: str, case: Case, again: bool) -> Reply:
        """Ask in the server's dialect. One that it refused is left only for one that it took."""
        dialect = self._dialect
        while True:
            reply = await self._send(client, key, self._request(case, dialect, again))
            if reply.body is not None:
                self._dialect, self._settled = dialect, True
            if self._settled:
                return reply
            self._stop_if_hopeless(reply)
            other = dialect.after(self.settings.style, reply.message) if reply.status in _REFUSED else None
            if other is None:
                return reply
            dialect = other

    def _request(self, case: Case, dialect: Dialect, again: bool = False) -> dict[str, Any]:
        n_tokens = self.reply_tokens * (8 if dialect.limit == "max_completion_tokens" else 1)
        model, style = self.settings.model or "", self.settings.style
        return request(case, model, self.prompt, style, dialect, reply_tokens=n_tokens, again=again)

    async def _send(self, client: Any, key: str, keywords: dict[str, Any]) -> Reply:
        openai, settings = import_extra("openai"), self.settings
        resource = client.chat.completions if settings.style == "chat" else client.completions
        try:
            # The client's time limit is for each read; this one ends a reply that drips in for ever.
            async with asyncio.timeout((settings.max_retries + 1) * settings.timeout + PAUSES):
                raw = await resource.with_raw_response.create(**keywords)
                return Reply(_without(key, raw.http_response.text))
        except openai.APITimeoutError as error:
            return Reply(None, f"no reply within {settings.timeout:g} s{_attempts(error)}")
        except TimeoutError:
            return Reply(None, "no whole reply within the time for all attempts")
        except openai.APIConnectionError as error:
            return Reply(None, f"the connection failed{_attempts(error)}")
        except openai.APIStatusError as error:
            said = shorten(_without(key, str(error.body if error.body is not None else error.response.text)), 300)
            # What a server says about a key may hold part of it.
            why = _attempts(error) or ("" if error.status_code in (401, 403) else f": {shorten(said.lower())}")
            return Reply(None, f"HTTP {error.status_code}{why}", error.status_code, said.lower())
        except openai.APIError as error:
            return Reply(None, f"the client gave up: {type(error).__name__}")

    def _stop_if_hopeless(self, reply: Reply) -> None:
        """Raise `ConfigError` where every request would fail like this one (wrong key, unknown model, no credit)."""
        if reply.status not in _HOPELESS and "insufficient_quota" not in reply.message:
            return
        what = _HOPELESS.get(reply.status, "says that the account has no credit left")
        raise ConfigError(
            got=f"HTTP {reply.status} from {self.url} for the model {self.settings.model!r}: the server {what}",
            expected="a server that judges",
            remedy=f"check the key ({self.key_variable or 'none is sent: set api_key_env'}), the model and base_url",
        )

    def check(self) -> None:
        """Raise `ConfigError` for a missing package, or an address or key that cannot be used."""
        import_extra("openai")
        parts = urlsplit(self.url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
        if not is_address or parts.username or parts.password or parts.query:  # not quoted: it may hold a secret
            raise ConfigError(
                got="a base_url with a user name, a password or a query" if is_address else "a base_url that is none",
                expected="for example http://localhost:8000/v1, without secrets: it is written to the run folder",
                remedy="mend the judge's base_url; a key goes into the environment variable that api_key_env names",
            )
        self.key()

    def key(self) -> str:
        """The key, read from the environment when it is used; ``none`` where none is sent."""
        name = self.key_variable
        key = os.environ.get(name, "").strip() if name else ""
        is_missing = not key and urlsplit(self.url).hostname == urlsplit(PUBLIC_URL).hostname
        if is_missing or not all("!" <= letter <= "~" for letter in key):  # else the client's errors would quote it
            raise ConfigError(
                got=f"the environment variable {name}, which is "
                + ("not set" if is_missing else "set to spaces or letters that no key has"),
                expected="an API key in it",
                remedy=f"set {name}, name another variable in api_key_env, or set base_url",
            )
        return key or "none"


def load(wanted: Mapping[str, OpenAISettings], device: str) -> dict[str, OpenAIJudge]:
    """The judges of the kind ``openai``."""
    return {aspect: load_openai_judge(ASPECTS[aspect], settings) for aspect, settings in wanted.items()}


def load_openai_judge(aspect: Aspect, settings: OpenAISettings, *, reply_tokens: int = 512) -> OpenAIJudge:
    r"""A judge that asks a model behind an OpenAI-compatible server. Nothing is sent before `score`.

    Chat: the references are part of the case, and the model states P(yes) as JSON, bound to a schema where the server
    can. Completion:

        P(yes) = sum of P(token) over the server's 5 likeliest first tokens that spell yes

    in any case, with or without the space (servers differ in how they spell a token); the causal-LM judge counts
    `` yes`` alone. It is 0 if only a no is among them, missing if neither is. A server without log-probabilities
    says yes (1) or no (0) as text, anything else is missing. Temperature is 0.

    Raises `ConfigError` for a rubric that cannot be read and for a missing model, key, package or address.
    """
    needed_model(aspect, settings.model)
    is_chat, prompt = settings.style == "chat", settings.prompt
    if is_chat and prompt is not None:
        prompt = _read_rubric(prompt)
    text = prompt if prompt is not None else (aspect.rubric if is_chat else aspect.suffix)
    judge = OpenAIJudge(aspect, settings, text, reply_tokens)
    judge.check()
    return judge


def _read_rubric(name: str) -> str:
    try:
        text = Path(name).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        text, why = "", f"which cannot be read ({error})"
    else:
        why = "which is empty"
    if not text:
        raise ConfigError(got=f"the rubric {name}, {why}", expected="a text file", remedy="check the judge's prompt")
    return text


def _attempts(error: Any) -> str:
    """How often the client tried, if more than once."""
    retries = int(error.request.headers.get("x-stainless-retry-count", 0))
    return f" ({retries + 1} attempts)" if retries else ""


def _without(key: str, text: str) -> str:
    # Shorter keys are placeholders of local servers, and may be ordinary words.
    return text.replace(key, "[key]") if len(key) >= 8 else text
