"""Settings and defaults of each kind of judge. Imports no torch."""

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
        # Not quoted, because it may be the key itself.
        got = "an api_key_env that is not a variable name"
        raise ConfigError(
            got=got,
            expected="a name such as MY_KEY",
            remedy="put the key into an environment variable and give the name of that variable",
        )
    return name


@checked
class ReferenceSettings:
    """The bundled judge, which compares an answer with the question's reference answers."""

    model: str | None = None
    """Folder of a judge fitted with tools/judge/fit.py (None: the bundled judge)."""


@checked
class CausalLMSettings:
    """A causal language model that answers yes or no, such as AllenAI's truth and info judges."""

    model: str | None = None
    """The judge: a folder, a hub id, or a folder with a PEFT adapter made by tools/judge/finetune.py."""
    prompt: str | None = None
    """Text after the answer in the prompt (None: the default of the aspect, such as ``True:``)."""


@checked
class OpenAISettings:
    """A model behind an OpenAI-compatible server."""

    model: str | None = None
    """Name under which the server knows the model."""
    prompt: str | None = None
    """For style chat: path of a text file with the rubric. For style completion: text after the answer in the prompt.
    None: the default of the aspect."""
    style: Style = "chat"
    """``chat``: a chat model with a rubric. ``completion``: a fine-tuned model with the prompt of kind causal-lm."""
    base_url: str | None = None
    """Address of the server, for example ``http://localhost:8000/v1`` (None: api.openai.com)."""
    api_key_env: Annotated[str, AfterValidator(_variable)] | None = None
    """Name of the environment variable that holds the API key. The key is never saved.
    None: ``OPENAI_API_KEY`` for api.openai.com, no key for other servers."""
    concurrency: Count = 8
    """Maximum number of requests at the same time."""
    timeout: Positive = 60.0
    """Seconds to wait for a reply before a request counts as failed."""
    max_retries: Annotated[int, Field(ge=0)] = 5
    """How often a failed request is repeated, with increasing pauses."""
    price_in: Price | None = None
    """US dollars per million prompt tokens, for the cost estimate (None: estimate tokens only)."""
    price_out: Price | None = None
    """US dollars per million completion tokens."""


@checked
class LexiconSettings:
    """Word lists and rules for ``negative``, without a model. It has no settings."""


@checked
class LikelihoodSettings:
    """How an unedited SmolLM2-135M reads the answer, for ``fluency``. It has no settings."""


@checked
class ExactSettings:
    """Words of the answer, for ``match`` and ``refusal``, without a model. It has no settings."""


@checked
class NoSettings:
    """No judge. It has no settings."""
