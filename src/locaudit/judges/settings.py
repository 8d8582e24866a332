"""Settings of each kind of judge, every default once. No torch here."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from locaudit.config.validation import Count, Positive, checked
from locaudit.errors import ConfigError

Style = Literal["chat", "completion"]
Price = Annotated[float, Field(ge=0)]


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w{0,63}", name):
        # Not quoted: it may be the key itself.
        got = "an api_key_env that is no name of a variable"
        raise ConfigError(got=got, expected="a name such as MY_KEY", remedy="put the key into that variable")
    return name


@checked
class ReferenceSettings:
    """The bundled judge, which compares an answer with the question's reference answers."""

    model: str | None = None
    """Folder of a judge fitted with tools/judge/fit.py (None: the bundled weights)."""


@checked
class CausalLMSettings:
    """A language model that says yes or no to an answer, such as the public truth and info judges."""

    model: str | None = None
    """The judge: a folder, a hub id, or the folder of an adapter made by tools/judge/finetune.py."""
    prompt: str | None = None
    """What follows the answer (None: the aspect's own, such as ``True:``)."""


@checked
class OpenAISettings:
    """A model behind an OpenAI-compatible server."""

    model: str | None = None
    """The server's name of the model."""
    prompt: str | None = None
    """chat: a text file with the rubric; completion: what follows the answer (None: the aspect's own)."""
    style: Style = "chat"
    """A chat model with a rubric, or a fine-tuned completion model with the causal-lm prompt."""
    base_url: str | None = None
    """Address of the server, for example ``http://localhost:8000/v1`` (None: api.openai.com)."""
    api_key_env: Annotated[str, AfterValidator(_variable)] | None = None
    """Name of the environment variable that holds the key; the key itself is written nowhere (None:
    ``OPENAI_API_KEY`` for api.openai.com, no key for any other server)."""
    concurrency: Count = 8
    """Requests under way at once."""
    timeout: Positive = 60.0
    """Seconds without a reply until an attempt counts as failed."""
    max_retries: Annotated[int, Field(ge=0)] = 5
    """Further attempts after a failure, with growing pauses."""
    price_in: Price | None = None
    """US dollars a million prompt tokens, for the estimate (None: tokens only)."""
    price_out: Price | None = None
    """US dollars a million completion tokens."""


@checked
class NoSettings:
    """Nobody judges. It has no settings."""
