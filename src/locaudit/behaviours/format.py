r"""Prompts: how a question and its answers become text.

There are three kinds of text. In style ``qa`` (source: the ITI and TruthfulQA reference code):

    scoring   primer, then  Q: {question}\nA: {answer}
    training  the same, by default without the primer
    probing   Q: {question} A: {answer}   [ Q: {another question} ]

In style ``chat`` the tokenizer's chat template writes them (<role> stands for its markup of a message):

    scoring   <system> {primer} <user> {question} <assistant> {answer}
    training  the same, by default without the primer
    probing   <user> {question} <assistant> {answer}   [ <user> {another question} ]

Probes read activations at the last token of the probing text: the last token of the answer or of the other question.
A generated answer ends at one of the model's end tokens. In ``qa`` it also ends at the next ``Q:``, and in ``chat`` at
the special token that the template puts after an answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from os.path import commonprefix
from pathlib import Path
from typing import Any

from locaudit.behaviours.behaviour import Style
from locaudit.errors import DataError

_NEXT = re.compile(r"(?<!\w)Q:")
"""Start of the next question. ``Q:`` at the end of a word, such as ``FAQ:``, does not match."""
_CUT = re.compile(r"\n\s*Q\s*$")
"""The start of the next question at the end of a text, where the token limit cut off its colon."""
_PARAGRAPH = "\n\n"
"""A paragraph break, which ends an answer in style ``completion``."""
_END = "\ue000"
"""A private-use character that no real text contains. Appended to a message, it shows where the message ends in the
rendered template."""


@dataclass(frozen=True)
class Prompt:
    """Turns a question into the text that comes before its answer."""

    style: Style = "qa"
    primer: str = ""
    """Instruction and example questions with answers, put before the question. Empty: none."""

    def render(self, question: str, tokenizer: Any) -> str:
        """The text of the prompt. An answer follows it, after the separator `joint`."""
        before = f"{self.primer}\n\n" if self.primer else ""
        if self.style == "completion":
            return before + question
        if self.style == "qa":
            return f"{before}Q: {question}\nA:"
        if self.primer:
            try:
                return _chat(tokenizer, ("system", self.primer), ("user", question))
            except DataError:
                pass  # Some templates refuse system messages: then the primer goes before the question.
        return _chat(tokenizer, ("user", before + question))

    @property
    def joint(self) -> str:
        """Separator between prompt and answer: a space in ``qa``, nothing in ``chat``."""
        return "" if self.style == "chat" else " "

    @property
    def adds_special_tokens(self) -> bool:
        """Whether the tokenizer must add special tokens (BOS). In ``chat`` the template has written them already."""
        return self.style != "chat"

    def probe(self, question: str, endings: Sequence[tuple[str, str | None]], tokenizer: Any) -> tuple[str, list[str]]:
        """The probing texts of a question: (the beginning that they share, the rest of each text).

        Activations are read at each text's last token. `endings` holds pairs of an answer and the question that follows
        it, or None for no question. The primer is left out.
        """
        if self.style != "chat":
            ask, behind = ("Q: {} A:", " Q: ") if self.style == "qa" else ("{}", _PARAGRAPH)
            said = [f" {answer}" + ("" if then is None else behind + then) for answer, then in endings]
            return ask.format(question), said
        prompt, asked = _chat(tokenizer, ("user", question)), ("user", question)
        texts = [
            prompt + answer if then is None else _split(tokenizer, asked, ("assistant", answer), ("user", then))[0]
            for answer, then in endings
        ]
        # A template may render a past answer differently from the current one (it may drop or add a reasoning block).
        shared = commonprefix([prompt, *texts])
        return shared, [text.removeprefix(shared) for text in texts]

    @property
    def marker(self) -> str:
        """Text behind which a generated text no longer belongs to the answer. Empty in ``chat``, where none does."""
        return {"qa": "Q:", "completion": _PARAGRAPH}.get(self.style, "")

    def has_ended(self, text: str) -> bool:
        """Whether a generated text has reached the next question."""
        return _PARAGRAPH in text if self.style == "completion" else self.style == "qa" and bool(_NEXT.search(text))

    def answer(self, text: str) -> str:
        """The answer in a generated text: everything before the next question, stripped."""
        if self.style == "qa":
            text = _CUT.sub("", _NEXT.split(text, maxsplit=1)[0])
        return (text.split(_PARAGRAPH)[0] if self.style == "completion" else text).strip()

    def end_tokens(self, tokenizer: Any) -> frozenset[int]:
        """Tokens that end an answer besides the model's own end tokens.

        In ``chat``: the special token that the template puts after an answer. In ``qa``: none.
        """
        if self.style != "chat":
            return frozenset()
        behind = _split(tokenizer, ("user", "Why?"), ("assistant", "So."))[1].lstrip()
        first, known = tokenizer(behind, add_special_tokens=False)["input_ids"][:1], tokenizer.added_tokens_decoder
        return frozenset(token for token in first if token in known and known[token].special)


def _chat(tokenizer: Any, *messages: tuple[str, str]) -> str:
    """The chat template applied to messages, pairs (role, text).

    If the last message is the user's, the text ends where the model's answer begins.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            got="prompt style 'chat' with a tokenizer that has no chat template",
            expected="the tokenizer of an instruct model",
            remedy="set prompt.style to qa, or choose an instruct model",
        )
    turns = [{"role": role, "content": words} for role, words in messages]
    try:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=messages[-1][0] == "user", tokenize=False)
    except Exception as error:  # templates raise whatever they like
        raise DataError(
            got=f"a chat template that fails ({type(error).__name__}: {' '.join(str(error).split())})",
            expected=f"a template that renders {' and '.join(dict(messages))} messages",
            remedy="set prompt.style to qa, or choose another model",
        ) from error


def _split(tokenizer: Any, *messages: tuple[str, str]) -> tuple[str, str]:
    """The text of `_chat`, split at the end of the last message's own words."""
    *before, (role, words) = messages
    text, found, behind = _chat(tokenizer, *before, (role, words + _END)).partition(_END)
    if not found:
        raise DataError(
            got=f"a chat template that leaves out the last message (role {role})",
            expected="a template that renders user and assistant messages",
            remedy="set prompt.style to qa, or choose another model",
        )
    return text, behind


@cache
def truthful_primer() -> str:
    """The bundled primer: an instruction to answer truthfully and six example questions with answers.

    It was written for this project.
    """
    return resources.files("locaudit.behaviours").joinpath("primer.txt").read_text(encoding="utf-8").strip()


def load_primer(primer: str, own: str = "") -> str:
    """The text of a primer, given by name or as the path of a text file.

    ``auto`` gives `own`, the primer of the behaviour; ``none`` gives no text; ``truthful`` gives the bundled primer.
    Raises `DataError` if the file is missing, empty or not UTF-8.
    """
    if primer in ("auto", "none", "truthful"):
        return {"auto": own, "none": "", "truthful": truthful_primer()}[primer]
    path = Path(primer)
    if not path.is_file():
        raise DataError(
            got=f"primer {primer!r}, which is not a file",
            expected="'auto', 'none', 'truthful' or a text file",
            remedy="correct prompt.primer",
        )
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise DataError(
            got=f"{path}, which is not UTF-8 text", expected="a text file", remedy="save it as UTF-8"
        ) from None
    if not text:
        raise DataError(
            got=f"the empty primer file {path}",
            expected="text",
            remedy="write the primer into it, or set prompt.primer to none",
        )
    return text
