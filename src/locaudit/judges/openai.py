"""A judge behind an OpenAI-compatible server: a chat model with a rubric, or a fine-tuned completion model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from locaudit.errors import ConfigError
from locaudit.judges.base import Aspect, Case, Judgement
from locaudit.judges.server import Ask, Reply, Server, gather, stop_if_hopeless
from locaudit.judges.wire import VERSION, Dialect, Style, chat_messages, completion_prompt, read, request
from locaudit.records import content_hash

LETTERS_PER_TOKEN = 4
"""Rule of thumb for English text; `Estimate` knows no tokenizer."""
CHAT_REPLY_TOKENS = 12
"""Tokens of ``{"yes_probability": 0.97}``, about."""


@dataclass(frozen=True)
class Estimate:
    """What judging would take, roughly: 4 characters a token, no retries, no hidden reasoning."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    dollars: float | None
    """None without both prices."""

    def __str__(self) -> str:
        cost = "" if self.dollars is None else f", about ${self.dollars:,.2f}"
        return (
            f"{self.requests:,} requests, about {self.prompt_tokens:,} prompt and {self.completion_tokens:,} "
            f"completion tokens at {LETTERS_PER_TOKEN} characters a token{cost}"
        )


@dataclass(eq=False)
class OpenAIJudge:
    """Asks a server. Made by `load_openai_judge`."""

    aspect: Aspect
    model: str
    prompt: str
    """Rubric (chat) or suffix (completion)."""
    style: Style
    server: Server
    prices: tuple[float | None, float | None] = (None, None)
    """US dollars a million prompt and completion tokens."""
    reply_tokens: int = 512
    """Limit of a chat reply; 8 times as many for a model that counts its reasoning (``max_completion_tokens``)."""
    _dialect: Dialect = field(default_factory=Dialect, init=False, repr=False)
    _settled: bool = field(default=False, init=False, repr=False)
    """Whether the server has answered: its dialect is known, and key and model are right."""

    @property
    def name(self) -> str:
        """Model and aspect."""
        return f"{self.model} ({self.aspect.name})"

    @property
    def fingerprint(self) -> str:
        """Hash of style, address, served model, prompt and version.

        The address counts: servers call different models by one name, such as ``judge``.
        """
        parts = [self.style, self.server.url, self.model, self.aspect.name, self.prompt]
        return content_hash(["openai", VERSION, *parts])

    @property
    def uses_references(self) -> bool:
        """A chat judge reads them; a completion judge's prompt has no place for them."""
        return self.style == "chat"

    def estimate(self, cases: Sequence[Case]) -> Estimate:
        """Requests, tokens and cost of judging the cases once."""
        tokens = sum(math.ceil(self._n_letters(case) / LETTERS_PER_TOKEN) for case in cases)
        replies = len(cases) * (CHAT_REPLY_TOKENS if self.style == "chat" else 1)
        price_in, price_out = self.prices
        dollars = None if price_in is None or price_out is None else (tokens * price_in + replies * price_out) / 1e6
        return Estimate(len(cases), tokens, replies, dollars)

    def _n_letters(self, case: Case) -> int:
        if self.style == "completion":
            return len(completion_prompt(case.question, case.answer, self.prompt))
        return sum(len(message["content"]) for message in chat_messages(case, self.prompt))

    def score(self, cases: Sequence[Case]) -> list[Judgement]:
        """One judgement a case, in order, up to `concurrency` at once.

        A request that fails for good, and a reply that is no judgement twice, are missing. When
        2 * concurrency cases in a row (at least 4) fail for good, the rest is not asked and missing too. Until the
        server has answered once, a wrong key, model or address (401, 403, 404) or an empty account raises
        `ConfigError`.
        """
        return self.server.run(lambda ask: self._score(ask, cases)) if cases else []

    async def _score(self, ask: Ask, cases: Sequence[Case]) -> list[Judgement]:
        out: list[Judgement] = [Judgement(None, "not asked")] * len(cases)
        failures, last = 0, ""

        async def one(i: int) -> None:
            nonlocal failures, last
            if failures >= max(4, 2 * self.server.concurrency):
                out[i] = Judgement(None, f"not asked: {failures} cases before it failed, the last with {last}")
                return
            out[i], answered = await self._judge(ask, cases[i])
            failures = 0 if answered else failures + 1
            last = out[i].reason

        # The first case goes alone: it finds out about key, model and dialect.
        await one(0)
        await gather(len(cases) - 1, self.server.concurrency, lambda i: one(i + 1))
        return out

    async def _judge(self, ask: Ask, case: Case) -> tuple[Judgement, bool]:
        """The judgement, and whether the server took the request."""
        judgement = Judgement(None)
        for again in (False, True):
            reply = await self._send(ask, case, again)
            if reply.body is None:
                return Judgement(None, reply.reason), reply.is_refused and self._settled
            judgement = read(reply.body, self.style)
            if judgement.probability is not None:
                return judgement, True
        return Judgement(None, f"{judgement.reason} (asked twice)"), True

    async def _send(self, ask: Ask, case: Case, again: bool) -> Reply:
        """Ask in the server's dialect. One that it refused is left only for one that it took."""
        dialect: Dialect | None = self._dialect
        while True:
            n_tokens = self.reply_tokens * (8 if dialect.limit == "max_completion_tokens" else 1)
            keywords = request(case, self.model, self.prompt, self.style, dialect, reply_tokens=n_tokens, again=again)
            reply = await ask(self.style, keywords)
            if reply.body is not None:
                self._dialect, self._settled = dialect, True
                return reply
            if self._settled:
                return reply
            stop_if_hopeless(reply, self.server, self.model)
            dialect = dialect.after(self.style, reply.message) if reply.is_refused else None
            if dialect is None:
                return reply


