r"""How a question and its answers become text.

Three texts are in play. In style ``qa`` (source: the ITI and TruthfulQA reference code):

    scoring   primer, then  Q: {question}\nA: {answer}
    training  the same, by default without the primer
    probing   Q: {question} A: {answer}   [ Q: {another question} ]

In style ``chat`` the tokenizer's chat template writes them (<role> stands for what it puts around a message):

    scoring   <system> {primer} <user> {question} <assistant> {answer}
    training  the same, by default without the primer
    probing   <user> {question} <assistant> {answer}   [ <user> {another question} ]

Activations are read at the last token of the probing text, which ends with the words of the answer or of the other
question. A generated answer ends at an end token of the model; in ``qa`` also at the next ``Q:``, in ``chat`` also at
the special token that the template puts behind an answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from os.path import commonprefix
from pathlib import Path
from typing import Any, Literal

from locaudit.errors import DataError

Style = Literal["qa", "chat"]

_NEXT = re.compile(r"(?<!\w)Q:")
"""The next question, unlike the end of a word such as ``FAQ:``."""
_CUT = re.compile(r"\n\s*Q\s*$")
"""A marker of the next question that a limit on tokens cut in two."""
_END = "\ue000"
"""Put behind a message's words, it shows where a template's text has them; a private character, in no real text."""


@dataclass(frozen=True)
class Prompt:
    """Turns a question into the text before its answer."""

    style: Style = "qa"
    primer: str = ""
    """Instruction and example pairs; empty for none."""

    def render(self, question: str, tokenizer: Any) -> str:
        """The prompt's text; answers follow it after `joint`."""
        before = f"{self.primer}\n\n" if self.primer else ""
        if self.style == "qa":
            return f"{before}Q: {question}\nA:"
        if self.primer:
            try:
                return _chat(tokenizer, ("system", self.primer), ("user", question))
            except DataError:
                pass  # Some templates raise on a system message: then the primer goes before the question.
        return _chat(tokenizer, ("user", before + question))

    @property
    def joint(self) -> str:
        """What stands between prompt and answer: a space, or nothing behind a chat template."""
        return "" if self.style == "chat" else " "

    @property
    def adds_special_tokens(self) -> bool:
        """Whether the tokenizer adds its own special tokens; a chat template brings them itself."""
        return self.style != "chat"

    def probe(self, question: str, endings: Sequence[tuple[str, str | None]], tokenizer: Any) -> tuple[str, list[str]]:
        """The texts at whose last tokens activations are read: the beginning that they share, and how each goes on.

        `endings`: each answer, with the question that follows it or None. The primer is left out.
        """
        if self.style == "qa":
            said = [f" {answer}" + ("" if then is None else f" Q: {then}") for answer, then in endings]
            return f"Q: {question} A:", said
        prompt, asked = _chat(tokenizer, ("user", question)), ("user", question)
        texts = [
            prompt + answer if then is None else _split(tokenizer, asked, ("assistant", answer), ("user", then))[0]
            for answer, then in endings
        ]
        # A template may write a past answer otherwise than one to come (it may drop or add a block of reasoning).
        shared = commonprefix([prompt, *texts])
        return shared, [text.removeprefix(shared) for text in texts]

    @property
    def marker(self) -> str:
        """What begins the next question in a generated text; empty in a chat, where nothing written does."""
        return "" if self.style == "chat" else "Q:"

    def has_ended(self, text: str) -> bool:
        """Whether a generated text has reached the next question."""
        return self.style == "qa" and _NEXT.search(text) is not None

    def answer(self, text: str) -> str:
        """The answer in a generated text: up to the next question, stripped."""
        return text.strip() if self.style == "chat" else _CUT.sub("", _NEXT.split(text, maxsplit=1)[0]).strip()

    def end_tokens(self, tokenizer: Any) -> frozenset[int]:
        """Tokens that end an answer besides the model's own: in a chat, the special one behind an answer."""
        if self.style == "qa":
            return frozenset()
        behind = _split(tokenizer, ("user", "Why?"), ("assistant", "So."))[1].lstrip()
        first, known = tokenizer(behind, add_special_tokens=False)["input_ids"][:1], tokenizer.added_tokens_decoder
        return frozenset(token for token in first if token in known and known[token].special)


def _chat(tokenizer: Any, *messages: tuple[str, str]) -> str:
    """The text of messages (role, words) by the chat template; behind a user's it goes on to where an answer begins."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            got="prompt style 'chat' with a tokenizer that has no chat template",
            expected="an instruct model's tokenizer",
            remedy="use prompt style 'qa'",
        )
    turns = [{"role": role, "content": words} for role, words in messages]
    try:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=messages[-1][0] == "user", tokenize=False)
    except Exception as error:  # templates raise whatever they like
        raise DataError(
            got=f"a chat template that fails ({type(error).__name__}: {' '.join(str(error).split())})",
            expected=f"one that renders {' and '.join(dict(messages))} messages",
            remedy="use prompt style 'qa', or another tokenizer",
        ) from error


def _split(tokenizer: Any, *messages: tuple[str, str]) -> tuple[str, str]:
    """`_chat`'s text up to the end of the last message's words, and what follows them."""
    *before, (role, words) = messages
    text, found, behind = _chat(tokenizer, *before, (role, words + _END)).partition(_END)
    if not found:
        raise DataError(
            got=f"a chat template that leaves out the last message, of the {role}",
            expected="one that renders user and assistant messages",
            remedy="use prompt style 'qa', or another tokenizer",
        )
    return text, behind


@cache
def truthful_primer() -> str:
    """The bundled primer, written for this project: an instruction to answer truthfully, and six example pairs."""
    return resources.files("locaudit.behaviours").joinpath("primer.txt").read_text(encoding="utf-8").strip()


def load_primer(primer: str, own: str = "") -> str:
    """The text of a primer: ``auto`` (`own`, of the behaviour), ``none``, ``truthful`` (bundled), or that of a file."""
    if primer in ("auto", "none", "truthful"):
        return {"auto": own, "none": "", "truthful": truthful_primer()}[primer]
    path = Path(primer)
    if not path.is_file():
        raise DataError(
            got=f"primer {primer!r}, which is not a file",
            expected="'auto', 'none', 'truthful' or a text file",
            remedy="check prompt.primer",
        )
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise DataError(got=f"{path}, which is not UTF-8 text", expected="a text file", remedy="check it") from None
    if not text:
        raise DataError(got=f"the empty primer file {path}", expected="text", remedy="write it, or use 'none'")
    return text
