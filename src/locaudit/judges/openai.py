"""A judge behind an OpenAI-compatible server: a chat model with a rubric, or a fine-tuned completion model.

The `openai` client sends requests and retries them. `locaudit.judges.wire` defines the form of requests and replies.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from locaudit.errors import ConfigError, import_extra
from locaudit.judges.base import Aspect, Case, Judgement, needed_model
from locaudit.judges.settings import OpenAISettings
from locaudit.judges.wire import FORMS, VERSION, Dialect, chat_messages, completion_prompt, has_choices, read, shorten
from locaudit.records import content_hash
from locaudit.registry import ASPECTS

PUBLIC_URL = "https://api.openai.com/v1"
PAUSES = 120.0
"""Longest total time, in seconds, that one request may spend in pauses between its attempts."""
LETTERS_PER_TOKEN = 4
"""Characters per token: a rule of thumb for English, because the server's tokenizer is not known."""
CHAT_REPLY_TOKENS = 12
"""Approximate number of tokens in ``{"yes_probability": 0.97}``."""
_REFUSED = {400, 422, 501}
"""HTTP statuses of a request whose form the server does not accept; see `Dialect.after`."""
_HOPELESS = {401: "refused the API key", 403: "does not allow this", 404: "knows no such model or address"}
"""HTTP statuses that every later request would also get, and what the server means by them."""


@dataclass(frozen=True)
class Reply:
    """The outcome of one request after all its attempts."""

    body: str | None
    """Body of an HTTP 200 reply; None after a failure."""
    reason: str = ""
    """Why the request failed."""
    status: int = 0
    """HTTP status of a failure; 0 if there is none (connection error, timeout)."""
    message: str = ""
    """The server's error message in lower case, with the key removed."""


