r"""How a question and its answers become text.

Three texts are in play (source: the ITI and TruthfulQA reference code):

    scoring   primer, then  Q: {question}\nA: {answer}
    training  the same, by default without the primer
    probing   Q: {question} A: {answer}   [ Q: {another question} ]
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from locaudit.errors import DataError

Style = Literal["qa", "chat"]

_NEXT = re.compile(r"(?<!\w)Q:")
"""The next question, unlike the end of a word such as ``FAQ:``."""
_CUT = re.compile(r"\n\s*Q\s*$")
"""A marker of the next question that a limit on tokens cut in two."""


@dataclass(frozen=True)
class Prompt:
    """Turns a question into the text before its answer."""

    style: Style = "qa"
    primer: str = ""
    """Instruction and example pairs; empty for none."""

    def render(self, question: str, tokenizer: Any) -> str:
        """The prompt's text; answers follow it after `joint`."""
        if self.style == "chat":
            return self._chat(question, tokenizer)
        body = f"Q: {question}\nA:"
        return f"{self.primer}\n\n{body}" if self.primer else body

    @property
    def joint(self) -> str:
        """What stands between prompt and answer: a space, or nothing behind a chat template."""
        return "" if self.style == "chat" else " "

    @property
    def adds_special_tokens(self) -> bool:
        """Whether the tokenizer adds its own special tokens; a chat template brings them itself."""
        return self.style != "chat"

    def probe(self, question: str) -> str:
        """The prompt's text where activations are read: one line, without primer or template."""
        return f"Q: {question} A:"

    def probe_ending(self, answer: str, following: str | None = None) -> str:
        """What stands behind `probe`: an answer, and another question if one follows."""
        return f" {answer}" if following is None else f" {answer} Q: {following}"

    @property
    def marker(self) -> str:
        """What begins the next question; a generated text without it is an answer that goes on."""
        return "Q:"

    def has_ended(self, text: str) -> bool:
        """Whether a generated text has reached the next question."""
        return _NEXT.search(text) is not None

    def answer(self, text: str) -> str:
        """The answer in a generated text: up to the next question, stripped."""
        return _CUT.sub("", _NEXT.split(text, maxsplit=1)[0]).strip()

    def _chat(self, question: str, tokenizer: Any) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                got="prompt style 'chat' with a tokenizer that has no chat template",
                expected="an instruct model's tokenizer",
                remedy="use prompt style 'qa'",
            )
        user = {"role": "user", "content": question}
        system = [{"role": "system", "content": self.primer}] if self.primer else []
        # Some templates raise on a system message: then the primer goes before the question.
        before = f"{self.primer}\n\n" if self.primer else ""
        attempts = [[*system, user], [{"role": "user", "content": before + question}]]
        for number, messages in enumerate(attempts):
            try:
                return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            except Exception as error:  # templates raise whatever they like
                if number == len(attempts) - 1:
                    raise DataError(
                        got=f"a chat template that fails ({type(error).__name__}: {' '.join(str(error).split())})",
                        expected="one that renders a user message",
                        remedy="use prompt style 'qa', or another tokenizer",
                    ) from error
        raise AssertionError


def load_primer(primer: str) -> str:
    """The text of a primer: ``default`` (bundled, written for this project), ``none``, or a file's content."""
    if primer == "none":
        return ""
    if primer == "default":
        return resources.files("locaudit.behaviours").joinpath("primer.txt").read_text(encoding="utf-8").strip()
    path = Path(primer)
    if not path.is_file():
        raise DataError(
            got=f"primer {primer!r}, which is not a file",
            expected="'default', 'none' or a text file",
            remedy="check prompt.primer",
        )
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise DataError(got=f"{path}, which is not UTF-8 text", expected="a text file", remedy="check it") from None
    if not text:
        raise DataError(got=f"the empty primer file {path}", expected="text", remedy="write it, or use 'none'")
    return text