def load_openai_judge(
    aspect: Aspect,
    model: str,
    *,
    prompt: str | None = None,
    style: Style = "chat",
    base_url: str | None = None,
    api_key_env: str | None = None,
    concurrency: int = 8,
    timeout: float = 60.0,
    max_retries: int = 5,
    price_in: float | None = None,
    price_out: float | None = None,
    reply_tokens: int = 512,
    first_pause: float = 0.5,
) -> OpenAIJudge:
    r"""A judge that asks `model` behind an OpenAI-compatible server. Nothing is sent before `score`.

    Chat: `prompt` is the rubric's text (None: the aspect's), the references are part of the case, and the model states
    P(yes) as JSON, bound to a schema where the server can. Completion: `prompt` is what follows the answer (None: the
    aspect's suffix), and

        P(yes) = sum of P(token) over the server's 5 likeliest first tokens that spell yes

    in any case, with or without the space (servers differ in how they spell a token); the causal-LM judge counts
    `` yes`` alone. It is 0 if only a no is among them, missing if neither is. A server without log-probabilities
    says yes (1) or no (0) as text, anything else is missing.

    `timeout` (s) is for a whole request. A failed one (408, 409, 425, 429, 5xx, connection, time limit) is sent again
    up to `max_retries` times after `first_pause` (s), doubled each time, or what Retry-After asks (at most 60 s).

    The key is read from the environment when it is used and kept nowhere. A server other than api.openai.com may do
    without. Raises `ConfigError` for a missing key, package or address. Temperature is 0.
    """
    if style not in ("chat", "completion"):
        raise ConfigError(got=f"judge style {style!r}", expected="chat or completion", remedy="name one of them")
    server = Server(base_url, api_key_env, concurrency, timeout, max_retries, first_pause)
    server.check()
    text = prompt if prompt is not None else (aspect.rubric if style == "chat" else aspect.suffix)
    return OpenAIJudge(aspect, model, text, style, server, (price_in, price_out), reply_tokens)