@dataclass(eq=False)
class OpenAIJudge:
    """A judge that asks a server. Made by `load_openai_judge`. It stores where to find the API key, never the key."""

    aspect: Aspect
    settings: OpenAISettings
    prompt: str
    """Rubric (chat) or suffix (completion)."""
    reply_tokens: int = 512
    """Token limit of a chat reply. It is 8 times higher if it includes reasoning (``max_completion_tokens``)."""
    _dialect: Dialect = field(default_factory=Dialect, init=False, repr=False)
    _settled: bool = field(default=False, init=False, repr=False)
    """Whether the server has answered once. Then it accepts key and model, and its dialect is known."""
    _works: bool = field(default=False, init=False, repr=False)
    """Whether a judgement has been read from a reply of the server."""

    @property
    def name(self) -> str:
        """Model and aspect."""
        return f"{self.settings.model} ({self.aspect.name})"

    @property
    def url(self) -> str:
        """Address of the server. Never None, because the client would then take an address from the environment."""
        return self.settings.base_url or PUBLIC_URL

    @property
    def key_variable(self) -> str:
        """Name of the environment variable that holds the key; empty if no key is sent."""
        is_public = urlsplit(self.url).hostname == urlsplit(PUBLIC_URL).hostname
        return self.settings.api_key_env or ("OPENAI_API_KEY" if is_public else "")

    @property
    def fingerprint(self) -> str:
        """Hash of style, address, served model, prompt and version.

        The address is included because different servers may serve different models under one name, such as ``judge``.
        """
        parts = [self.settings.style, self.url, self.settings.model, self.aspect.name, self.prompt]
        return content_hash(["openai", VERSION, *parts])

    @property
    def uses_references(self) -> bool:
        """True for a chat judge, and False for a completion judge, whose prompt has no references."""
        return self.settings.style == "chat"

    def estimate(self, cases: Sequence[Case]) -> str:
        """Rough number of requests and tokens, and cost in US dollars, not counting retries and hidden reasoning."""
        is_chat, prices = self.settings.style == "chat", (self.settings.price_in, self.settings.price_out)
        asked = [self._request(case, self._dialect) for case in cases]
        texts = ["".join(m["content"] for m in x["messages"]) if is_chat else x["prompt"] for x in asked]
        tokens = sum(math.ceil(len(text) / LETTERS_PER_TOKEN) for text in texts)
        replies = len(cases) * (CHAT_REPLY_TOKENS if is_chat else 1)
        dollars = [n * price / 1e6 for n, price in zip((tokens, replies), prices, strict=True) if price is not None]
        return (
            f"{len(cases):,} requests, about {tokens:,} prompt and {replies:,} completion tokens at "
            f"{LETTERS_PER_TOKEN} characters per token" + (f", about ${sum(dollars):,.2f}" if len(dollars) == 2 else "")
        )

    def score(self, cases: Sequence[Case]) -> list[Judgement]:
        """One judgement per case, in order, with up to `concurrency` requests at once.

        A judgement is missing if the request fails after all attempts, or if two replies in a row cannot be read. After
        max(4, 2 * concurrency) failures in a row, the remaining cases are not sent, and their judgements are missing
        too. Unreadable replies count as failures until the first readable one.

        Raises `ConfigError` in two cases. Before its first answer, the server rejects the key, model or address (HTTP
        401, 403, 404) or reports that the account has no credit. Or, before a first judgement could be read, two
        replies to a case are not those of an OpenAI-compatible server.
        """
        if not cases:
            return []
        # In a thread of its own, so that it also works where an event loop is running already (a notebook). Ctrl-C
        # cancels it.
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
        async with import_extra("openai", "judge").AsyncOpenAI(api_key=key, base_url=self.url, **limits) as client:
            await one(0)  # alone, to learn the dialect and whether key and model are accepted
            await asyncio.gather(*map(one, range(1, len(cases))))
        return out

    async def _judge(self, client: Any, key: str, case: Case) -> tuple[Judgement, bool]:
        """The judgement, and whether the server works: it has given a judgement, or it refused only this case."""
        judgement = Judgement(None)
        for again in (False, True):
            reply = await self._ask(client, key, case, again)
            if reply.body is None:
                return Judgement(None, reply.reason), reply.status in _REFUSED and self._settled
            judgement = read(reply.body, self.settings.style)
            if judgement.probability is not None:
                self._works = True
                return judgement, True
            if again and not self._works and not has_choices(reply.body):
                raise ConfigError(
                    got=f"a reply from {self.url} that is not OpenAI-compatible: {shorten(reply.body)!r}",
                    expected=f"a {self.settings.style} reply, a JSON object with the key choices",
                    remedy="check the judge's base_url and style, then repeat: finished trials and judgements are kept",
                )
        return Judgement(None, f"{judgement.reason} (asked twice)"), self._works

    async def _ask(self, client: Any, key: str, case: Case, again: bool) -> Reply:
        """Send a case in the server's dialect. Until the server has answered, a refusal leads to a simpler dialect."""
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
        """Keyword arguments for the client's `create`."""
        out: dict[str, Any] = {"model": self.settings.model, **FORMS[self.settings.style][dialect.form]}
        if dialect.temperature:
            out["temperature"] = 0
        if self.settings.style == "completion":
            return out | {"prompt": completion_prompt(case.question, case.answer, self.prompt), "max_tokens": 1}
        n_tokens = self.reply_tokens * (8 if dialect.limit == "max_completion_tokens" else 1)
        return out | {"messages": chat_messages(case, self.prompt, again=again), dialect.limit: n_tokens}

    async def _send(self, client: Any, key: str, keywords: dict[str, Any]) -> Reply:
        openai, settings = import_extra("openai", "judge"), self.settings
        resource = client.chat.completions if settings.style == "chat" else client.completions
        try:
            # The client's timeout is for each read. This one is for the whole request, even if a reply comes slowly.
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
            # A server's message about a key may quote part of it.
            why = _attempts(error) or ("" if error.status_code in (401, 403) else f": {shorten(said.lower())}")
            return Reply(None, f"HTTP {error.status_code}{why}", error.status_code, said.lower())
        except openai.APIError as error:
            return Reply(None, f"the client gave up: {type(error).__name__}")

    def _stop_if_hopeless(self, reply: Reply) -> None:
        """Raise `ConfigError` if every request would fail like this one: wrong key, unknown model, no credit."""
        if reply.status not in _HOPELESS and "insufficient_quota" not in reply.message:
            return
        what = _HOPELESS.get(reply.status, "says that the account has no credit left")
        raise ConfigError(
            got=f"HTTP {reply.status} from {self.url} for the model {self.settings.model!r}: the server {what}",
            expected="a server that accepts the judge's requests",
            remedy=f"check the key ({self.key_variable or 'none is sent: set api_key_env'}), the model and base_url",
        )

    def check(self) -> None:
        """Raise `ConfigError` for a missing package, or an address or key that cannot be used."""
        if find_spec("openai") is None:  # looked for only: importing it takes a second
            import_extra("openai", "judge")
        parts = urlsplit(self.url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
        if not is_address or parts.username or parts.password or parts.query:  # not quoted: it may contain a secret
            raise ConfigError(
                got="a base_url that is not an address, or has a user name, password or query",
                expected="an address without secrets (it is saved in the run folder), such as http://localhost:8000/v1",
                remedy="correct the judge's base_url; put a key into the environment variable that api_key_env names",
            )
        self.key()

    def key(self) -> str:
        """The key, read from the environment at each use; ``none`` if no key is sent.

        Raises `ConfigError` if a key is needed and not set, or if it has characters that no key has.
        """
        name = self.key_variable
        key = os.environ.get(name, "").strip() if name else ""
        is_missing = not key and urlsplit(self.url).hostname == urlsplit(PUBLIC_URL).hostname
        if is_missing or not all("!" <= letter <= "~" for letter in key):  # the client's own error would show the key
            raise ConfigError(
                got=f"the environment variable {name}, which is "
                + ("not set" if is_missing else "set to spaces or characters that no key has"),
                expected="an API key in it",
                remedy=f"set {name}, name another variable in api_key_env, or set base_url",
            )
        return key or "none"


def load(wanted: Mapping[str, OpenAISettings], device: str) -> dict[str, OpenAIJudge]:
    """Load the judges of kind ``openai``: aspect -> judge."""
    return {aspect: load_openai_judge(ASPECTS[aspect], settings) for aspect, settings in wanted.items()}


def load_openai_judge(aspect: Aspect, settings: OpenAISettings, *, reply_tokens: int = 512) -> OpenAIJudge:
    r"""Make a judge that asks a model behind an OpenAI-compatible server. Nothing is sent before `score`.

    In style ``chat``, the model sees question, answer and references, and replies with P(yes) as JSON. A JSON schema is
    enforced if the server supports it. In style ``completion``,

        P(yes) = sum of P(token) over those of the 5 most likely first tokens that spell yes

    Case and leading spaces are ignored, because servers spell tokens differently (the causal-LM judge counts only
    `` yes``). If "no" is among the 5 tokens and "yes" is not, P(yes) is 0; if neither is, the judgement is missing. If
    the server gives no log-probabilities, the text counts: yes is 1, no is 0, anything else is missing. Temperature is
    0.

    Raises `ConfigError` for an unreadable rubric or a missing model, key, package or address.
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
        text, why = Path(name).read_text(encoding="utf-8").strip(), "is empty"
    except (OSError, ValueError) as error:
        text, why = "", f"cannot be read ({error})"
    if not text:
        raise ConfigError(
            got=f"the rubric {name}, which {why}", expected="a text file", remedy="check the judge's prompt"
        )
    return text


def _attempts(error: Any) -> str:
    """`` (n attempts)`` if the client tried more than once, else empty."""
    retries = int(error.request.headers.get("x-stainless-retry-count", 0))
    return f" ({retries + 1} attempts)" if retries else ""


def _without(key: str, text: str) -> str:
    # Shorter keys are placeholders for local servers and may be ordinary words.
    return text.replace(key, "[key]") if len(key) >= 8 else text
